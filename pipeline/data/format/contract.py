"""The contract of a cache: how its values were made, and which facts two caches must share to serve one model."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.errors import ContractMismatch

ENCODER_FACTS = (  # facts that two caches, or a cache and loaded encoders, must share to serve one model
    "vae_sha256",
    "text_sha256",
    "pixel_range",
    "channel_order",
    "latent_shape",
    "downsampling",
    "scale",
    "shift",
    "stored",
    "text",
)


T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Member:
    """One array of every record."""

    name: str
    """Name of the array: moments, text or cond.NAME."""
    shape: tuple[int, ...]
    """Shape of the array; -1 for a side that differs between records."""
    dtype: str
    """numpy's name of its dtype."""


@dataclass(frozen=True, kw_only=True)
class TextFacts:
    """How captions were encoded to text states (L, D)."""

    storage: str = "full"
    """full: states of all positions are stored; trimmed: states up to the caption's end token, and a model attends only
    to these; tokens: `tokens` has token ids, which the trainer encodes."""
    layer: str
    """Hidden layer, followed by the tower's final norm: last or penultimate."""
    length: int
    """Context length L in tokens, start and end included."""
    width: int
    """Width D of a state."""
    pad: int
    """Token id after the end token."""
    eot: int
    """Token id that ends a caption."""
    quick_gelu: bool = False
    """Whether the tower's activation is x * sigmoid(1.702 x), as in OpenAI's CLIP; weights do not show it."""


@dataclass(frozen=True, kw_only=True)
class Contract:
    """Everything that a cache's bytes depend on besides its source.

    Trainers refuse a cache whose contract differs from the one that they need; a rerun of encode refuses a destination
    that was begun with another contract.
    """

    encoders: dict[str, Any]
    """The encoders' configuration."""
    vae_sha256: str
    """Hash of the autoencoder's weights (weights_hash); "" if `latentmill index` was given no encoders: then nothing
    can be proved, and comparisons of contracts fail."""
    text_sha256: str
    """Hash of the text tower's weights, or ""."""
    pixel_range: tuple[float, float] = (-1.0, 1.0)
    """Range of the pixel values that the autoencoder encoded."""
    channel_order: str = "RGB"
    """Order of the pixels' channels."""
    resolution: int
    """Side of the encoded crop in pixels; with buckets, side of the square with the same area as theirs."""
    buckets: tuple[tuple[int, int], ...]
    """(width, height) in pixels of each size of crop: one square, or the aspect-ratio buckets."""
    crop: str
    """Position of a crop: centre or random."""
    seed: int
    """Seed of random crops."""
    flip: bool
    """Whether every image was stored a second time, flipped left to right."""
    filters: dict[str, Any]
    """The configuration of the filters."""
    limits: dict[str, Any]
    """Limits on untrusted input; a sample beyond them was rejected."""
    resize: str
    """Resampling filter."""
    latent_shape: tuple[int, int, int]
    """(C, h, w) of a latent of the square crop."""
    downsampling: int
    """Pixels per latent position, along a side."""
    scale: float
    """A latent is (z - shift) * scale for a posterior sample z. Stored moments are not scaled."""
    shift: float
    """See scale."""
    stored: str = "moments"
    """moments: posterior mean and log-variance, from which the trainer draws a new sample at every visit."""
    caption_key: str
    """Where captions were read. No captions are dropped in a cache."""
    text: TextFacts
    """Facts of the text states."""
    members: tuple[Member, ...]
    """The arrays of each record."""
    batch: int
    """Images per encoder batch; the last batch of a unit is padded to it."""
    device: str
    """Kind of device that encoded: cpu or cuda."""
    threads: int
    """CPU threads of each encoding process; 0 when a GPU encoded."""
    versions: dict[str, str]
    """Versions of the packages whose arithmetic the bytes depend on."""

    @property
    def trimmed(self) -> bool:
        """Whether text states beyond the caption's end are missing, and a model attends only to the others."""
        return self.text.storage == "trimmed"

    def differences(self, other: Contract, names: tuple[str, ...] | None = None) -> list[str]:
        """One line for people per differing field (of `names`, or of all): 'name: value here, not value of other'."""
        names = names or tuple(f.name for f in dataclasses.fields(self))
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in names)
        return [
            f"{name}: {_brief(own_value)}, not {_brief(other_value)}"
            for name, own_value, other_value in pairs
            if own_value != other_value
        ]


def canonical_json(value: Any) -> bytes:
    """The canonical JSON of a value: sorted keys, no spaces, floats by shortest round trip, no NaN, a final newline."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def plain(value: Any) -> dict[str, Any]:
    """A dataclass as the values that JSON would parse to: dictionaries, lists, strings and numbers."""
    return json.loads(canonical_json(dataclasses.asdict(value)))


def stored_limits(limits: Any) -> dict[str, Any]:
    """The limits as a contract holds them: without `seconds`, which says more about a machine than about a dataset."""
    return {name: value for name, value in plain(limits).items() if name != "seconds"}


def contract_from_json(value: dict[str, Any]) -> Contract:
    """The contract of a parsed canonical_json(asdict(contract)). Raises ValueError, KeyError or TypeError."""
    members = tuple(_build(Member, {**m, "shape": tuple(m["shape"])}) for m in value["members"])
    nested = {"text": _build(TextFacts, value["text"]), "members": members}
    tuples = {name: tuple(value[name]) for name in ("pixel_range", "latent_shape")}
    return _build(Contract, {**value, **nested, **tuples, "buckets": tuple(map(tuple, value["buckets"]))})


def require_match(required: Contract, actual: Contract, what: str, names: tuple[str, ...] = ENCODER_FACTS) -> None:
    """Raise ContractMismatch, which lists the differences, unless both contracts have equal facts `names`.

    what: names the cache of the second contract in the message, for example "data.val=cache-val".
    """
    for contract, whose in ((actual, what), (required, "the cache that it is compared with")):
        unknown_hashes = [
            name for name in ("vae_sha256", "text_sha256") if name in names and not getattr(contract, name)
        ]
        if unknown_hashes:
            raise ContractMismatch(
                f"{what} cannot be proved to fit: {whose} does not know its encoders ({', '.join(unknown_hashes)}). "
                "Index it again with encoders=NAME"
            )
    differences = actual.differences(required, names)
    if differences:
        raise ContractMismatch(
            f"{what} was made differently: {'; '.join(differences)}. Encode it with the same encoders"
        )


def _build(cls: type[T], value: dict[str, Any]) -> T:
    """cls(**value). Raises ValueError when names of fields are missing or unknown."""
    field_names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if set(value) != field_names:
        raise ValueError(f"{cls.__name__} has missing or unknown fields {sorted(set(value) ^ field_names)}")
    return cls(**value)


def _brief(value: Any) -> str:
    """A value for a message; hashes are cut to 12 digits."""
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    return str(value)
