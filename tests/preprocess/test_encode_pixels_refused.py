"""`encode stored=pixels`: what contradicts itself is one line, and what is no part of the contract."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from made.pixel_cache import make_pixels as make
from made.pixel_cache import make_source
from pipeline.config import EncodersConfig, FetchConfig
from pipeline.config.check.verbs import check
from pipeline.config.conditions import LabelsConfig, LowresConfig
from pipeline.data.format.contract_json import contract_from_json
from pipeline.errors import ConfigError, DestinationExists
from preprocess import encode


@pytest.fixture
def source(tmp_path: Path) -> str:
    return make_source(tmp_path)


def test_a_gpu_is_no_part_of_the_contract_where_nothing_is_encoded(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, real = list[str](), encode.pick_device

    def noted(name: str, rank: int) -> Any:
        asked.append(name)
        return real("cpu", rank)

    monkeypatch.setattr(encode, "pick_device", noted)
    make(source, tmp_path / "cache")
    assert asked == ["cpu"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pixels": "png", "stored": "latents"}, "pixels=png is for stored=pixels"),
        ({"stored": "latents", "encoders": EncodersConfig(vae="pixels")}, "give stored=pixels"),
        ({"conditions": ("pixels",)}, "holds its crop already"),
        ({"conditions": ("labels",), "labels": LabelsConfig(count=3)}, "labels.grid=1"),
        ({"text_storage": "trimmed"}, "give caption_key=txt"),
        ({"caption_key": ("json:",)}, "caption_key=json:"),
        ({"conditions": ("lowres",), "lowres": LowresConfig(factor=5)}, "lowres.factor=5: resolution=24"),
    ],
)
def test_contradictions_are_one_line(changes: dict[str, Any], words: str, source: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words) as told:
        make(source, tmp_path / "cache", **{"pixels": "array", **changes})
    assert "\n" not in str(told.value) and not (tmp_path / "cache").exists()


def test_pixels_are_nothing_to_fetch() -> None:
    with pytest.raises(ConfigError, match="nothing to fetch"):
        check(FetchConfig(dest="x", encoders=EncodersConfig(vae="pixels")))


def test_a_dataset_of_arrays_does_not_go_on_with_pngs(source: str, tmp_path: Path) -> None:
    make(source, tmp_path / "cache")
    with pytest.raises(DestinationExists, match="pixels: array, not png"):
        make(source, tmp_path / "cache", "png")
    stored = json.loads((tmp_path / "cache" / "contract.json").read_bytes())["contract"]
    assert "pixels" not in stored and contract_from_json(stored).pixels == "array"
