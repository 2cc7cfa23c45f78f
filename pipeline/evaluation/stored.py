"""Stores an evaluation in a run directory."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from pipeline.report.grid import GAP, png, tile
from pipeline.runs.directory import evaluation_folder
from pipeline.storage.base import Storage

GRID_COLUMNS = 8


class Card(Protocol):
    """What is stored as card.json."""

    def to_json(self) -> dict[str, Any]: ...


class Result(Protocol):
    """What is stored (evaluate.py, EvalResult)."""

    @property
    def n(self) -> int: ...
    @property
    def metrics(self) -> dict[str, Any]: ...
    @property
    def card(self) -> Card: ...
    @property
    def grid(self) -> np.ndarray: ...
    @property
    def captions(self) -> list[str]: ...
    @property
    def shown(self) -> np.ndarray | None: ...


def write(run: Storage, result: Result, name: str = "") -> str:
    """Store a result under evals/ of the run directory and return its folder there. metrics.json is written last.

    name: distinguishes evaluations at the same n; "" for those inside training.
    """
    folder = evaluation_folder(result.n, name)
    write_files(run, f"{folder}/", result)
    return folder


def write_files(storage: Storage, prefix: str, result: Result) -> None:
    """Store the files of a result, whose keys begin with `prefix`; metrics.json last.

    grid.png has the pictures, given.png what they were given, in the same tiles, where that is pictures.
    """
    if len(result.grid):
        height, width = result.grid.shape[1:3]
        columns = min(GRID_COLUMNS, len(result.grid))
        tiles = {"captions": result.captions, "columns": columns, "width": width, "height": height, "gap": GAP}
        if result.shown is not None:
            storage.put(f"{prefix}given.png", png(tile(result.shown, columns)))
        storage.put(f"{prefix}grid.png", png(tile(result.grid, columns)))
        storage.put(f"{prefix}grid.json", _json(tiles))
    storage.put(f"{prefix}card.json", _json(result.card.to_json()))
    storage.put(f"{prefix}metrics.json", _json(result.metrics))


def _json(value: Any) -> bytes:
    return json.dumps(_finite(value), indent=1, ensure_ascii=False, sort_keys=True).encode("utf-8", "replace")


def _finite(value: Any) -> Any:
    """Plain data with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
