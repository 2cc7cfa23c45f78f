"""The names that this program gives to what it puts into a run directory, and who reads them back.

Others put things there too: an editor's backup, `.ipynb_checkpoints`, `._commit.json` of a Mac, a copy of a
checkpoint. Which names are ours this module alone decides, to the character; whatever has another name is left
alone everywhere: it is neither read, nor counted, nor removed.
"""

from __future__ import annotations

import re

CHECKPOINTS = "checkpoints/"
EVALUATIONS = "evals/"
LEASES = "lease/"
LEDGERS = "ledger/"
PROFILES = "profiles/"
EVENTS = "tensorboard/"
AVERAGES = "averages"
"""Folder of the snapshots of power-function averages, which has checkpoints/ of its own."""
CONFIG = "config.yaml"
FACTS = "run.json"
ROWS = "metrics.jsonl"
COMMIT = "commit.json"
METRICS = "metrics.json"
PAIRS = "pairs.png"  # of an autoencoder's evaluation
"""File in a folder of evals/: the figures."""
SNAPSHOT = "ema.safetensors"
"""File in a folder of evals/: the weights that a job outside of training is to evaluate."""
DIGITS = 15
"""Most digits of a number in a name: with more it is none of ours."""

_NUMBER = re.compile(r"[0-9]+")
_RANK_FILE = re.compile(r"rank([0-9]+)(?:-[0-9A-Za-z_]+)?\.(?:safetensors|json)")
_LEDGER = re.compile(r"rank([0-9]+)\.jsonl")
_EVALUATION = re.compile(r"([0-9]+)(-[^/]+)?")


def checkpoint_folder(n: int) -> str:
    """Folder of the checkpoint at n samples, with a slash at its end."""
    return f"{CHECKPOINTS}{n:012d}/"


def evaluation_folder(n: int, name: str = "") -> str:
    """Where an evaluation at n samples is kept in a run directory. name: tells evaluations at the same n apart; "" for
    the one that belongs to training."""
    return f"{EVALUATIONS}{n:012d}" + (f"-{name}" if name else "")


def lease_key(number: int) -> str:
    """Key of the lease with this number."""
    return f"{LEASES}{number:06d}.json"


def profile_key(first: int, last: int) -> str:
    """Key of the trace of steps `first` to `last`."""
    return f"{PROFILES}{first:09d}-{last:09d}.json.gz"


def ledger_key(rank: int) -> str:
    """Key of a rank's ledger."""
    return f"{LEDGERS}rank{rank:05d}.jsonl"


def commit_of(key: str) -> int | None:
    """n of the checkpoint whose commit.json is at this key; None for any other key."""
    n = checkpoint_of(key)
    return n if n is not None and key.endswith(f"/{COMMIT}") else None


def checkpoint_of(key: str) -> int | None:
    """n of the checkpoint that the file at this key is part of; None where it is none of a checkpoint's files."""
    folder, _, name = key.removeprefix(CHECKPOINTS).partition("/")
    if not key.startswith(CHECKPOINTS) or not (name == COMMIT or is_rank_file(name)):
        return None
    return _number(folder, 12)


def is_rank_file(name: str) -> bool:
    """Whether a file of a checkpoint that a rank wrote can have this name."""
    match = _RANK_FILE.fullmatch(name)
    return match is not None and _number(match[1], 5) is not None


def lease_of(key: str) -> int | None:
    """Number of the lease at this key, 1 or more; None for any other key."""
    if not (key.startswith(LEASES) and key.endswith(".json")):
        return None
    return _number(key.removeprefix(LEASES).removesuffix(".json"), 6) or None


def ledger_of(key: str) -> int | None:
    """The rank whose ledger is at this key; None for any other key."""
    match = _LEDGER.fullmatch(key.removeprefix(LEDGERS))
    return _number(match[1], 5) if match and key.startswith(LEDGERS) else None


def evaluation_of(key: str) -> tuple[int, str] | None:
    """(n, name) of the evaluation that the file at this key is part of, as `evaluation_folder` takes them; None for any
    other key, and for a file in a folder inside of an evaluation's."""
    folder, slash, name = key.removeprefix(EVALUATIONS).partition("/")
    match = _EVALUATION.fullmatch(folder)
    if not key.startswith(EVALUATIONS) or not slash or not name or "/" in name or match is None:
        return None
    n = _number(match[1], 12)
    return None if n is None else (n, (match[2] or "")[1:])


def _number(text: str, width: int) -> int | None:
    """The number that this program writes so, with zeros before it up to `width` digits; None for any other text."""
    if not _NUMBER.fullmatch(text) or len(text) > DIGITS:
        return None
    return number if f"{(number := int(text)):0{width}d}" == text else None
