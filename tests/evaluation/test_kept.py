"""The names of evaluations hold all that these depend on, and a card that is hostile or damaged is none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from made.report import fake_run
from pipeline import eval as eval_verb
from pipeline.config import DiffusionConfig, EvalRunConfig, SamplerConfig, TrackingConfig
from pipeline.errors import ConfigError, LatentmillError, ParseError, WeightsError
from pipeline.eval import table
from pipeline.evaluation import beside
from pipeline.evaluation.card import Card, parse_card
from pipeline.evaluation.kept import full_name, kept_card, short_name
from pipeline.evaluation.reproduced import differences
from pipeline.evaluation.runs import cards
from pipeline.evaluation.runs.cards import perceptual_of
from pipeline.evaluation.stored import _json
from pipeline.models.weights import weights_digest
from pipeline.report import page
from pipeline.report.run import load
from pipeline.storage.urls import open_storage
from pipeline.tracking.tracker import Tracker, read_rows

SAMPLER = SamplerConfig(sampler="ddim", steps=4, guidance=2.0)
CARD = Card(
    metrics={"fid_democlip": 2.5, "clip_score": 20.0, "images": 8, "weights": "ema"},
    images=8,
    n=64,
    weights="ema",
    weights_sha256="aa" * 32,
    sampler="ddim",
    steps=4,
    guidance=2.0,
    seed=0,
    task="text",
    captions={"dataset": "cd" * 32, "records": 8},
    vae_sha256="ee" * 32,
    clip={"name": "demo", "text_sha256": "11" * 32, "image_sha256": "22" * 32},
    features={"name": "democlip", "sha256": "33" * 32, "resize": "bicubic"},
    reference={"sha256": "44" * 32, "images": 100},
    rank_deficient=True,
    device="cpu",
)


REST = (8, SAMPLER, "ema", "aa")


def features(**changes: str) -> Any:
    return SimpleNamespace(**({"name": "democlip", "sha256": "33" * 32, "resize": "bicubic"} | changes))


def evaluator(**changes: Any) -> Any:
    """What names an evaluation, in place of an Evaluator with its networks."""
    parts = {
        "seed": 0,
        "task": "text",
        "diffusion": DiffusionConfig(),
        "validation": SimpleNamespace(digest="cd" * 32, taken="1"),
        "first_stage": SimpleNamespace(weights_sha256="ee" * 32),
        "tower": SimpleNamespace(weights_sha256="11" * 32, image_sha256="22" * 32),
        "features": features(),
        "perceptual": None,
        "tiles": {},
        "precision": {},
        "reference": SimpleNamespace(sha256="44" * 32),
        "steering": SimpleNamespace(facts={}),
        "differing": lambda card, weights: [],
    }
    return SimpleNamespace(**(parts | changes))


OTHERS: dict[str, tuple[Any, ...]] = {
    "nothing": (evaluator(), *REST),
    "the weights": (evaluator(), 8, SAMPLER, "ema", "bb"),
    "the average": (evaluator(), 8, SAMPLER, "ema=0.1", "aa"),
    "an average close to it": (evaluator(), 8, SAMPLER, "ema=0.1", "cc"),
    "raw weights": (evaluator(), 8, SAMPLER, "raw", "aa"),
    "images": (evaluator(), 9, SAMPLER, "ema", "aa"),
    "the seed": (evaluator(seed=1), *REST),
    "the sampler": (evaluator(), 8, replace(SAMPLER, sampler="euler"), "ema", "aa"),
    "steps": (evaluator(), 8, replace(SAMPLER, steps=5), "ema", "aa"),
    "guidance": (evaluator(), 8, replace(SAMPLER, guidance=2.5), "ema", "aa"),
    "guidance in its seventh digit": (evaluator(), 8, replace(SAMPLER, guidance=2.0000001), "ema", "aa"),
    "guidance_low": (evaluator(), 8, replace(SAMPLER, guidance_low=0.1), "ema", "aa"),
    "guidance_high": (evaluator(), 8, replace(SAMPLER, guidance_high=0.1), "ema", "aa"),
    "rescale": (evaluator(), 8, replace(SAMPLER, rescale=0.1), "ema", "aa"),
    "the reference": (evaluator(reference=SimpleNamespace(sha256="55" * 32)), *REST),
    "no reference": (evaluator(reference=None), *REST),
    "the captions": (evaluator(validation=SimpleNamespace(digest="66" * 32, taken="1")), *REST),
    "the caption of each record": (evaluator(validation=SimpleNamespace(digest="cd" * 32, taken="2")), *REST),
    "the autoencoder": (evaluator(first_stage=SimpleNamespace(weights_sha256="7" * 64)), *REST),
    "the text tower": (evaluator(tower=SimpleNamespace(weights_sha256="8", image_sha256="22" * 32)), *REST),
    "features of other weights": (evaluator(features=features(sha256="9")), *REST),
    "features": (evaluator(features=features(name="inception")), *REST),
    "a resize": (evaluator(features=features(resize="other")), *REST),
    "the perceptual distance": (evaluator(perceptual=SimpleNamespace(sha256="a" * 64)), *REST),
    "what images begin from": (evaluator(steering=SimpleNamespace(facts={"strength": 0.5})), *REST),
    "a file that steers": (evaluator(steering=SimpleNamespace(facts={"target": "ab"})), *REST),
    "tiles": (evaluator(tiles={"denoise": 64}), *REST),
    "other tiles": (evaluator(tiles={"denoise": 64, "decode": 64}), *REST),
    "bf16": (evaluator(precision={"denoiser": "bf16"}), *REST),
    "TF32": (evaluator(precision={"tf32": True}), *REST),
    "a decoder in bf16": (evaluator(precision={"decoder": "bf16"}), *REST),
    "the schedule": (evaluator(diffusion=DiffusionConfig(beta_end=0.02)), *REST),
}


def test_evaluations_that_differ_in_anything_have_names_of_their_own() -> None:
    names = {what: full_name(*arguments) for what, arguments in OTHERS.items()}
    assert len(set(names.values())) == len(names), names
    assert full_name(*OTHERS["nothing"]) == names["nothing"]
    assert full_name(evaluator(), 8, replace(SAMPLER, batch=3), "ema", "aa") == names["nothing"]  # rounding alone
    assert names["nothing"].startswith("ddim-4-g2-n8-s0-democlip-") and len(names["nothing"]) < 60
    assert names["no reference"].startswith("ddim-4-g2-n8-s0-") and "democlip" not in names["no reference"]
    assert names["the average"].startswith("ddim-4-g2-n8-s0-ema0.1-democlip-")
    assert names["bf16"].startswith("ddim-4-g2-n8-s0-bf16-democlip-")


def test_weights_are_told_apart_by_a_bit_a_name_or_a_shape() -> None:
    state = {"a": torch.zeros(2, 3), "b": torch.ones(4)}
    others = [
        {"b": torch.ones(4), "a": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2), "b": torch.ones(4)},
        {"a": torch.zeros(2, 3), "c": torch.ones(4)},
        {"a": torch.zeros(2, 3), "b": torch.tensor([1, 1, 1, 1.0000001])},
        {"a": -torch.zeros(2, 3), "b": torch.ones(4)},
    ]
    assert [weights_digest(other) == weights_digest(state) for other in others] == [True, *[False] * 4]


def test_an_evaluation_is_taken_under_its_name_and_under_that_of_before(tmp_path: Path) -> None:
    run, asked = open_storage(str(tmp_path)), (evaluator(), 8, SAMPLER, "ema", "aa" * 32)
    assert kept_card(run, 64, *asked) is None
    for name in (short_name(8, 0, SAMPLER, "ema"), full_name(*asked)):
        folder = f"evals/{64:012d}-{name}"
        run.put(f"{folder}/card.json", _json(CARD.to_json()))
        assert kept_card(run, 64, *asked) is None  # it is not complete
        run.put(f"{folder}/metrics.json", _json(CARD.metrics))
        assert kept_card(run, 64, *asked) == CARD
        for key, value in (("guidance", 2.0000001), ("seed", 1), ("images", 9), ("weights", "raw"), ("n", 65)):
            run.put(f"{folder}/card.json", _json(CARD.to_json() | {key: value}))
            assert kept_card(run, 64, *asked) is None, key
        for damaged in (b"", b"[]", b"{}", b"[" * 200_000):
            run.put(f"{folder}/card.json", damaged)
            assert kept_card(run, 64, *asked) is None
    assert short_name(8, 0, SAMPLER, "ema") == "ddim-4-g2-n8-s0"


def test_a_card_is_read_as_it_was_written_and_one_of_before_has_no_hash_of_its_weights() -> None:
    assert parse_card(_json(CARD.to_json())) == CARD
    before = {name: value for name, value in CARD.to_json().items() if name != "weights_sha256"}
    assert parse_card(_json(before)).weights_sha256 == ""
    assert "weights_sha256" not in replace(CARD, weights_sha256="").to_json()


def test_figures_that_are_no_numbers_are_null_and_can_be_shown_and_compared() -> None:
    card = parse_card(_json(replace(CARD, metrics={**CARD.metrics, "fid_democlip": float("nan")}).to_json()))
    assert card.metrics["fid_democlip"] is None
    assert "fid_democlip nan" in card.line()
    assert [row.split() for row in table([CARD, card]).splitlines()][3] == ["fid_democlip", "2.5", "-"]
    again = {**CARD.metrics, "fid_democlip": float("nan")}
    assert differences(card.metrics, again) == {"clip_score": 0.0, "fid_democlip": 0.0, "images": 0.0}
    assert differences(CARD.metrics, again)["fid_democlip"] == float("inf")


HOSTILE = [
    {"metrics": []},
    {"metrics": {"fid_democlip": "2.5"}},
    {"metrics": {"clip_score": 1e308}},
    {"metrics": {}},
    {"images": 0},
    {"images": 10**12},
    {"images": 8.0},
    {"images": True},
    {"n": -1},
    {"n": 2**63},
    {"weights": "ema=abc"},
    {"weights": "ema=nan"},
    {"weights": "ema=1e999"},
    {"weights": "../../x"},
    {"sampler": "os.system"},
    {"steps": 0},
    {"steps": 10**9},
    {"batch": -5},
    {"guidance": "high"},
    {"guidance": -1.0},
    {"guidance_settings": {"batch": 3}},
    {"guidance_settings": {"rescale": -1.0}},
    {"seed": -1},
    {"seed": 2**64},
    {"captions": {}},
    {"captions": {"dataset": 5}},
    {"clip": {}},
    {"judge": []},
    {"judge": {"truth": 5}},
    {"judge": {"truth": "x" * 101}},
    {"judge": {"figures": [["psnr"]]}},
    {"features": {"name": "democlip"}},
    {"features": ["democlip"]},
    {"reference": {"sha256": "x"}},
    {"reference": {"sha256": 5, "images": 100}},
    {"versions": {}},
    {"format": 2},
    {"a_setting_of_a_newer_version": 1},
]


@pytest.mark.parametrize("changes", HOSTILE, ids=str)
def test_a_card_that_is_none_is_refused_by_name(tmp_path: Path, changes: dict[str, Any]) -> None:
    url = str(tmp_path / "card.json")
    Path(url).write_bytes(json.dumps(CARD.to_json() | changes).encode())
    with pytest.raises(ConfigError, match=f"^from_card={url}: no card of this version is there"):
        eval_verb.main(EvalRunConfig(from_card=url, run=str(tmp_path)))


@pytest.mark.parametrize("data", [b"", b"null", b"[]", b"{}", b"[" * 200_000, b"\xff", b'{"line": NaN}', b"\0" * 100])
def test_bytes_that_are_no_card_are_refused(data: bytes) -> None:
    with pytest.raises(ParseError):
        parse_card(data)


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_damage_of_a_card_leaves_a_card_that_can_be_shown_or_a_line(data: st.DataObject) -> None:
    value = data.draw(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        )
    )
    facts = CARD.to_json()
    name = data.draw(st.sampled_from(sorted(facts)))
    if isinstance(facts[name], dict) and facts[name] and data.draw(st.booleans()):
        facts[name] = {**facts[name], data.draw(st.sampled_from(sorted(facts[name]))): value}
    else:
        facts[name] = value
    try:
        card = parse_card(json.dumps(facts).encode())
    except LatentmillError:
        return
    assert card.line() and table([CARD, card]) and differences(CARD.metrics, card.metrics)


# --------------------------------------------------------------------------------------------------------------------
# The report of evaluations side by side


def test_curves_against_other_references_are_drawn_apart_and_named(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run")
    for reference, factor in (("44", 1.0), ("55", 2.0)):
        for guidance in (1, 2):
            folder = run / "evals" / f"{40_000:012d}-ddim-4-g{guidance}-n8-s0-democlip-{reference * 6}"
            folder.mkdir()
            figures = {
                "guidance": guidance,
                "clip_score": 20.0 + guidance,
                "fid_democlip": factor * guidance,
                "images": 8,
            }
            (folder / "metrics.json").write_text(json.dumps(figures))
            card = {"sampler": "ddim", "steps": 4, "weights": "ema", "reference": {"sha256": reference * 32}}
            (folder / "card.json").write_text(json.dumps(card))
    html = page.page([load(str(run))], {})
    for reference in ("44", "55"):
        assert f"8 images, reference {reference * 6}, at 40k</li>" in html
        assert f"<td>{reference * 6}</td>" in html


def test_figures_inside_training_against_other_references_are_said_not_to_compare(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path / name) for name in "ab"]
    for number, n in enumerate((13_333, 40_000)):
        card = {"reference": {"sha256": f"{number}{number}" * 32}, "captions": {"dataset": "cd" * 32}}
        (runs[0] / "evals" / f"{n:012d}" / "card.json").write_text(json.dumps(card))
    html = page.page([load(str(runs[0]))], {})
    said = "The evaluations inside training differ in their reference (000000000000 at 13,333; 111111111111 at 40,000)"
    assert said in html and "captions" not in html.partition(said)[2][:200]
    assert "differ" not in page.page([load(str(runs[1]))], {})
    metrics = json.loads((runs[1] / f"evals/{40_000:012d}/metrics.json").read_text())
    (runs[1] / f"evals/{40_000:012d}/metrics.json").write_text(json.dumps(metrics | {"images": 64}))
    assert "The runs&#x27; last evaluations differ in their number of images" in page.page(
        [load(str(r)) for r in runs], {}
    )


def test_perceptual_distances_of_other_weights_are_said_not_to_compare(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run")
    for number, n in enumerate((13_333, 40_000)):
        card = {"judge": {"perceptual": "st-alex", "perceptual_sha256": f"{number}{number}" * 32}}
        (run / "evals" / f"{n:012d}" / "card.json").write_text(json.dumps(card))
    said = (
        "differ in their perceptual weights (000000000000 at 13,333; 111111111111 at 40,000), so figures do not compare"
    )
    assert said in page.page([load(str(run))], {})


@pytest.mark.parametrize(
    ("on_card", "own", "taken"),
    [
        (None, "st-vgg", "none"),
        ("st-alex", "none", "st-alex"),
        ("st-alex", "mine.pth", "mine.pth"),
        ("https://elsewhere/w.pth", "none", "none"),  # a card names no file that is read
        (["st-alex"], "none", "none"),
    ],
)
def test_a_figure_is_made_again_with_the_runs_perceptual_distance_or_the_published_one(
    monkeypatch: pytest.MonkeyPatch, on_card: Any, own: str, taken: str
) -> None:
    config = SimpleNamespace(eval=SimpleNamespace(perceptual=own))
    monkeypatch.setattr(cards, "load_run", lambda url: SimpleNamespace(config=config))
    card = replace(CARD, judge={} if on_card is None else {"perceptual": on_card})
    assert perceptual_of(card, "run") == taken


# --------------------------------------------------------------------------------------------------------------------
# Evaluations beside training


@pytest.mark.parametrize("name", ["64/ema.safetensors", "²²²²²²²²²²²²/ema.safetensors", "0064 (copy)/ema.safetensors"])
def test_a_snapshot_that_others_left_is_none(tmp_path: Path, name: str) -> None:
    """Nothing of it would be read, so it would be pending for ever."""
    run = open_storage(str(tmp_path))
    run.put(f"evals/{name}", b"x")
    run.put(f"evals/{64:012d}/.ipynb_checkpoints/ema.safetensors", b"x")
    assert beside.pending(run) == []
    run.put(f"evals/{64:012d}/ema.safetensors", b"x")
    assert beside.pending(run) == [64]


@pytest.mark.parametrize("data", [b"", b"x" * 100, b"\xff" * 8 + b"{}", (2**62).to_bytes(8, "little") + b"{}"])
def test_a_damaged_snapshot_is_named_with_what_to_do(tmp_path: Path, data: bytes) -> None:
    run = open_storage(str(tmp_path))
    run.put(f"evals/{64:012d}/ema.safetensors", data)
    with pytest.raises(WeightsError, match=r"ema\.safetensors is damaged .*: delete it"):
        beside.read_snapshot(run, 64)


def test_damaged_figures_of_one_evaluation_keep_no_other_from_the_tracker(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = open_storage(str(tmp_path))
    run.put(beside.figures(run, 8), b"[" * 200_000)
    run.put(beside.figures(run, 16), b'{"clip_score": 2.0}')
    run.put(f"evals/{16:012d}/grid.json", b"null")
    run.put("evals/24/metrics.json", b'{"clip_score": 2.0}')
    with Tracker(run, TrackingConfig(wandb="off")) as tracker:
        jobs = beside.Jobs(run, tracker, beside.Starter("nothing", "", "cpu", None))
        for _ in range(2):
            jobs._bring()
    assert [(row["n"], row["clip_score"]) for row in read_rows(tmp_path / "metrics.jsonl")] == [(16, 2.0)]
    assert capsys.readouterr().err.count(f"{8:012d}/metrics.json is damaged") == 1
