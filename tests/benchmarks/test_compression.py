"""The compression study: its sizes, that its steps are commands that can be, that it goes on where it stopped, and what
its page says. Its commands are not run here, but for the last test, which runs them all with tiny sizes."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import compression_study
from benchmarks.compression import runner as running
from benchmarks.compression.page import PAGE, wrapped
from benchmarks.compression.plan import LEVELS, Plan
from benchmarks.compression.runner import Runner, Step, StepFailed
from benchmarks.compression.steps import Places, Study, denoiser_cost, images_per_s, model_of, step_seconds
from pipeline.config.loading.load import load
from pipeline.errors import RunError
from pipeline.verbs import VERBS

RATE = {1: 10.0, 2: 20.0, 4: 50.0, 8: 80.0}
"""Images/s of made-up training."""
FIDS = {1: 30.0, 2: 12.0, 4: 6.0, 8: 6.4}
PLAN = Plan()


class Machine:
    """Stands for the machine: writes what a command would leave behind, and keeps the commands. ends_at: words of one
    that is stopped. checks: whether each is looked at as the command line would."""

    def __init__(self) -> None:
        self.commands: list[tuple[str, ...]] = []
        self.ends_at, self.checks = "", False
        self.checked: set[tuple[str, ...]] = set()

    def run(self, words: tuple[str, ...]) -> int:
        if self.ends_at and self.ends_at in " ".join(words):
            return 143
        self.commands.append(words)
        verb, values = words[0], dict(word.split("=", 1) for word in words[1:])
        kind = (verb, *values, values.get("model.multipliers", ""), values.get("autoencoder", ""))
        if self.checks and verb in VERBS and kind not in self.checked:
            load(verb, list(words[1:]))  # raises for a key that there is not
            self.checked.add(kind)  # others like it differ in folders and numbers alone
        makers: dict[str, Callable[[dict[str, str]], None]] = {
            **dict.fromkeys(("synth",), lambda v: Path(v["dest"]).mkdir(parents=True)),
            "encode": lambda v: put(Path(v["dest"]) / "manifest.json", "{}"),
            "verify": lambda v: put(Path(v["report"]), ""),
            "reference": lambda v: put(Path(v["dest"]), ""),
            "export": lambda v: put(Path(v["dest"]) / "config.json", "{}"),
            "reconstruct": lambda v: put(Path(v["dest"]) / "metrics.json", '{"psnr": 33.25, "psnr_error": 0.1}'),
            "autoencoder": trained,
            "train": trained,
            "eval": evaluated,
            "benchmarks.compression.speed": lambda v: put(
                Path(v["dest"]), json.dumps({steps: 100 / int(steps) for steps in v["steps"].split(",")})
            ),
        }
        makers[verb](values)
        return 0


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def factor(path: Path) -> int:
    """f of a folder of the study."""
    found = re.search(r"f([0-9]+)", path.name)
    assert found is not None
    return int(found[1])


def trained(values: dict[str, str]) -> None:
    """A run whose steps take as long as RATE says, the first of them ten times as long."""
    run, batch, samples = Path(values["run"]), int(values["optim.batch"]), int(values["samples"])
    step = batch / RATE[factor(run)]
    rows = [{"n": 0, "time": 0.0, "kind": "start"}]
    for n in range(batch, samples + 1, batch):
        seconds = 10 * step if n == batch else step
        if n == 5 * batch:  # stopped between two rows: the run goes on, and nothing says how long this step took
            rows.append({"n": n, "time": float(n), "kind": "start"})
            continue
        rows.append({"n": n, "time": float(n), "kind": "train", "steps_s": [seconds], "memory_gb": 1.5})
    put(run / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    put(run / "config.yaml", "run: r\n")


def evaluated(values: dict[str, str]) -> None:
    """An evaluation, the better the longer its run has trained."""
    run, n, steps = Path(values["run"]), int(values["at"]), int(values["steps"])
    fid = FIDS[factor(run)] * (1 + 1e5 / n / RATE[factor(run)]) * (1 + 1 / steps)
    folder = run / "evals" / f"{n:012d}-{steps}"
    metrics = {
        "n": n, "images": int(values["images"]), "guidance": 2.0, "fid_democlip": fid, "fid_democlip_error": 1.0,
        "fid_democlip_floor_reconstruction": 5.0, "fid_democlip_floor_real": 4.5, "attribute_accuracy": 0.5,
        "attribute_accuracy_low": 0.45, "attribute_accuracy_high": 0.55, "attribute_accuracy_reconstruction": 0.98,
        "clip_score": 70.0, "clip_score_error": 0.4,
    }  # fmt: skip
    put(folder / "card.json", json.dumps({"sampler": values["sampler"], "steps": steps, "line": "l"}))
    put(folder / "metrics.json", json.dumps(metrics))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(running, "execute", made.run)
    return made


def study(tmp_path: Path, *words: str) -> int:
    return compression_study.main([str(tmp_path / "study"), "--root", str(tmp_path / "checkout"), *words])


def test_denoisers_have_one_size_and_the_same_positions_of_attention() -> None:
    sizes = [denoiser_cost(level)[0] for level in LEVELS]
    assert max(sizes) / min(sizes) < 1.06
    assert {level.side // factor for level in LEVELS for factor in level.attention} == {8, 4}
    assert all(model_of(level).multipliers[-2:] in ((2, 4), (1, 2)) for level in LEVELS)
    assert [level.side**2 * level.latent_channels for level in LEVELS] == [12288, 2048, 768, 256]
    flops = [denoiser_cost(level)[1] for level in LEVELS]
    assert flops == sorted(flops, reverse=True)


def test_first_stages_have_the_factor_and_channels_of_their_denoisers() -> None:
    for level in LEVELS[1:]:
        words = ["run=r", "data.train=c", f"autoencoder={level.stage}"]
        stage = load("autoencoder", words).autoencoder
        assert (stage.downsampling, stage.latent_channels) == (level.f, level.latent_channels)


def test_first_stages_have_the_losses_of_their_recipe(tmp_path: Path) -> None:
    """The page says so."""
    made = Study(PLAN, Places(tmp_path), Runner(tmp_path, 1.0)).stage_words(LEVELS[2], 100, tmp_path / "r", 100)
    recipe = load("autoencoder", ["experiment=kl_small", "run=r", "data.train=c"])
    assert load("autoencoder", list(made[1:])).loss == recipe.loss


def test_commands_can_be_and_every_denoiser_trains_for_one_time_and_is_judged_by_the_same_captions(
    tmp_path: Path, machine: Machine
) -> None:
    machine.checks = True
    assert study(tmp_path) == 0
    samples, captions = {}, set()
    for words in machine.commands:
        values = dict(word.split("=", 1) for word in words[1:])
        if words[0] == "train" and "probe" not in values["run"]:
            samples[factor(Path(values["run"]))] = int(values["samples"])
        if words[0] == "eval":
            captions.add((values["images"], values["seed"], values["sampler"], values["guidance"]))
        f = factor(Path(values.get("dataset", values.get("run", "f0"))))
        if words[0] in ("verify", "reference", "train") and f > 1:
            assert values["encoders.vae"].endswith(f"/stages/f{f}-exported"), "the cache does not know the folder"
    seconds = [n / RATE[f] for f, n in samples.items()]
    assert list(samples) == [1, 2, 4, 8]
    assert seconds == pytest.approx([PLAN.denoiser_seconds] * 4, rel=0.02)
    assert len(captions) == 1
    assert all(n % (PLAN.batch * PLAN.parts) == 0 for n in samples.values())


def test_the_page_says_where_the_optimum_lies_and_what_cannot_be_told_from_it(tmp_path: Path, machine: Machine) -> None:
    assert study(tmp_path) == 0
    text = (tmp_path / "checkout" / PAGE).read_text()
    assert "the lowest FID is at f = 4 (the error bar reaches that of f = 8)" in " ".join(text.split())
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert next(row[1:4] for row in rows if row[0] == "4") == ["16x16x3", "768", "32-64-128"]
    assert sum(row[0] == "2" and "33.25 +- 0.10" in row for row in rows) == 1
    assert sum(row[0] == "8" and "0.500, 0.450 to 0.550" in row for row in rows) == 1 + 4 + 3  # end, time, steps
    assert "Left out" not in text
    assert str(tmp_path) not in text and "runs/compression/caches/f4-train" in text
    assert "f = 1: 8,960 samples in the time, 8.0 times fewer than f = 8" in " ".join(text.split())
    title, sentence, shown = text.split("\n\n")[:3]
    assert title.startswith("# ") and sentence.endswith(".") and shown.startswith("![")
    assert [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")] == []
    pictures = re.findall(r"\(\.\./images/([\w.-]+)\)", text)
    assert len(pictures) == 5
    for name in pictures:
        root = ElementTree.fromstring((tmp_path / "checkout" / "docs" / "images" / name).read_text())
        assert root.tag.endswith("svg")
    assert (tmp_path / "checkout" / "docs" / "images" / "compression-time.svg").read_text().count("f = ") >= 4


def test_a_study_goes_on_where_it_stopped_and_does_nothing_twice(tmp_path: Path, machine: Machine) -> None:
    machine.ends_at = "train experiment=shapes data.train=" + str(tmp_path / "study" / "caches" / "f4-train")
    assert study(tmp_path) == 143
    before = list(machine.commands)
    machine.ends_at = ""
    assert study(tmp_path) == 0
    assert len(set(machine.commands)) == len(machine.commands)
    assert before == machine.commands[: len(before)]
    count = len(machine.commands)
    assert study(tmp_path, "--page") == 0 and study(tmp_path) == 0
    assert len(machine.commands) == count


def test_a_step_runs_again_when_one_before_it_has(tmp_path: Path) -> None:
    steps = [Step(name, ("synth", f"dest={tmp_path / name}"), tmp_path / name) for name in "ab"]
    ran: list[str] = []

    def run(words: tuple[str, ...]) -> int:
        ran.append(words[1][-1])
        Path(words[1].removeprefix("dest=")).mkdir(exist_ok=True)
        return 0

    def go() -> str:
        ran.clear()
        runner = Runner(tmp_path, 1e9, run=run)
        assert [runner.step(step) for step in steps] == [True, True]
        return "".join(ran)

    assert go() == "ab" and go() == ""
    (tmp_path / "a").rmdir()
    assert go() == "ab", "b is there, but was made of another a"
    (tmp_path / "b").rmdir()
    assert go() == "b"


def test_a_study_with_other_sizes_is_refused(tmp_path: Path, machine: Machine, capsys: pytest.CaptureFixture) -> None:
    assert study(tmp_path) == 0
    capsys.readouterr()
    file = tmp_path / "study" / "study.json"
    file.write_text(file.read_text().replace('"batch": 32', '"batch": 64'))
    assert study(tmp_path) != 0
    said = capsys.readouterr().err
    assert "holds a study with other sizes (batch)" in said and said.count("\n") == 1


def test_a_time_limit_below_zero_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert study(tmp_path, "--hours", "-1") != 0
    assert "--hours -1: a number of hours above 0 is wanted" in capsys.readouterr().err


def test_evaluations_without_time_are_left_out_by_name(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10**9, 300))  # every step takes 300 s
    monkeypatch.setattr(running.time, "monotonic", lambda: float(next(clock)))
    assert study(tmp_path) == 0
    evaluations = [words for words in machine.commands if words[0] == "eval"]
    ends = [factor(Path(dict(word.split("=", 1) for word in words[1:])["run"])) for words in evaluations[:4]]
    assert ends == [1, 2, 4, 8], "the ends of training come first"
    assert 4 <= len(evaluations) < 24
    done = json.loads((tmp_path / "study" / "steps.json").read_text())
    assert sum(entry["seconds"] for entry in done) <= 5 * 3600
    text = " ".join((tmp_path / "checkout" / PAGE).read_text().split())
    assert "Left out, as the time was over: " in text and "f = 1 after 8/8 with 16 steps" in text


def test_a_list_runs_nothing_and_says_how_long_it_takes(
    tmp_path: Path, machine: Machine, capsys: pytest.CaptureFixture
) -> None:
    assert study(tmp_path, "--list") == 0
    said = capsys.readouterr().out
    assert machine.commands == [] and not (tmp_path / "study").exists()
    assert said.count("\nlatentmill eval ") == 24 and said.count("\nlatentmill train ") == 8
    hours = re.search(r"about ([0-9.]+) hours in all, of 5", said)
    assert hours is not None and 1 < float(hours[1]) < 5


def test_the_rate_is_that_of_steady_steps(tmp_path: Path) -> None:
    run = tmp_path / "f2"
    trained({"run": str(run), "optim.batch": "8", "samples": "200"})
    assert images_per_s(run) == pytest.approx(RATE[2])
    seconds, batch = step_seconds(run)
    assert (len(seconds), batch) == (24, 8)  # of the last step before a stop nothing says how long it took
    assert sum(seconds) == pytest.approx((24 + 9) * 8 / RATE[2])
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(RunError, match="no steps of training"):
        images_per_s(run)


def test_a_failed_step_ends_the_study_with_its_status(tmp_path: Path) -> None:
    step = Step("h", ("synth", "dest=a b"), tmp_path / "x")
    with pytest.raises(StepFailed, match=r"failed \(exit status 3\).*latentmill synth dest='a b'") as caught:
        Runner(tmp_path, 1.0, run=lambda _: 3).step(step)
    assert caught.value.exit_code == 3


def test_words_fill_lines_of_a_page() -> None:
    lines = wrapped("word " * 60, "- ", "  ").splitlines()
    assert len(lines) > 2 and lines[0].startswith("- word") and all(line.startswith("  word") for line in lines[1:])
    assert all(len(line) <= 118 for line in lines)


def test_steps_of_another_first_level_are_refused(tmp_path: Path) -> None:
    plan = replace(PLAN, factors=(4, 8))
    with pytest.raises(RunError, match="begins with f = 1"):
        Study(plan, Places(tmp_path), Runner(tmp_path, 1.0, run=lambda _: 0)).all()


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_the_whole_study_runs_with_tiny_sizes(tmp_path: Path) -> None:
    assert study(tmp_path, "--quick") == 0
    text = (tmp_path / "checkout" / PAGE).read_text()
    assert "is at f = " in text
    for number in (1, 4):
        assert re.search(rf"\n\| {number} +\| \d+x\d+x\d \|", re.sub(r" +\|", " |", text))
