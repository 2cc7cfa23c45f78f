"""Samples of the tars of a cache, for peers that keep them in a format of their own. It imports nothing of
latentmill."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np


def samples_of(tar: str) -> Iterator[dict[str, Any]]:
    """Arrays by name, and the values of the json as "json", of one key after the other."""
    previous_key = None
    sample: dict[str, Any] = {}
    with tarfile.open(tar) as file:
        for member in file:
            key, _, name = member.name.partition(".")
            if previous_key not in (None, key):
                yield sample
                sample = {}
            previous_key, data = key, file.extractfile(member).read()  # type: ignore[union-attr]
            sample[name.removesuffix(".npy")] = np.load(io.BytesIO(data)) if name.endswith(".npy") else json.loads(data)
    yield sample
