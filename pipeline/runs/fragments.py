"""Fragments of parameters, and safetensors files of them, which are written and hashed in one pass."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.storage.base import local_errors

PIECE = 16 * 1024 * 1024
"""Bytes written and hashed at once."""


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
