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

from benchmarks.machine import figure, machine, median, table
from pipeline.config.values.members import parse_place
from pipeline.data.format.records import tar_member, walk
from pipeline.data.reading.columns import find_columns
from preprocess.adopting.arrays import Foreign, read_array

SHAPE = (8, 64, 64)
"""Of the moments of a crop of 512 pixels."""
RECORDS, ROUNDS = 256, 9
Tar = tuple[bytes, list[int], list[int]]


def main() -> int:
    """Prints microseconds a record."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    moments = [rng.standard_normal(SHAPE).astype(np.float16) for _ in range(RECORDS)]
    kinds: dict[str, tuple[str, Callable[[np.ndarray], bytes]]] = {
        ".npz, stored": ("npz:z", lambda one: npz(one, np.savez)),
        ".npz, deflated": ("npz:z", lambda one: npz(one, np.savez_compressed)),
        ".safetensors": ("safetensors:z", lambda one: save({"z": one})),
        "bfloat16 as uint16": (
            "z.npy:bfloat16",
            lambda one: npy((one.astype(np.float32).view("<u4") >> 16).astype("<u2")),
        ),
    }
    own = [("z.npy", npy(one)) for one in moments]
    base = microseconds(partial(in_place, packed(own)))
    rows = [[".npy of float16, in place", figure(base), "1"]]
    for name, (place, write) in kinds.items():
        file = place.partition(":")[0]
        spent = microseconds(partial(taken_out, packed([(file, write(one)) for one in moments]), place))
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


def taken_out(tar: Tar, place: str) -> torch.Tensor:
    """The arrays out of files of other software, checked as conversion checks them."""
    data, offsets, sizes = tar
    view, where = memoryview(data), parse_place(place)
    out = np.empty((RECORDS, *SHAPE), np.float16)
    for row, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        record = view[offset : offset + size]
        files = {name: record[start : start + length] for _, name, start, length in walk(record)}
        out[row] = read_array(Foreign(str(row), files), where, 1 << 26)
    return torch.from_numpy(out)


def microseconds(work: Callable[[], torch.Tensor]) -> float:
    """Median time of a record."""
    spent = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        spent.append((time.perf_counter() - began) / RECORDS * 1e6)
    return median(spent)


if __name__ == "__main__":
    raise SystemExit(main())
