"""Which arrays a record holds, and of which shape, by the contract and the size of the record's crop."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from pipeline.data.format.contract import Contract, Member, TextFacts
from pipeline.errors import ShardCorrupt

SHORTEST = 2
"""Tokens of the empty caption: start and end."""
NO_CAPTION = -1
"""Fills the rows of `captions` that hold none."""
VARIES = -1
"""Stands for a side that differs between records."""
ARRAYS = (
    *("moments", "latents", "pixels", "text", "tokens", "captions", "cond.boxes", "cond.class", "cond.labels"),
    *("cond.lowres", "cond.mask", "cond.masked"),
)
"""Names of the arrays that facts describe."""
FOREIGN_FLOAT = ("moments", "latents", "text")
"""Those that may be float32 as well, as other software stores them."""
OF_CAPTIONS = ("text", "tokens")
"""Arrays that readers are given of one caption; where records hold several, these are parts of what is stored."""
Array = tuple[str, tuple[int, ...], str]
"""Name, shape and dtype."""


def arrays_of(contract: Contract) -> tuple[Member, ...]:
    """The arrays that the contract's facts call for: the image's, the text's, then those of the conditions in the order
    of their names. With several crop sizes, sides that depend on the size are VARIES."""
    channels, factor = contract.latent_shape[0], contract.downsampling
    width, height = contract.buckets[0] if len(contract.buckets) == 1 else (VARIES, VARIES)

    def sides(pixels: int, cells: int = 1) -> tuple[int, int]:
        """Height and width in units of `pixels` / `cells` pixels."""
        return (height, width) if width == VARIES else (height // pixels * cells, width // pixels * cells)

    def member(name: str, shape: tuple[int, ...], dtype: str, variants: int = 1) -> Member:
        return Member(name=name, shape=(variants, *shape) if variants > 1 else shape, dtype=dtype)

    images = {
        "moments": ("moments", (2 * channels, *sides(factor)), "float16"),
        "latents": ("latents", (channels, *sides(factor)), "float16"),
        "pixels": ("pixels", (VARIES,) if contract.pixels == "png" else (3, *sides(1)), "uint8"),
    }
    arrays = [member(*images[contract.stored])]
    arrays += _texts(contract)
    conditions = contract.conditions
    if conditions.boxes is not None:
        arrays.append(member("cond.boxes", (conditions.boxes.most, 5), "float16"))
    if conditions.classes is not None:
        arrays.append(member("cond.class", (), "int32"))
    if conditions.labels is not None:
        arrays.append(member("cond.labels", sides(factor, conditions.labels.grid), "uint8"))
    if conditions.lowres is not None:
        lowres = conditions.lowres
        arrays.append(member("cond.lowres", (3, *sides(lowres.factor)), "uint8", lowres.variants))
    if conditions.mask is not None:
        mask = conditions.mask
        rows, columns = sides(1)
        columns = -(-columns // 8) if mask.packed and columns != VARIES else columns
        arrays.append(member("cond.mask", (rows, columns), "uint8", mask.variants))
        arrays.append(member("cond.masked", (channels, *sides(factor)), "float16", mask.variants))
    if conditions.pixels and contract.stored != "pixels":
        arrays.append(member("pixels", (3, *sides(1)), "uint8"))
    return tuple(arrays)


def text_member(text: TextFacts) -> Member:
    """The array that holds a caption of these facts: text states, or token ids."""
    return {
        "full": Member(name="text", shape=(text.length, text.width), dtype="float16"),
        "trimmed": Member(name="text", shape=(VARIES, text.width), dtype="float16"),
        "tokens": Member(name="tokens", shape=(text.length,), dtype="int32"),
    }[text.storage]


def _texts(contract: Contract) -> list[Member]:
    """What a record holds of its captions."""
    text = contract.text
    if text is None:
        return []
    one = text_member(text)
    if text.captions == 1:
        return [one]
    several = {"full": [replace(one, shape=(text.captions, *one.shape))], "trimmed": [one], "tokens": []}
    return [*several[text.storage], Member(name="captions", shape=(text.captions, 1 + text.length), dtype="int32")]


def has_several(text: TextFacts | None) -> bool:
    """Whether records hold several captions."""
    return text is not None and text.captions > 1


def held(names: Iterable[str], text: TextFacts | None) -> tuple[str, ...]:
    """The arrays of a record that hold what readers are given as `names`."""
    if not has_several(text):
        return tuple(names)
    parts = {"tokens": ("captions",), "text": ("captions", "text")}
    return tuple(dict.fromkeys(part for name in names for part in parts.get(name, (name,))))


def dtypes_of(contract: Contract) -> dict[str, str]:
    """numpy's name of the dtype of each array that readers may be given, by its name."""
    dtypes = {member.name: member.dtype for member in contract.members}
    return dtypes | ({"tokens": dtypes["captions"]} if has_several(contract.text) else {})


def most_png_bytes(size: tuple[int, int]) -> int:
    """More bytes than a PNG of `size` (width, height) has that does not shrink its pixels."""
    raw = size[1] * (1 + 3 * size[0])
    return raw + raw // 8 + 4096


def member_shape(
    member: Member, contract: Contract, size: tuple[int, int], found: tuple[int, ...] | None
) -> tuple[int, ...]:
    """The shape of `member` in a record whose crop is `size` (width, height) in pixels.

    found: the stored shape, if there is one. A trimmed text may have any length that the context of its captions
    allows, and a PNG any length that its pixels can take; where `found` has such a length, it is the length that is
    returned.
    """
    if VARIES not in member.shape:
        return member.shape
    if member.name == "text":
        assert contract.text is not None, "a text without its facts"
        tokens, length = found[0] if found else 0, contract.text.length * contract.text.captions
        return (tokens if SHORTEST <= tokens <= length else length, *member.shape[1:])
    width, height = size
    if member.name == "pixels" and len(member.shape) == 1:
        bytes_ = found[0] if found and len(found) == 1 else 0
        return (min(bytes_, most_png_bytes(size)),)
    conditions, factor = contract.conditions, contract.downsampling
    if member.name == "cond.labels" and conditions.labels is not None:
        cells = conditions.labels.grid
        sides = (height // factor * cells, width // factor * cells)
    elif member.name == "cond.lowres" and conditions.lowres is not None:
        sides = (height // conditions.lowres.factor, width // conditions.lowres.factor)
    elif member.name == "cond.mask" and conditions.mask is not None and conditions.mask.packed:
        sides = (height, -(-width // 8))
    elif member.name in ("moments", "latents", "cond.masked"):
        sides = (height // factor, width // factor)
    else:
        sides = (height, width)
    return (*member.shape[:-2], *sides)


def require_array(name: str, dtype: str, shape: tuple[int, ...], contract: Contract, size: tuple[int, int]) -> None:
    """Raise ShardCorrupt unless an array `name` of this dtype and shape is one of the contract's, in a record whose
    crop is `size`."""
    member = next((member for member in contract.members if member.name == name), None)
    if member is None:
        raise ShardCorrupt(f"{name} is an array that the contract does not name")
    wanted = member_shape(member, contract, size, shape)
    if (dtype, shape) != (member.dtype, wanted):
        raise ShardCorrupt(f"{name} is {dtype} {shape}, not {member.dtype} {wanted}")
