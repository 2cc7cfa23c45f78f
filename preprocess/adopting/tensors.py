"""Reads the header of .safetensors files of other software: eight bytes of its length, JSON, then the tensors.

Source: the format's description in the safetensors repository (README, section "Format").
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import ParseError
from pipeline.parsing.typed import build
from pipeline.parsing.values import parse_json

HEADER_BYTES = 1 << 20
DTYPES = {
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "BF16": "bfloat16",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "I64": "int64",
}


@dataclass(frozen=True)
class Tensor:
    """What the header says of a tensor. data_offsets: [begin, end) in bytes, from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


@dataclass(frozen=True)
class Tensors:
    """The tensors of a file by name. start: offset of their data in bytes."""

    tensors: dict[str, object]
    start: int

    def find(self, name: str, size: int) -> tuple[str, tuple[int, ...], int, int]:
        """(dtype, shape, begin, end) of a tensor in a file of `size` bytes, which is there. Raises ParseError."""
        tensor = build(Tensor, self.tensors[name])
        begin, end = (self.start + offset for offset in tensor.data_offsets)
        if tensor.dtype not in DTYPES:
            raise ParseError(f"{name[:60]!r} holds {tensor.dtype[:20]}, which is not read")
        if not self.start <= begin <= end <= size:
            raise ParseError(f"{name[:60]!r} lies outside of the file")
        return DTYPES[tensor.dtype], tensor.shape, begin, end


def read_tensors(data: memoryview) -> Tensors:
    """The header of a file. Raises ParseError."""
    length = int.from_bytes(data[:8], "little") if len(data) >= 8 else HEADER_BYTES + 1
    if length > min(HEADER_BYTES, len(data) - 8):
        raise ParseError("it is cut, or not a .safetensors file")
    value = parse_json(bytes(data[8 : 8 + length]), HEADER_BYTES)
    if type(value) is not dict:
        raise ParseError("its header is not that of a .safetensors file")
    return Tensors({name: item for name, item in value.items() if name != "__metadata__"}, 8 + length)
