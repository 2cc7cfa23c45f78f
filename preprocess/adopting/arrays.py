"""The arrays and captions of a record of other software, by place: of .npy, .npz and .safetensors files, and of the
columns of MDS shards. Whatever does not fit rejects the record, by a reason and in words."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from pipeline.config.values.members import INTEGERS, Place
from pipeline.errors import ParseError, RecordRejected
from pipeline.parsing.npy import parse_npy_header
from preprocess.adopting.npz import npz_entries, npz_member
from preprocess.adopting.tensors import read_tensors
from preprocess.source.sample import Sample, only_caption

PICKLES = ("pth", "pt", "pkl", "pickle", "pyd", "pyc")
NUMPY = {
    "<f2": "float16",
    "<f4": "float32",
    "<f8": "float64",
    "|u1": "uint8",
    "|i1": "int8",
    "<u2": "uint16",
    "<i2": "int16",
    "<u4": "uint32",
    "<i4": "int32",
    "<i8": "int64",
    "|V2": "bits",  # as numpy saves the bfloat16 of ml_dtypes
    "<V2": "bits",
}
"""numpy's code of a dtype -> its name."""
SIZED = re.compile(r"_\d{1,5}x\d{1,5}")
"""What an array's name may have at its end: the height and width of its latent, as sd-scripts writes them."""


@dataclass(frozen=True)
class Foreign:
    """One record as it was found. files: contents by name after the key, or by column. encodings: of the columns of an
    MDS shard; empty for files. reason, detail: why it is rejected, "" where it can be looked at."""

    key: str
    files: Mapping[str, bytes | memoryview] = field(default_factory=dict)
    encodings: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""
    detail: str = ""

    @property
    def has(self) -> str:
        """Its files, for messages."""
        return f"it has {', '.join(sorted(self.files)[:20]) or 'nothing'}"


def read_array(found: Foreign, place: Place, most: int) -> np.ndarray:
    """The array at a place, of float32 or an integer dtype; bfloat16 and float64 become float32. most: bytes that a
    file may have. Raises RecordRejected: member_missing, pickle, member_unreadable, member_mismatch."""
    if place.file not in found.files:
        pickles = [file for file in found.files if file.rpartition(".")[2].lower() in PICKLES]
        if pickles:
            raise RecordRejected("pickle", f"{pickles[0]} is a pickle, which is never opened: write arrays as .npy")
        raise RecordRejected("member_missing", f"{place.file} is not there ({found.has})")
    data = memoryview(found.files[place.file])
    try:
        if place.file in found.encodings:
            dtype, shape, content, fortran = _column(data, found.encodings[place.file], place)
        else:
            dtype, shape, content, fortran = _file(data, place, most)
        return _values(dtype, shape, content, fortran, place)
    except ParseError as error:
        raise RecordRejected("member_unreadable", f"{place.file}: {error}") from None


Found = tuple[str, tuple[int, ...], memoryview, bool]
"""dtype, shape, bytes, and whether these are in Fortran order."""


def _file(data: memoryview, place: Place, most: int) -> Found:
    """The array of a file. Raises ParseError."""
    if place.container == "npz":
        entries = npz_entries(data)
        return _npy(npz_member(data, entries[named(place.array, entries)], most))
    if place.container == "safetensors":
        tensors = read_tensors(data)
        dtype, shape, begin, end = tensors.find(named(place.array, tensors.tensors), len(data))
        return dtype, shape, data[begin:end], False
    return _npy(data)


def named(name: str, present: Mapping[str, object]) -> str:
    """The name of an array in a file of several: `name`, or `name` and the size of the latent where there is one such.
    Raises ParseError."""
    if name in present:
        return name
    sized = [other for other in present if other.startswith(name) and SIZED.fullmatch(other, len(name))]
    if len(sized) > 1:
        raise ParseError(f"it holds {name} in several sizes ({', '.join(sorted(sized)[:5])}): name one of them")
    if not sized:
        raise ParseError(f"it holds no array {name[:60]!r} (it has {', '.join(sorted(present)[:10])[:200] or 'none'})")
    return sized[0]


def _npy(data: memoryview) -> Found:
    header = parse_npy_header(data)
    if header.dtype not in NUMPY:
        raise ParseError(f"it holds {header.dtype}, which is not read: write float16 or float32, little-endian")
    return NUMPY[header.dtype], header.shape, data[header.start :], header.fortran


# --------------------------------------------------------------------------------------------------------------------
# Columns of MDS shards. Source: the documentation of mosaicml-streaming, "Dataset format" and "Supported encodings".

MDS_DTYPES = {8: "uint8", 9: "int8", 16: "uint16", 17: "int16", 18: "float16", 32: "uint32", 33: "int32"} | {
    34: "float32",
    65: "int64",
    66: "float64",
}
SCALARS = ("float16", "float32", "float64", *INTEGERS)


def _column(data: memoryview, encoding: str, place: Place) -> Found:
    """The array of a column. Raises ParseError."""
    kind, _, rest = encoding.partition(":")
    if kind == "ndarray":
        dtype, _, sides = rest.partition(":")
        return _ndarray(data, dtype, sides)
    if kind == "bytes" and place.dtype:
        width = np.dtype("<u2" if place.dtype == "bfloat16" else place.dtype).itemsize
        if len(data) % width:
            raise ParseError(f"it has {len(data)} bytes, which are no whole number of {place.dtype}")
        return place.dtype, place.shape or (len(data) // width,), data, False
    if kind == "bytes":
        if bytes(data[:6]) != b"\x93NUMPY":
            raise ParseError("it is raw bytes: say what of, as in latents_256:float16:4x32x32")
        return _npy(data)
    if kind in SCALARS or kind == "int":
        return ("int64" if kind == "int" else kind), (), data, False
    raise ParseError(f"its encoding is {encoding[:40]!r}, which is no array" + _never(kind))


def _never(kind: str) -> str:
    return "; pickles are never opened" if kind == "pkl" else ""


def _ndarray(data: memoryview, dtype: str, sides: str) -> Found:
    """An array of the encoding ndarray[:DTYPE[:SIDES]], which says itself what the encoding does not. Raises
    ParseError."""
    at = 0
    if not dtype:
        if not data or data[0] not in MDS_DTYPES:
            raise ParseError("its first byte names no dtype")
        dtype, at = MDS_DTYPES[data[0]], 1
    if sides:
        if not re.fullmatch(r"\d{1,9}(,\d{1,9}){0,31}", sides):
            raise ParseError(f"its encoding names the shape {sides[:40]!r}")
        return dtype, tuple(map(int, sides.split(","))), data[at:], False
    if len(data) <= at:
        raise ParseError("it ends before its shape")
    axes, width = data[at] >> 2, 1 << (data[at] & 3)
    start = at + 1 + axes * width
    if len(data) < start:
        raise ParseError("it ends within its shape")
    shape = tuple(int.from_bytes(data[i : i + width], "little") for i in range(at + 1, start, width))
    return dtype, shape, data[start:], False


# --------------------------------------------------------------------------------------------------------------------
# Values


def _values(dtype: str, shape: tuple[int, ...], data: memoryview, fortran: bool, place: Place) -> np.ndarray:
    """The array of these bytes, float32 or integers. Raises ParseError."""
    if place.dtype == "bfloat16" and dtype in ("uint16", "int16", "bits"):
        dtype = "bfloat16"
    if dtype == "bits" or (dtype == "uint16" and place.dtype != "uint16"):
        advised = ":".join(filter(None, (place.file, place.array, "bfloat16")))
        what = "two bytes of no dtype" if dtype == "bits" else "uint16"
        raise ParseError(f"it holds {what}: if these are the bits of bfloat16, write {advised}")
    if dtype not in (*SCALARS, "bfloat16") or (place.dtype and dtype != place.dtype):
        raise ParseError(f"it holds {dtype[:20]}, not {place.dtype or 'numbers that are read'}")
    raw, count = np.dtype("<u2" if dtype == "bfloat16" else dtype).newbyteorder("<"), math.prod(shape)
    if count == 0 or any(side < 0 for side in shape) or len(shape) > 32 or len(data) != count * raw.itemsize:
        raise ParseError(f"an array of shape {str(shape)[:80]} has {len(data)} bytes of {dtype}")
    if place.shape and math.prod(place.shape) != count:
        raise ParseError(f"it has shape {str(shape)[:80]}, not {place.shape}")
    values = np.frombuffer(data, raw, count).reshape(shape, order="F" if fortran else "C")
    values = values.reshape(place.shape) if place.shape else values
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(over="ignore"):  # infinity is rejected later, by name
        return values.astype(np.float32) if values.dtype.kind == "f" else values


def read_caption(found: Foreign, key: str, most: int) -> str:
    """The caption of a record. key: FILE of a text, or FILE:KEY of a JSON object. most: bytes it may have. Raises
    RecordRejected, by the reasons of `encode`."""
    file, colon, _ = key.partition(":")
    if file not in found.files:
        raise RecordRejected("caption_missing", f"{file} is not there ({found.has})")
    data = found.files[file]
    encoding = found.encodings.get(file, "json" if colon else "str")
    if encoding != ("json" if colon else "str"):
        raise RecordRejected("caption_not_text", f"{file} is {encoding[:40]!r}; str is wanted, or json with a key")
    kind = "json" if colon else "txt"
    where = f"json:{key[len(file) + 1 :]}" if colon else "txt"
    sample = Sample(found.key, {kind: bytes(data)})
    return only_caption(sample, where, most)
