"""How far a run is, and the proof of it: everything here is a function of n, the number of samples seen.

The ledger proves that every sample was trained on once. Each rank keeps a local file of JSON lines, one per stretch of
steps between commits; a line holds two sums modulo 2**64 over the stretch's samples, of a hash of (n, record key) and
of a hash of (n, the random draws that it got). Sums do not care which rank or stretch a sample fell in, so the totals
of two runs over the same numbers are equal exactly when they trained on the same records with the same noise, whatever
their worlds were.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.config import OptimConfig
from pipeline.storage import Storage

LEDGER = "ledger/rank{rank:05d}.jsonl"
MODULUS = 1 << 64


def learning_rate(n: int, samples: int, config: OptimConfig) -> float:
    """Of the step that begins at n of `samples` samples seen: linear warm-up, then constant or cosine to 0."""
    warm = min(1.0, (n + config.batch) / config.warmup) if config.warmup > 0 else 1.0
    if config.decay == "cosine":
        progress = (n - config.warmup) / max(samples - config.warmup, 1)
        warm *= 0.5 * (1.0 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
    return config.lr * warm


def due(n: int, every: int, batch: int) -> bool:
    """Whether a multiple of `every` lies in (n - batch, n]: what comes every so many samples comes after this step."""
    return every > 0 and n // every > (n - batch) // every


# --------------------------------------------------------------------------------------------------------------------
# Ledger


@dataclass(frozen=True)
class Stretch:
    """One line of a rank's ledger: this rank's samples with numbers in [first, last)."""

    first: int
    last: int
    rank: int
    world: int
    samples: int
    keys: int
    noise: int


class Ledger:
    """One rank's samples. folder: where the file grows; it is the run's own when that is local, else uploaded whole
    with each commit."""

    def __init__(self, run: Storage, folder: Path, rank: int, world: int) -> None:
        self._run, self._rank, self._world = run, rank, world
        self._key = LEDGER.format(rank=rank)
        local = run.local_path(self._key)
        self._path = local or folder / self._key
        self._uploads = local is None
        self._begin(0)

    def _begin(self, n: int) -> None:
        self._first, self._samples, self._keys = n, 0, 0
        self._noise: Tensor | int = 0

    def start(self, n: int) -> None:
        """Begin or resume at n samples, after truncate_ledgers."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._uploads:
            self._path.write_bytes(self._run.get(self._key) if self._run.exists(self._key) else b"")
        self._begin(n)

    def add(self, numbers: Tensor, keys: Sequence[str], noise: Tensor) -> None:
        """This rank's samples of a step. numbers (b,) int64 on the CPU; noise: of noise_digest, on any device."""
        for number, key in zip(numbers.tolist(), keys, strict=True):
            digest = hashlib.blake2b(f"{number} {key}".encode(), digest_size=8).digest()
            self._keys = (self._keys + int.from_bytes(digest, "little")) % MODULUS
        self._samples += len(keys)
        self._noise = noise + self._noise  # stays on the device until commit

    def commit(self, n: int) -> None:
        """Write the stretch that ends at n, with a commit of the state at n."""
        if n > self._first:
            noise = int(self._noise) % MODULUS
            stretch = Stretch(self._first, n, self._rank, self._world, self._samples, self._keys, noise)
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(_line(stretch))
                file.flush()
                os.fsync(file.fileno())
            self._begin(n)
        if self._uploads:
            self._run.put(self._key, self._path.read_bytes())


def noise_digest(numbers: Tensor, draws: Iterable[Tensor]) -> Tensor:
    """Scalar int64: the sum modulo 2**64, over samples, of a hash of a sample's number and the bits of its draws.

    numbers (b,) int64; draws (b, ...) of any dtype. Stays on the device.
    """
    state = numbers * _ODD[0]
    for i, draw in enumerate(draws):
        bits = draw.reshape(len(numbers), -1)
        bits = bits.view(torch.int32).long() if bits.dtype == torch.float32 else bits.long()
        place = torch.arange(1, bits.shape[1] + 1, device=bits.device) * _ODD[1] | 1
        state = _mix(state ^ ((bits * place).sum(dim=1) + i))
    return state.sum()


_ODD = (-7046029254386353131, -4417276706812531889)  # 2**64 / golden ratio and an odd companion, as signed integers


def _mix(x: Tensor) -> Tensor:
    """Every bit of x reaches every bit of the result, or nearly."""
    x = (x ^ (x >> 29)) * _ODD[1]
    x = (x ^ (x >> 32)) * _ODD[0]
    return x ^ (x >> 29)


def parse_ledger(data: bytes) -> list[Stretch]:
    """The lines of a ledger file; a last line that a killed process left unfinished is no line."""
    stretches = []
    for line in data.split(b"\n"):
        try:
            stretches.append(Stretch(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return stretches


def truncate_ledgers(run: Storage, n: int) -> None:
    """Drop what lies beyond n samples from every rank's ledger, whatever world wrote it. Rank 0 only."""
    for info in run.list("ledger/"):
        lines = parse_ledger(run.get(info.key))
        kept = [line for line in lines if line.last <= n]
        if len(kept) < len(lines):
            run.put(info.key, "".join(map(_line, kept)).encode())


def read_ledger(run: Storage) -> list[Stretch]:
    """All ranks' lines of a run, by first sample and rank."""
    stretches: list[Stretch] = []
    for info in run.list("ledger/"):
        stretches += parse_ledger(run.get(info.key))
    return sorted(stretches, key=lambda s: (s.first, s.rank))


def totals(stretches: Iterable[Stretch]) -> tuple[int, int, int]:
    """(samples, keys, noise) of some lines together; equal for equal samples with equal noise."""
    lines = list(stretches)
    keys, noise = sum(line.keys for line in lines) % MODULUS, sum(line.noise for line in lines) % MODULUS
    return sum(line.samples for line in lines), keys, noise


def _line(stretch: Stretch) -> str:
    return json.dumps(asdict(stretch)) + "\n"
