"""The contract of a cache: how its values were made, and which facts two caches must share to serve one model."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pipeline.data.format.bounds import (
    MOST_ELEMENTS,
    MOST_SIDE,
    Channels,
    MaybeDigest,
    Scale,
    Several,
    Shift,
    Side,
    Text,
    Whole,
)
from pipeline.errors import ConfigError, ContractMismatch, ParseError
from pipeline.parsing.typed import build

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

DTYPE = re.compile("float16|float32|uint8|int32")
MEMBER_NAME = re.compile(r"[a-z0-9_]{1,64}(?:\.[a-z0-9_]{1,64})?")


@dataclass(frozen=True, kw_only=True)
class Member:
    """One array of every record."""

    name: Annotated[str, Text(MEMBER_NAME, "the name of an array, such as moments or cond.boxes,")]
    """Name of the array: moments, text or cond.NAME."""
    shape: Annotated[tuple[Annotated[int, Whole(-1, MOST_SIDE)], ...], Several(0, 8)]
    """Shape of the array; -1 for a side that differs between records."""
    dtype: Annotated[str, Text(DTYPE, "float16, float32, uint8 or int32")]
    """numpy's name of its dtype."""


@dataclass(frozen=True, kw_only=True)
class TextFacts:
    """How captions were encoded to text states (L, D)."""

    storage: Literal["full", "trimmed", "tokens"] = "full"
    """full: states of all positions are stored; trimmed: states up to the caption's end token, and a model attends only
    to these; tokens: `tokens` has token ids, which the trainer encodes."""
    layer: str
    """Hidden layer, followed by the tower's final norm: last or penultimate."""
    length: Side
    """Context length L in tokens, start and end included."""
    width: Side
    """Width D of a state."""
    pad: Annotated[int, Whole(-1, 2**31 - 1)]
    """Token id after the end token."""
    eot: Annotated[int, Whole(-1, 2**31 - 1)]
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
    vae_sha256: MaybeDigest
    """Hash of the autoencoder's weights (weights_hash); "" if `latentmill index` was given no encoders: then nothing
    can be proved, and comparisons of contracts fail."""
    text_sha256: MaybeDigest
    """Hash of the text tower's weights, or ""."""
    pixel_range: tuple[float, float] = (-1.0, 1.0)
    """Range of the pixel values that the autoencoder encoded."""
    channel_order: str = "RGB"
    """Order of the pixels' channels."""
    resolution: Side
    """Side of the encoded crop in pixels; with buckets, side of the square with the same area as theirs."""
    buckets: Annotated[tuple[tuple[Side, Side], ...], Several(1, 4096, different=True)]
    """(width, height) in pixels of each size of crop: one square, or the aspect-ratio buckets."""
    crop: str
    """Position of a crop: centre or random."""
    seed: Annotated[int, Whole(0, 2**64 - 1)]
    """Seed of random crops."""
    flip: bool
    """Whether every image was stored a second time, flipped left to right."""
    filters: dict[str, Any]
    """The configuration of the filters."""
    limits: dict[str, Any]
    """Limits on untrusted input; a sample beyond them was rejected."""
    resize: str
    """Resampling filter."""
    latent_shape: tuple[Channels, Side, Side]
    """(C, h, w) of a latent of the square crop."""
    downsampling: Annotated[int, Whole(1, 4096)]
    """Pixels per latent position, along a side."""
    scale: Scale
    """A latent is (z - shift) * scale for a posterior sample z. Stored moments are not scaled."""
    shift: Shift
    """See scale."""
    stored: Literal["moments"] = "moments"
    """moments: posterior mean and log-variance, from which the trainer draws a new sample at every visit."""
    caption_key: str
    """Where captions were read. No captions are dropped in a cache."""
    text: TextFacts
    """Facts of the text states."""
    members: Annotated[tuple[Member, ...], Several(1, 64)]
    """The arrays of each record."""
    batch: Annotated[int, Whole(0, 2**31 - 1)]
    """Images per encoder batch; the last batch of a unit is padded to it."""
    device: str
    """Kind of device that encoded: cpu or cuda."""
    threads: Annotated[int, Whole(0, 2**31 - 1)]
    """CPU threads of each encoding process; 0 when a GPU encoded."""
    versions: dict[str, str]
    """Versions of the packages whose arithmetic the bytes depend on."""

    @property
    def encoder_seed(self) -> int:
        """The seed of encoders with random weights; -1 = trained weights. Raises ContractMismatch."""
        seed = self.encoders.get("seed", -1)
        if type(seed) is not int or not -1 <= seed < 2**64:
            raise ContractMismatch("the cache's contract names a seed of its encoders that is no number of 64 bits")
        return seed

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


def contract_from_json(value: Any) -> Contract:
    """The contract of a parsed canonical_json(asdict(contract)). Raises ParseError, which names the field."""
    if missing := sorted(_names(Contract) - set(value if isinstance(value, dict) else ())):
        raise ParseError(f"it lacks {', '.join(missing)}, so it is no contract")
    contract = build(Contract, value)
    if missing := sorted(_names(TextFacts) - set(value["text"])):
        raise ParseError(f"text lacks {', '.join(missing)}")
    check_sizes(contract)
    return contract


def require_readable(contract: Contract) -> None:
    """Raise ConfigError for a contract that `contract_from_json` would not read again."""
    try:
        contract_from_json(plain(contract))
    except ParseError as error:
        raise ConfigError(f"these settings and arrays make no dataset that can be read again: {error}") from None


def check_sizes(contract: Contract) -> None:
    """Raise ParseError where sizes contradict each other, or one is beyond what an array of a record can have."""
    channels, height, width = contract.latent_shape
    factor, members = contract.downsampling, {member.name: member for member in contract.members}
    if not -1e6 <= contract.pixel_range[0] < contract.pixel_range[1] <= 1e6:
        raise ParseError(f"pixel_range={contract.pixel_range} is not a range")
    if len(members) != len(contract.members):
        raise ParseError("members has an array twice")
    for shape in (contract.latent_shape, *(member.shape for member in contract.members)):
        if math.prod(max(side, 1) for side in shape) > MOST_ELEMENTS:
            raise ParseError(f"it names an array of shape {shape}, more than {MOST_ELEMENTS} elements")
    if abs(math.sqrt(height * width) * factor - contract.resolution) > factor:
        raise ParseError(
            f"latent_shape={contract.latent_shape} is not that of a crop of resolution={contract.resolution} pixels "
            f"with downsampling={factor}"
        )
    places = {(h // factor, w // factor) for w, h in contract.buckets}
    sides = next(iter(places)) if len(contract.buckets) == 1 else (-1, -1)
    states = {"full": (contract.text.length, contract.text.width), "trimmed": (-1, contract.text.width)}
    wanted: dict[str, tuple[int, ...]] = {"moments": (2 * channels, *sides)}
    if contract.text.storage == "tokens":
        wanted["tokens"] = (contract.text.length,)
    else:
        wanted["text"] = states[contract.text.storage]
    for name, shape in wanted.items():
        if name not in members or members[name].shape != shape:
            found = members[name].shape if name in members else "nothing"
            raise ParseError(f"members: {name} of shape {shape} is wanted, not {found}")
        kinds = ("int32",) if name == "tokens" else ("float16", "float32")
        if members[name].dtype not in kinds:
            raise ParseError(f"members: {name} is {members[name].dtype}, not {' or '.join(kinds)}")


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


def _names(cls: type) -> set[str]:
    """Names of the fields of a dataclass."""
    return {field.name for field in dataclasses.fields(cls)}


def _brief(value: Any) -> str:
    """A value for a message; hashes are cut to 12 digits."""
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    return str(value)
