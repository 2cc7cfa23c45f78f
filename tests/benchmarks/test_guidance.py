"""The figures of guidance: that their steps are commands that can be, on what CLIP's weight is chosen and on what it is
measured, what the page says of them, and how kept regions are measured. Networks run in the last tests alone."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import guidance_figures
from benchmarks.compression import runner as running
from benchmarks.guidance import kept
from benchmarks.guidance.page import PAGE
from benchmarks.guidance.plan import Plan
from benchmarks.guidance.results import Measured, Value, of, together
from benchmarks.guidance.sheet import GAP, MARGIN, WORDS, sheet
from made.run import make_cache, make_run
from pipeline import cli
from pipeline.config import UnconditionalTask
from pipeline.config.loading.load import load
from pipeline.evaluation.metrics.error_bars import wilson
from pipeline.evaluation.metrics.restoration import MOST_DB

PLAN = Plan()
RIGHT = {4.0: 0.75, 2.0: 0.5, 0.0: 0.046875, -2.0: 0.0}
"""Made-up shares of right classes by the classifier's weight."""
CLIP = {0.0: 0.0, 0.25: 0.015625, 0.5: 0.0625, 1.0: 0.09375}
CLAIMS = {0.25: 0.3, 0.5: 0.45, 1.0: 0.4}
"""Weight 1 shows most captions right and 0.5 most claims: claims decide."""
CLASS_KEPT = {0.25: 0.9375, 0.5: 0.75, 0.75: 0.25, 1.0: 0.046875}


class Machine:
    """Stands for the machine: writes what a command would leave behind, and keeps the commands. checks: whether each
    evaluation is looked at as the command line would. changed: figures that are others than usual."""

    def __init__(self) -> None:
        self.commands: list[tuple[str, ...]] = []
        self.changed: dict[str, float] = {}
        self.checks, self.checked = False, set[tuple[str, ...]]()

    def run(self, words: tuple[str, ...]) -> int:
        self.commands.append(words)
        values = dict(word.split("=", 1) for word in words[1:])
        if words[0] == "eval":
            if self.checks and tuple(values) not in self.checked:
                load("eval", list(words[1:]))  # raises for a key that there is not
                self.checked.add(tuple(values))  # others differ in their values alone
            for sampler in values["sampler"].strip("[]").split(","):
                self.evaluated(values, sampler)
        else:
            assert words[0] == "benchmarks.guidance.kept"
            case = ("both" if "again" in values else "guide") if "guide" in values else "plain"
            figures = {"kept": 26.0, "kept_error": 0.5, "mean": 28.5, "mean_error": 0.4, "away": 29.0, "images": 128}
            figures |= {f"{name}_reconstruction": 33.0 for name in ("kept", "mean", "away")}
            figures["kept"] = self.changed.get(case, figures["kept"])
            put(Path(values["dest"]), json.dumps(figures))
        return 0

    def evaluated(self, values: dict[str, str], sampler: str) -> None:
        """An evaluation with a card, as `eval` stores it."""
        images, seed, steps = (int(values[name].strip("[]")) for name in ("images", "seed", "steps"))
        steering: dict[str, Any] = {}
        if "guide" in values:
            steering[f"guide.{values['guide']}"] = float(values["guide.weight"])
        metrics: dict[str, Any] = {"n": 40_000, "whole_shapes": 0.6, "images": images}
        if "guide.classifier" in steering:
            steering["guide.classifier_sha256"] = "0" * 16
            share(metrics, "class_accuracy", RIGHT[steering["guide.classifier"]], images)
        if "guide.image" in steering:
            value = {0.0: 14.0, 2.0: 20.0, 8.0: 20.5}[steering["guide.image"]]
            steering["guide.factor"] = 4
            metrics |= {"guide_consistency": value + 0.2 * seed, "guide_consistency_error": 0.3}
        if "guide.clip" in steering:
            weight = steering["guide.clip"]
            share(metrics, "attribute_accuracy", self.changed.get("clip", CLIP[weight]), images)
            metrics["attribute_accuracy_by_attribute"] = {"colour": CLAIMS.get(weight, 0.0)}
            metrics["attribute_accuracy_by_objects"] = {"1": 0.1, "2": 0.0}
        if "strength" in values:
            strength = steering["strength"] = float(values["strength"])
            share(metrics, "class_kept", CLASS_KEPT[strength], images)
            metrics |= {"psnr_start": 30.0 - 16 * strength, "psnr_start_error": 0.2}
        if "keep" in values:
            steering["keep"] = True
            metrics |= {"psnr_kept": 18.5, "psnr_kept_error": 0.4, "psnr_kept_reconstruction": 33.2}
        said = "-".join(map(str, steering.values()))
        folder = Path(values["run"]) / "evals" / f"{sampler}-{steps}-n{images}-s{seed}-{'-'.join(steering)}-{said}"
        card = {"sampler": sampler, "steps": steps, "seed": seed, "images": images, "steering": steering}
        put(folder / "card.json", json.dumps(card))
        put(folder / "metrics.json", json.dumps(metrics))


def share(metrics: dict[str, Any], name: str, value: float, images: int) -> None:
    low, high = wilson(round(value * images), images)
    metrics |= {name: value, f"{name}_low": low, f"{name}_high": high}


def put(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    made = Machine()
    monkeypatch.setattr(running, "execute", made.run)
    put(tmp_path / "demo" / "unconditional" / "config.yaml", "run: r\n")
    put(tmp_path / "demo" / "unconditional" / "evals" / "000000040000" / "metrics.json", "of training")
    for name in ("cache-val/manifest.json", "cache-ref/manifest.json", "reference.safetensors"):
        put(tmp_path / "demo" / "data" / name)
    put(tmp_path / "classifier" / "config.yaml")
    return made


def figures(tmp_path: Path, *words: str) -> int:
    places = ["--demo", str(tmp_path / "demo"), "--classifier", str(tmp_path / "classifier")]
    return guidance_figures.main([str(tmp_path / "g"), *places, "--root", str(tmp_path / "checkout"), *words])


def keys(words: tuple[str, ...]) -> dict[str, str]:
    return dict(word.split("=", 1) for word in words[1:])


def rows_of(tmp_path: Path) -> dict[str, list[str]]:
    """Rows of the page's tables by their first cell."""
    text = (tmp_path / "checkout" / PAGE).read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows}


def test_the_demos_run_is_copied_and_its_own_folder_stays_as_it_is(tmp_path: Path, machine: Machine) -> None:
    before = sorted(path.relative_to(tmp_path) for path in (tmp_path / "demo").rglob("*"))
    assert figures(tmp_path) == 0
    assert {keys(words)["run"] for words in machine.commands} == {str(tmp_path / "g" / "unconditional")}
    assert sorted(path.relative_to(tmp_path) for path in (tmp_path / "demo").rglob("*")) == before
    assert not (tmp_path / "g" / "unconditional" / "evals" / "000000040000").exists()


def test_clips_weight_is_measured_on_other_captions_and_seeds_than_it_was_chosen_on(
    tmp_path: Path, machine: Machine
) -> None:
    assert figures(tmp_path) == 0
    guided = [keys(words) for words in machine.commands if "guide=clip" in words]
    caches = [Path(values["data.val"]).name for values in guided]
    assert caches == ["cache-val"] * 3 + ["cache-ref"] * 4
    chosen, measured = guided[:3], guided[3:]
    assert {values["seed"] for values in chosen}.isdisjoint({values["seed"] for values in measured})
    assert {values["guide.weight"] for values in measured} == {"0", "0.5"}
    assert rows_of(tmp_path)["0.5, chosen"][0] == "0.450"


def test_each_cell_has_two_seeds_of_the_same_records(tmp_path: Path, machine: Machine) -> None:
    machine.checks = True
    assert figures(tmp_path) == 0
    by_rest: dict[str, list[str]] = {}
    for words in machine.commands:
        values = keys(words) | {"dest": ""}
        by_rest.setdefault(json.dumps({**values, "seed": ""}, sort_keys=True), []).append(values["seed"])
    counts = [len(set(seeds)) for seeds in by_rest.values()]
    assert counts.count(1) == len(PLAN.clip), "the evaluations that choose a weight, and no others"
    assert set(counts) == {1, 2}


def test_the_page_says_what_was_asked_what_was_measured_and_what_is_missed(tmp_path: Path, machine: Machine) -> None:
    machine.changed["both"] = 28.25
    assert figures(tmp_path) == 0
    rows = rows_of(tmp_path)
    low, high = wilson(192, 256)
    right = f"0.750 [{low:.3f}, {high:.3f}]"
    assert rows["classifier, weight 4: right classes"] == ["at least 0.5", right, "yes"]
    assert rows["classifier, weight -2: right classes"][2] == "yes"
    best = rows["image, weight 8, ddim: consistency with the target"]
    assert best == ["at least 5 dB more than without a guide", "6.5 +- 0.3 dB more", "yes"]
    assert rows["CLIP, weight 0.5: all attributes right"][2] == "yes"
    assert rows["img2img, unipc: class kept at 1"][2] == "yes"
    assert rows["known half before pasting, pooled"] == ["at least 28 dB", "26.0 +- 0.4 dB", "**no**"]
    assert rows["the same, begun again from its own result and led to the kept pixels"][1:] == ["28.2 +- 0.4 dB", "yes"]
    text = (tmp_path / "checkout" / PAGE).read_text(encoding="utf-8")
    assert "of 12 figures that were asked for, 11 are reached" in " ".join(text.split())
    assert str(tmp_path) not in text and "guide.run=runs/classifier" in text
    title, sentence, shown = text.split("\n\n")[:3]
    assert title.startswith("# ") and sentence.endswith(".") and shown.startswith("    ")
    assert [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")] == []


def test_a_gain_within_the_error_bars_is_none(tmp_path: Path, machine: Machine) -> None:
    machine.changed["clip"] = 0.0078125  # one of 128, with or without the guide
    assert figures(tmp_path) == 0
    assert rows_of(tmp_path)["CLIP, weight 0.5: all attributes right"][2] == "**no**"


def test_figures_go_on_where_they_stopped(tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def stops(words: tuple[str, ...]) -> int:
        return 143 if "strength=0.5" in words else machine.run(words)

    monkeypatch.setattr(running, "execute", stops)
    assert figures(tmp_path) == 143
    before = len(machine.commands)
    monkeypatch.setattr(running, "execute", machine.run)
    assert figures(tmp_path) == 0
    assert 0 < before < len(machine.commands) == len(set(machine.commands))
    assert figures(tmp_path, "--page") == 0 and figures(tmp_path) == 0
    assert len(machine.commands) == len(set(machine.commands))


def test_a_list_runs_nothing_and_says_how_long_it_takes(
    tmp_path: Path, machine: Machine, capsys: pytest.CaptureFixture
) -> None:
    assert figures(tmp_path, "--list") == 0
    said = capsys.readouterr().out
    assert machine.commands == [] and not (tmp_path / "g").exists()
    minutes = re.search(r"about ([0-9]+) minutes in all", said)
    assert minutes is not None and 10 < int(minutes[1]) <= 25


def test_a_demo_without_what_is_needed_is_refused_with_the_command(
    tmp_path: Path, machine: Machine, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "classifier" / "config.yaml").unlink()
    assert figures(tmp_path) != 0
    said = capsys.readouterr().err
    assert "latentmill train experiment=shapes_classifier" in said and said.count("\n") == 1
    assert machine.commands == []


def test_a_share_of_two_seeds_has_the_interval_of_all_their_pictures() -> None:
    def one(seed: int, value: float) -> Measured:
        metrics: dict[str, Any] = {}
        share(metrics, "class_accuracy", value, 64)
        return Measured("ddim", 20, seed, 64, {}, metrics | {"psnr": 20.0 + seed, "psnr_error": 0.3}, Path())

    both = [one(0, 0.25), one(1, 0.5)]
    assert together(both, "class_accuracy") == Value(0.375, *wilson(48, 128), share=True)
    psnr = together(both, "psnr")
    assert psnr is not None and psnr.value == 20.5
    assert psnr.high - psnr.value == pytest.approx(0.3 / 2**0.5)
    assert together(both, "fid") is None


def test_evaluations_are_told_apart_by_what_steered_them() -> None:
    steerings: list[dict[str, Any]] = [{"guide.image": 2.0, "guide.factor": 4}, {"strength": 0.5}, {"keep": True}]
    steerings += [{"keep": True, "strength": 0.5}, {}]
    found = [Measured("ddim", 20, 0, 64, steering, {}, Path(str(i))) for i, steering in enumerate(steerings)]

    def folders(steering: dict[str, Any], sampler: str = "ddim") -> list[str]:
        return [str(one.folder) for one in of(found, steering, sampler, 64, (0, 1))]

    assert folders({"guide.image": 2.0}) == ["0"]
    assert folders({"strength": 0.5}) == ["1"]
    assert folders({"keep": True}) == ["2"]
    assert folders({"keep": True}, "unipc") == []


def test_regions_of_what_is_kept_end_at_latent_positions_and_their_neighbours() -> None:
    holes = np.zeros((1, 32, 32), dtype=bool)
    holes[0, 9, 9] = True  # in the position of row 1, column 1
    outside, positions, away = kept.rings(holes, 8)
    assert outside.sum() == 32 * 32 - 1
    assert positions.sum() == 32 * 32 - 64 and not positions[0, 8:16, 8:16].any()
    assert away[0, 24:].all() and away[0, :, 24:].all() and not away[0, :24, :24].any()


def test_kept_pixels_are_measured_pooled_and_as_a_mean_over_pictures() -> None:
    given = np.full((8, 16, 16, 3), 100, dtype=np.uint8)
    drawn = given.copy()
    drawn[0, :, :8] = 110  # one picture is off by 10 levels in what is kept
    drawn[:, :, 8:] = 0
    holes = np.zeros((8, 16, 16), dtype=bool)
    holes[:, :, 8:] = True
    figures = kept.measured(kept.Pictures(drawn, given, given, holes, 8))
    pooled = 10 * np.log10(255**2 * 8 / 100)
    assert figures["kept"] == pytest.approx(pooled) and figures["positions"] == pytest.approx(pooled)
    assert figures["mean"] == pytest.approx((10 * np.log10(255**2 / 100) + 7 * MOST_DB) / 8)
    assert figures["kept_reconstruction"] == MOST_DB
    assert figures["away"] is None, "each kept position has a neighbour that is made anew"
    assert figures["hidden"] == 0.5


def test_a_sheet_shows_its_pictures_and_is_small() -> None:
    pictures = [np.full((64, 64, 3), 40 * i, dtype=np.uint8) for i in range(6)]
    data = sheet([("above", pictures), ("below", pictures[::-1])], [f"a head of number {i}" for i in range(6)])
    assert len(data) < 20_000
    with Image.open(io.BytesIO(data)) as opened:
        shown = np.asarray(opened.convert("RGB"))
    found = {tuple(colour) for colour in shown[-40, ::8].tolist()}
    assert {(level, level, level) for level in range(0, 240, 40)} <= found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with masks and pictures, and a run."""
    folder = tmp_path_factory.mktemp("kept")
    make_cache(folder, 8, conditions=("mask", "pixels"))
    make_run(folder, task=UnconditionalTask())
    return folder


def measured(folder: Path, *words: str) -> dict[str, Any]:
    dest = folder / f"{'-'.join(words)}.json"
    words = (*words, f"run={folder / 'run'}", f"val={folder / 'cache'}", "images=8", "batch=8", "steps=4")
    assert kept.main([*words, "sampler=ddim", f"dest={dest}"]) == 0
    figures: dict[str, Any] = json.loads(dest.read_text(encoding="utf-8"))
    return figures


def test_kept_regions_of_the_records_masks_have_the_figure_of_eval(folder: Path) -> None:
    figures = measured(folder, "mask=records")
    words = [f"run={folder / 'run'}", "keep=true", "images=8", "batch=8", "guidance=[1]", "sampler=[ddim]"]
    assert cli.main(["eval", *words, "steps=[4]", "device=cpu"]) == 0
    (path,) = (folder / "run" / "evals").glob("*/metrics.json")
    metrics = json.loads(path.read_text(encoding="utf-8"))
    assert figures["kept"] == pytest.approx(metrics["psnr_kept"], abs=1e-6)
    assert figures["kept_error"] == pytest.approx(metrics["psnr_kept_error"], abs=1e-6)
    assert figures["kept_reconstruction"] == pytest.approx(metrics["psnr_kept_reconstruction"], abs=1e-6)


def test_a_half_is_kept_in_several_ways_that_differ(folder: Path) -> None:
    ways = [("mask=half",), ("mask=half", "again=1"), ("mask=half", "guide=0.25")]
    figures = [measured(folder, *words) for words in ways]
    assert [one["hidden"] for one in figures] == [0.5] * 3
    assert len({one["kept"] for one in figures}) == 3
    assert len({one["kept_reconstruction"] for one in figures}) == 1


def test_a_mask_that_there_is_not_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert kept.main(["run=a", "val=b", "mask=third"]) in (1, 2)
    said = capsys.readouterr().err
    assert "mask=half or records" in said and said.count("\n") == 1


def test_a_sheet_keeps_the_colour_of_a_small_shape_on_noisy_grey() -> None:
    noise = np.random.RandomState(0).randint(190, 250, (6, 64, 64, 1), dtype=np.uint8).repeat(3, 3)
    shades = np.random.RandomState(1).randint(0, 12, (6, 64, 64, 3), dtype=np.uint8)
    pictures = noise - shades
    for picture, colour in zip(pictures, [(220, 30, 40), (40, 190, 200), (240, 200, 30)] * 2, strict=True):
        picture[30:36, 30:36] = colour
    with Image.open(io.BytesIO(sheet([("row", list(pictures))], scale=1))) as opened:
        shown = np.asarray(opened.convert("RGB")).astype(int)
    for i, picture in enumerate(pictures):
        top, left = MARGIN, WORDS + i * (64 + GAP)
        assert np.abs(shown[top + 32, left + 32] - picture[32, 32]).max() < 16
