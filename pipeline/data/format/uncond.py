"""uncond.npy: the encoded empty caption of a dataset."""

from __future__ import annotations

import hashlib

import numpy as np

from pipeline.data.format.contract import Contract
from pipeline.data.format.manifest import UNCOND, Manifest
from pipeline.data.format.objects import read_bounded
from pipeline.data.format.records import parse_npy
from pipeline.errors import NotFound, ShardCorrupt
from pipeline.parsing.npy import HEADER_BYTES
from pipeline.storage.base import Storage

STATES = ("float16", "float32")


def read_uncond(storage: Storage, manifest: Manifest) -> np.ndarray:
    """The encoded empty caption (L, D), float16 or float32, of a dataset with captions. Raises ShardCorrupt when it is
    missing, its hash is not the manifest's, or it is not finite states of the contract's shape; DatasetError,
    StorageError."""
    storage = next((one.storage for one in manifest.columns if one.has_text), storage)
    try:
        data = read_bounded(storage, UNCOND, most_uncond_bytes(manifest.contract))
    except NotFound:
        data = b""
    if hashlib.sha256(data).hexdigest() != manifest.uncond_sha256:
        raise ShardCorrupt(
            f"{storage.locate(UNCOND)} is missing or not what the manifest promises: restore it, or encode again"
        )
    try:
        return parse_uncond(data, manifest.contract)
    except ShardCorrupt as error:
        raise ShardCorrupt(f"{storage.locate(UNCOND)} {error}: restore it, or encode again") from None


def most_uncond_bytes(contract: Contract) -> int:
    """Most bytes of the file."""
    assert contract.text is not None, "no captions"
    return 4 * contract.text.length * contract.text.width + HEADER_BYTES + 12


def parse_uncond(data: bytes, contract: Contract) -> np.ndarray:
    """The states (L, D) of the file's bytes. Raises ShardCorrupt, whose message goes on after the file's name."""
    assert contract.text is not None, "no captions"
    wanted = (contract.text.length, contract.text.width)
    try:
        states = parse_npy(memoryview(data))
    except ShardCorrupt as error:
        raise ShardCorrupt(f"cannot be read ({error})") from None
    if states.shape != wanted or states.dtype.name not in STATES or not np.isfinite(states).all():
        raise ShardCorrupt(f"is {states.dtype} {states.shape}, not finite states {wanted}")
    return states
