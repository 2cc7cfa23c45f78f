"""The contract: what made a cache's values, and what two caches must share to serve one model."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.errors import ContractMismatch

ENCODER_FACTS = (  # what two caches, or a cache and loaded encoders, must share to serve one model
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
    """moments, text or cond.NAME."""
    shape: tuple[int, ...]
    """Its shape; -1 where a side differs between records."""
    dtype: str
    """numpy's name of its type."""


@dataclass(frozen=True, kw_only=True)
class TextFacts:
    """How captions became states (L, D)."""

    storage: str = "full"
    """full: every position of the context is stored; trimmed: those up to the caption's end token, and a model attends
    to nothing else; tokens: `tokens` holds ids, and the trainer encodes them."""
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
    """Whether the tower's activation is x * sigmoid(1.702 x), as in OpenAI's CLIP: weights do not tell."""


@dataclass(frozen=True, kw_only=True)
class Contract:
    """Everything that a cache's bytes depend on besides its source. Trainers refuse a cache whose contract differs from
    what they need; a rerun of encode refuses a destination begun under another one."""

    encoders: dict[str, Any]
    """The encoders' configuration, as given."""
    vae_sha256: str
    """Hash of the autoencoder's weights (autoencoder.weights_hash); "" where `latentmill index` was not told: that
    proves nothing, and what compares contracts refuses it."""
    text_sha256: str
    """Hash of the text tower's weights, or ""."""
    pixel_range: tuple[float, float] = (-1.0, 1.0)
    """Pixel values that the autoencoder was given."""
    channel_order: str = "RGB"
    """Order of the pixels' channels."""
    resolution: int
    """Side of the encoded crop in pixels; of buckets, the side of the square whose area they keep."""
    buckets: tuple[tuple[int, int], ...]
    """(width, height) in pixels of the crops that there are: one square, or the aspect-ratio buckets."""
    crop: str
    """Place of a crop: centre or random."""
    seed: int
    """Of random crops."""
    flip: bool
    """Whether every image was stored a second time, flipped left to right."""
    filters: dict[str, Any]
    """The configuration of the filters."""
    limits: dict[str, Any]
    """The bounds on untrusted input, beyond which a sample was rejected."""
    resize: str
    """Resampling filter."""
    latent_shape: tuple[int, int, int]
    """(C, h, w) of a latent of the square crop."""
    downsampling: int
    """Pixels per latent position, along a side."""
    scale: float
    """A latent is (z - shift) * scale for a posterior sample z. Stored moments are unscaled."""
    shift: float
    """See scale."""
    stored: str = "moments"
    """moments: posterior mean and log-variance, from which the trainer samples anew at every visit."""
    caption_key: str
    """Where captions came from. Captions are never dropped in a cache."""
    text: TextFacts
    """The text states."""
    members: tuple[Member, ...]
    """Arrays of every record."""
    batch: int
    """Images per encoder batch; the last of a unit is padded to it."""
    device: str
    """Kind of device that encoded: cpu or cuda."""
    threads: int
    """CPU threads of each encoding process; 0 when a GPU encoded."""
    versions: dict[str, str]
    """Packages whose arithmetic the bytes depend on."""

    @property
    def trimmed(self) -> bool:
        """Whether text states end with their caption, and a model attends to nothing else."""
        return self.text.storage == "trimmed"

    def differences(self, other: Contract, names: tuple[str, ...] | None = None) -> list[str]:
        """One readable line per field (of `names`, or of all) whose values differ: 'name: mine, not other's'."""
        names = names or tuple(f.name for f in dataclasses.fields(self))
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in names)
        return [f"{name}: {_brief(mine)}, not {_brief(theirs)}" for name, mine, theirs in pairs if mine != theirs]


def canonical_json(value: Any) -> bytes:
    """The one JSON of a value: sorted keys, no spaces, floats by shortest round trip, no NaN, newline at the end."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def plain(value: Any) -> dict[str, Any]:
    """A dataclass as what JSON gives back: dictionaries, lists, texts and numbers."""
    return json.loads(canonical_json(dataclasses.asdict(value)))


def contract_from_json(value: dict[str, Any]) -> Contract:
    """The contract that canonical_json(asdict(...)) wrote."""
    members = tuple(_build(Member, {**m, "shape": tuple(m["shape"])}) for m in value["members"])
    nested = {"text": _build(TextFacts, value["text"]), "members": members}
    tuples = {name: tuple(value[name]) for name in ("pixel_range", "latent_shape")}
    return _build(Contract, {**value, **nested, **tuples, "buckets": tuple(map(tuple, value["buckets"]))})


def require_match(wanted: Contract, found: Contract, what: str, names: tuple[str, ...] = ENCODER_FACTS) -> None:
    """Raises ContractMismatch, which lists the differences, unless both contracts share the facts `names`.

    what: names the cache in the message, for example "data.val=cache-val".
    """
    for contract, whose in ((found, what), (wanted, "the cache that it is compared with")):
        unknown = [name for name in ("vae_sha256", "text_sha256") if name in names and not getattr(contract, name)]
        if unknown:
            raise ContractMismatch(
                f"{what} cannot be proved to fit: {whose} does not know its encoders ({', '.join(unknown)}). Index it "
                "again with encoders=NAME"
            )
    differences = found.differences(wanted, names)
    if differences:
        raise ContractMismatch(
            f"{what} was made differently: {'; '.join(differences)}. Encode it with the same encoders"
        )


def _build(cls: type[T], value: dict[str, Any]) -> T:
    """cls(**value), strict about names."""
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if set(value) != known:
        raise ValueError(f"{cls.__name__} has {sorted(set(value) ^ known)} too many or too few")
    return cls(**value)


def _brief(value: Any) -> str:
    """A value for a message; hashes are cut to 12 digits."""
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    return str(value)
