"""The study of latent scales: its arms, how its pictures are judged, that its steps are commands that can be, and what
it writes. Its commands are not run here, but for the last test, which runs them all with tiny sizes."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import signal_to_noise
from benchmarks.compression import runner as running
from benchmarks.latent_scale import measure, rescaled
from benchmarks.latent_scale.judged import Rows, decided, figures, mosaics, parts, repeated, rows_of, spread
from benchmarks.latent_scale.page import MOST_BYTES, small
from benchmarks.latent_scale.plan import ARMS, QUICK, USUAL, Plan, equal_at, log_ratios, mismatch
from made.task_run import make_task_run
from pipeline.conditions.facts import Conditions, LabelFacts
from pipeline.config import EncodersConfig, SemanticTask
from pipeline.config.loading.load import load
from pipeline.models.encoders.autoencoder import load_network
from pipeline.verbs import VERBS
from preprocess.shapes.drawing import label_map, render, scene

PLAN = Plan()


def scenes(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Real pictures (N, 64, 64, 3) and their label maps (N, 32, 32)."""
    drawn = [scene(0, i, "val") for i in range(count)]
    return np.stack([render(one) for one in drawn]), np.stack([label_map(one)[1::2, 1::2] for one in drawn])


# --------------------------------------------------------------------------------------------------------------------
# Arms


def test_scaling_latents_moves_the_ratio_at_every_timestep_and_the_shifted_schedule_moves_it_back() -> None:
    small_arm, usual, large, shifted = ARMS
    for arm in (small_arm, large):
        moved = np.array(log_ratios(arm)) - np.array(log_ratios(usual))
        assert np.allclose(moved, 2 * math.log(arm.factor))
    assert mismatch(usual) == 1 and mismatch(large) == pytest.approx(3.2**2)
    assert shifted.factor == large.factor and mismatch(shifted) < 1.45
    assert equal_at(small_arm) < equal_at(usual) < equal_at(large)
    assert abs(equal_at(shifted) - equal_at(usual)) < 40


def test_the_rescaled_autoencoder_has_the_demos_weights_and_latents_as_many_times_as_large(tmp_path: Path) -> None:
    assert rescaled.main(["factor=3.2", f"dest={tmp_path / 'stage'}"]) == 0
    usual = load_network(EncodersConfig(vae="demo"))
    made = load_network(EncodersConfig(vae=str(tmp_path / "stage")))
    assert made.scale == pytest.approx(3.2 * usual.scale)
    assert made.weights_sha256 == usual.weights_sha256


# --------------------------------------------------------------------------------------------------------------------
# Judging


def test_every_size_asks_for_every_map_once_and_is_cut_as_it_was_put_together() -> None:
    labels = np.arange(16 * 6, dtype=np.uint8).reshape(16, 2, 3)
    for side in (1, 2, 4):
        one = mosaics(16, side)
        whole = one.labels(labels)
        assert whole.shape == (16 // side**2, 2 * side, 3 * side) and len(one) == len(whole)
        assert np.array_equal(parts(whole, side).reshape(16, 2, 3), labels[one.numbers.reshape(-1)])
        assert sorted(one.numbers.reshape(-1).tolist()) == list(range(16))
    four = parts(repeated(3).labels(labels), 2)
    assert all(np.array_equal(four[k, i], labels[k]) for k in range(3) for i in range(4))


def test_a_larger_picture_is_judged_as_its_parts_are_alone() -> None:
    pictures, labels = scenes(16)
    alone = rows_of(pictures, labels, 1)
    one = mosaics(16, 2)
    larger = np.stack([np.block([[[pictures[k]] for k in row] for row in rows]) for rows in one.numbers.tolist()])
    rows = rows_of(larger, one.labels(labels), 2)
    assert [row for own in rows for row in own] == [own[0] for own in alone]
    found = figures(rows, alone, one.numbers)
    assert found["label_iou"] > 0.95 and found["retention"] == 1 and found["retention_error"] == 0
    worse: Rows = [[{**row, "both_0": 0.0} for row in own] for own in rows[2:]]
    assert 0.9 < figures(rows[:2] + worse, alone, one.numbers)["retention"] < 1


def test_the_background_of_real_pictures_is_one_and_of_pictures_side_by_side_is_not() -> None:
    pictures, labels = scenes(16)
    assert spread(pictures, labels) < 0.5
    one = mosaics(16, 2)
    larger = np.stack([np.block([[[pictures[k]] for k in row] for row in rows]) for rows in one.numbers.tolist()])
    greys = [scene(0, i, "val").background for i in range(16)]
    variances = [np.var(greys[i : i + 4], ddof=1) for i in range(0, 16, 4)]
    assert spread(larger, one.labels(labels)) == pytest.approx(float(np.sqrt(np.mean(variances))), abs=0.5)
    full = np.ones_like(labels)
    assert math.isnan(spread(pictures, full)), "there is no background"


def test_what_is_decided_is_the_share_of_the_last_pictures_variance_that_is_there() -> None:
    last = 220 + 12 * np.random.RandomState(0).normal(size=400)
    middle = last.mean()
    rows = np.stack([np.full(400, middle), middle + 0.5 * (last - middle), last + 1, last])
    rows[0, 3] = np.nan
    assert decided(rows) == pytest.approx([0, 0.25, 1, 1])
    assert decided(rows * 0 + 5) == [0] * 4, "no background differs"


def test_a_run_is_drawn_at_each_size_for_the_same_maps_and_seen_after_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_task_run(tmp_path, SemanticTask(), Conditions(labels=LabelFacts(count=25, grid=2)), channels=3)
    labels = scenes(4)[1]
    monkeypatch.setattr(measure, "label_maps", lambda settings: labels)
    words = [f"run={made.config.run}", "val=none", "at=64", "maps=4", "sides=1,2", "repeated=1", "walk=2"]
    words += ["sampler=dpmpp_2m", "steps=2", f"dest={tmp_path / 'measured'}"]
    assert measure.main(words) == 0
    found = json.loads((tmp_path / "measured" / "figures.json").read_text())
    assert list(found["at"]["64"]) == ["64", "128", "repeated"]
    assert found["at"]["64"]["64"]["retention"] == 1
    with np.load(tmp_path / "measured" / "pictures.npz", allow_pickle=False) as kept:
        assert kept["drawn-64"].shape == (4, 64, 64, 3) and kept["drawn-128"].shape == (1, 128, 128, 3)
        assert np.array_equal(kept["asked-128"][0], mosaics(4, 2).labels(labels)[0])
        assert kept["walk"].shape == (2, 3, 64, 64, 3)
        apart = np.abs(kept["walk"][:, -1].astype(int) - kept["drawn-64"][:2])
        assert apart.max() <= 1, "what is seen in the end is what is drawn"
    assert found["walk"]["background_decided"][-1] == pytest.approx(1)


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ([], "run=, val= and dest= are missing"),
        (["run=r", "val=v", "dest=d", "maps=6", "sides=1,2"], "the number of maps is a multiple"),
        (["run=r", "val=v", "dest=d", "sides=2"], "sides begin with 1"),
        (["run=r", "val=v", "dest=d", "sides=1,b"], "whole numbers with commas"),
        (["run=r", "val=v", "dest=d", "sampler=heun"], "heun predicts twice a step"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(
    words: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measure.main(words) in (1, 2)
    said = capsys.readouterr().err
    assert hint in said and said.count("\n") == 1


# --------------------------------------------------------------------------------------------------------------------
# The study


class Machine:
    """Stands for the machine: writes what a command would leave behind, and keeps the commands. ends_at: words of one
    that is stopped."""

    def __init__(self) -> None:
        self.commands: list[tuple[str, ...]] = []
        self.ends_at = ""

    def run(self, words: tuple[str, ...]) -> int:
        if self.ends_at and self.ends_at in " ".join(words):
            return 143
        self.commands.append(words)
        values = dict(word.split("=", 1) for word in words[1:])
        if words[0] in VERBS and words[0] not in [other[0] for other in self.commands[:-1]]:
            load(words[0], list(words[1:]))  # raises for a key that there is not
        makers: dict[str, Callable[[], None]] = {
            "synth": lambda: Path(values["dest"]).mkdir(parents=True),
            "encode": lambda: put(Path(values["dest"]) / "manifest.json", "{}"),
            "train": lambda: put(Path(values["run"]) / "config.yaml", ""),
            "benchmarks.latent_scale.rescaled": lambda: put(Path(values["dest"]) / "config.json", "{}"),
            "benchmarks.latent_scale.measure": lambda: measured(values),
        }
        makers[words[0]]()
        return 0


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def measured(values: dict[str, str]) -> None:
    """Figures and plain pictures, as measure.py leaves them."""
    sides = [*map(int, values["sides"].split(",")), *map(int, values["large"].split(","))]
    cell = {"label_iou": 0.8125, "label_iou_error": 0.01, "label_accuracy": 0.99, "retention": 0.9375}
    cell |= {"retention_error": 0.02, "background_spread": 1.25, "background_apart": 13.0}
    steps = int(values["steps"])
    found: dict[str, Any] = {"at": {}}
    for n in values["at"].split(","):
        found["at"][n] = {str(64 * side): cell for side in sides}
    found["walk"] = {
        "log_snr": np.linspace(-5, 4, steps).tolist(),
        "background_decided": np.linspace(0, 1, steps + 1).tolist(),
        "label_iou": [0.5] * (steps + 1),
    }
    pictures = {"walk": np.full((2, steps + 1, 64, 64, 3), 200, np.uint8)}
    for side in sides[:3]:
        pictures[f"drawn-{64 * side}"] = np.full((2, 64 * side, 64 * side, 3), 200, np.uint8)
        pictures[f"asked-{64 * side}"] = np.full((2, 32 * side, 32 * side), 7, np.uint8)
    Path(values["dest"]).mkdir(parents=True)
    np.savez(Path(values["dest"]) / "pictures.npz", **pictures)  # type: ignore[arg-type]
    put(Path(values["dest"]) / "figures.json", json.dumps(found))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(running, "execute", made.run)
    return made


def study(tmp_path: Path, *words: str) -> int:
    return signal_to_noise.main([str(tmp_path / "study"), "--root", str(tmp_path / "checkout"), *words])


def test_arms_differ_in_scale_and_schedule_alone_and_are_judged_by_the_same_maps(
    tmp_path: Path, machine: Machine
) -> None:
    assert study(tmp_path) == 0
    trained = [words for words in machine.commands if words[0] == "train"]
    assert len(trained) == len(ARMS) * len(PLAN.seeds)
    own = ("data.train=", "run=", "encoders.vae=", "diffusion.beta", "seed=")
    assert len({tuple(word for word in words if not word.startswith(own)) for words in trained}) == 1
    assert [any("beta_end" in word for word in words) for words in trained[:4]] == [False, False, False, True]
    drawn = [words for words in machine.commands if words[0].endswith("measure")]
    elsewhere = ("run=", "val=", "dest=", "seed=")
    assert len({tuple(word for word in words if not word.startswith(elsewhere)) for words in drawn}) == 1
    for words in (*trained, *drawn):
        values = dict(word.split("=", 1) for word in words[1:])
        scale = re.findall(r"x[0-9.]+", Path(values["run"]).name)[0]
        assert Path(values.get("data.train", values.get("val", ""))).name.startswith(f"{scale}-")
    encodings = [words for words in machine.commands if words[0] == "encode"]
    assert len(encodings) == 3 * 2, "arms of one factor share their caches"


def test_what_it_writes_has_every_run_and_pictures_that_are_small(tmp_path: Path, machine: Machine) -> None:
    assert study(tmp_path) == 0
    (path,) = (tmp_path / "checkout" / "benchmarks" / "results").glob("signal-to-noise-*.md")
    text = path.read_text()
    assert text.count("0.812 +- 0.010") >= 8 * 4 and text.count("0.938 +- 0.020") >= 8 * 4
    assert all(f"| {arm.name}, seed {seed} " in text for arm in ARMS for seed in PLAN.seeds)
    assert str(tmp_path) not in text and "runs/signal/runs/x3.2-shifted-seed1" in text
    pictures = sorted((tmp_path / "checkout" / "docs" / "images").iterdir())
    assert [one.name.removeprefix("signal-to-noise-") for one in pictures] == [
        "128.png", "256.png", "background.svg", "ratio.svg", "steps.png",
    ]  # fmt: skip
    assert all(arm.words in pictures[2].read_text() for arm in ARMS)
    assert USUAL.words in pictures[3].read_text()


def test_pictures_have_levels_as_fine_as_fit_and_colours_in_their_place() -> None:
    plain = np.full((64, 64, 3), (201, 77, 3), np.uint8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(small(Image.fromarray(plain))))), plain)
    noise = np.random.RandomState(0).randint(0, 9, (220, 220, 3)).astype(np.uint8) + np.uint8(200)
    data = small(Image.fromarray(noise))
    assert len(data) <= MOST_BYTES
    assert np.abs(np.asarray(Image.open(io.BytesIO(data))).astype(int) - noise).max() <= 6


def test_the_study_goes_on_where_it_stopped_and_refuses_other_sizes(
    tmp_path: Path, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.ends_at = "train experiment=shapes_semantic data.train=" + str(tmp_path / "study" / "caches" / "x3.2")
    assert study(tmp_path) == 143
    before = list(machine.commands)
    machine.ends_at = ""
    assert study(tmp_path) == 0
    assert len(set(machine.commands)) == len(machine.commands) and before == machine.commands[: len(before)]
    count = len(machine.commands)
    assert study(tmp_path, "--page") == 0 and study(tmp_path) == 0
    assert len(machine.commands) == count
    capsys.readouterr()
    assert study(tmp_path, "--quick") != 0
    assert "holds a study with other sizes" in capsys.readouterr().err


def test_later_seeds_are_left_out_where_no_time_is_left(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10**9, 300))  # every step takes 300 s
    monkeypatch.setattr(running.time, "monotonic", lambda: float(next(clock)))
    assert study(tmp_path, "--minutes", "1") == 0
    assert [words[-1] for words in machine.commands if words[0] == "train"] != []
    assert len([words for words in machine.commands if words[0] == "train"]) == len(ARMS)


def test_a_list_runs_nothing_and_says_how_long_it_takes(
    tmp_path: Path, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert study(tmp_path, "--list") == 0
    said = capsys.readouterr().out
    assert machine.commands == [] and not (tmp_path / "study").exists()
    minutes = re.search(r"about (\d+) minutes in all", said)
    assert minutes is not None and 10 < int(minutes[1]) <= 25


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_the_whole_study_runs_with_tiny_sizes(tmp_path: Path) -> None:
    assert study(tmp_path, "--quick") == 0
    (path,) = (tmp_path / "checkout" / "benchmarks" / "results").glob("signal-to-noise-*.md")
    assert all(f"| {name}, seed 0 " in path.read_text() for name in QUICK.arms)
