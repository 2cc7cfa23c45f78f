"""The contract of a cache: how its values were made, and which facts two caches must share to serve one model."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pipeline.conditions.facts import Conditions
from pipeline.data.format.bounds import MOST_SIDE, Channels, MaybeDigest, Name, Scale, Shift, Side
from pipeline.errors import ContractMismatch
from pipeline.parsing.bounds import Real, Several, Text, Whole

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
OF_ANY_SIZE = tuple(fact for fact in ENCODER_FACTS if fact != "latent_shape")
"""Those of a cache whose pictures a model draws, which may be larger than those that it was trained on."""

WHERE_NEEDED: dict[str, Any] = {"pixels": "array", "converted": None, "clip_sha256": ""}
"""Fields of a contract that are written only where they have another value than this, so that datasets of before and
their digests are as they were."""
FILTERS_WHERE_NEEDED: dict[str, Any] = {"near_duplicates": 0, "clip_score": 0.0}
"""The same of its filters."""
TEXT_WHERE_NEEDED: dict[str, Any] = {"keys": [], "weights": []}
"""The same of the facts of a text."""
MOST_CAPTIONS = 64
"""Captions of a record."""
MISSING = object()
LONGEST_VALUE = 400
"""Characters of a list that a message shows."""
DTYPE = re.compile("float16|float32|uint8|int32")
MEMBER_NAME = re.compile(r"[a-z0-9_]{1,64}(?:\.[a-z0-9_]{1,64})?")
Place = Annotated[str, Text(re.compile("[^\0]*"), "a place without zeros")]


@dataclass(frozen=True, kw_only=True)
class Member:
    """One array of every record."""

    name: Annotated[str, Text(MEMBER_NAME, "the name of an array, such as moments or cond.boxes,")]
    """Name of the array: moments, latents, pixels, text, tokens, captions or cond.NAME."""
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
    vocabulary: Annotated[int, Whole(0, 2**31 - 1)] = field(default=0, compare=False)
    """Number of token ids, for a transformer that is trained on them; 0 = not known (format 2)."""
    start: Annotated[int, Whole(-1, 2**31 - 1)] = field(default=-1, compare=False)
    """Token id that begins a caption; -1 = not known (format 2)."""
    captions: Annotated[int, Whole(1, MOST_CAPTIONS)] = 1
    """Captions stored of each record, at most. With several, `captions` has the token ids of all, whatever is stored
    beside them (data/reading/captions.py)."""
    keys: Annotated[tuple[Name, ...], Several(0, MOST_CAPTIONS, different=True)] = ()
    """Where several captions were read, in the order in which a record holds them; () of one caption."""
    weights: Annotated[tuple[Annotated[float, Real(0, 1e9)], ...], Several(0, MOST_CAPTIONS)] = ()
    """Chances of the keys, in any unit, by which training draws one; () = equal."""

    @property
    def of_one(self) -> TextFacts:
        """What a model of these texts depends on, which does not show how many captions there are to choose from."""
        return replace(self, captions=1, keys=(), weights=())


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Where `latentmill index dest=` found the arrays of records in files of other software. The places are those that
    its keys of the same names give; "" = not read."""

    kind: Literal["tar", "mds", "npz", "safetensors"]
    """What was read: tars, MDS shards, or files of arrays."""
    moments_member: Place
    logvar_member: Place
    text_member: Place
    class_member: Place
    boxes_member: Place
    scaled: bool
    """Whether latents were scaled; their scale and shift have been taken off."""
    unit_size: Annotated[int, Whole(1, 2**31 - 1)]
    """Files of arrays of a unit."""


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
    """Hash of the text tower's weights; "" as above, or of a cache without captions."""
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
    stored: Literal["moments", "latents", "pixels"] = "moments"
    """The array that holds an image. moments (2C, h, w): posterior mean and log-variance, from which the trainer draws
    a new sample at every visit. latents (C, h, w): of an encoder without variance, before any quantisation. pixels
    (3, H, W) uint8: the crop itself, of a first stage that does nothing or is still to be trained."""
    pixels: Literal["array", "png"] = "array"
    """How stored pixels lie in a record. array: (3, H, W) uint8. png: the bytes (N,) uint8 of a PNG of 8-bit RGB."""
    caption_key: str
    """Where captions were read, of several keys the first, "" for nowhere. No captions are dropped in a cache."""
    text: TextFacts | None
    """Facts of the text states; None of a cache without captions."""
    conditions: Conditions = field(default_factory=Conditions)
    """Facts of the arrays cond.*."""
    colour: Literal["as_stored", "srgb"] = "as_stored"
    """Colour profiles (ICC) in the source's pictures. as_stored: not looked at. srgb: pictures whose profile is another
    than sRGB were converted to it."""
    clip_sha256: MaybeDigest = ""
    """Hash of the CLIP image tower's weights by which filters.clip_score told; "" without that filter."""
    columns: Annotated[tuple[str, ...], Several(0, 0)] = ()
    """Columns of the source that every record's json holds besides its own."""
    converted: Conversion | None = None
    """How the arrays were read from files of other software; None where `encode` made them, or where they lie."""
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
        return self.text is not None and self.text.storage == "trimmed"

    @property
    def padded_text(self) -> int:
        """Rows to which the text states of a record are padded; 0 where all have as many."""
        return self.text.length if self.text is not None and self.trimmed else 0

    def differences(self, other: Contract, names: tuple[str, ...] | None = None) -> list[str]:
        """One line for people per differing field (of `names`, or of all): 'name: value here, not value of other'."""
        names = names or tuple(f.name for f in dataclasses.fields(self))
        return [
            f"{place}: {_brief(own_value)}, not {_brief(other_value)}"
            for name in names
            for place, own_value, other_value in _pairs(name, getattr(self, name), getattr(other, name))
        ]


def canonical_json(value: Any) -> bytes:
    """The canonical JSON of a value: sorted keys, no spaces, floats by shortest round trip, no NaN, a final newline."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def plain(value: Any) -> dict[str, Any]:
    """A dataclass as the values that JSON would parse to: dictionaries, lists, strings and numbers. A contract is
    without those of WHERE_NEEDED and TEXT_WHERE_NEEDED that say what is so without them."""
    found = json.loads(canonical_json(dataclasses.asdict(value)))
    if isinstance(value, Contract):
        found = _needed(found, WHERE_NEEDED)
        if found["text"] is not None:
            found["text"] = _needed(found["text"], TEXT_WHERE_NEEDED)
    return found


def _needed(found: dict[str, Any], absent: dict[str, Any]) -> dict[str, Any]:
    """The values but for those that are what an absent one means."""
    return {name: item for name, item in found.items() if item != absent.get(name, MISSING)}


def stored_filters(filters: Any) -> dict[str, Any]:
    """The filters as a contract holds them."""
    return _needed(plain(filters), FILTERS_WHERE_NEEDED)


def stored_limits(limits: Any) -> dict[str, Any]:
    """The limits as a contract holds them: without `seconds`, which says more about a machine than about a dataset."""
    return {name: value for name, value in plain(limits).items() if name != "seconds"}


def require_match(required: Contract, actual: Contract, what: str, names: tuple[str, ...] = ENCODER_FACTS) -> None:
    """Raise ContractMismatch, which lists the differences, unless both contracts have equal facts `names`.

    what: names the cache of the second contract in the message, for example "data.val=cache-val".
    """
    for contract, whose in ((actual, what), (required, "the cache that it is compared with")):
        unknown_hashes = [
            name
            for name, wanted in (
                ("vae_sha256", contract.stored != "pixels"),
                ("text_sha256", contract.text is not None),
            )
            if name in names and wanted and not getattr(contract, name)
        ]
        if unknown_hashes:
            raise ContractMismatch(
                f"{what} cannot be proved to fit: {whose} does not know its encoders ({', '.join(unknown_hashes)}). "
                "Index it again with encoders=NAME"
            )
    differences = _of_one(actual).differences(_of_one(required), names)
    if differences:
        raise ContractMismatch(
            f"{what} was made differently: {'; '.join(differences)}. Encode it with the same encoders"
        )


def _of_one(contract: Contract) -> Contract:
    """A contract that does not show how many captions there are."""
    return contract if contract.text is None else replace(contract, text=contract.text.of_one)


def _pairs(place: str, one: Any, other: Any) -> Iterator[tuple[str, Any, Any]]:
    """Where two values of a contract differ, and how; of settings of encoders, and of facts of texts and conditions,
    each that differs."""
    if one == other:
        return
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other}):
            yield from _pairs(f"{place}.{key}", one.get(key, "none"), other.get(key, "none"))
        return
    alike = type(one) is type(other) and dataclasses.is_dataclass(one)
    if not alike or not place.startswith(("conditions", "text")):
        yield place, one, other
        return
    for fact in dataclasses.fields(one):
        if fact.compare:  # others may be unknown
            yield from _pairs(f"{place}.{fact.name}", getattr(one, fact.name), getattr(other, fact.name))


def _brief(value: Any) -> str:
    """A value for a message; hashes are cut to 12 digits, facts of a condition to those that have no default, and long
    names."""
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    if value is None:
        return "none"
    if dataclasses.is_dataclass(value) and not isinstance(value, TextFacts):
        facts = ((fact.name, getattr(value, fact.name), fact.default) for fact in dataclasses.fields(value))
        return " ".join(f"{name}={_brief(item)}" for name, item, default in facts if item != default) or "there"
    text = str(value)
    return text if not isinstance(value, tuple) or len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."
