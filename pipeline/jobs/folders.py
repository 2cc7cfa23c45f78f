"""The folders of a sweep's jobs."""

from __future__ import annotations

import hashlib

LONGEST = 200
"""Longest name in bytes: file systems take 255, and what is written beside a folder has a longer name."""


def job_folder(words: str) -> str:
    """The name of a job's folder: its swept keys and values, as in optim.lr=1e-4,model=tiny. What is longer than
    LONGEST is cut, and ends with a digest of the whole, so that equal words always get the same folder."""
    parts = words.split("/")  # values may be paths
    return "/".join(part if len(part.encode()) <= LONGEST else _cut(part, words) for part in parts)


def _cut(part: str, words: str) -> str:
    digest = hashlib.sha256(words.encode()).hexdigest()[:16]
    return f"{part.encode()[: LONGEST - 20].decode(errors='ignore')}...{digest}"
