"""Fragments of parameters, and safetensors files of them, which are written and hashed in one pass, and whose headers
are believed only as far as they agree with the file's size."""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import ParseError
from pipeline.parsing.typed import build
from pipeline.parsing.values import parse_json
from pipeline.runs.stored import LARGEST
from pipeline.storage.base import local_errors

PIECE = 16 * 1024 * 1024
"""Bytes written and hashed at once."""
HEADER_BYTES = 1 << 26
"""Longest header: a fragment takes some hundred bytes of it."""
DIMENSIONS = 8
"""Most dimensions of a parameter."""
LABEL = re.compile(r"([^/]+)/(.+)@([0-9]{1,15})")


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Write fp32 CPU tensors as a safetensors file; returns its size and SHA-256. Raises StorageError.

    The file is written and hashed in pieces straight from the tensors' memory, and other threads can run meanwhile.
    (The library's own writer holds Python's lock all the time, and a second copy of the state in memory.)
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32 and tensor.is_contiguous(), name
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [end, end := end + 4 * tensor.numel()],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with local_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb", buffering=0) as file:
            buffers = [memoryview(struct.pack("<Q", len(text)) + text)]
            buffers += [tensor.numpy().view("u1").data for tensor in tensors.values() if tensor.numel()]
            for buffer in buffers:
                for start in range(0, len(buffer), PIECE):
                    piece = buffer[start : start + PIECE]
                    digest.update(piece)
                    while piece:
                        piece = piece[file.write(piece) :]
    return 8 + len(text) + end, digest.hexdigest()


@dataclass(frozen=True)
class Fragment:
    """Contiguous elements of one flattened parameter.

    name: of the parameter. offset: of the first element. view: (length,) fp32, a view of the memory of the values.
    """

    name: str
    offset: int
    view: Tensor


@dataclass(frozen=True)
class Span:
    """Elements [start, stop) of a flattened parameter of a kind, stored from byte `begin` of a file on."""

    kind: str
    name: str
    start: int
    stop: int
    begin: int

    @property
    def end(self) -> int:
        """The byte after the last."""
        return self.begin + 4 * (self.stop - self.start)


@dataclass(frozen=True)
class _Entry:
    """What the header of a safetensors file says of a tensor."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def header_length(head: bytes, size: int) -> int:
    """Bytes of the header after the first 8 of a safetensors file of `size` bytes, which are given. Raises
    ParseError."""
    (length,) = struct.unpack("<Q", head)
    if length > min(size - 8, HEADER_BYTES):
        raise ParseError(f"its header is said to have {length} bytes, of a file of {size}")
    return int(length)


def parse_header(header: bytes, size: int) -> list[Span]:
    """The fragments in a file that `write_safetensors` wrote, from its header and its size in bytes. Raises ParseError
    for what does not lie in the file, or lies there twice."""
    tree = parse_json(header, HEADER_BYTES)
    if not isinstance(tree, dict):
        raise ParseError("its header is no group of keys")
    tree.pop("__metadata__", None)
    first, spans = 8 + len(header), []
    for label, value in tree.items():
        match = LABEL.fullmatch(label)
        entry = build(_Entry, value)
        begin, end = entry.data_offsets
        count = (end - begin) // 4
        if match is None or entry.dtype != "F32" or len(entry.shape) > DIMENSIONS:
            raise ParseError(f"its header names {label[:100]!r} of {entry.dtype[:10]!r}, which is no fragment")
        if not 0 <= begin <= end <= size - first or (end - begin) % 4 or count != math.prod(entry.shape):
            raise ParseError(f"its header says that {label[:100]!r} lies at bytes {begin} to {end}, which cannot be")
        start = int(match[3])
        if start + count > LARGEST:
            raise ParseError(f"its header says that {label[:100]!r} has more elements than a file")
        spans.append(Span(match[1], match[2], start, start + count, first + begin))
    by_place = sorted(spans, key=lambda span: span.begin)
    for before, after in pairwise(by_place):
        if after.begin < before.end:
            raise ParseError(f"its header lets {after.kind}/{after.name} lie in {before.kind}/{before.name}")
    return spans
