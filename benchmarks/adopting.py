"""What it would cost a reading thread to take latents out of the files of other software at every visit, next to the
.npy files that tars of latents are read from in place: why `latentmill index` converts the others once.

.venv/bin/python -m benchmarks.adopting
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from safetensors.numpy import save

from benchmarks.machine import figure, machine, table
from pipeline.data.format.records import parse_npy, tar_member, walk
from pipeline.data.reading.columns import find_columns
from pipeline.parsing.npy import parse_npy_header
from preprocess.adopting.npz import npz_entries, npz_member
from preprocess.adopting.tensors import read_tensors

SHAPE = (8, 64, 64)
"""Of the moments of a crop of 512 pixels."""
RECORDS, ROUNDS = 256, 15
Tar = tuple[bytes, list[int], list[int]]


def main() -> int:
    """Prints microseconds a record."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    moments = [rng.standard_normal(SHAPE).astype(np.float16) for _ in range(RECORDS)]
    kinds: dict[str, Callable[[np.ndarray], bytes]] = {
        ".npz, stored": lambda one: npz(one, np.savez),
        ".npz, deflated": lambda one: npz(one, np.savez_compressed),
        ".safetensors": lambda one: save({"z": one}),
        "bfloat16 as uint16": lambda one: npy((one.astype(np.float32).view("<u4") >> 16).astype("<u2")),
    }
    own = [("z.npy", npy(one)) for one in moments]
    base = microseconds(partial(in_place, packed(own)))
    rows = [[".npy of float16, in place", figure(base), "1"]]
    for name, write in kinds.items():
        spent = microseconds(partial(taken_out, packed([("z", write(one)) for one in moments]), name))
        rows.append([name, figure(spent), figure(spent / base)])
    print("\n".join(["# python -m benchmarks.adopting", "", *machine(torch.device("cpu"), 1), ""]))
    print(table([f"moments {SHAPE} of a block of {RECORDS} records", "us a record", "times .npy"], rows))
    return 0


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def npz(array: np.ndarray, write: Callable[..., None]) -> bytes:
    out = io.BytesIO()
    write(out, z=array)
    return out.getvalue()


def packed(files: Sequence[tuple[str, bytes]]) -> Tar:
    """The bytes of a block of records of one file each, and their offsets and sizes."""
    members = [tar_member(f"{row:06d}.{name}", data) for row, (name, data) in enumerate(files)]
    sizes = list(map(len, members))
    return b"".join(members), np.cumsum([0, *sizes[:-1]]).tolist(), sizes


def in_place(tar: Tar) -> torch.Tensor:
    """The arrays as the stream takes them: all headers of a block at once, then a copy of each record's bytes."""
    data, offsets, sizes = tar
    raw = np.frombuffer(data, np.uint8)
    column = find_columns(raw, np.array(offsets), np.array(sizes), ("z",))["z"]
    out = np.empty((RECORDS, *SHAPE), np.float16)
    for row, start in enumerate(column.starts):
        out[row] = raw[start : start + out[row].nbytes].view(np.float16).reshape(SHAPE)
    return torch.from_numpy(out)


def taken_out(tar: Tar, kind: str) -> torch.Tensor:
    """The arrays out of files of other software, found and checked as conversion does it; float16 is then copied, and
    bfloat16 widened."""
    data, offsets, sizes = tar
    view = memoryview(data)
    out = np.empty((RECORDS, *SHAPE), np.float16)
    for row, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        record = view[offset : offset + size]
        _, _, start, length = next(walk(record))
        out[row] = READ[kind](record[start : start + length])
    return torch.from_numpy(out)


def from_npz(data: memoryview) -> np.ndarray:
    return parse_npy(npz_member(data, npz_entries(data)["z"], 1 << 26))


def from_tensors(data: memoryview) -> np.ndarray:
    _, shape, begin, end = read_tensors(data).find("z", len(data))
    return np.frombuffer(data[begin:end], np.float16).reshape(shape)


def from_bits(data: memoryview) -> np.ndarray:
    header = parse_npy_header(data)
    bits = np.frombuffer(data[header.start :], "<u2").reshape(header.shape)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


READ: dict[str, Callable[[memoryview], np.ndarray]] = {
    ".npz, stored": from_npz,
    ".npz, deflated": from_npz,
    ".safetensors": from_tensors,
    "bfloat16 as uint16": from_bits,
}


def microseconds(work: Callable[[], torch.Tensor]) -> float:
    """Time of a record in the fastest round."""
    spent = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        spent.append((time.perf_counter() - began) / RECORDS * 1e6)
    return min(spent)


if __name__ == "__main__":
    raise SystemExit(main())
