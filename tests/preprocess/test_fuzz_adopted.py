"""`latentmill index dest=`, fed with mutations of whole files: a cache, a count or an error of ours, soon, and without
much memory. The long tests hold the same of many more."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from made.fuzz import bounded, mutated_bytes, mutated_value
from made.latents import latent, ndarray, npz, tensors, write_mds
from pipeline.config import IndexConfig, LimitsConfig, VerifyConfig
from pipeline.config.values.members import parse_place
from pipeline.data.format.manifest import load_manifest
from pipeline.errors import ConfigError, RecordRejected
from pipeline.storage.urls import open_storage
from preprocess import index, verify
from preprocess.adopting.arrays import Foreign, read_array
from preprocess.adopting.unit import read_unit

QUICK, LONG = 60, 3000
SMALL = latent(0, 2, 2)
FILES = {
    "npz:z": npz(z=SMALL, y=SMALL),
    "npz:y": npz(True, z=SMALL, y=SMALL),
    "safetensors:z": tensors(z=SMALL, y=SMALL.astype(np.float16)),
}


def options(examples: int) -> dict[str, Any]:
    return {
        "max_examples": examples,
        "deadline": None,
        "derandomize": examples == QUICK,
        "suppress_health_check": list(HealthCheck),
    }


def try_arrays(folder: Path, examples: int) -> None:
    @settings(**options(examples))
    @given(st.sampled_from(sorted(FILES)).flatmap(lambda name: st.tuples(st.just(name), mutated_bytes(FILES[name]))))
    def arrays(change: tuple[str, bytes]) -> None:
        place = parse_place(change[0])
        with bounded():
            array = read_array(Foreign("a", {place.file: change[1]}), place, 100_000)
            assert array.nbytes <= 100_000 and array.dtype.kind in "fiu"

    arrays()


def try_columns(folder: Path, examples: int) -> None:
    encodings = ["ndarray", "ndarray:float32", "ndarray:float32:4,2,2", "bytes", "int", "json", "pkl", "ndarray:x:0"]

    @settings(**options(examples))
    @given(mutated_bytes(ndarray(SMALL)), st.sampled_from(encodings) | st.text(max_size=40))
    def columns(data: bytes, encoding: str) -> None:
        with bounded():
            found = Foreign("a", {"z": data}, {"z": encoding})
            assert read_array(found, parse_place("z"), 100_000).nbytes <= len(data) * 2

    columns()


def converted(folder: Path, source: str, **changes: Any) -> None:
    """Converts what lies there, allowing rejects; what is accepted passes `verify`."""
    cache = folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    limits = LimitsConfig(member_bytes=100_000)
    given_: dict[str, Any] = {"text_member": "", "stored": "latents", "max_rejects": 1.0, "limits": limits, **changes}
    with bounded():
        index.main(IndexConfig(source=source, dest=str(cache), **given_))
        assert load_manifest(open_storage(str(cache))).samples > 0
        assert verify.main(VerifyConfig(dataset=str(cache), source=source)) == 0


def try_shards(folder: Path, examples: int) -> None:
    columns = {"z": "ndarray", "caption": "str"}
    mds = write_mds(folder / "mds", columns, [[{"z": ndarray(SMALL), "caption": b"words"}] * 3], ["sha1"])
    listed = json.loads((mds / "index.json").read_bytes())
    listed["shards"][0]["raw_data"]["hashes"] = {}
    (mds / "index.json").write_text(json.dumps(listed))
    whole = (mds / "shard.00000.mds").read_bytes()

    @settings(**options(examples))
    @given(mutated_bytes(whole))
    def shards(data: bytes) -> None:
        (mds / "shard.00000.mds").write_bytes(data)
        listed["shards"][0]["raw_data"]["bytes"] = len(data)
        (mds / "index.json").write_text(json.dumps(listed))
        converted(folder, f"{mds}/index.json", moments_member="z")

    shards()


def try_indexes(folder: Path, examples: int) -> None:
    columns = {"z": "ndarray", "caption": "str"}
    mds = write_mds(folder / "mds", columns, [[{"z": ndarray(SMALL), "caption": b"words"}] * 3], ["sha1"])
    whole = json.loads((mds / "index.json").read_bytes())

    @settings(**options(examples))
    @given(mutated_value(whole))
    def indexes(value: Any) -> None:
        (mds / "index.json").write_bytes(json.dumps(value).encode("utf-8", "surrogatepass"))
        converted(folder, f"{mds}/index.json", moments_member="z")

    indexes()


def try_reports(folder: Path, examples: int) -> None:
    (folder / "a.npz").write_bytes(FILES["npz:z"])
    converted(folder, f"{folder}/a.npz", moments_member="npz:z")
    path = folder / "cache/units/000000.json"
    whole = json.loads(path.read_bytes())

    @settings(**options(examples))
    @given(mutated_value(whole))
    def reports(value: Any) -> None:
        path.write_bytes(json.dumps(value).encode("utf-8", "surrogatepass"))
        with bounded():
            read_unit(open_storage(str(folder / "cache")), 0, whole["source"], whole["settings"])

    reports()


def try_places(folder: Path, examples: int) -> None:
    @settings(**options(examples))
    @given(st.text(max_size=60) | st.from_regex(r"[a-z.]{0,9}(:[a-z0-9x]{0,9}){0,5}"))
    def places(text: str) -> None:
        try:
            place = parse_place(text)
        except ConfigError:
            return
        try:
            read_array(Foreign("a", {place.file: FILES["npz:z"]}), place, 100_000)
        except RecordRejected:
            return

    places()


PROPERTIES = {
    "arrays": try_arrays,
    "columns": try_columns,
    "shards": try_shards,
    "indexes": try_indexes,
    "reports": try_reports,
    "places": try_places,
}


@pytest.mark.parametrize("name", PROPERTIES)
def test_mutated_files_are_converted_counted_or_refused(tmp_path: Path, name: str) -> None:
    PROPERTIES[name](tmp_path, QUICK)


@pytest.mark.long
@pytest.mark.parametrize("name", PROPERTIES)
def test_mutated_files_are_converted_counted_or_refused_of_thousands(tmp_path: Path, name: str) -> None:
    PROPERTIES[name](tmp_path, LONG)
