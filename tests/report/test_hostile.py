"""A report of a run that is hostile or damaged: the rest is shown, what is left out is named, nothing is run."""

from __future__ import annotations

import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import pytest

from made.report import HOSTILE, fake_run, parse
from pipeline import cli
from pipeline.report import page
from pipeline.report.run import load

LAST = f"evals/{40_000:012d}"
NESTED = "[" * 200_000
ROW = {"n": 41_000, "time": 1200.0, "kind": "train"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return fake_run(tmp_path / "run")


def shown(run: Path) -> tuple[str, str]:
    """(HTML, text) of the run's page, which is checked to be whole and to run no script but its own, within seconds."""
    began, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    html = page.page([load(str(run))], {"attribute_accuracy": 0.75, "fid_ratio": 3.0, "seconds": 9.0})
    assert time.monotonic() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200_000
    parsed = parse(html)
    assert html.count("<script") == 1 and parsed.addresses == []
    assert "nan" not in "".join(html.partition("<svg")[1:]).split("<script")[0].lower().replace("dominant", "")
    return html, " ".join(parsed.text)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "low"},
        {"loss": 1e308},
        {"loss": -1e308},
        {"loss": True},
        {"loss": [1.0]},
        {"time": -5.0},
        {"time": 1e300},
        {"loss_by_noise": {"abc": 1.0}},
        {"loss_by_noise": {"0.0": "x"}},
        {"loss_by_noise": {"1e999": 1.0}},
        {"loss_by_noise": {"nan": 1.0}},
        {"loss_by_noise": ["0.0"]},
        {"loss_by_noise": {str(i): 1.0 for i in range(1000)}},
        {"steps_s": "many"},
        {"steps_s": [0.1, None, {}]},
        {"step_s": {}, "data_wait_s": "x"},
        {"kind": "checkpoint", "write_s": "slow"},
        {"kind": "checkpoint", "write_s": 1.0, "bytes": [], "stall_s": "x"},
        {"kind": "alert", "alert": {}, "text": 3},
        {"kind": "start", "world": "<b>", "engine": 5},
    ],
    ids="-".join,
)
def test_a_row_with_values_of_wrong_types_or_sizes_is_counted_and_left_out(run: Path, changes: dict[str, Any]) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(ROW | changes) + "\n")
        file.write(json.dumps(ROW | {"n": 42_000, "loss": None, "loss_by_noise": {"0.0": None, "0.2": 0.5}}) + "\n")
    _, text = shown(run)
    assert "metrics.jsonl: 1 of its lines are damaged and left out" in text
    assert load(str(run)).samples == 42_000


@pytest.mark.parametrize("value", [1e-308, 5e-324, 1e30, -1e30, 0, 9e18, 2**63])
def test_any_number_that_a_row_may_hold_can_be_drawn(run: Path, value: float) -> None:
    names = ("loss", "lr", "grad_norm", "weight_norm", "images_per_s", "step_s", "data_wait_s", "memory_gb", "mfu")
    rows = [ROW | {"n": n, "kind": kind} | dict.fromkeys(names, value) for n in (1, 2**62) for kind in ("train", "val")]
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    assert "damaged" not in shown(run)[1]


@pytest.mark.parametrize(
    "content",
    [
        "garbage",
        "null",
        "[]",
        "{}",
        "[1, 2]",
        NESTED,
        '{"clip_score": NaN}',
        '{"clip_score": 1e308}',
        '{"clip_score": "<b>high</b>"}',
        '{"images": "many"}',
        '{"guidance": [3]}',
        '{"fid_democlip": {"x": 1}}',
        '{"fid_democlip": "1\\" onload=alert(1) x=\\""}',
        '{"fid_democlip_floor_reconstruction": "3"}',
        '{"attribute_accuracy_low": "x"}',
        '{"attribute_accuracy_by_objects": [1]}',
        '{"attribute_accuracy_by_objects": {"1": "x"}}',
        '{"seconds": "\\ud800"}',
        json.dumps({f"fid_{i}": 1.0 for i in range(100_000)}),
        "\0" * 1000,
    ],
    ids=range(20),
)
def test_an_evaluation_whose_figures_are_none_is_left_out_by_name(run: Path, content: str) -> None:
    (run / LAST / "metrics.json").write_text(content)
    _, text = shown(run)
    assert f"{LAST}/metrics.json is left out: it " in text
    last = load(str(run)).last
    assert last is not None and last.n == 26_666


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("card.json", "[]"),
        ("card.json", NESTED),
        ("card.json", '{"line": 5}'),
        ("card.json", '{"sampler": ["ddim"]}'),
        ("card.json", '{"guidance_settings": {"rescale": 1e300}}'),
        ("card.json", '{"reference": "none"}'),
        ("grid.json", "null"),
        ("grid.json", "{}"),
        ("grid.json", NESTED),
        ("grid.json", '{"captions": "abc", "columns": 4, "width": 64, "height": 64, "gap": 2}'),
        ("grid.json", '{"captions": [1, 2, 3, 4, 5, 6], "columns": 4, "width": 64, "height": 64, "gap": 2}'),
        ("grid.json", '{"captions": ["a"], "columns": 0, "width": 64, "height": 64, "gap": 2}'),
        ("grid.json", '{"captions": ["a"], "columns": -4, "width": 64, "height": 64, "gap": 2}'),
        ("grid.json", '{"captions": ["a"], "columns": 4, "width": "64;}body{x:y", "height": 64, "gap": 2}'),
        ("grid.json", '{"captions": ["a"], "columns": 4, "width": 64, "height": 1e9, "gap": 2}'),
        ("grid.json", '{"captions": ["a"], "columns": 4, "width": 64, "height": 0, "gap": -64}'),
        ("grid.json", '{"captions": [], "columns": 4, "width": 64, "height": 64, "gap": 2}'),
        ("grid.json", json.dumps({"captions": ["a"] * 10**6, "columns": 4, "width": 64, "height": 64, "gap": 2})),
        ("grid.png", "<svg onload=alert(1)>"),
        ("grid.png", ""),
    ],
    ids=range(20),
)
def test_a_damaged_card_or_picture_is_left_out_by_name_and_the_figures_stay(run: Path, name: str, content: str) -> None:
    (run / LAST / name).write_text(content)
    _, text = shown(run)
    assert content == "" or f"{LAST}/{name} is left out: " in text
    last = load(str(run)).last
    assert last is not None and last.n == 40_000 and "0.880" in text


def test_a_picture_of_another_size_than_its_tiles_is_left_out(run: Path) -> None:
    grid = json.loads((run / LAST / "grid.json").read_text())
    (run / LAST / "grid.json").write_text(json.dumps(grid | {"columns": 2}))
    assert f"{LAST}/grid.png is left out: it has 262 x 130 pixels, and grid.json tells of 130 x 196" in shown(run)[1]


@pytest.mark.parametrize("content", [NESTED, "null", "{}", '[{"heading": 1}]', '[{"heading": "a", "command": "b"}]'])
def test_damaged_steps_are_left_out_by_name(run: Path, content: str) -> None:
    (run / "steps.json").write_text(content)
    assert "steps.json is left out: " in shown(run)[1]


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\0binary", b"a: &a [x]\nb: *a", b"!!python/object/apply:os.system ['x']"]
)
def test_a_damaged_configuration_is_shown_as_text_and_said_to_be_damaged(run: Path, content: bytes) -> None:
    (run / "config.yaml").write_bytes(content)
    assert "config.yaml is shown as it stands: " in shown(run)[1]


@pytest.mark.parametrize("name", ["config.yaml", "run.json", "steps.json", "metrics.jsonl"])
def test_a_folder_or_a_pipe_in_place_of_a_file_is_said(run: Path, name: str) -> None:
    puts = (os.mkdir, os.mkfifo, lambda path: os.symlink("/dev/zero", path), lambda path: os.symlink(name, path))
    for number, put in enumerate(puts):
        (run / name).rename(run / f"odd{number}")
        put(run / name)
        assert f"{name} is left out: it is no file" in shown(run)[1]


def test_what_cannot_be_listed_or_read_of_the_evaluations_hides_nothing_else(run: Path) -> None:
    (run / LAST / "card.json").unlink()
    os.mkfifo(run / LAST / "card.json")
    assert "card.json" not in shown(run)[1] or f"{LAST}/card.json is left out" in shown(run)[1]
    os.symlink("loop", run / "evals" / "loop")
    assert "evals/ is left out: " in shown(run)[1] and "Throughput" in shown(run)[1]


@pytest.mark.parametrize("name", ["config.yaml", "run.json", "steps.json", "metrics.jsonl", f"{LAST}/card.json"])
def test_a_file_of_a_terabyte_is_not_read(run: Path, name: str) -> None:
    os.truncate(run / name, 10**12)
    text = shown(run)[1]
    assert f"{name} has 1,000,000,000,000 bytes" in text or f"{name} is left out: it has 1,000,000,000,000" in text


def test_names_that_others_put_beside_evaluations_are_left_alone(run: Path) -> None:
    for name in (".ipynb_checkpoints", f"{40_000:012d} (copy)", "backup", "64", "²²²²²²²²²²²²", f"{40_000:012d}/old"):
        (run / "evals" / name).mkdir()
        (run / "evals" / name / "metrics.json").write_text("garbage")
    _, text = shown(run)
    assert "left out" not in text and len(load(str(run)).evaluations) == 4


def test_hostile_words_are_text_wherever_they_stand(tmp_path: Path) -> None:
    word = HOSTILE + " \x1b]0;x\x07 \u202e "
    run = fake_run(tmp_path / "run<b>\udcff", captions=[word] * 6)
    (run / "config.yaml").write_text(json.dumps({"run": HOSTILE, HOSTILE: HOSTILE}))
    card = {"line": word, "sampler": word, "weights": word, "reference": {"sha256": HOSTILE}, "steps": 3}
    for number, guidance in enumerate((1, 2)):
        folder = run / "evals" / f"{40_000:012d}-x{number}<i>"
        folder.mkdir()
        figures = {"fid_<b>": 3.0, "fid_democlip": 4.0, "clip_score": 5.0, "guidance": guidance, "weights": word}
        (folder / "metrics.json").write_text(json.dumps(figures))
        (folder / "card.json").write_text(json.dumps(card))
    rows: list[dict[str, Any]] = [
        {"kind": "alert", "alert": word, "text": word},
        {"kind": "start", "engine": word, "world": 1},
    ]
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(ROW | row) + "\n" for row in rows)
    html, text = shown(run)
    both = page.page([load(str(run)), load(str(fake_run(tmp_path / "b")))], {})
    for one in (html, both):
        assert parse(one) and one.count("<script") == 1 and "<b>&" not in one and "\x1b" not in one
    assert '<script>alert("x")</script>' in text
    assert html.encode()


def test_a_comparison_of_figures_that_are_text_shows_none(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path / name) for name in "ab"]
    (runs[0] / LAST / "metrics.json").write_text('{"fid_democlip": "3\\" onmouseover=alert(1) x=\\""}')
    html = page.page([load(str(run)) for run in runs], {})
    assert "onmouseover" not in html and parse(html)


def test_no_secret_of_a_url_is_on_a_page(tmp_path: Path) -> None:
    url = "https://SENTINELUSER:SENTINELPASS@host/w.pth?X-Amz-Signature=SENTINELSIG&v=1"
    run = fake_run(tmp_path / "run", captions=[url] * 6)
    (run / "config.yaml").write_text(f"run: a\neval:\n  features_weights: {url}\n")
    (run / "run.json").write_text(json.dumps({"init": {"from": url}}))
    (run / LAST / "card.json").write_text(json.dumps({"line": url, "sampler": url}))
    (run / "steps.json").write_text(json.dumps([{"heading": url, "command": f"latentmill {url}", "seconds": 1}]))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(ROW | {"kind": "alert", "alert": url, "text": url}) + "\n")
    both = page.page([load(str(run)), load(str(fake_run(tmp_path / "b")))], {}, [f"{url} is passed over: {url}"])
    for html in (page.page([load(str(run))], {}), both):
        assert "SENTINEL" not in html and "[redacted]" in html


# --------------------------------------------------------------------------------------------------------------------
# The verb


def failing(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The only line of stderr with which the verb ends, at status 1."""
    assert cli.main(["report", *words]) == 1
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and said.out == ""
    return said.err


def test_one_bad_run_hides_no_other_and_is_named_on_stderr_and_on_the_page(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad").mkdir()
    dest = tmp_path / "page.html"
    assert cli.main(["report", str(tmp_path / "bad"), str(run), str(tmp_path / "gone"), f"dest={dest}"]) == 0
    said, html = capsys.readouterr().err, dest.read_text()
    for name in ("bad", "gone"):
        sentence = f"{tmp_path / name} is passed over: no run at {tmp_path / name}"
        assert sentence in said and sentence in html
    assert "0.880" in html
    assert cli.main(["report", str(tmp_path / "bad"), str(tmp_path / "gone"), f"dest={dest}"]) == 1
    assert "latentmill report: none of the 2 is a run" in capsys.readouterr().err
    assert dest.read_text() == html


def test_what_is_damaged_in_a_run_is_told_on_stderr(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for n in (0, 13_333, 26_666):
        (run / "evals" / f"{n:012d}" / "metrics.json").write_text("x")
        (run / "evals" / f"{n:012d}" / "card.json").write_text("x")
        (run / "evals" / f"{n:012d}" / "grid.json").write_text("x")
    (run / LAST / "card.json").write_text("x")
    (run / "steps.json").write_text("x")
    (run / "run.json").write_text("x")
    assert cli.main(["report", str(run)]) == 0
    said = capsys.readouterr().err
    assert said.count(" is left out: it is not JSON") == 5 and "1 more files or lines are left out" in said


def test_the_runs_of_a_sweep_are_compared_as_the_shell_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`latentmill report runs/sweep/* dest=sweep.html`, with what Hydra leaves there."""
    for i, name in enumerate(("optim.lr=0.001", "optim.lr=0.002,optim.name=adamw")):
        fake_run(tmp_path / "sweep" / name, seed=i)
    (tmp_path / "sweep" / "multirun.yaml").write_text("hydra: {}\n")
    monkeypatch.chdir(tmp_path)
    words = sorted(str(path) for path in Path("sweep").iterdir())
    assert len(words) == 3 and cli.main(["report", *words, "dest=sweep.html"]) == 0
    said, html = capsys.readouterr().err, Path("sweep.html").read_text()
    assert said.count("\n") == 1 and "multirun.yaml is what a sweep leaves" in said
    assert "optim.lr=0.001" in html and "optim.name=adamw" in html and "passed over" not in html
    monkeypatch.chdir(tmp_path / "sweep")
    assert cli.main(["report", "optim.lr=0.001"]) == 0
    assert Path("optim.lr=0.001/report.html").exists() and capsys.readouterr().err == ""
    assert "dets= is no option of report" in failing(capsys, "optim.lr=0.001", "dets=x.html")


def test_a_report_replaces_a_report_and_nothing_else(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dest = tmp_path / "page.html"
    for _ in range(2):
        assert cli.main(["report", str(run), f"dest={dest}"]) == 0
    capsys.readouterr()
    for content in (b"", b"mine", b"<!doctype html><html>", dest.read_bytes()[:20_000], b"x" + dest.read_bytes()):
        (tmp_path / "other.html").write_bytes(content)
        assert "is no page that this verb wrote" in failing(capsys, str(run), f"dest={tmp_path / 'other.html'}")
        assert (tmp_path / "other.html").read_bytes() == content
    before = (run / "metrics.jsonl").read_bytes()
    assert "is no page" in failing(capsys, str(run), f"dest={run / 'metrics.jsonl'}")
    assert (run / "metrics.jsonl").read_bytes() == before
    assert "is a folder" in failing(capsys, str(run), f"dest={tmp_path}")
    assert "is a device or a pipe" in failing(capsys, str(run), "dest=/dev/null")
    failing(capsys, str(run), f"dest={dest}/below.html")
    failing(capsys, str(run), "dest=.")
    failing(capsys, str(run), f"dest={tmp_path}/")
    (tmp_path / "latest.html").symlink_to(dest)
    assert cli.main(["report", str(run), f"dest={tmp_path / 'latest.html'}"]) == 0
    assert (tmp_path / "latest.html").is_symlink() and not list(tmp_path.glob(".*"))
