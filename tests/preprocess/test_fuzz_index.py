"""`latentmill index`, `verify` and reference files, fed with mutations of whole ones: a dataset, a count or an error of
ours, soon, and without much memory. The long tests hold the same of many more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as to_safetensors

from made.foreign import COUNT, record, write
from made.forged_cache import forge_manifest, manifest_json, small
from made.fuzz import bounded, mutated_bytes, mutated_value
from pipeline.config import IndexConfig, LimitsConfig, VerifyConfig
from pipeline.data.format.manifest import load_manifest
from pipeline.evaluation.metrics.fid import Statistics
from pipeline.evaluation.reference import Reference, ReferenceFacts, load_reference
from pipeline.storage.urls import open_storage
from preprocess import index, verify

QUICK, LONG = 40, 2000


def options(examples: int) -> dict[str, Any]:
    return {
        "max_examples": examples,
        "deadline": None,
        "derandomize": examples == QUICK,
        "suppress_health_check": list(HealthCheck),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def index_and_read(folder: Path) -> None:
    """Indexes what lies there, allowing rejects; what is accepted passes `verify`."""
    limits = LimitsConfig(member_bytes=100_000)
    for path in [*folder.glob("*.json"), *folder.glob("manifests/*")]:
        path.unlink()
    with bounded():
        index.main(IndexConfig(dataset=str(folder), source=f"{folder}/*.tar", max_rejects=1.0, limits=limits))
        manifest = load_manifest(open_storage(str(folder)))
        assert 0 < manifest.samples <= COUNT
        assert verify.main(VerifyConfig(dataset=str(folder))) == 0


def try_tars(folder: Path, examples: int) -> None:
    whole = (write(folder) / "0.tar").read_bytes()

    @settings(**options(examples))
    @given(mutated_bytes(whole))
    def tars(data: bytes) -> None:
        (folder / "0.tar").write_bytes(data)
        index_and_read(folder)

    tars()


def try_members(folder: Path, examples: int) -> None:
    """Members are damaged, and the tar around them is whole."""
    one = record(3)

    @settings(**options(examples))
    @given(st.sampled_from(sorted(one)).flatmap(lambda name: st.tuples(st.just(name), mutated_bytes(one[name]))))
    def files(change: tuple[str, bytes]) -> None:
        write(folder, lambda row, files: files.update([change]) if row in (0, 3) else None)
        index_and_read(folder)

    files()


def try_manifests(folder: Path, examples: int) -> None:
    """A manifest that is accepted can be verified, by findings or an error."""
    small(folder)
    whole = manifest_json(folder)

    @settings(**options(examples))
    @given(mutated_value(whole))
    def manifests(value: Any) -> None:
        forge_manifest(folder, lambda _: json.dumps(value).encode("utf-8", "surrogatepass"))
        with bounded():
            verify.main(VerifyConfig(dataset=str(folder), samples=0))

    manifests()


def try_references(folder: Path, examples: int) -> None:
    generator = torch.Generator().manual_seed(0)
    facts = {"features": "democlip", "features_sha256": "", "resolution": 64, "crop": "", "resize": "", "dataset": ""}
    facts |= {"vae_sha256": "", "clip_sha256": "", "images": 9, "held": 4, "scores": {"a": 1.0}, "floors": {}}
    gaussian = Statistics.of(torch.randn(9, 3, generator=generator)).gaussian()
    tensors = {"mean": gaussian.mean, "cov": gaussian.cov, "held.real": torch.zeros(4, 3)}
    tensors["held.reconstruction"] = torch.ones(4, 3)
    path = folder / "reference.safetensors"

    def file(value: Any) -> bytes:
        return to_safetensors(tensors, {"latentmill.reference": json.dumps(value)})

    def read(data: bytes) -> None:
        path.write_bytes(data)
        with bounded():
            reference = load_reference(str(path))
            assert isinstance(reference, Reference) and isinstance(reference.facts, ReferenceFacts)
            assert reference.gaussian.cov.shape == (len(reference.gaussian.mean),) * 2
            assert len(reference.real) == len(reference.reconstruction) == reference.facts.held

    @settings(**options(examples))
    @given(mutated_bytes(file(facts)))
    def by_bytes(data: bytes) -> None:
        read(data)

    @settings(**options(examples))
    @given(mutated_value(facts))
    def by_facts(value: Any) -> None:
        read(file(value))

    by_bytes()
    by_facts()


PROPERTIES = {"tars": try_tars, "members": try_members, "manifests": try_manifests, "references": try_references}


@pytest.mark.parametrize("name", PROPERTIES)
def test_mutated_files_are_used_counted_or_refused(folder: Path, name: str) -> None:
    PROPERTIES[name](folder, QUICK)


@pytest.mark.long
@pytest.mark.parametrize("name", PROPERTIES)
def test_mutated_files_are_used_counted_or_refused_of_thousands(folder: Path, name: str) -> None:
    PROPERTIES[name](folder, LONG)
