"""Evaluations of pictures larger than a model was trained on, and in tiles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from made.run import make_cache, make_run
from pipeline import eval as eval_verb
from pipeline.config import DataConfig, EvalRunConfig, LayoutTask
from pipeline.config.conditions import BoxesConfig
from pipeline.data.format.manifest import load_manifest
from pipeline.errors import ConfigError, ParseError
from pipeline.evaluation.card import parse_card
from pipeline.evaluation.evaluate import Evaluator
from pipeline.evaluation.runs import commits
from pipeline.inference.tiles import choice
from pipeline.inference.tiles.denoise import TiledDenoiser
from pipeline.inference.tiles.stage import TiledStage
from pipeline.storage.urls import open_storage


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a layout model on pictures of 64 x 64, and a cache of 96 x 96."""
    folder = tmp_path_factory.mktemp("larger")
    conditions: dict[str, Any] = {"conditions": ("boxes",), "text_storage": "none", "boxes": BoxesConfig(count=25)}
    make_cache(folder, 12, **conditions)
    make_run(folder, task=LayoutTask())
    (folder / "large").mkdir()
    make_cache(folder / "large", 12, **conditions, resolution=(96,))
    return folder


def config(folder: Path, **keys: Any) -> EvalRunConfig:
    fields = {"images": 4, "guidance": (1.5,), "sampler": ("euler",), "steps": (2,), "batch": 3}
    return EvalRunConfig(run=str(folder / "run"), **{**fields, **keys})


def large(folder: Path, **keys: Any) -> EvalRunConfig:
    return config(folder, data=DataConfig(val=str(folder / "large" / "cache")), **keys)


def test_a_cache_of_larger_pictures_is_evaluated_at_its_own_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its latents have other sides than those of training, and so do the planes that are concatenated to them."""
    assert load_manifest(open_storage(str(folder / "large" / "cache"))).contract.latent_shape[1:] == (12, 12)
    card = eval_verb.evaluate_run(large(folder))[0]
    assert card.images == 4 and card.tiles == {} and "tiles" not in card.to_json()
    whole = eval_verb.prepare(large(folder))[1]
    assert isinstance(whole, Evaluator) and not isinstance(whole.first_stage, TiledStage)


def test_tiles_are_on_the_card_and_in_the_name_and_are_made_again(folder: Path, capsys: Any) -> None:
    plain = eval_verb.evaluate_run(large(folder, seed=1))[0]
    card = eval_verb.evaluate_run(large(folder, seed=1, tile="64"))[0]
    assert card.tiles == {"denoise": 64, "decode": 64}
    assert "denoise in tiles of 64, decode in tiles of 64" in card.line()
    paths = sorted((folder / "run" / "evals").glob("*-s1-*/card.json"))
    assert len(paths) == 2
    found = {json.loads(path.read_text()).get("tiles", {}).get("denoise", 0): path for path in paths}
    assert set(found) == {0, 64}
    covering = eval_verb.evaluate_run(large(folder, seed=1, tile="96"))[0]  # one tile covers the pictures
    assert covering == plain and len(list((folder / "run" / "evals").glob("*-s1-*"))) == 2
    capsys.readouterr()
    again = EvalRunConfig(from_card=str(found[64]), data=DataConfig(val=str(folder / "large" / "cache")))
    assert eval_verb.main(again) == 0
    assert "reproduced" in capsys.readouterr().out
    denoiser = eval_verb.prepare(large(folder, tile="64"))[2]
    assert isinstance(denoiser, TiledDenoiser) and denoiser.side == 8


def test_sides_that_the_unet_does_not_halve_are_refused(folder: Path) -> None:
    (folder / "odd").mkdir()
    make_cache(
        folder / "odd", 4, conditions=("boxes",), text_storage="none", boxes=BoxesConfig(count=25), resolution=(72,)
    )
    odd = config(folder, data=DataConfig(val=str(folder / "odd" / "cache")))
    with pytest.raises(ConfigError, match=r"holds pictures of 72 x 72 pixels, and this model makes multiples of 16$"):
        eval_verb.prepare(odd)


def test_auto_chooses_by_memory_and_off_refuses(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert eval_verb.prepare(large(folder, tile="auto"))[1].tiles == {}
    assert "eval: whole pictures" in capsys.readouterr().out
    monkeypatch.setattr(choice, "free_bytes", lambda device: 0)
    assert eval_verb.prepare(large(folder, tile="auto"))[1].tiles["denoise"] == 64
    monkeypatch.setattr(commits, "load_trained", lambda *a: 1 / 0)
    with pytest.raises(ConfigError, match=r"^3 images of 96 x 96 pixels at once .* give tile=auto$"):
        eval_verb.prepare(large(folder))


@pytest.mark.parametrize("tiles", [{"other": 64}, {"denoise": 0}, {"decode": -8}, {"decode": 10**6}])
def test_tiles_that_are_none_are_no_card(folder: Path, tiles: dict[str, int]) -> None:
    facts = eval_verb.evaluate_run(config(folder))[0].to_json()
    assert parse_card(json.dumps({**facts, "tiles": {"denoise": 64}}).encode()).tiles == {"denoise": 64}
    with pytest.raises(ParseError, match="tiles that are none"):
        parse_card(json.dumps({**facts, "tiles": tiles}).encode())
