"""The card of an autoencoder's evaluation: its figures, and everything that they depend on."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

from pipeline.config.tasks.figures import FIRST_STAGE_COSTS, perceived
from pipeline.config.tasks.found import present
from pipeline.config.values.bounds import Between
from pipeline.errors import ParseError
from pipeline.evaluation.card import versions
from pipeline.parsing.typed import build
from pipeline.parsing.values import parse_json
from pipeline.report.parsed import FILE_BYTES, checked_figures
from pipeline.tracking import terminal

FORMAT = 1
KIND: Literal["autoencoder"] = "autoencoder"
GIVEN = "given"
"""Name of weights that are of no run."""
OF_THE_MACHINE = ("seconds", *(figure.name for figure in FIRST_STAGE_COSTS if figure.name.endswith("_per_s")))
"""Figures that another run of the same evaluation has otherwise."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """An evaluation's figures and what they were made from."""

    kind: Literal["autoencoder"] = KIND
    """What was evaluated; cards of diffusion models have no such field."""
    metrics: dict[str, Any]
    """The figures, under the names of metrics.json."""
    images: Annotated[int, Between(1, 10**8)]
    """Pictures reconstructed, N."""
    n: Annotated[int, Between(0, 2**62)]
    """Number of samples that the weights have seen; 0 for an autoencoder of others."""
    weights: str
    """ema, raw, a power-function average such as ema=0.1; given: an autoencoder of others."""
    autoencoder: dict[str, Any]
    """architecture (AutoencoderKL, VQModel or pixels), downsampling, channels of a latent, and codes; dtype in which it
    computed."""
    vae_sha256: str
    """Hash of its weights."""
    pictures: dict[str, Any]
    """dataset: digest of the manifest whose first records were reconstructed; records: their number; resolution: their
    side in pixels."""
    batch: Annotated[int, Between(1, 10**6)]
    """Pictures per batch. It changes figures only by rounding."""
    features: dict[str, str] | None
    """Feature network of rFID: name, sha256, resize; None without a reference."""
    reference: dict[str, Any] | None
    """Reference statistics of rFID: sha256 of the file, dataset, images, resolution, crop, resize."""
    rank_deficient: bool
    """Whether rFID was computed from at most as many images as the features have channels."""
    perceptual: dict[str, str] = field(default_factory=dict)
    """Network of the perceptual distance: name, sha256; {} without one."""
    device: str
    """Kind of device: cpu or cuda."""
    versions: dict[str, str] = field(default_factory=versions)
    """latentmill, and the packages that the figures depend on."""
    format: int = FORMAT
    """Version of the card."""

    def line(self) -> str:
        """The figures and how they were made, in one line for a paper."""
        figures = []
        if self.features is not None and (name := f"rfid_{self.features['name']}") in self.metrics:
            floor = self.metrics.get(f"{name}_floor_real")
            notes = [f"real {floor:.3g}"] if floor is not None else []
            notes += ["rank deficient"] if self.rank_deficient else []
            beside = f" ({', '.join(notes)})" if notes else ""
            figures.append(f"{name} {self._figure(name):.3g}{self._error(name)}{beside}")
        for name, figure in present(self.metrics):
            if name not in OF_THE_MACHINE:
                figures.append(f"{name} {self._figure(name):.{figure.digits}f}{self._error(name)}")
        settings = [
            f"{self.images:,} pictures of {self.pictures['dataset'][:12]} at {self.pictures['resolution']} px",
            self.described(),
        ]
        if self.weights != GIVEN:
            settings.append(f"{self.weights} weights at {self.n:,} samples")
        if self.perceptual:
            name = self.perceptual["name"]
            settings.append(f"{perceived(name).title} by {name} {self.perceptual['sha256'][:12]}")
        if self.reference is not None and self.features is not None:
            settings.append(f"{self.features['name']} {self.features['sha256'][:12]}, {self.features['resize']} resize")
            settings.append(f"reference {self.reference['sha256'][:12]} of {self.reference['images']:,} images")
        return f"{', '.join(figures)}; {'; '.join(settings)}; latentmill {self.versions['latentmill']}"

    def described(self) -> str:
        """The autoencoder in words: AutoencoderKL, f = 8, 4 channels, weights 0123456789ab."""
        facts = self.autoencoder
        codes = f", {facts['codes']:,} codes" if facts.get("codes") else ""
        return (
            f"{facts['architecture']}, f = {facts['downsampling']}, {facts['channels']} channels{codes}, weights "
            f"{self.vae_sha256[:12]}"
        )

    def _figure(self, name: str) -> float:
        """A figure; NaN where a stored card has none."""
        value = self.metrics[name]
        return math.nan if value is None else value

    def _error(self, name: str) -> str:
        """+- the standard error; "" for none."""
        error = self.metrics.get(f"{name}_error")
        return "" if error is None else f" +- {error:.2g}"

    def to_json(self) -> dict[str, Any]:
        """Plain data; "line" is the one-line form."""
        return asdict(self) | {"line": self.line()}


def is_autoencoders(data: bytes) -> bool:
    """Whether the bytes of a card.json are of an autoencoder's card. Raises ParseError for what is no JSON."""
    facts = parse_json(data, FILE_BYTES)
    return type(facts) is dict and facts.get("kind") == KIND


def parse_card(data: bytes) -> Card:
    """The card in the bytes of a card.json. Raises ParseError for a damaged card, and for one with a field that this
    version does not know."""
    facts = parse_json(data, FILE_BYTES)
    if type(facts) is dict:
        facts.pop("line", None)
    card = build(Card, facts)
    kind, _, average = card.weights.partition("=")
    texts = {"architecture": str, "downsampling": int, "channels": int}
    problems = {
        f"format={card.format}, which this version does not read": card.format != FORMAT,
        f"weights={card.weights[:40]}, which are none": card.weights not in ("ema", "raw", GIVEN)
        and not (kind == "ema" and re.fullmatch(r"[0-9][0-9.e+-]{0,19}", average)),
        "an autoencoder that is none": any(type(card.autoencoder.get(name)) is not kind for name, kind in texts.items())
        or type(card.autoencoder.get("codes", 0)) is not int,
        "pictures without the digest of their dataset": type(card.pictures.get("dataset")) is not str
        or type(card.pictures.get("resolution")) is not int,
        "features without name, hash and resize": card.features is not None
        and not {"name", "sha256", "resize"} <= card.features.keys(),
        "a reference without its hash and number of images": card.reference is not None
        and (type(card.reference.get("sha256")), type(card.reference.get("images"))) != (str, int),
        "a perceptual distance without name and hash": bool(card.perceptual)
        and not {"name", "sha256"} <= card.perceptual.keys(),
        "versions without latentmill's": "latentmill" not in card.versions,
    }
    for problem, is_one in problems.items():
        if is_one:
            raise ParseError(f"it holds {problem}")
    return replace(card, metrics=checked_figures(card.metrics))


def table(card: Card) -> str:
    """The figures for a terminal, a line each with its error and its unit."""
    rows = []
    metrics = card.metrics
    if card.features is not None and metrics.get(name := f"rfid_{card.features['name']}") is not None:
        floor = metrics.get(f"{name}_floor_real")
        rows.append(
            [name, f"{metrics[name]:.4g}", _error(metrics, name), "" if floor is None else f"real: {floor:.4g}"]
        )
    for name, figure in present(metrics):
        rows.append([name, f"{metrics[name]:.{figure.digits}f}", _error(metrics, name), figure.unit])
    if (deviation := metrics.get("latent_std")) is not None:
        unit = f"before scaling; a scale of {1 / deviation:.4g} makes it 1" if deviation else "before scaling"
        rows.append(["latent_std", f"{deviation:.4g}", _error(metrics, "latent_std"), unit])
    return terminal.table(["figure", "value", "+-", "unit"], rows, left=(0, 3))


def _error(metrics: Mapping[str, Any], name: str) -> str:
    error = metrics.get(f"{name}_error")
    return "" if error is None else f"{error:.2g}"
