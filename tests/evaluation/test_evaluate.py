"""Evaluation: the same images whatever the world, nothing of training changed, and figures beside their floors."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from made.run import IMAGES, SAMPLER, SOURCE, make_cache, make_denoiser, make_run
from pipeline import cli
from pipeline import eval as eval_verb
from pipeline.config import EncodersConfig, EvalRunConfig, ReferenceConfig, SamplerConfig, TextTask, TrainConfig
from pipeline.data.format.manifest import load_manifest
from pipeline.distributed.world import World
from pipeline.errors import ConfigError, ContractMismatch, DatasetError, Interrupted, LatentmillError, RunError
from pipeline.evaluation.evaluate import Evaluator
from pipeline.evaluation.features.networks import FEATURES, Features, Source, inception, load_features
from pipeline.evaluation.judging import Judging
from pipeline.evaluation.measure import merge_accuracies, shapes_accuracy
from pipeline.evaluation.metrics.fid import Statistics, fid
from pipeline.evaluation.records import Records
from pipeline.evaluation.reference import load_reference, save_reference
from pipeline.evaluation.runs.while_training import in_training
from pipeline.evaluation.stored import GRID_COLUMNS, write
from pipeline.evaluation.tasks.judge import make_judge
from pipeline.evaluation.validation import load_validation
from pipeline.inference import trained as trained_module
from pipeline.inference.pictures import from_uint8, frozen, to_uint8
from pipeline.inference.trained import encode_captions, load_encoders, load_trained
from pipeline.models.weights import weights_digest
from pipeline.report.run import load as load_report
from pipeline.storage.urls import open_storage
from preprocess import reference as reference_verb
from preprocess.reference import real_images
from preprocess.shapes.drawing import render, scene


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache, a reference made from it, and a run."""
    folder = tmp_path_factory.mktemp("evaluation")
    make_cache(folder)
    source, dest = str(folder / SOURCE), str(folder / "reference.safetensors")
    reference_verb.main(ReferenceConfig(dataset=str(folder / "cache"), source=source, dest=dest))
    make_run(folder, reference=dest)
    return folder


@pytest.fixture(scope="module")
def config(folder: Path) -> TrainConfig:
    return load_trained(str(folder / "run")).info.config


@pytest.fixture(scope="module")
def parts(folder: Path) -> dict[str, Any]:
    """What an Evaluator is made of."""
    storage = open_storage(str(folder / "cache"))
    manifest = load_manifest(storage)
    first_stage, tower = load_encoders(manifest.contract)
    return {
        "validation": load_validation(storage, manifest, ("text",), IMAGES, tower),
        "first_stage": first_stage,
        "tower": tower,
        "diffusion": load_trained(str(folder / "run")).info.config.diffusion,
        "judge": make_judge(manifest.contract, TextTask()),
        "reference": load_reference(str(folder / "reference.safetensors")),
        "features": load_features("democlip", seed=1),
        "grid": 4,
    }


class OneOf(World):
    """One rank of several that run after each other: `gather` gives what the ranks before have left."""

    left: list[Any]

    def __init__(self, rank: int, size: int, left: list[Any]) -> None:
        super().__init__(rank=rank, size=size)
        object.__setattr__(self, "left", left)

    def gather(self, value: Any) -> list[Any]:
        self.left.append(value)
        return list(self.left)


def test_any_world_makes_the_same_images_and_figures(parts: dict[str, Any], config: TrainConfig) -> None:
    denoiser = make_denoiser(config)
    alone = Evaluator(**parts)(denoiser, 64, images=13, sampler=SAMPLER)
    left: list[Any] = []
    for rank in reversed(range(3)):  # rank 0 last: it merges
        together = (
            Evaluator(**parts, world=OneOf(rank, 3, left))(denoiser, 64, images=13, sampler=SAMPLER)
            if rank == 0
            else None
        )
        if rank:
            left.append(Evaluator(**parts, world=OneOf(rank, 3, left))._measure(denoiser, 13, SAMPLER, lambda: False))
    assert together is not None
    np.testing.assert_array_equal(together.grid, alone.grid)
    assert together.captions == alone.captions == parts["validation"].captions[:4]
    assert {**together.metrics, "seconds": 0} == {**alone.metrics, "seconds": 0}
    for name in ("fid_democlip_error", "kid_democlip", "kid_democlip_std", "precision_democlip", "cmmd_democlip"):
        assert np.isfinite(alone.metrics[name])
    metrics = alone.metrics
    assert metrics["attribute_accuracy_low"] <= metrics["attribute_accuracy"] <= metrics["attribute_accuracy_high"]
    assert metrics["clip_score_error"] > 0


def test_batch_size_does_not_change_the_images(parts: dict[str, Any], config: TrainConfig) -> None:
    denoiser = make_denoiser(config)
    first, second = (
        Evaluator(**parts)(denoiser, 0, images=8, sampler=replace(SAMPLER, batch=batch)) for batch in (3, 8)
    )
    assert np.abs(first.grid.astype(int) - second.grid.astype(int)).max() <= 1
    assert first.metrics["clip_score"] == pytest.approx(second.metrics["clip_score"], rel=1e-3)


def test_an_evaluation_that_is_asked_to_stop_leaves_before_its_next_batch(
    parts: dict[str, Any], config: TrainConfig
) -> None:
    asked = iter([False, True])
    with pytest.raises(Interrupted):
        Evaluator(**parts)(make_denoiser(config), 64, images=13, sampler=SAMPLER, stopped=lambda: next(asked))


def test_seed_changes_the_images(parts: dict[str, Any], config: TrainConfig) -> None:
    denoiser = make_denoiser(config)
    grids = [Evaluator(**parts, seed=seed)(denoiser, 0, images=4, sampler=SAMPLER).grid for seed in (0, 0, 1)]
    assert (grids[0] == grids[1]).all() and (grids[0] != grids[2]).any()


def test_training_state_is_untouched(parts: dict[str, Any], config: TrainConfig) -> None:
    denoiser = make_denoiser(config)
    denoiser.train()
    denoiser.unet.eval()
    modes = [module.training for module in denoiser.modules()]
    before = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    random.seed(0)
    torch.manual_seed(0)
    expected = (torch.get_rng_state(), random.getstate(), torch.is_grad_enabled())
    Evaluator(**parts)(denoiser, 0, images=3, sampler=SAMPLER)
    assert torch.equal(torch.get_rng_state(), expected[0]) and random.getstate() == expected[1]
    assert torch.is_grad_enabled() is expected[2]
    assert [module.training for module in denoiser.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in denoiser.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in denoiser.parameters())


def test_modes_come_back_after_an_error(config: TrainConfig) -> None:
    denoiser = make_denoiser(config).train()
    with pytest.raises(ZeroDivisionError), frozen(denoiser):
        assert 1 // int(denoiser.training or torch.is_grad_enabled())
    assert denoiser.training and torch.is_grad_enabled()


def test_an_error_on_one_rank_is_raised(parts: dict[str, Any], config: TrainConfig) -> None:
    def broken(*_: object) -> Tensor:
        raise ContractMismatch("no such thing")

    evaluator = Evaluator(**{**parts, "features": replace(parts["features"], network=broken)})
    with pytest.raises(ContractMismatch, match="no such thing"):
        evaluator(make_denoiser(config), 0, images=2, sampler=SAMPLER)


def test_images_that_are_not_finite_are_counted_and_judged_all_the_same(
    parts: dict[str, Any], config: TrainConfig
) -> None:
    denoiser = make_denoiser(config)
    with torch.no_grad():
        next(iter(denoiser.parameters())).fill_(float("nan"))
    result = Evaluator(**parts)(denoiser, 0, images=6, sampler=SAMPLER)
    assert result.metrics["images_not_finite"] == 6
    assert np.isfinite(result.metrics["fid_democlip"]) and (result.grid == 0).all()


def test_more_images_than_captions_begin_with_the_first_again(parts: dict[str, Any]) -> None:
    judging = Judging(parts["judge"], Records(parts["validation"], parts["first_stage"]), seed=0)
    captions = judging.given([0, IMAGES, IMAGES + 1], 2 * IMAGES).captions
    assert captions[0] == captions[1] and captions[2] == parts["validation"].captions[1]
    text = judging.batch([0, IMAGES, IMAGES + 1], 2 * IMAGES, torch.device("cpu"))["text"]
    assert torch.equal(text[0], text[1]) and not torch.equal(text[0], text[2]) and text.dtype == torch.float16


# --------------------------------------------------------------------------------------------------------------------
# Inside training, and as a verb


def test_in_training_writes_an_evaluation_that_the_report_reads(
    folder: Path, config: TrainConfig, tmp_path: Path
) -> None:
    cache = open_storage(config.data.train)
    empty = torch.zeros(32, 128)
    run = open_storage(str(tmp_path))
    evaluate = in_training(
        replace(config, eval=replace(config.eval, final_images=7)), run, World(), load_manifest(cache), empty
    )
    state = make_denoiser(config).state_dict()
    assert evaluate(state, 64, lambda: False)["images"] == 12
    assert evaluate(state, 128, lambda: False)["images"] == 7
    (tmp_path / "config.yaml").write_text("{}")
    report = load_report(str(tmp_path))
    assert report.notes == []
    assert [e.n for e in report.training_evaluations] == [64, 128]
    last = report.last
    assert last is not None and last.grid.startswith(b"\x89PNG") and last.tiles and len(last.tiles.captions) == 4
    assert last.card["line"].startswith("fid_democlip ") and "7 images" in last.card["line"]
    assert last.metrics["fid_democlip_floor_images"] == 7
    for name in ("clip_score", "clip_score_real", "attribute_accuracy", "attribute_accuracy_reconstruction"):
        assert -100 <= last.metrics[name] <= 100
    assert set(last.metrics["attribute_accuracy_by_objects"]) <= {"1", "2", "3"}


def test_eval_verb_writes_one_evaluation_with_card_per_guidance_scale(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    config = EvalRunConfig(
        run=str(folder / "run"), images=6, guidance=(1.0, 2.5), sampler=("ddim",), steps=(4,), batch=4
    )
    assert eval_verb.main(config) == 0
    folders = [
        next((folder / "run" / "evals").glob(f"000000000128-ddim-4-g{g}-n6-s0-democlip-" + "?" * 12))
        for g in ("1", "2.5")
    ]
    cards = [json.loads((place / "card.json").read_text()) for place in folders]
    assert [card["guidance"] for card in cards] == [1.0, 2.5]
    for card in cards:
        assert card["n"] == 128 and card["weights"] == "ema" and card["sampler"] == "ddim" and card["steps"] == 4
        assert card["reference"]["sha256"] == load_reference(str(folder / "reference.safetensors")).sha256
        assert card["features"]["name"] == "democlip" and len(card["features"]["sha256"]) == 64
        assert card["rank_deficient"] is True and card["versions"]["torch"] == torch.__version__
        assert card["metrics"] == json.loads((folders[cards.index(card)] / "metrics.json").read_text())
    assert cards[0]["metrics"]["fid_democlip"] != cards[1]["metrics"]["fid_democlip"]
    printed = capsys.readouterr().out
    assert "guidance" in printed and cards[1]["line"] in printed


def test_eval_verb_repeats_its_own_figures_and_takes_those_that_are_there(folder: Path) -> None:
    config = EvalRunConfig(run=str(folder / "run"), images=5, guidance=(2.0,), sampler=("dpmpp_2m",), steps=(2,))
    first = eval_verb.evaluate_run(config)[0]
    (path,) = (folder / "run" / "evals").glob("*-dpmpp_2m-2-g2-n5-s0-*/metrics.json")
    written = path.stat().st_mtime_ns
    again = eval_verb.evaluate_run(config)[0]
    assert again == first and path.stat().st_mtime_ns == written
    path.unlink()
    anew = eval_verb.evaluate_run(config)[0]
    assert {**first.metrics, "seconds": 0} == {**anew.metrics, "seconds": 0} and path.exists()


def test_figures_against_other_references_stand_side_by_side(
    folder: Path, tmp_path: Path, parts: dict[str, Any]
) -> None:
    config = EvalRunConfig(run=str(folder / "run"), images=4, guidance=(2.0,), sampler=("ddim",), steps=(5,))
    first = eval_verb.evaluate_run(config)[0]
    url = str(tmp_path / "other.safetensors")
    reference = parts["reference"]
    save_reference(url, replace(reference, facts=replace(reference.facts, images=reference.facts.images + 1)))
    other = eval_verb.evaluate_run(replace(config, reference=url))[0]
    assert first.reference is not None and other.reference is not None
    assert other.reference["sha256"] != first.reference["sha256"]
    cards = [json.loads(path.read_text()) for path in (folder / "run/evals").glob("*-ddim-5-g2-n4-s0-*/card.json")]
    assert sorted(card["reference"]["sha256"] for card in cards) == sorted(
        card.reference["sha256"] for card in (first, other) if card.reference
    )
    assert [eval_verb.evaluate_run(c)[0] for c in (config, replace(config, reference=url))] == [first, other]
    shown = [e for e in load_report(str(folder / "run")).evaluations if "-ddim-5-" in f"-{e.name}"]
    assert len(shown) == 2
    for place in (folder / "run/evals").glob("*-ddim-5-g2-n4-s0-*"):
        shutil.rmtree(place)


def test_an_evaluation_of_an_earlier_version_is_taken_and_its_folder_stays(folder: Path) -> None:
    config = EvalRunConfig(run=str(folder / "run"), images=3, guidance=(2.0,), sampler=("ddim",), steps=(4,), seed=9)
    first = eval_verb.evaluate_run(config)[0]
    (place,) = (folder / "run/evals").glob("*-n3-s9-*")
    before = place.rename(place.with_name(f"{128:012d}-ddim-4-g2-n3-s9"))
    card = json.loads((before / "card.json").read_text())
    (before / "card.json").write_text(json.dumps({k: v for k, v in card.items() if k != "weights_sha256"}))
    assert eval_verb.evaluate_run(config)[0] == replace(first, weights_sha256="")
    assert len(list((folder / "run/evals").glob("*-n3-s9*"))) == 1
    assert first.weights_sha256 == weights_digest(load_trained(str(folder / "run")).state)


def test_several_samplers_steps_and_scales_are_a_curve_in_the_report(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    config = EvalRunConfig(
        run=str(folder / "run"), images=4, guidance=(1.0, 2.0), sampler=("ddim", "euler"), steps=(4, 5), seed=7
    )
    assert eval_verb.main(config) == 0
    folders = sorted(place.name[: -len("-democlip-0123456789ab")] for place in (folder / "run/evals").glob("*-n4-s7-*"))
    assert folders == [
        f"000000000128-{sampler}-{steps}-g{guidance}-n4-s7"
        for sampler in ("ddim", "euler")
        for steps in (4, 5)
        for guidance in (1, 2)
    ]
    printed = capsys.readouterr().out
    assert "8 of 8: euler-5-g2-n4-s7" in printed and "report: " in printed
    with pytest.raises(ConfigError, match="start at timestep"):
        eval_verb.main(replace(config, steps=(4, 3), seed=8))
    assert not list((folder / "run" / "evals").glob("*-n4-s8-*"))  # refused before the first image


def test_eval_verb_and_training_agree_on_the_same_weights(folder: Path, config: TrainConfig) -> None:
    tower = load_encoders(load_trained(config.run).contract)[1]
    assert tower is not None
    empty = encode_captions(tower, [""])[0]
    evaluate = in_training(
        config, open_storage(config.run), World(), load_manifest(open_storage(config.data.train)), empty
    )
    inside = evaluate(make_denoiser(config).state_dict(), 128, lambda: False)
    request = EvalRunConfig(run=config.run, images=12, guidance=(2.0,), sampler=("ddim",), steps=(4,), batch=5)
    outside = eval_verb.evaluate_run(request)[0].metrics
    assert {**inside, "seconds": 0} == {**outside, "seconds": 0}


def test_raw_weights_are_others_than_the_average(folder: Path) -> None:
    config = EvalRunConfig(run=str(folder / "run"), images=4, guidance=(2.0,), sampler=("ddim",), steps=(4,))
    ema, raw = (eval_verb.evaluate_run(replace(config, weights=which))[0] for which in ("ema", "raw"))
    assert ema.metrics["clip_score"] != raw.metrics["clip_score"] and raw.weights == "raw"


def test_evaluation_refuses_what_does_not_fit(folder: Path, tmp_path: Path, parts: dict[str, Any]) -> None:
    run = str(folder / "run")
    with pytest.raises(RunError, match="no checkpoint at 64"):
        eval_verb.main(EvalRunConfig(run=run, at=64))
    with pytest.raises(DatasetError, match="latentmill reference"):
        eval_verb.main(EvalRunConfig(run=run, reference=str(tmp_path / "none.safetensors")))
    with pytest.raises(ConfigError, match="guidance"):
        eval_verb.main(EvalRunConfig(run=run, guidance=()))
    reference = parts["reference"]
    for change in ({"resolution": 128}, {"crop": "random"}, {"features_sha256": "0" * 64}, {"vae_sha256": "0" * 64}):
        url = str(tmp_path / "other.safetensors")
        save_reference(url, replace(reference, facts=replace(reference.facts, **change)))
        with pytest.raises(ContractMismatch, match="does not fit this run"):
            eval_verb.main(EvalRunConfig(run=run, reference=url, images=4))
    (tmp_path / "damaged.safetensors").write_bytes(b"\x10" * 64)
    with pytest.raises(DatasetError, match="make them again"):
        load_reference(str(tmp_path / "damaged.safetensors"))


def test_a_run_loads_its_encoders_from_where_it_is_told(
    folder: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A contract holds no absolute paths; a run's own `encoders`, or a verb's, say where they are."""
    trained, asked = load_trained(str(folder / "run")), []
    monkeypatch.setattr(
        trained_module,
        "load_encoders",
        lambda contract, device, override, *, named, beside: asked.append((override or named, beside)),
    )
    mine, run = EncodersConfig(vae="/mine"), EncodersConfig(vae="/run")
    told = replace(trained, info=replace(trained.info, config=replace(config, encoders=run)))
    trained.encoders()
    told.encoders()
    told.encoders(override=mine, beside=("/val",))
    data = (config.data.train, config.data.val)
    assert asked == [(None, data), (run, data), (mine, (*data, "/val"))]
    manifest = load_manifest(open_storage(config.data.train))
    with pytest.raises(ContractMismatch, match="not the encoders"):
        in_training(
            replace(config, encoders=EncodersConfig(seed=2)),
            open_storage(str(folder)),
            World(),
            manifest,
            torch.zeros(32, 128),
        )


def test_encoders_of_other_weights_are_refused(parts: dict[str, Any]) -> None:
    contract = parts["validation"].contract
    with pytest.raises(ContractMismatch, match="not the encoders that made the cache"):
        load_encoders(replace(contract, encoders={**contract.encoders, "seed": 2}))


def test_a_cards_figures_are_made_again(folder: Path, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    config = EvalRunConfig(run=str(folder / "run"), images=6, guidance=(1.5,), sampler=("heun",), steps=(3,), seed=5)
    card = eval_verb.evaluate_run(config)[0]
    (path,) = (folder / "run" / "evals").glob("000000000128-heun-3-g1.5-n6-s5-democlip-*/card.json")
    capsys.readouterr()
    assert cli.main(["eval", "--from-card", str(path)]) == 0
    said = capsys.readouterr().out
    assert card.line() in said and "reproduced: the figures are those of the card" in said and "to 0 of" in said
    facts = json.loads(path.read_text())
    facts["metrics"]["fid_democlip"] *= 1.01
    moved = tmp_path / "card.json"
    moved.write_text(json.dumps(facts))
    again = EvalRunConfig(run=config.run, from_card=str(moved))
    assert eval_verb.main(again) == 1
    assert "not reproduced: fid_democlip" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="name the run with run="):
        eval_verb.main(EvalRunConfig(from_card=str(moved)))
    for key, change in (("reference", {"sha256": "0" * 64}), ("features", {"resize": "other"})):
        moved.write_text(json.dumps({**facts, key: {**facts[key], **change}}))
        with pytest.raises(ContractMismatch, match=f"cannot be made again.*{'resize' if key == 'features' else key}"):
            eval_verb.main(again)
    moved.write_text(json.dumps({**facts, "weights_sha256": "0" * 64}))
    with pytest.raises(ContractMismatch, match=r"cannot be made again.*weights: 000000000000 on the card"):
        eval_verb.main(again)
    moved.write_text(json.dumps({**facts, "n": 0}))
    with pytest.raises(RunError, match="no checkpoint at 0 samples"):
        eval_verb.main(again)
    moved.write_text("{}")
    with pytest.raises(ConfigError, match="no card of this version"):
        eval_verb.main(again)


@pytest.fixture
def narrow_inception(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inception with the first 256 of its 2,048 channels, since roots of their covariances take half a minute."""
    for name in ("inception", "inception_clean"):

        def load(source: Source, *arguments: Any) -> Features:
            whole = inception(source, *arguments)
            assert whole.classes is not None
            return replace(
                whole,
                width=256,
                network=lambda images: whole.network(images)[:, :256],
                classes=whole.classes[:, :256],
            )

        monkeypatch.setitem(FEATURES, name, replace(FEATURES[name], load=load, width=256))


@pytest.mark.usefixtures("narrow_inception")
def test_inception_figures_have_their_own_reference_and_resize(folder: Path, tmp_path: Path) -> None:
    """One made with another resize of the same network is refused."""
    source, dest = str(folder / SOURCE), str(tmp_path / "inception.safetensors")
    cache = str(folder / "cache")
    reference_verb.main(ReferenceConfig(dataset=cache, source=source, dest=dest, features="inception", images=12))
    config = EvalRunConfig(
        run=str(folder / "run"), images=6, sampler=("ddim",), steps=(4,), reference=dest, features="inception"
    )
    card = eval_verb.evaluate_run(config)[0]
    assert card.features is not None and card.features["resize"] == "tensorflow" and card.rank_deficient
    for name in ("fid_inception", "fid_inception_error", "kid_inception", "inception_score", "recall_inception"):
        assert np.isfinite(card.metrics[name])
    assert "fid_infinity_inception" not in card.metrics  # six images are far too few
    assert "tensorflow resize" in card.line() and "fid_inception" in card.line()
    with pytest.raises(ContractMismatch, match="features inception, not inception_clean"):
        eval_verb.evaluate_run(replace(config, features="inception_clean"))


# --------------------------------------------------------------------------------------------------------------------
# References


def test_reference_is_of_the_images_that_are_not_held_out(folder: Path, parts: dict[str, Any]) -> None:
    reference, features = parts["reference"], parts["features"]
    pictures = np.stack([render(scene(1, i, "val")) for i in range(IMAGES)])
    assert (reference.facts.held, reference.facts.images) == (IMAGES // 2, IMAGES // 2)
    torch.testing.assert_close(reference.real, features(pictures[: IMAGES // 2]), rtol=1e-4, atol=1e-5)
    expected = Statistics.of(features(pictures[IMAGES // 2 :])).gaussian()
    torch.testing.assert_close(reference.gaussian.mean, expected.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(reference.gaussian.cov, expected.cov, rtol=1e-3, atol=1e-6)
    assert reference.facts.scores["attribute_accuracy_real"] == 1.0


def test_floors_are_of_as_many_images_as_asked_for(parts: dict[str, Any]) -> None:
    reference = parts["reference"]
    floors = reference.floors(8)
    assert floors["images"] == 8
    with pytest.warns(UserWarning, match="rank deficient"):
        assert floors["real"] == fid(Statistics.of(reference.real[:8]).gaussian(), reference.gaussian)
    assert floors["reconstruction"] > floors["real"]  # of an untrained autoencoder
    assert reference.floors(10_000)["images"] == IMAGES // 2
    assert reference.facts.floors[str(IMAGES // 2)]["real"] == reference.floors(IMAGES // 2)["real"]


def test_reference_refuses_another_source(folder: Path, tmp_path: Path) -> None:
    storage = open_storage(str(folder / "cache"))
    manifest = load_manifest(storage)
    with pytest.raises(LatentmillError, match=r"is not what .* was made from"):
        list(real_images(storage, manifest, str(folder / "shapes" / "00000.tar"), IMAGES))
    for name in ("00000.tar", "00001.tar"):
        (tmp_path / name).write_bytes((folder / "shapes" / name).read_bytes())
    tar = tmp_path / "00000.tar"
    data = bytearray(tar.read_bytes())
    place = data.index(b"IDAT") + 40  # inside the first picture
    data[place] ^= 1
    tar.write_bytes(data)
    with pytest.raises(LatentmillError):
        list(real_images(storage, manifest, str(tmp_path / "{00000..00001}.tar"), IMAGES))


def test_real_images_are_those_of_their_records(folder: Path) -> None:
    storage = open_storage(str(folder / "cache"))
    pairs = list(real_images(storage, load_manifest(storage), str(folder / SOURCE), IMAGES - 5))
    assert len(pairs) == IMAGES - 5
    for i, (picture, record) in enumerate(pairs):
        assert record.meta["caption"] == scene(1, i, "val").caption
        np.testing.assert_array_equal(picture, render(scene(1, i, "val")))


# --------------------------------------------------------------------------------------------------------------------
# Parts


def test_pixels_come_back_from_the_networks_range() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    x = from_uint8(levels)
    assert x.shape == (1, 3, 16, 16) and float(x.min()) == -1 and float(x.max()) == 1
    np.testing.assert_array_equal(to_uint8(x), levels)
    assert to_uint8(torch.tensor([[[[2.0, float("nan")]]] * 3]).view(1, 3, 1, 2)).tolist() == [[[[255] * 3, [0] * 3]]]


def test_accuracies_of_parts_add_up_to_those_of_the_whole() -> None:
    scenes = [scene(0, i, "val") for i in range(30)]
    pictures = np.stack([render(s) for s in scenes])
    captions = [s.caption for s in scenes]
    captions[3:9] = captions[4:10]  # some are wrong
    whole = shapes_accuracy(pictures, captions)
    merged = merge_accuracies([shapes_accuracy(pictures[a:b], captions[a:b]) for a, b in ((0, 1), (1, 20), (20, 30))])
    assert 0 < merged["overall"] < 1
    assert merged == whole


def test_accuracy_is_no_figure_when_a_caption_cannot_be_read() -> None:
    pictures = np.stack([render(scene(0, i)) for i in range(2)])
    assert "overall" not in merge_accuracies([shapes_accuracy(pictures, [scene(0, 0).caption, "a photo of my dog"])])
    assert shapes_accuracy(np.zeros((1, 32, 32, 3), np.uint8), ["a red circle"]) == {}
    assert merge_accuracies([{}]) == {
        "n": 0,
        "unread": 0,
        "by_objects": {},
        "n_by_objects": {},
        "by_attribute": {},
        "n_by_attribute": {},
    }


def test_a_result_is_there_when_its_metrics_are(
    parts: dict[str, Any], config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = Evaluator(**parts)(make_denoiser(config), 3, images=2, sampler=SamplerConfig(sampler="ddim", steps=4))
    run = open_storage(str(tmp_path))
    order: list[str] = []
    put = run.put

    def watched(key: str, data: bytes) -> None:
        order.append(key)
        put(key, data)

    monkeypatch.setattr(run, "put", watched)
    assert write(run, result, "quick") == "evals/000000000003-quick"
    assert order[-1].endswith("metrics.json") and len(order) == 4
    assert GRID_COLUMNS == 8
