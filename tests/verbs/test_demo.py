"""The whole loop, as `latentmill demo` runs it, at the smallest size: every verb once, on real components."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import cli, demo
from pipeline.config import DemoConfig
from pipeline.config.loading.load import load
from pipeline.distributed import forks
from pipeline.errors import ConfigError

pytestmark = pytest.mark.timeout(900)  # the fixture runs every verb once

SMOKE = """# @package _global_
samples: 64
model: {channels: 32, blocks: 1, norm_groups: 8}
optim: {batch: 32, warmup: 32}
eval: {images: 16, final_images: 16, grid: 4, sampler: {steps: 2}}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], str]:
    """A finished demo of an untrained model: (folder it ran in, environment, what it printed)."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "conf" / "experiment").mkdir(parents=True)
    (folder / "conf" / "experiment" / "smoke.yaml").write_text(SMOKE)
    environment = os.environ | {"LATENTMILL_CONF": str(folder / "conf")}
    done = run_demo(folder, environment)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    return folder, environment, done.stdout


def run_demo(folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline.demo", "images=128", "recipe=smoke"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_demo_goes_through_every_step_and_ends_with_its_figures(finished: tuple[Path, dict[str, str], str]) -> None:
    folder, _, said = finished
    for verb in ("synth", "encode", "verify", "reference", "train", "sample", "export"):
        assert re.search(rf"^   latentmill {verb} ", said, re.MULTILINE)
    assert re.search(r"Attribute accuracy +\d\.\d{3} \(\d\.\d{3} to \d\.\d{3}\) +>= 0\.75", said)
    assert re.search(r"fid_democlip / its autoencoder's floor +[\d.]+ +<= 3", said)
    steps = json.loads((folder / "runs/demo/steps.json").read_text())
    assert [step["command"].split()[1] for step in steps] == [
        *("synth", "synth", "synth", "encode", "encode", "encode", "verify", "reference", "train", "sample", "export")
    ]


def test_the_demo_leaves_a_run_a_page_a_picture_and_a_diffusers_folder(
    finished: tuple[Path, dict[str, str], str],
) -> None:
    run = finished[0] / "runs/demo"
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "attribute accuracy" in page
    assert "data:image/png" in page
    assert (run / "samples.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "diffusers" / "unet" / "diffusion_pytorch_model.safetensors").exists()
    assert (run / "data" / "verify.html").exists()
    assert list((run / "checkpoints").glob("*/commit.json"))


def test_the_demos_cache_is_plain_webdataset(finished: tuple[Path, dict[str, str], str]) -> None:
    import webdataset

    shard = finished[0] / "runs/demo/data/cache/000000.tar"
    records = list(webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False).decode())
    assert len(records) == 128
    assert records[0]["moments.npy"].shape == (8, 8, 8)
    assert records[0]["json"]["caption"]


@pytest.fixture
def again(
    finished: tuple[Path, dict[str, str], str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[], str]:
    """Runs the same demo in this process, its steps too. Returns what it printed."""
    folder, environment, _ = finished
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LATENTMILL_CONF", environment["LATENTMILL_CONF"])
    monkeypatch.setattr(forks, "begin", lambda: None)
    monkeypatch.setattr(forks, "run_verb", lambda main, verb, arguments: main([verb, *arguments]))

    def run() -> str:
        capsys.readouterr()
        assert cli.main(["demo", "images=128", "recipe=smoke"]) == 0
        return capsys.readouterr().out

    return run


def test_the_demo_run_again_does_nothing_and_says_so(
    finished: tuple[Path, dict[str, str], str], again: Callable[[], str]
) -> None:
    said = again()
    assert said.count("already done") == 11
    assert (figures := re.findall(r"Attribute accuracy .*", said))
    assert figures == re.findall(r"Attribute accuracy .*", finished[2])


def test_a_step_whose_product_is_gone_is_done_again_with_all_that_follow(
    finished: tuple[Path, dict[str, str], str], again: Callable[[], str]
) -> None:
    samples = finished[0] / "runs/demo/samples.png"
    samples.unlink()
    assert again().count("already done") == 9
    assert samples.exists()


def test_the_printed_commands_can_be_typed() -> None:
    """Each command is what the shell and the command line take: its configuration loads."""
    import shlex

    config = DemoConfig(dest="runs/de mo's", tasks=("all",))
    dest, tasks = Path(config.dest), demo.tasks_of(config)
    given = {"class": ["class=[0,7]"], "semantic": ["labels=a.png"], "layout": ["boxes=a.json"]}
    given |= {"superres": ["image=a.png"], "inpaint": ["image=a.png", "mask=b.png"], "text": ["prompt=it's {red}, $x"]}
    steps = demo.data_steps(config, dest, tasks)
    for task in tasks:
        steps += [demo.train_step(config, task, dest, dest / task)]
        steps += demo.result_steps(task, dest / task, given.get(task, []), 0)
    for step in steps:
        shown = " ".join(map(demo._quoted, step.arguments[1:]))
        assert shlex.split(shown) == step.arguments[1:]
        load(step.arguments[0], step.arguments[1:])


def test_one_demo_stores_the_conditions_of_every_task_once_and_truth_for_evaluations_alone() -> None:
    steps = demo.data_steps(DemoConfig(), Path("d"), demo.tasks_of(DemoConfig(tasks=("all",))))
    caches = {step.product.parent.name: step.arguments for step in steps if step.arguments[0] == "encode"}
    assert "conditions=[class,boxes,labels,lowres,mask]" in caches["cache"]
    assert "conditions=[class,boxes,labels,lowres,mask,pixels]" in caches["cache-val"]
    assert not any(
        "conditions" in word for step in demo.data_steps(DemoConfig(), Path("d"), ("text",)) for word in step.arguments
    )


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (DemoConfig(task="clas"), "no such task; there are text"),
        (DemoConfig(tasks=("text", "text")), "give each task once"),
        (DemoConfig(tasks=("all",), recipe="shapes"), "recipe=shapes is of one task"),
    ],
)
def test_a_demo_of_tasks_that_do_not_fit_is_refused(config: DemoConfig, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        demo.tasks_of(config)


def test_training_sees_none_of_the_captions_that_are_judged() -> None:
    steps = demo.data_steps(DemoConfig(), Path("d"), ("text",))
    splits = {step.product.name: step.arguments for step in steps if step.arguments[0] == "synth"}
    assert "split=train" in splits["shapes"]
    assert "split=val" in splits["shapes-val"]
    assert "split=val" in splits["shapes-ref"]
    seeds = [next(word for word in arguments if word.startswith("seed=")) for arguments in splits.values()]
    assert len(set(seeds)) == 3


def test_a_step_that_fails_ends_the_demo_with_its_status_and_command(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dest = tmp_path / "demo"
    (dest / "data").mkdir(parents=True)
    (dest / "data" / "shapes").write_text("not a folder")
    assert cli.main(["demo", f"dest={dest}", "images=128"]) == 1
    said = capfd.readouterr().err
    assert "latentmill demo: this step failed (exit status 1); run the demo again to go on from here: " in said
    assert "Traceback" not in said
