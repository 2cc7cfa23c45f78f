"""A card says how figures were made, so that they can be believed, compared and made again."""

from __future__ import annotations

import importlib.metadata
from dataclasses import asdict, dataclass, field
from typing import Any

FORMAT = 1
PACKAGES = ("torch", "torchvision", "diffusers", "open_clip_torch", "timm", "numpy", "scipy", "pillow")
"""Packages whose arithmetic the figures depend on."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """Everything that an evaluation's figures depend on, and the figures."""

    metrics: dict[str, Any]
    """The figures, by the names of metrics.json."""
    images: int
    """Images sampled, N."""
    n: int
    """Samples seen by the weights."""
    weights: str
    """ema, raw, or the average that was asked for: ema=0.1."""
    sampler: str
    """Sampler."""
    steps: int
    """Denoising steps."""
    batch: int = 0
    """Images per denoising batch; changes figures by rounding alone."""
    guidance: float
    """Classifier-free guidance scale."""
    guidance_settings: dict[str, float] = field(default_factory=dict)
    """What else was said of guidance: guidance_low, guidance_high, rescale, where they are not 0."""
    seed: int
    """Image i starts from the noise of (seed, i)."""
    task: str
    """What conditions the model."""
    captions: dict[str, Any]
    """Where the captions are from: digest of the dataset's manifest, and how many of its first records."""
    vae_sha256: str
    """Autoencoder that decoded the samples."""
    clip: dict[str, str]
    """Towers of the CLIP score: name, text_sha256, image_sha256."""
    features: dict[str, str] | None
    """Feature network of FID: name, sha256, resize; None without a reference."""
    reference: dict[str, Any] | None
    """Reference statistics of FID: sha256 of the file, dataset, images, resolution, crop, resize."""
    rank_deficient: bool
    """Whether FID is from no more images than the features are wide."""
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
            deficient = ", rank deficient" if self.rank_deficient else ""
            figures.append(f"{name} {self.metrics[name]:.3g}{self._error(name)} ({floors}{deficient})")
            for kind in ("fid_infinity", "kid", "precision", "recall", "cmmd"):
                name = f"{kind}_{self.features['name']}"
                if name in self.metrics:
                    figures.append(f"{name} {self.metrics[name]:.3g}{self._error(name)}")
        for name, digits in (("inception_score", 2), ("clip_score", 2), ("attribute_accuracy", 3)):
            if name in self.metrics:
                real = self.metrics.get(f"{name}_real")
                beside = f" (real {real:.{digits}f})" if real is not None else ""
                figures.append(f"{name} {self.metrics[name]:.{digits}f}{self._error(name)}{beside}")
        how = [
            f"{self.images:,} images, seed {self.seed}",
            ", ".join(
                [f"{self.sampler}, {self.steps} steps, guidance {self.guidance:g}"]
                + [f"{name} {value:g}" for name, value in self.guidance_settings.items()]
            ),
            f"{self.weights} weights at {self.n:,} samples",
        ]
        if self.reference is not None:
            if self.features is not None:
                how.append(f"{self.features['name']} {self.features['sha256'][:12]}, {self.features['resize']} resize")
            how.append(f"reference {self.reference['sha256'][:12]} of {self.reference['images']:,} images")
        return f"{', '.join(figures)}; {'; '.join(how)}; latentmill {self.versions['latentmill']}"

    def _error(self, name: str) -> str:
        """+- the standard error, or else the deviation over subsets; or the 95% interval."""
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
