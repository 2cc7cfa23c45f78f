"""Records, the cached samples: a few members each of a plain WebDataset tar, written in only one way and read strictly.

A record is stored under the key `{unit:06d}_{row:06d}` as `KEY.json` and `KEY.NAME.npy` for each array (`moments`,
`text`, `cond.boxes`, ...). Headers are ustar with owner 0, mode 0644 and time 0, so equal samples give equal bytes and
any tar reader can read them.

Tars of other software (`latentmill index`) may have other names. A layout states them, as in {"moments": "latent.npy",
"text": "clip.npy", "caption": "json:prompt"}: the file of each array and of the caption, without the key. Without a
layout the names are those above, and the caption is `txt` if there is no json. Records of a dataset without captions
need neither: their caption is "".
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from pipeline.data.format.rows import require_dense
from pipeline.errors import ParseError, ShardCorrupt
from pipeline.parsing.npy import parse_npy_header
from pipeline.parsing.tar import BLOCK, parse_header, pax_fields
from pipeline.parsing.values import parse_json

END_OF_TAR = bytes(2 * BLOCK)
# Files, and the entries that other writers put before them: extended headers, folders.
KINDS = (b"0", b"x", b"g", b"L", b"K", b"5")
META_BYTES = 64 << 20  # of a record's json
NPY_MAGIC = b"\x93NUMPY\x01\x00"
DTYPES: dict[str, np.dtype[Any]] = {
    "<f2": np.dtype("<f2"),
    "<f4": np.dtype("<f4"),
    "|u1": np.dtype("u1"),
    "<i4": np.dtype("<i4"),
}


@dataclass(frozen=True)
class Record:
    """One cached sample.

    members: `moments` float16 (2C, h, w), posterior mean then log-variance, unscaled; `text` float16 (L, D); `cond.*`.
    meta: the json: source key, caption ("" of a dataset without captions), token count, original size and crop.
    """

    key: str
    members: dict[str, np.ndarray]
    meta: dict[str, Any]


def record_key(unit: int, row: int) -> str:
    """Key of row `row` of unit `unit`. It has no dots: webdataset splits names at the first one."""
    return f"{unit:06d}_{row:06d}"


# --------------------------------------------------------------------------------------------------------------------
# Tar


def tar_member(name: str, payload: bytes) -> bytes:
    """One tar member: ustar header, payload, zeros up to a whole block. The name has at most 100 ASCII bytes."""
    encoded = name.encode("ascii")
    assert 0 < len(encoded) <= 100, f"member name {name!r} does not fit a ustar header"
    fields = b"".join(
        (
            encoded.ljust(100, b"\0"),
            b"0000644\0",  # mode
            b"0000000\0",  # owner
            b"0000000\0",  # group
            b"%011o\0" % len(payload),
            b"00000000000\0",  # modification time
            b" " * 8,  # checksum, counted as blanks
            b"0",
            b"\0" * 100,
            b"ustar\x0000",
        )
    ).ljust(BLOCK, b"\0")
    header = fields[:148] + b"%06o\0 " % sum(fields) + fields[156:]
    return header + payload + bytes(-len(payload) % BLOCK)


# --------------------------------------------------------------------------------------------------------------------
# Records


def pack(record: Record) -> list[tuple[str, bytes]]:
    """The members of a record as (name, bytes), in their order in the tar."""
    meta = json.dumps(record.meta, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    arrays = [(f"{record.key}.{name}.npy", npy_bytes(array)) for name, array in sorted(record.members.items())]
    return [(f"{record.key}.json", meta), *arrays]


def unpack(
    view: bytes | memoryview,
    members: Collection[str] | None = None,
    *,
    meta: bool = True,
    layout: Mapping[str, str] | None = None,
    captions: bool = True,
) -> Record:
    """Read one record from its tar bytes; arrays are read-only views of them, not copies.

    members: names of the arrays to read, None for all. meta: whether to parse the json. layout: names of the files if
    they are not this module's; then `meta` has only the caption. captions: whether records of this dataset have one.
    Raises ShardCorrupt when the bytes are not exactly one record of this layout, or a requested member is missing.
    """
    view = memoryview(view)
    arrays: dict[str, np.ndarray] = {}
    texts: dict[str, memoryview] = {}
    key = ""
    for stem, name, start, size in walk(view):
        key = stem
        if name in ("json", "txt"):
            texts[name] = view[start : start + size]
        elif (role := role_of(name, layout)) and (members is None or role in members):
            arrays[role] = parse_npy(view[start : start + size])
    require_members(key, arrays, members or (), layout)
    return Record(key, arrays, _meta(key, texts, layout, captions) if meta else {})


def walk(view: memoryview) -> Iterator[tuple[str, str, int, int]]:
    """(key, rest of the name, offset, size) of each file of one record. Raises ShardCorrupt for any other content."""
    key, long_name, offset = "", b"", 0
    while offset < len(view):
        header = parse_header(view[offset : offset + BLOCK])
        start, offset = offset + BLOCK, offset + BLOCK + header.size + -header.size % BLOCK
        if offset > len(view) or header.kind not in KINDS:
            raise ShardCorrupt(f"record {key or '?'} is cut short or holds something that is not a file")
        if header.kind != b"0":
            long_name = _long_name(header.kind, view[start : start + header.size], long_name)
            continue
        stem, name = split_key((long_name or header.name).decode("utf-8", "replace"))
        long_name = b""
        if key and stem != key:
            raise ShardCorrupt(f"record {key} runs into record {stem}")
        key = stem
        yield key, name, start, header.size
    if long_name:
        raise ShardCorrupt(f"record {key or '?'} ends with a name that has no member")


def role_of(name: str, layout: Mapping[str, str] | None) -> str:
    """The array that the file `name` (without the key) holds: moments, text, ...; "" for none."""
    if not (name.endswith(".npy") or name == "npy"):
        return ""
    return name[:-4] if layout is None else next((role for role, file in layout.items() if file == name), "")


def require_members(
    key: str, present: Collection[str], members: Collection[str], layout: Mapping[str, str] | None
) -> None:
    """Raise ShardCorrupt, with names of files, when one of the arrays `members` is not among those `present`."""
    if missing := sorted(set(members) - set(present)):
        files = [(layout or {}).get(name, name) for name in missing]
        raise ShardCorrupt(f"record {key} has no {', '.join(files)}")


def _meta(
    key: str, texts: Mapping[str, memoryview], layout: Mapping[str, str] | None, captions: bool
) -> dict[str, Any]:
    """A record's json, or only its caption if there is a layout or no json. Raises ShardCorrupt."""
    if not captions and (layout is not None or "json" not in texts):
        return {"caption": ""}
    source = (layout or {}).get("caption", "json" if layout is not None or "json" in texts or not texts else "txt")
    file, _, column = source.partition(":")
    if file not in texts:
        raise ShardCorrupt(f"record {key or '?'} has no {file}")
    try:
        require_dense(texts[file])
        meta = {"caption": str(texts[file], "utf-8")} if file == "txt" else parse_json(texts[file], META_BYTES)
    except (ParseError, UnicodeDecodeError) as error:
        raise ShardCorrupt(f"record {key}: {source} cannot be read ({error})") from None
    column = "caption" if layout is None else column or "caption"
    if not captions and type(meta) is dict:
        meta.setdefault("caption", "")
    if type(meta) is not dict or type(meta.get(column)) is not str:
        raise ShardCorrupt(f"record {key}: {source} cannot be read (it has no text {column[:100]!r}, the caption)")
    return meta if layout is None else {"caption": meta[column]}


def split_key(name: str) -> tuple[str, str]:
    """A member's name -> (key, rest), split as in webdataset: at the first dot after the last slash."""
    folder, slash, base = name.rpartition("/")
    stem, _, rest = base.partition(".")
    return folder + slash + stem, rest


def _long_name(kind: bytes, payload: memoryview, current_name: bytes) -> bytes:
    """The name that an entry before a file (such as an extended header) gives to that file; b"" for none."""
    if kind == b"L":
        return bytes(payload).rstrip(b"\0")
    if kind != b"x":
        return b"" if kind == b"5" else current_name
    fields = pax_fields(bytes(payload))
    if b"size" in fields:
        raise ShardCorrupt("a member's size stands in a pax header: members of 8 GB and more are no part of records")
    return fields.get(b"path", current_name)


def find_records(tar: bytes | memoryview) -> Iterable[tuple[str, int, int]]:
    """(key, offset, size) of each record of a whole cached tar. Raises ShardCorrupt unless it ends like a tar."""
    view = memoryview(tar)
    key, start, offset = "", 0, 0
    while True:
        block = view[offset : offset + BLOCK]
        if len(block) < BLOCK:
            raise ShardCorrupt(f"the tar is cut at byte {len(view)}: it has no end-of-archive blocks")
        if not any(block):
            break
        header = parse_header(block)
        stem = header.name.decode("ascii", "replace").partition(".")[0]
        if stem != key:
            if key:
                yield key, start, offset - start
            key, start = stem, offset
        offset += BLOCK + header.size + -header.size % BLOCK
    if bytes(view[offset:]) != END_OF_TAR:
        raise ShardCorrupt(f"the tar does not end at byte {offset} as its last header says")
    if key:
        yield key, start, offset - start


# --------------------------------------------------------------------------------------------------------------------
# Arrays


def npy_head(dtype: str, shape: tuple[int, ...]) -> bytes:
    """What stands before the data of a .npy file, version 1.0, C order. dtype: one of DTYPES."""
    sides = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
    header_text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({sides}), }}"
    padding = -(len(NPY_MAGIC) + 2 + len(header_text) + 1) % 64  # data begin at a multiple of 64 bytes
    header = header_text.encode() + b" " * padding + b"\n"
    return NPY_MAGIC + len(header).to_bytes(2, "little") + header


def npy_bytes(array: np.ndarray) -> bytes:
    """A .npy file, version 1.0, C order, little-endian; dtype one of DTYPES."""
    array = np.asarray(array, order="C")
    if array.dtype.str not in DTYPES:
        raise AssertionError(f"records hold {', '.join(DTYPES)}, not {array.dtype.str}")
    return npy_head(array.dtype.str, array.shape) + array.tobytes()


def parse_npy(view: memoryview) -> np.ndarray:
    """The array of a .npy file, as a read-only view of its bytes. Raises ShardCorrupt for dtypes outside DTYPES."""
    if bytes(view[:8]) != NPY_MAGIC:
        raise ShardCorrupt("an array member is not a version 1.0 .npy file")
    start = min(10 + int.from_bytes(view[8:10], "little"), len(view))
    dtype, shape = _dtype_and_shape(bytes(view[:start]))
    count = math.prod(shape)
    if len(view) != start + count * dtype.itemsize:
        raise ShardCorrupt(f"an array member of shape {shape} has {len(view) - start} bytes of data")
    array = np.frombuffer(view, dtype, count, start).reshape(shape)
    array.flags.writeable = False
    return array


@lru_cache(maxsize=256)
def _dtype_and_shape(head: bytes) -> tuple[np.dtype, tuple[int, ...]]:
    """dtype and shape of a .npy file that begins with `head`, its header. Raises ShardCorrupt."""
    try:
        header = parse_npy_header(head)
    except ParseError as error:
        raise ShardCorrupt(f"an array member cannot be read: {error}") from None
    if header.fortran or header.dtype not in DTYPES:
        raise ShardCorrupt(
            f"an array member holds {_dtype_name(header.dtype)}{' in Fortran order' if header.fortran else ''}; "
            f"read are {', '.join(dtype.name for dtype in DTYPES.values())}, little-endian and in C order"
        )
    return DTYPES[header.dtype], header.shape


def _dtype_name(code: str) -> str:
    """The name of a dtype for people: "<f8" -> "float64", ">f4" -> "big-endian float32"."""
    try:
        name = np.dtype(code).name
    except TypeError:
        return code
    return f"big-endian {name}" if code[0] == ">" else name
