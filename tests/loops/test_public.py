"""The public package `latentmill`: its names, what importing it costs, and that its defaults are those of the keys."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import latentmill
from made.places import REPOSITORY
from pipeline.config import DataConfig

NAMES = ["CacheDataset", "LatentmillError", "as_webdataset", "open_dataset"]


def test_the_public_names_are_these() -> None:
    """A name that has been published stays."""
    assert latentmill.__all__ == NAMES
    assert set(NAMES) <= set(dir(latentmill))
    for name in NAMES:
        assert inspect.getdoc(getattr(latentmill, name))
    with pytest.raises(AttributeError, match=r"no attribute 'open'; it has CacheDataset, .*, open_dataset"):
        latentmill.open  # noqa: B018
    assert (REPOSITORY / "latentmill" / "py.typed").is_file()


def test_importing_the_package_imports_nothing(tmp_path: Path) -> None:
    code = "import sys; before = set(sys.modules); import latentmill; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "pipeline.errors", "webdataset"} & set(eval(done.stdout))
    assert "latentmill" in eval(done.stdout)


def test_defaults_are_those_of_latentmill_train() -> None:
    signature = inspect.signature(latentmill.open_dataset).parameters
    keys, shared = DataConfig(), ("weights", "columns", "tail", "memory_gb", "workers", "prefetch", "cache", "cache_gb")
    assert {name: signature[name].default for name in shared} == {name: getattr(keys, name) for name in shared}
