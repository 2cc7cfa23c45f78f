"""Reads tensors from other software's weight files without unpickling code, writes safetensors, and hashes weights."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.errors import ParseError, WeightsError
from pipeline.parsing.text import one_line
from pipeline.parsing.values import parse_json
from pipeline.storage.staging import obey_umask, writing


def weights_hash(state: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of the tensors in the order of their names, as float32 (integers as int64): equal weights have equal
    hashes, whatever the format, order or precision of their file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state):
        plain = tensor.detach().cpu().to(torch.float32 if tensor.is_floating_point() else torch.int64).contiguous()
        digest.update(f"{name} {tuple(plain.shape)}\n".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of weights by name, of their bits as they are, whichever files or ranks they came from."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


PICKLES = (".ckpt", ".pt", ".pth", ".bin")
FACTS = "latentmill"
"""The key under which our single files say how the model was trained."""
FACTS_BYTES = 1 << 20
MOST_PARAMETERS = 2**33
"""Of a network with random weights."""
COUNTED = 64
"""Descriptions of networks whose parameters are remembered, at most."""
_counted: dict[str, int] = {}
NESTED = 4
"""State dicts inside one another that are opened, at most: a pickle may hold itself."""


def save_tensors(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with the mode that new files have. Raises StorageError."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(state), path, metadata={"format": "pt", **(metadata or {})})
    obey_umask(path)


def require_finite(name: str, tensor: Tensor) -> None:
    """Raise WeightsError for a weight that is no real number, or holds NaN or infinity."""
    if not tensor.is_floating_point():
        raise WeightsError(f"{name} holds {str(tensor.dtype).removeprefix('torch.')}; real numbers are wanted")
    if tensor.is_meta:
        return  # a shape without values
    # A sum is finite where its terms are, unless it overflows; then every value is looked at.
    if not bool(tensor.float().sum().isfinite()) and not bool(tensor.float().isfinite().all()):
        bad = int((~tensor.float().isfinite()).sum())
        raise WeightsError(f"{name} holds NaN or infinity ({bad} of {tensor.numel()} values): take other weights")


def require_whole(where: str, state: Mapping[str, Tensor]) -> None:
    """Raise WeightsError, which names the tensor, where a network holds NaN or infinity."""
    for name, tensor in state.items():
        if tensor.is_floating_point():
            try:
                require_finite(name, tensor)
            except WeightsError as error:
                raise WeightsError(f"{where}: {error}") from None


def require_room(build: Callable[[], nn.Module], described: object, where: str, weights: Path | None) -> None:
    """Raise WeightsError where a network has more parameters than its weights have bytes, before it takes memory.

    build: makes the network. described: all that it is made from, as values that JSON knows: networks that are
    described alike are counted once in a process. weights: the file, or the folder with the files, that will fill it;
    None for none.
    """
    parameters = _parameters(build, described)
    if weights is None:
        if parameters > MOST_PARAMETERS:
            raise WeightsError(f"{where} describes a network of {parameters:,} parameters, {MOST_PARAMETERS:,} at most")
        return
    files = [path for path in weights.iterdir() if path.is_file()] if weights.is_dir() else [weights]
    try:
        size = sum(path.stat().st_size for path in files)
    except OSError as error:
        raise WeightsError(f"{weights} is missing or damaged: {error.strerror or error}") from None
    if parameters > size:
        raise WeightsError(
            f"{where}: cannot load it: the network that is described has {parameters:,} parameters, and {weights} has "
            f"{size:,} bytes for them"
        )


def _parameters(build: Callable[[], nn.Module], described: object) -> int:
    """The number of a network's parameters, without memory for them."""
    key = json.dumps(described, sort_keys=True, default=repr)
    if key not in _counted:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in build().parameters())
        if len(_counted) >= COUNTED:
            _counted.clear()
        _counted[key] = parameters
    return _counted[key]


def read_file(path: Path, suffix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A single file's tensors, and the facts that it states (our files: prediction, scale, shift, model, diffusion).

    suffix: of the file's format, if its name has another one. Raises WeightsError for a damaged file, and for a pickle
    that holds more than tensors.
    """
    suffix = suffix or path.suffix
    if suffix == ".safetensors":
        return _read_safetensors(path)
    if suffix not in PICKLES:
        raise WeightsError(f"{path}: the file must be .safetensors, .ckpt or .pt")
    if not path.is_file():
        raise WeightsError(f"{path} is missing or no file")
    try:
        _refuse_bomb(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # PyTorch's unpickler raises errors of many kinds
        refused_global = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it needs {refused_global[1]}" if refused_global else " ".join(str(error).split())[:120]
        raise WeightsError(
            f"{path} cannot be read as tensors alone ({reason}); a pickle with other content may run code: "
            "give a .safetensors file"
        ) from None
    facts = content.get(FACTS, {}) if isinstance(content, dict) else {}
    for _ in range(NESTED):
        if isinstance(content, dict) and "state_dict" in content:
            content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a state dict")
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    return tensors, _facts(path, facts)


def _refuse_bomb(path: Path) -> None:
    """Raise ValueError for a zip file that holds more than its bytes: PyTorch packs nothing."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if sum(entry.file_size for entry in file.infolist()) > path.stat().st_size:
                raise ValueError("its parts are larger than the file")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if path.exists() and not path.is_file():
        raise WeightsError(f"{path} is no file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors reports some kinds of damage by errors of other libraries
        raise WeightsError(f"{path} is missing or damaged: {one_line(str(error))[:200]}") from None
    facts = _facts(path, metadata.get(FACTS, {}))
    if "modelspec.prediction_type" in metadata:  # Stability's specification of metadata: epsilon or v
        facts.setdefault("prediction", metadata["modelspec.prediction_type"])
    return tensors, facts


def _facts(path: Path, value: Any) -> dict[str, Any]:
    try:
        facts = parse_json(value, FACTS_BYTES) if isinstance(value, str) else value
        if not isinstance(facts, dict) or not all(isinstance(name, str) for name in facts):
            raise ParseError(f"a {type(facts).__name__}, not a table")
        return dict(facts)
    except ParseError as error:
        raise WeightsError(f"{path}: its metadata ({FACTS}) cannot be read: {error}") from None
