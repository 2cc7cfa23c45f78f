"""evaluation/reference.py: a file of statistics is read strictly, and a destination that is something else is kept."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as to_safetensors

from pipeline.errors import DatasetError, DestinationExists, LatentmillError
from pipeline.evaluation.metrics.fid import Statistics
from pipeline.evaluation.reference import (
    Reference,
    ReferenceFacts,
    load_reference,
    require_free_or_own,
    save_reference,
)

WIDTH, HELD = 6, 5


def make() -> Reference:
    generator = torch.Generator().manual_seed(0)
    real, reconstruction, images = (torch.randn(n, WIDTH, generator=generator) for n in (HELD, HELD, 20))
    facts = ReferenceFacts(
        features="democlip",
        features_sha256="a" * 64,
        resolution=64,
        crop="centre",
        resize="lanczos",
        dataset="b" * 64,
        vae_sha256="c" * 64,
        clip_sha256="d" * 64,
        images=20,
        held=HELD,
        scores={"clip_score_real": 0.3},
        floors={"5": {"real": 1.0, "reconstruction": 2.0}},
    )
    return Reference(facts, Statistics.of(images).gaussian(), real, reconstruction)


def forged(tensors: dict[str, Any], facts: Any = None, metadata: dict[str, str] | None = None) -> bytes:
    """The file of a reference with other tensors (None: left out) or facts."""
    whole = make()
    parts = {"mean": whole.gaussian.mean, "cov": whole.gaussian.cov}
    parts |= {"held.real": whole.real, "held.reconstruction": whole.reconstruction}
    stored = {name: tensor for name, tensor in {**parts, **tensors}.items() if tensor is not None}
    values = {**whole.facts.__dict__, **(facts or {})}
    return to_safetensors(stored, metadata or {"latentmill.reference": json.dumps(values)})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "reference.safetensors"


def test_a_reference_comes_back_as_it_was(path: Path) -> None:
    whole = make()
    save_reference(str(path), whole)
    again = load_reference(str(path))
    assert again.facts == whole.facts
    assert torch.equal(again.gaussian.mean, whole.gaussian.mean) and torch.equal(again.gaussian.cov, whole.gaussian.cov)
    assert torch.equal(again.real, whole.real) and torch.equal(again.reconstruction, whole.reconstruction)


def test_a_reference_with_a_fact_more_is_read(path: Path) -> None:
    path.write_bytes(forged({}, {"later": 1}))
    assert load_reference(str(path)).facts == make().facts


def nan(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


WRONG: dict[str, Callable[[], bytes]] = {
    "mean float32": lambda: forged({"mean": torch.zeros(WIDTH)}),
    "mean of NaN": lambda: forged({"mean": nan((WIDTH,))}),
    "cov of NaN": lambda: forged({"cov": nan((WIDTH, WIDTH))}),
    "cov of infinity": lambda: forged({"cov": torch.full((WIDTH, WIDTH), torch.inf, dtype=torch.float64)}),
    "features of NaN": lambda: forged({"held.real": nan((HELD, WIDTH), torch.float32)}),
    "no mean": lambda: forged({"mean": None}),
    "no features": lambda: forged({"held.reconstruction": None}),
    "cov of another width": lambda: forged({"cov": torch.eye(WIDTH + 1, dtype=torch.float64)}),
    "cov of one row": lambda: forged({"cov": torch.zeros(WIDTH, dtype=torch.float64)}),
    "cov that is none": lambda: forged({"cov": -torch.eye(WIDTH, dtype=torch.float64)}),
    "cov without symmetry": lambda: forged({"cov": torch.ones(WIDTH, WIDTH, dtype=torch.float64).triu()}),
    "mean of no numbers": lambda: forged({"mean": torch.zeros(0, dtype=torch.float64)}),
    "scalar mean": lambda: forged({"mean": torch.tensor(0.0, dtype=torch.float64)}),
    "features of another width": lambda: forged({"held.real": torch.zeros(HELD, WIDTH + 1)}),
    "fewer features": lambda: forged({"held.real": torch.zeros(HELD - 1, WIDTH)}),
    "integers as features": lambda: forged({"held.real": torch.zeros(HELD, WIDTH, dtype=torch.int64)}),
    "held of text": lambda: forged({}, {"held": "5"}),
    "held negative": lambda: forged({}, {"held": -5}),
    "images 0": lambda: forged({}, {"images": 0}),
    "images of 10**400": lambda: forged({}, {"images": 10**400}),
    "resolution text": lambda: forged({}, {"resolution": "64"}),
    "floors a list": lambda: forged({}, {"floors": [1]}),
    "scores a list": lambda: forged({}, {"scores": []}),
    "another format": lambda: forged({}, {"format": 2}),
    "facts null": lambda: forged({}, metadata={"latentmill.reference": "null"}),
    "facts nested": lambda: forged({}, metadata={"latentmill.reference": "[" * 100_000}),
    "facts NaN": lambda: forged({}, {"scores": {"a": float("nan")}}),
    "no facts": lambda: forged({}, metadata={"other": "{}"}),
    "cut": lambda: forged({})[:-1],
    "cut in its header": lambda: forged({})[:100],
    "longer": lambda: forged({}) + b"x",
    "empty": lambda: b"",
    "pickle": lambda: b"\x80\x04cos\nsystem\n(S'x'\ntR.",
    "huge header": lambda: (2**62).to_bytes(8, "little") + b"{}",
    "zeros": lambda: bytes(64),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_is_no_reference_ends_in_a_line_with_its_name(path: Path, name: str) -> None:
    path.write_bytes(WRONG[name]())
    with pytest.raises(DatasetError, match=r"reference\.safetensors holds no reference .*make them again") as caught:
        load_reference(str(path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_what_is_no_file_is_no_reference(path: Path) -> None:
    for make_it in (path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero")):
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        make_it()
        with pytest.raises(LatentmillError, match=r"reference\.safetensors"):
            load_reference(str(path))
    path.unlink()
    path.touch()
    os.truncate(path, 2**40)
    with pytest.raises(DatasetError, match="has 1099511627776 bytes"):
        load_reference(str(path))


MADE_OF = {"features_sha256": "a" * 64, "dataset": "b" * 64, "clip_sha256": "d" * 64}
IMAGES = 20 + HELD


def test_a_destination_that_is_free_or_the_same_reference_is_written(path: Path) -> None:
    require_free_or_own(str(path), MADE_OF, IMAGES)
    save_reference(str(path), make())
    require_free_or_own(str(path), MADE_OF, IMAGES)


@pytest.mark.parametrize("change", [{"dataset": "0" * 64}, {"features_sha256": "0" * 64}, {"clip_sha256": ""}])
def test_a_reference_of_something_else_is_kept(path: Path, change: dict[str, str]) -> None:
    save_reference(str(path), make())
    with pytest.raises(DestinationExists, match=f"of {next(iter(change))} other than this one: give another dest="):
        require_free_or_own(str(path), {**MADE_OF, **change}, IMAGES)
    with pytest.raises(DestinationExists, match="another number of images"):
        require_free_or_own(str(path), MADE_OF, IMAGES - 1)


def test_whatever_else_lies_at_the_destination_is_kept(path: Path, tmp_path: Path) -> None:
    path.write_bytes(b"somebody's weights")
    with pytest.raises(DestinationExists, match=r"is there, and is no reference"):
        require_free_or_own(str(path), MADE_OF, IMAGES)
    with pytest.raises(DestinationExists, match="is a folder"):
        require_free_or_own(str(tmp_path), MADE_OF, IMAGES)
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(DestinationExists, match="is no reference"):
        require_free_or_own(str(tmp_path / "link"), MADE_OF, IMAGES)
    with pytest.raises(DestinationExists, match="which is a file"):
        require_free_or_own(f"{path}/below", MADE_OF, IMAGES)
