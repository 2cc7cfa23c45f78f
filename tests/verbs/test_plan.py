"""`latentmill plan`: from a command line to a page, without PyTorch and in a moment, for everything that trains."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from made.cache import make_cache
from made.rates import calibration
from made.report import fake_run
from pipeline import cli
from pipeline.config.loading.folders import groups
from pipeline.config.loading.load import load
from pipeline.config.values.counts import parse_count
from pipeline.errors import ConfigError
from pipeline.plan import divided, planned
from pipeline.planning.plan.expected import EXPECTED
from pipeline.planning.plan.figures import value_words
from pipeline.planning.plan.sections import Plan
from pipeline.planning.rates.calibration import add
from pipeline.report import page as report
from preprocess.shapes.shards import write_shards

QUICK = ("sd1_256", "ldm_text", "ldm4_inpainting", "shapes_layout", "shapes_classifier", "kl_f8", "vq_small")
ISSUE = ("experiment=sd1_256", "cluster=a100", "nodes=8", "images=100M", "price=2.0")
CACHE_WORDS = ("model=tiny", "model.in_channels=4", "model.context_width=8", "optim.batch=8", "samples=800")


@pytest.fixture(autouse=True)
def uncalibrated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No file of rates of this machine counts."""
    monkeypatch.delenv("LATENTMILL_RATES", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@cache
def plan(*words: str) -> Plan:
    found = divided(words)
    return planned(load("plan", found.own), found)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["plan", *words]) in (1, 2)
    message = capsys.readouterr().err
    assert message.count("\n") == 1, message
    return message


# --------------------------------------------------------------------------------------------------------------------
# The whole


def test_what_a_lab_asks_is_on_one_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *ISSUE]) == 0
    page = capsys.readouterr().out
    for words in ("8 nodes x 4 a100", "bytes of moments", "text_storage=tokens", "hours with 32 GPUs", "parameters"):
        assert words in page
    for words in (
        "ZeRO 0",
        "ZeRO 3",
        "images/s",
        "MFU",
        "sends in a step",
        "node from storage",
        "other numbers of nodes",
    ):
        assert words in page
    for words in ("bytes of a checkpoint", "checkpoints kept", "images of evaluations", "share of the run", "price"):
        assert words in page
    assert "arithmetic: by formulas" in page
    assert len(page.splitlines()) <= 110
    assert max(len(line) for line in page.splitlines() if not line.startswith(("[", "  ZeRO "))) <= 145, "but for notes"


def test_a_plan_imports_no_torch_and_takes_a_moment() -> None:
    """Seconds are those of this process's own CPU, so that a busy machine does not count."""
    code = (
        "import sys, time\n"
        "from pipeline import cli\n"
        f"status = cli.main(['plan', *{ISSUE!r}])\n"
        "heavy = {'torch', 'deepspeed', 'diffusers', 'transformers', 'open_clip', 'wandb'} & set(sys.modules)\n"
        "print(status, sorted(heavy), time.process_time(), file=sys.stderr)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    status, heavy, seconds = ended.stderr.splitlines()[-1].split(" ")
    assert (status, heavy) == ("0", "[]")
    assert float(seconds) < 4.0, "a second on a quiet machine"


def test_every_shipped_experiment_says_what_its_cache_is() -> None:
    assert {*groups("train")["experiment"], *groups("autoencoder")["experiment"]} == set(EXPECTED)


@pytest.mark.parametrize(
    "experiment", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.long]) for name in sorted(EXPECTED)]
)
def test_every_experiment_has_a_plan(experiment: str) -> None:
    made = plan(f"experiment={experiment}", "images=1M", "gpu=h100")
    names = [section.name for section in made.sections]
    assert names == ["encode", "training", "storage", "evaluations", "whole"]
    for section in made.sections:
        assert len({figure.name for figure in section.figures}) == len(section.figures)
        for figure in section.figures:
            assert figure.value >= 0 and figure.where, figure
    assert made.recommended is not None
    assert json.loads(made.json())["sections"].keys() == set(names)


def test_without_a_gpu_a_plan_is_of_this_machines_processors() -> None:
    made = plan("experiment=demo", "images=10000", "launch.processes=2")
    assert made.title == "latentmill train experiment=demo on 1 node x 2 CPU processes"
    assert made.section("whole") is not None
    assert made.value("whole", "device-hours") == pytest.approx(2 * (made.value("whole", "hours") or 0))
    assert made.recommended is None


# --------------------------------------------------------------------------------------------------------------------
# Its figures


def test_hours_are_samples_over_images_a_second_and_what_training_waits_for() -> None:
    made = plan(*ISSUE)
    samples, rate = made.value("training", "samples"), made.value("training", "images/s")
    steps = made.value("training", "hours of steps")
    assert samples and rate and steps
    assert steps == pytest.approx(samples / rate / 3600)
    losses = made.value("evaluations", "hours of validation losses") or 0
    looked = made.value("evaluations", "hours of evaluations") or 0
    hours = made.value("whole", "hours")
    assert hours == pytest.approx(steps + losses + looked)
    assert made.value("whole", "device-hours") == pytest.approx(32 * (hours or 0))
    assert made.value("whole", "price") == pytest.approx(2.0 * 32 * (hours or 0))


def test_evaluations_beside_training_are_not_waited_for() -> None:
    words = ("experiment=demo", "images=1000", "gpu=h100", "eval.loss_images=0")
    inside, beside = plan(*words), plan(*words, "eval.where=job")
    assert beside.value("whole", "hours") == pytest.approx(beside.value("training", "hours of steps") or 0)
    assert (inside.value("whole", "hours") or 0) > (beside.value("whole", "hours") or 0)


def test_on_a_gpu_evaluations_predict_in_bf16_unless_fp32_is_asked_for() -> None:
    words = ("experiment=sd1_256", "gpu=h100", "images=1M")
    rates = [
        plan(*words, f"eval.precision={precision}").value("evaluations", "images/s of a rank in them") or 0
        for precision in ("auto", "fp32")
    ]
    assert rates[0] > 5 * rates[1]


def test_a_cache_without_data_val_is_not_evaluated() -> None:
    assert plan("experiment=demo", "images=1000", "data.val=").section("evaluations") is None


def test_where_the_configured_step_does_not_fit_the_figures_are_of_the_recommended_one() -> None:
    made = plan("experiment=sd2_512", "gpu=a10g", "optim.micro_batch=64", "optim.batch=64", "images=1M")
    assert made.chosen == made.recommended
    assert made.chosen is not None and made.chosen.micro_batch < 64
    assert "does not fit" in made.why


def test_without_images_the_cache_alone_is_not_planned() -> None:
    made = plan("experiment=demo")
    assert made.section("encode") is None
    assert made.section("training") is not None


def test_keys_of_encode_change_the_cache_and_not_the_rest() -> None:
    full, tokens = plan(*ISSUE), plan(*ISSUE, "encode.text_storage=tokens")
    of_text = full.value("encode", "bytes of text")
    assert of_text and of_text > 100e6 * 77 * 768 * 2
    assert tokens.value("encode", "bytes of text") is None
    assert (tokens.value("encode", "bytes of the cache") or 0) < 0.3 * (full.value("encode", "bytes of the cache") or 0)
    assert (tokens.value("training", "FLOPs of an image in the text tower") or 0) > 1e9
    assert tokens.value("training", "parameters") == full.value("training", "parameters")


def test_an_unknown_autoencoder_is_described_by_its_factor() -> None:
    words = ("task=unconditional", "model=ldm4_unconditional", "images=1000", "gpu=h100", "encode.resolution=[256]")
    made = plan(*words, "downsampling=4", "optim.batch=8")
    assert made.value("encode", "bytes of moments") == pytest.approx(1000 * (2 * 3 * 64 * 64 * 2 + 128 + 512), rel=0.02)


def test_a_finished_cache_is_read_by_its_manifest(tmp_path: Path) -> None:
    manifest = make_cache(str(tmp_path / "cache"), [16, 24])
    made = plan(f"data.train={tmp_path / 'cache'}", *CACHE_WORDS)
    assert made.value("encode", "records") == 40
    assert made.value("training", "epochs") == 20
    section = made.section("encode")
    assert section is not None and manifest.digest[:12] in section.figures[0].where


def test_a_source_is_tried_and_its_images_are_counted(tmp_path: Path) -> None:
    write_shards(str(tmp_path / "shapes"), 40, 1, "train", shard_size=10)
    made = plan("experiment=demo", f"source={tmp_path}/shapes/*.tar", "trial=2")
    assert made.value("encode", "images") == pytest.approx(40, rel=0.05)
    section = made.section("encode")
    assert section is not None
    figures = {figure.name: figure for figure in section.figures}
    assert figures["images"].basis == "measured" and figures["images"].where == "20 samples of 2 of 4 shards"
    assert figures["bytes of the source"].value == sum(one.stat().st_size for one in tmp_path.glob("shapes/*.tar"))
    assert made.value("training", "epochs") == pytest.approx(64000 / figures["images"].value)


def test_rates_of_this_machine_come_from_the_file_that_calibrate_wrote(tmp_path: Path) -> None:
    file = tmp_path / "rates.json"
    add(file, calibration())
    words = ("experiment=demo", "images=1000", "launch.processes=2", f"rates={file}")
    section = plan(*words).section("training")
    rate = section.figure("images/s of a rank that sends nothing") if section else None
    assert rate is not None and rate.basis == "calibrated" and str(file) in rate.where


def test_a_cache_that_does_not_fit_the_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_cache(str(tmp_path / "cache"), [16])
    assert "context_width" in refused(capsys, f"data.train={tmp_path / 'cache'}", "optim.batch=8")


# --------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("experiment=demo", "images=many"), "images=many: a whole number of 1 to 10^15 is wanted"),
        (("experiment=demo", "nodes=2"), "gpu=NAME is missing: which GPU is it to be? b200, h200"),
        (("experiment=demo", "gpu=abacus"), "gpu=abacus: no such GPU is known"),
        (("experiment=demo", "device=cuda"), "gpu=NAME is missing"),
        (("experiment=demo", "cluster=a100", "nodes=3"), "optim.batch=32"),
        (("experiment=nonesuch",), "no such experiment"),
        (("experiment=demo", "encode.resolutoin=64"), "resolutoin: no such key"),
        (("experiment=demo", "modle.channels=3"), "no such key"),
        (("experiment=demo", "encode.resolution=[64]", "encode.encoders=sd1"), "model.context_width=128"),
        (("experiment=demo", "source=nowhere/*.tar"), "nowhere"),
        (("experiment=demo", "source=nowhere/*.tar", "trial=0"), "trial=0 reads no shard"),
        (("experiment=demo", "data.train=nowhere"), "nowhere"),
        (("verb=autoencoder", "model=tiny"), "model"),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], reason: str
) -> None:
    assert reason in refused(capsys, *words)


@pytest.mark.parametrize(
    ("text", "number"), [("250000", 250_000), ("100M", 10**8), ("1.5B", 1_500_000_000), ("2k", 2000), ("1_000", 1000)]
)
def test_counts_are_read_as_people_write_them(text: str, number: int) -> None:
    assert parse_count(text, "images") == number


@pytest.mark.parametrize(
    ("value", "unit", "words"),
    [
        (13_768_000_000_000, "bytes", "13.8 TB"),
        (999, "bytes", "999 B"),
        (21e6, "bytes/s", "21 MB/s"),
        (537e9, "FLOP", "537 GFLOP"),
        (0.064, "share", "6.4%"),
        (0.00073, "share", "0.07%"),
        (0, "share", "0.0%"),
        (113.94, "hours", "113.9 h"),
        (1.67, "hours", "1.67 h"),
        (0.1, "hours", "6 min"),
        (0.001, "hours", "3.6 s"),
        (1184.2, "images/s", "1,184 images/s"),
        (0.368, "images/s", "0.368 images/s"),
        (10**8, "images", "100,000,000"),
    ],
)
def test_figures_are_written_for_people(value: float, unit: str, words: str) -> None:
    assert value_words(value, unit) == words


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "M", "1e6", "", "10T", "0.0001k", "9" * 30])
def test_what_is_no_count_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="images="):
        parse_count(text, "images")


# --------------------------------------------------------------------------------------------------------------------
# The file


def test_a_plan_is_written_once_more_and_over_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    words = ("experiment=demo", "images=1000", f"json={file}")
    for _ in range(2):
        assert cli.main(["plan", *words]) == 0
    capsys.readouterr()
    held: dict[str, Any] = json.loads(file.read_text())
    assert held["format"] == 1
    figures = {figure["name"]: figure for figure in held["sections"]["training"]["figures"]}
    assert figures["samples"]["value"] == 64000
    assert {figure["basis"] for figure in figures.values()} <= {"measured", "calibrated", "arithmetic"}
    file.write_text('{"mine": 1}')
    assert "exists and is no plan" in refused(capsys, *words)
    assert file.read_text() == '{"mine": 1}'


def test_values_of_the_environment_are_neither_shown_nor_stored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(str(tmp_path / "hidden-place"), 10, 1, "train", shard_size=10)
    monkeypatch.setenv("SHAPES", str(tmp_path / "hidden-place"))
    file = tmp_path / "plan.json"
    assert cli.main(["plan", "experiment=demo", "source=${oc.env:SHAPES}/*.tar", f"json={file}"]) == 0
    for text in (capsys.readouterr().out, file.read_text()):
        assert "hidden-place" not in text and "${oc.env:SHAPES}/*.tar" in text


def test_a_runs_report_shows_the_plan_beside_what_happened(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "a")
    report.write([str(run)], str(run / "report.html"))
    assert "Planned, and what happened" not in (run / "report.html").read_text()
    (run / "plan.json").write_bytes(plan("experiment=demo", "images=1000").json())
    report.write([str(run)], str(run / "report.html"))
    page = (run / "report.html").read_text()
    assert "Planned, and what happened" in page
    happened = page.partition("Planned, and what happened")[2].partition("</table>")[0]
    assert "64,000" in happened and "40,000" in happened and "0.62" in happened, (
        "samples planned, seen, and their ratio"
    )
    assert "peak of a rank" not in happened, "a process on a CPU holds more than tensors"
    (run / "plan.json").write_bytes(plan("experiment=demo", "images=1000", "gpu=a100").json())
    report.write([str(run)], str(run / "report.html"))
    assert "peak of a rank" in (run / "report.html").read_text()


@pytest.mark.parametrize(
    "damage",
    [b"{", b"[]", b'{"format": 2, "title": "", "sections": {}}', b'{"format": 1, "title": 1, "sections": {}}'],
    ids=["cut", "list", "later", "typed"],
)
def test_a_damaged_plan_is_left_out_of_the_report_aloud(tmp_path: Path, damage: bytes) -> None:
    run = fake_run(tmp_path / "a")
    (run / "plan.json").write_bytes(damage)
    report.write([str(run)], str(run / "report.html"))
    page = (run / "report.html").read_text()
    assert "plan.json is left out" in page and "Planned, and what happened" not in page
