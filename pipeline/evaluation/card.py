"""A card records how figures were made, so that they can be checked, compared and reproduced."""

from __future__ import annotations

import importlib.metadata
from dataclasses import asdict, dataclass, field
from typing import Any

FORMAT = 1
PACKAGES = ("torch", "torchvision", "diffusers", "open_clip_torch", "timm", "numpy", "scipy", "pillow")
"""Packages whose arithmetic the figures depend on."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """An evaluation's figures and everything that they depend on."""

    metrics: dict[str, Any]
    """The figures, under the names of metrics.json."""
    images: int
    """Images sampled, N."""
    n: int
    """Number of samples that the weights have seen."""
    weights: str
    """ema, raw, or a power-function average such as ema=0.1."""
    sampler: str
    """Name of the sampler."""
    steps: int
    """Denoising steps."""
    batch: int = 0
    """Images per denoising batch. It changes figures only by rounding."""
    guidance: float
    """Classifier-free guidance scale."""
    guidance_settings: dict[str, float] = field(default_factory=dict)
    """Other settings of guidance: guidance_low, guidance_high and rescale, where they are not 0."""
    seed: int
    """Image i starts from the noise of (seed, i)."""
    task: str
    """The task, which conditions the model."""
    captions: dict[str, Any]
    """Source of the captions: digest of the dataset's manifest, and number of its first records."""
    vae_sha256: str
    """Autoencoder that decoded the samples."""
    clip: dict[str, str]
    """Towers of the CLIP score: name, text_sha256, image_sha256."""
    features: dict[str, str] | None
    """Feature network of FID: name, sha256, resize; None without a reference."""
    reference: dict[str, Any] | None
    """Reference statistics of FID: sha256 of the file, dataset, images, resolution, crop, resize."""
    rank_deficient: bool
    """Whether FID was computed from at most as many images as the features have channels."""
    device: str
    """Kind of device that sampled: cpu or cuda."""
    versions: dict[str, str] = field(default_factory=lambda: versions())  # noqa: PLW0108  (defined below)
    """latentmill, and the packages that the figures depend on."""
    format: int = FORMAT
    """Version of the card."""

    def line(self) -> str:
        """The figures and how they were made, in one line for a paper."""
        figures = []
        if self.features is not None:
            name = f"fid_{self.features['name']}"
            floors = ", ".join(
                f"{word} {self.metrics[key]:.3g}"
                for word, key in (("reconstructions", f"{name}_floor_reconstruction"), ("real", f"{name}_floor_real"))
                if key in self.metrics
            )
            rank_text = ", rank deficient" if self.rank_deficient else ""
            figures.append(f"{name} {self.metrics[name]:.3g}{self._error(name)} ({floors}{rank_text})")
            for kind in ("fid_infinity", "kid", "precision", "recall", "cmmd"):
                name = f"{kind}_{self.features['name']}"
                if name in self.metrics:
                    figures.append(f"{name} {self.metrics[name]:.3g}{self._error(name)}")
        for name, digits in (("inception_score", 2), ("clip_score", 2), ("attribute_accuracy", 3)):
            if name in self.metrics:
                real = self.metrics.get(f"{name}_real")
                real_text = f" (real {real:.{digits}f})" if real is not None else ""
                figures.append(f"{name} {self.metrics[name]:.{digits}f}{self._error(name)}{real_text}")
        settings = [
            f"{self.images:,} images, seed {self.seed}",
            ", ".join(
                [f"{self.sampler}, {self.steps} steps, guidance {self.guidance:g}"]
                + [f"{name} {value:g}" for name, value in self.guidance_settings.items()]
            ),
            f"{self.weights} weights at {self.n:,} samples",
        ]
        if self.reference is not None:
            if self.features is not None:
                settings.append(
                    f"{self.features['name']} {self.features['sha256'][:12]}, {self.features['resize']} resize"
                )
            settings.append(f"reference {self.reference['sha256'][:12]} of {self.reference['images']:,} images")
        return f"{', '.join(figures)}; {'; '.join(settings)}; latentmill {self.versions['latentmill']}"

    def _error(self, name: str) -> str:
        """The 95% interval or, without one, +- the standard error or the deviation over subsets; "" for none."""
        error = self.metrics.get(f"{name}_error", self.metrics.get(f"{name}_std"))
        low, high = (self.metrics.get(f"{name}_{end}") for end in ("low", "high"))
        if low is not None and high is not None:
            return f" [{low:.3f}, {high:.3f}]"
        return "" if error is None else f" +- {error:.2g}"

    def to_json(self) -> dict[str, Any]:
        """Plain data; "line" is the one-line form."""
        return asdict(self) | {"line": self.line()}


def versions() -> dict[str, str]:
    """Versions of latentmill and of the packages that figures depend on."""
    import pipeline

    return {"latentmill": pipeline.__version__} | {name: importlib.metadata.version(name) for name in PACKAGES}
