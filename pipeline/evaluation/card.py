"""A card records how figures were made, so that they can be checked, compared and reproduced."""

from __future__ import annotations

import importlib.metadata
import math
import re
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, get_args

from pipeline.config import SamplerName
from pipeline.config.tasks.figures import perceived
from pipeline.config.tasks.found import BOUNDS, present
from pipeline.config.values.bounds import Between
from pipeline.config.values.captions import FIRST, is_choice
from pipeline.errors import ParseError
from pipeline.parsing.typed import build
from pipeline.parsing.values import parse_json
from pipeline.report.parsed import FILE_BYTES, checked_figures, said

FORMAT = 1
GUIDANCE_SETTINGS = ("guidance_low", "guidance_high", "rescale")
PACKAGES = ("torch", "torchvision", "diffusers", "open_clip_torch", "timm", "numpy", "scipy", "pillow")
"""Packages whose arithmetic the figures depend on."""
LEFT_OUT = ("weights_sha256", "judge", "steering", "tiles")
"""Fields that a card.json has only where they say something."""
NAME = 100
"""Characters of a name that a judge says."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """An evaluation's figures and everything that they depend on."""

    metrics: dict[str, Any]
    """The figures, under the names of metrics.json."""
    images: Annotated[int, Between(1, 10**8)]
    """Images sampled, N."""
    n: Annotated[int, Between(0, 2**62)]
    """Number of samples that the weights have seen."""
    weights: str
    """ema, raw, or a power-function average such as ema=0.1."""
    weights_sha256: str = ""
    """Hash of the weights themselves; "" for evaluations inside training, and on cards of earlier versions."""
    sampler: str
    """Name of the sampler."""
    steps: Annotated[int, Between(1, 10**6)]
    """Denoising steps."""
    batch: Annotated[int, Between(0, 10**6)] = 0
    """Images per denoising batch. It changes figures only by rounding."""
    guidance: Annotated[float, Between(0, 1e9)]
    """Classifier-free guidance scale."""
    guidance_settings: dict[str, float] = field(default_factory=dict)
    """Other settings of guidance: guidance_low, guidance_high and rescale, where they are not 0."""
    seed: Annotated[int, Between(0, 2**64 - 1)]
    """Image i starts from the noise of (seed, i)."""
    task: str
    """The task, which conditions the model."""
    captions: dict[str, Any]
    """What was sampled for: digest of the dataset's manifest, number of its first records, and where these hold several
    captions the one that was taken, if it is not the first."""
    vae_sha256: str
    """Autoencoder that decoded the samples."""
    clip: dict[str, str]
    """Towers of the CLIP score: name, text_sha256, image_sha256; {} without one."""
    features: dict[str, str] | None
    """Feature network of FID: name, sha256, resize; None without a reference."""
    reference: dict[str, Any] | None
    """Reference statistics of FID: sha256 of the file, dataset, images, resolution, crop, resize."""
    rank_deficient: bool
    """Whether FID was computed from at most as many images as the features have channels."""
    device: str
    """Kind of device that sampled: cpu or cuda."""
    judge: dict[str, Any] = field(default_factory=dict)
    """The task's figures and how they were made: figures, truth (pixels: the records' own; reconstruction: these after
    the autoencoder), classes (even: image number modulo their number; records: those of the records), pasted,
    perceptual (the distance: st-alex, st-vgg or lpips-vgg) and perceptual_sha256 (of its weights). {} on cards of
    earlier versions."""
    steering: dict[str, Any] = field(default_factory=dict)
    """What images were given besides their conditioning, by the keys of `latentmill eval`; {} for nothing."""
    tiles: dict[str, int] = field(default_factory=dict)
    """Sides in pixels of the tiles in which pictures were denoised and decoded; {} = whole."""
    precision: dict[str, Any] | None = None
    """What was not float32: denoiser and decoder (bf16), and tf32 (true, where these two may round products to TF32);
    {} = all float32. None on cards of earlier versions: float32, but for a decoder, of which these cards say nothing,
    and for convolutions on GPUs, which were of TF32."""
    versions: dict[str, str] = field(default_factory=lambda: versions())  # noqa: PLW0108  (defined below)
    """latentmill, and the packages that the figures depend on."""
    format: int = FORMAT
    """Version of the card."""

    @property
    def caption(self) -> str:
        """Which caption of a record was sampled for, as eval.caption has it."""
        return str(self.captions.get("caption", FIRST))

    @property
    def rounded(self) -> dict[str, Any]:
        """What was not float32, as `precision`; {} on cards of earlier versions."""
        return self.precision or {}

    def line(self) -> str:
        """The figures and how they were made, in one line for a paper."""
        figures = []
        if self.features is not None and f"fid_{self.features['name']}" in self.metrics:
            name = f"fid_{self.features['name']}"
            floors = ", ".join(
                f"{word} {self._figure(key):.3g}"
                for word, key in (("reconstructions", f"{name}_floor_reconstruction"), ("real", f"{name}_floor_real"))
                if key in self.metrics
            )
            rank_text = ", rank deficient" if self.rank_deficient else ""
            figures.append(f"{name} {self._figure(name):.3g}{self._error(name)} ({floors}{rank_text})")
            for kind in ("fid_infinity", "kid", "precision", "recall", "cmmd"):
                name = f"{kind}_{self.features['name']}"
                if name in self.metrics:
                    figures.append(f"{name} {self._figure(name):.3g}{self._error(name)}")
        own = [(name, figure.digits) for name, figure in present(self.metrics)]
        for name, digits in (("inception_score", 2), *own):
            if name in self.metrics:
                bounds = ", ".join(
                    f"{ending} {bound:.{digits}f}"
                    for ending in BOUNDS
                    if (bound := self.metrics.get(f"{name}_{ending}")) is not None
                )
                bounds = f" ({bounds})" if bounds else ""
                figures.append(f"{name} {self._figure(name):.{digits}f}{self._error(name)}{bounds}")
        settings = [
            f"{self.images:,} images, seed {self.seed}",
            ", ".join(
                [f"{self.sampler}, {self.steps} steps, guidance {self.guidance:g}"]
                + [f"{name} {value:g}" for name, value in self.guidance_settings.items()]
            ),
            f"{self.weights} weights at {self.n:,} samples",
            *([", ".join(f"{name} in tiles of {side}" for name, side in self.tiles.items())] if self.tiles else []),
            *(["TF32" if name == "tf32" else f"{name} in {value}" for name, value in self.rounded.items()]),
            *([f"task {self.task}"] if self.judge else []),
            *([f"caption {self.caption}"] if self.caption != FIRST else []),
            *(f"{name} {value}" for name in ("classes", "truth") if (value := self.judge.get(name))),
            *([self._distance()] if "perceptual" in self.judge else []),
            *([said(self.steering)] if self.steering else []),
        ]
        if self.reference is not None:
            if self.features is not None:
                settings.append(
                    f"{self.features['name']} {self.features['sha256'][:12]}, {self.features['resize']} resize"
                )
            settings.append(f"reference {self.reference['sha256'][:12]} of {self.reference['images']:,} images")
        return f"{', '.join(figures)}; {'; '.join(settings)}; latentmill {self.versions['latentmill']}"

    def _distance(self) -> str:
        """The network of the perceptual distance."""
        name = str(self.judge["perceptual"])
        return f"{perceived(name).title} by {name} {str(self.judge.get('perceptual_sha256', ''))[:12]}"

    def _figure(self, name: str) -> float:
        """A figure; NaN where a stored card has none."""
        value = self.metrics[name]
        return math.nan if value is None else value

    def _error(self, name: str) -> str:
        """The 95% interval or, without one, +- the standard error or the deviation over subsets; "" for none."""
        error = self.metrics.get(f"{name}_error", self.metrics.get(f"{name}_std"))
        low, high = (self.metrics.get(f"{name}_{end}") for end in ("low", "high"))
        if low is not None and high is not None:
            return f" [{low:.3f}, {high:.3f}]"
        return "" if error is None else f" +- {error:.2g}"

    def to_json(self) -> dict[str, Any]:
        """Plain data; "line" is the one-line form."""
        facts = asdict(self) | {"line": self.line()}
        return {name: value for name, value in facts.items() if value or name not in LEFT_OUT}


def parse_card(data: bytes) -> Card:
    """The card in the bytes of a card.json. Raises ParseError for a damaged card, and for one with a field that this
    version does not know, since that might change what its figures are."""
    facts = parse_json(data, FILE_BYTES)
    if type(facts) is dict:
        facts.pop("line", None)
    card = build(Card, facts)
    kind, _, average = card.weights.partition("=")
    problems = {
        f"format={card.format}, which this version does not read": card.format != FORMAT,
        f"sampler={card.sampler[:40]}, which is none": card.sampler not in get_args(SamplerName),
        f"weights={card.weights[:40]}, which are none": card.weights not in ("ema", "raw")
        and not (kind == "ema" and re.fullmatch(r"[0-9.e+-]{1,20}", average) and _is_positive(average)),
        "captions without the digest of their dataset": type(card.captions.get("dataset")) is not str,
        "a caption that is none": not is_choice(card.caption),
        "clip without the hash of its image tower": "image_sha256" not in card.clip
        and bool(card.clip or not card.judge),
        "a judge that is none": not all(map(_is_fact, card.judge.values())),
        "steering that is none": not all(_is_setting(*item) for item in card.steering.items()),
        "features without name, hash and resize": card.features is not None
        and not {"name", "sha256", "resize"} <= card.features.keys(),
        "a reference without its hash and number of images": card.reference is not None
        and (type(card.reference.get("sha256")), type(card.reference.get("images"))) != (str, int),
        "guidance_settings that are none": not card.guidance_settings.keys() <= set(GUIDANCE_SETTINGS)
        or not all(0 <= value <= 1e9 for value in card.guidance_settings.values()),
        "tiles that are none": not card.tiles.keys() <= {"denoise", "decode"}
        or not all(0 < side < 10**6 for side in card.tiles.values()),
        "a precision that is none": not card.rounded.keys() <= {"denoiser", "decoder", "tf32"}
        or not all(value is True if name == "tf32" else value == "bf16" for name, value in card.rounded.items()),
        "versions without latentmill's": "latentmill" not in card.versions,
    }
    for problem, is_one in problems.items():
        if is_one:
            raise ParseError(f"it holds {problem}")
    return replace(card, metrics=checked_figures(card.metrics))


def _is_fact(value: Any) -> bool:
    """Whether a value is one that a judge says: yes or no, a name, or names."""
    values = value if type(value) is list else [value]
    return all(type(v) in (bool, str) for v in values) and all(len(v) <= NAME for v in values if type(v) is str)


def _is_setting(name: str, value: Any) -> bool:
    """Whether a value can be one of a key of `latentmill eval` that steers images, or the hash of what it reads."""
    if name == "strength":
        return type(value) is float and 0 < value <= 1
    if name == "keep":
        return value is True
    values = value if type(value) is list else [value]
    return _is_fact(value) or all(type(v) in (int, float) and math.isfinite(v) for v in values)


def _is_positive(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


def versions() -> dict[str, str]:
    """Versions of latentmill and of the packages that figures depend on."""
    import pipeline

    return {"latentmill": pipeline.__version__} | {name: importlib.metadata.version(name) for name in PACKAGES}
