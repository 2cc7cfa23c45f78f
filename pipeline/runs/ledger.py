"""The ledger, which proves that every sample was trained on once: a file of JSON lines for each rank, with one line per
stretch of steps between commits.

A line holds two sums modulo 2**64 over the stretch's samples: of a hash of (n, shard number, row of its tar, and the
digest of the columns that were read with it), and of a hash of (n, the random draws that the sample got). A sum does
not depend on the rank or stretch that a sample fell in, so the totals of two runs over the same numbers are equal
exactly when both trained on the same records with the same noise, whatever their worlds were. The order of the records
is arithmetic, so `latentmill ledger` computes the first sum again (proof.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from pipeline.config.values.bounds import Between
from pipeline.errors import ParseError, RunError
from pipeline.parsing.typed import build
from pipeline.parsing.values import parse_json
from pipeline.philox import GOLDEN, mix64
from pipeline.runs.names import LEDGERS, ledger_key, ledger_of
from pipeline.runs.stored import Count
from pipeline.storage.base import Storage, local_errors

MODULUS = 1 << 64
FORMAT = 2
LEDGER_BYTES = 1 << 30
"""Largest ledger: some millions of stretches."""
LINE_BYTES = 4096
"""Longest line of a ledger: eight numbers take some hundred bytes."""

Rank = Annotated[int, Between(0, 10**9)]
Sum = Annotated[int, Between(0, MODULUS - 1)]
"""A sum modulo 2**64."""


@dataclass(frozen=True)
class Stretch:
    """One line of a rank's ledger: this rank's samples with numbers in [first, last)."""

    first: Count
    last: Count
    rank: Rank
    world: Rank
    samples: Count
    records: Sum
    noise: Sum
    format: int = FORMAT


class Ledger:
    """Records one rank's samples. The file grows in a local run directory itself, or else in `folder`, from where
    `upload` copies it into the run directory. columns: digest of the columns that are read with the records; "" without
    any."""

    def __init__(self, run: Storage, folder: Path, rank: int, world: int, columns: str = "") -> None:
        self._run, self._rank, self._world, self._columns = run, rank, world, columns
        self._key = ledger_key(rank)
        local = run.local_path(self._key)
        self._path = local or folder / self._key
        self._uploads = local is None
        self._begin(0)

    def _begin(self, n: int) -> None:
        self._first, self._samples, self._records = n, 0, 0
        self._noise: Tensor | int = 0

    def start(self, n: int) -> None:
        """Begin or resume at n samples. truncate_ledgers must have run before."""
        stored = self._run.get(self._key) if self._uploads and self._run.exists(self._key) else b""
        with local_errors("write", self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._uploads:
                self._path.write_bytes(stored)
        self._begin(n)

    def add(self, numbers: Tensor, shards: Tensor, rows: Tensor, noise: Tensor) -> None:
        """Add this rank's samples of a step. numbers, shards, rows: (b,) int64 on the CPU, the record that each sample
        was. noise: from noise_digest, on any device."""
        hashes = record_hashes(numbers.numpy(), shards.numpy(), rows.numpy(), self._columns)
        self._records = (self._records + int(hashes.sum())) % MODULUS
        self._samples += len(numbers)
        self._noise = noise + self._noise  # stays on the device until commit

    def commit(self, n: int) -> None:
        """Write the stretch that ends at n. Must be called before the state at n is committed."""
        if n > self._first:
            noise = int(self._noise) % MODULUS
            stretch = Stretch(self._first, n, self._rank, self._world, self._samples, self._records, noise)
            with local_errors("write", self._path), open(self._path, "a", encoding="utf-8") as file:
                file.write(_line(stretch))
                file.flush()
                os.fsync(file.fileno())
            self._begin(n)

    def upload(self) -> None:
        """Copy the file into the run directory, if that is not local. Any thread may call it."""
        if self._uploads:
            with local_errors("read", self._path):
                data = self._path.read_bytes()
            self._run.put(self._key, data)


# --------------------------------------------------------------------------------------------------------------------
# Hashes

_GOLDEN = np.uint64(GOLDEN)
_ODD = (-7046029254386353131, -4417276706812531889)  # 2**64 / golden ratio and an odd companion, as signed integers


def record_hashes(numbers: np.ndarray, shards: np.ndarray, rows: np.ndarray, columns: str = "") -> np.ndarray:
    """(N,) int64 sample numbers, shard numbers and rows -> (N,) uint64. columns: digest of the columns that are read
    with the records, so that records with other columns are others; "" without any."""
    place = (shards.astype(np.uint64) << np.uint64(32)) + rows.astype(np.uint64)
    place = place ^ np.uint64(int(columns[:16], 16)) if columns else place
    return mix64(mix64(place + _GOLDEN) + (numbers.astype(np.uint64) + np.uint64(1)) * _GOLDEN)


def noise_digest(numbers: Tensor, draws: Iterable[Tensor]) -> Tensor:
    """Scalar int64: the sum modulo 2**64, over samples, of a hash of a sample's number and the bits of its draws.

    numbers: (b,) int64. draws: (b, ...) of any dtype. The result stays on their device.
    """
    state = numbers * _ODD[0]
    for i, draw in enumerate(draws):
        bits = draw.reshape(len(numbers), -1)
        bits = bits.view(torch.int32).long() if bits.dtype == torch.float32 else bits.long()
        place = torch.arange(1, bits.shape[1] + 1, device=bits.device) * _ODD[1] | 1
        state = _mix(state ^ ((bits * place).sum(dim=1) + i))
    return state.sum()


def _mix(x: Tensor) -> Tensor:
    """An integer hash: nearly every bit of x changes nearly every bit of the result."""
    x = (x ^ (x >> 29)) * _ODD[1]
    x = (x ^ (x >> 32)) * _ODD[0]
    return x ^ (x >> 29)


# --------------------------------------------------------------------------------------------------------------------
# Files


def parse_ledger(data: bytes, where: str = "a ledger") -> list[Stretch]:
    """The lines of a ledger file, except for a last line that a killed process left unfinished, and for damaged ones,
    whose samples prove() reports as missing. where: the file, for messages. Raises RunError for lines of another
    format."""
    return [stretch for _, stretch in _lines(data, where)]


def _lines(data: bytes, where: str) -> Iterator[tuple[bytes, Stretch]]:
    """(line without its end, what it says) of every whole line."""
    for line in data.split(b"\n"):
        try:
            fields = parse_json(line, LINE_BYTES)
            version = fields.get("format", 1) if isinstance(fields, dict) and "first" in fields else FORMAT
            if isinstance(version, int) and version != FORMAT:
                raise RunError(
                    f"{where} was written by another version of latentmill, whose sums differ from this one's: go on "
                    "with that version, or choose another run="
                )
            yield line, build(Stretch, fields, unknown="pass")
        except ParseError:
            continue


def truncate_ledgers(run: Storage, n: int) -> None:
    """Remove lines beyond n samples, unfinished and damaged lines from every rank's ledger, whatever world wrote it.
    Rank 0 only."""
    for key in _ledgers(run):
        stored = run.get(key)
        kept_lines = [line for line, stretch in _lines(stored, run.locate(key)) if stretch.last <= n]
        truncated = b"".join(line + b"\n" for line in kept_lines)
        if truncated != stored:
            run.put(key, truncated)


def read_ledger(run: Storage) -> list[Stretch]:
    """The lines of all ranks of a run, sorted by first sample and rank."""
    stretches: list[Stretch] = []
    for key in _ledgers(run):
        stretches += parse_ledger(run.get(key), run.locate(key))
    return sorted(stretches, key=lambda stretch: (stretch.first, stretch.rank))


def _ledgers(run: Storage) -> list[str]:
    """The keys of all ranks' ledgers. Raises RunError where one is larger than any can be."""
    infos = [info for info in run.list(LEDGERS) if ledger_of(info.key) is not None]
    if large := next((info for info in infos if info.size > LEDGER_BYTES), None):
        raise RunError(
            f"{run.locate(large.key)} has {large.size:,} bytes, more than a ledger can have: restore it, or choose "
            "another run="
        )
    return [info.key for info in infos]


def totals(stretches: Iterable[Stretch]) -> tuple[int, int, int]:
    """(samples, records, noise) summed over lines; equal for equal samples with equal noise."""
    lines = list(stretches)
    records, noise = sum(line.records for line in lines) % MODULUS, sum(line.noise for line in lines) % MODULUS
    return sum(line.samples for line in lines), records, noise


def _line(stretch: Stretch) -> str:
    return json.dumps(asdict(stretch)) + "\n"
