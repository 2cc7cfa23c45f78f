"""Reads tensors from other software's weight files without unpickling code, and hashes weights."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.errors import WeightsError


def weights_hash(state: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of the tensors in the order of their names, as float32 (integers as int64): equal weights have equal
    hashes, whatever the format, order or precision of their file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state):
        plain = tensor.detach().cpu().to(torch.float32 if tensor.is_floating_point() else torch.int64).contiguous()
        digest.update(f"{name} {tuple(plain.shape)}\n".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


PICKLES = (".ckpt", ".pt", ".pth", ".bin")


FACTS = "latentmill"  # the key under which our single files say how the model was trained


def read_file(path: Path, suffix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A single file's tensors, and the facts that it states (our files: prediction, scale, shift, model).

    suffix: of the file's format, if its name has another one. Raises WeightsError for a damaged file, and for a pickle
    that holds more than tensors.
    """
    suffix = suffix or path.suffix
    if suffix == ".safetensors":
        return _read_safetensors(path)
    if suffix not in PICKLES:
        raise WeightsError(f"{path}: the file must be .safetensors, .ckpt or .pt")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # PyTorch's unpickler raises errors of many kinds
        refused_global = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it needs {refused_global[1]}" if refused_global else " ".join(str(error).split())[:120]
        raise WeightsError(
            f"{path} cannot be read as tensors alone ({reason}); a pickle with other content may run code: "
            "give a .safetensors file"
        ) from None
    facts = content.get(FACTS, {}) if isinstance(content, dict) else {}
    while isinstance(content, dict) and "state_dict" in content:
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a state dict")
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}, _facts(path, facts)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is missing or damaged: {error}") from None
    facts = _facts(path, metadata.get(FACTS, {}))
    if "modelspec.prediction_type" in metadata:  # Stability's specification of metadata: epsilon or v
        facts.setdefault("prediction", metadata["modelspec.prediction_type"])
    return tensors, facts


def _facts(path: Path, value: Any) -> dict[str, Any]:
    try:
        facts = json.loads(value) if isinstance(value, str) else dict(value)
        if not isinstance(facts, dict):
            raise ValueError(f"{type(facts).__name__}, not a table")
        return facts
    except (ValueError, TypeError) as error:
        raise WeightsError(f"{path}: its metadata ({FACTS}) cannot be read: {error}") from None
