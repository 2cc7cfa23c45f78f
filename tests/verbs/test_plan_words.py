"""The words of `latentmill plan`: whose experiment it is, and which caches and machines are meant."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from made.cache import contract, make_cache
from made.rates import calibration
from pipeline import cli
from pipeline.config.loading.load import load
from pipeline.errors import DatasetError
from pipeline.plan import divided, planned
from pipeline.planning.plan.figures import Figure, Rate
from pipeline.planning.plan.job import Job, Machines
from pipeline.planning.plan.machines import gpu_of
from pipeline.planning.plan.sections import Plan, Section
from pipeline.planning.plan.speeds import Speeds
from pipeline.planning.plan.training import training_section
from pipeline.planning.plan.whole import of_sum
from pipeline.planning.rates.calibration import add
from pipeline.planning.rates.rates import Rates
from preprocess.shapes.shards import write_shards

CACHE_WORDS = ("model=tiny", "model.in_channels=4", "model.context_width=8", "optim.batch=8", "samples=800")
DEMO = ("experiment=demo", "images=1000")


@pytest.fixture(autouse=True)
def uncalibrated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No file of rates of this machine counts."""
    monkeypatch.delenv("LATENTMILL_RATES", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def plan(*words: str) -> Plan:
    found = divided(words)
    return planned(load("plan", found.own), found)


def figures(made: Plan, section: str) -> dict[str, tuple[float, str, str]]:
    found = made.section(section)
    assert found is not None
    return {figure.name: (figure.value, figure.basis, figure.where) for figure in found.figures}


def test_a_users_own_experiment_is_one_of_train_unless_only_autoencoders_know_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("# @package _global_\nsamples: 6400\noptim:\n  batch: 32\n")
    choice = "# @package _global_\ndefaults:\n  - override /autoencoder: kl_small\noptim:\n  batch: 32\n"
    (folder / "stage.yaml").write_text(choice)
    monkeypatch.setenv("LATENTMILL_CONF", str(tmp_path / "conf"))
    assert divided(("experiment=mine",)).verb("") == "train"
    assert divided(("experiment=stage",)).verb("") == "autoencoder"
    assert divided(("experiment=kl_f8",)).verb("") == "autoencoder"
    assert divided(("experiment=mine", "autoencoder=kl_small")).verb("") == "autoencoder"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((*DEMO, "efficiency=0.4"), "efficiency=0.4 is a share of a GPU's peak: name the GPU with gpu=NAME"),
        ((*DEMO, "gpu=h100", "device=cpu"), "gpu=h100 and device=cpu contradict each other"),
        ((*DEMO, "gpu=h100", "deepspeed=off", "cluster.processes=2"), "deepspeed.engine=torch trains in one process"),
    ],
    ids=["efficiency", "device", "engine"],
)
def test_words_that_contradict_are_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], reason: str
) -> None:
    assert cli.main(["plan", *words]) in (1, 2)
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and reason in message


def test_images_stand_for_caches_of_which_none_is_there_and_for_no_damaged_or_missing_one(tmp_path: Path) -> None:
    words = (*CACHE_WORDS, "images=1000", "encode.encoders=demo", "encode.resolution=[64]")
    to_come = plan(*words, "model.context_width=128", f"data.train={tmp_path}/none")
    assert figures(to_come, "encode")["images"] == (1000, "arithmetic", "as given by images=")
    make_cache(str(tmp_path / "cache"), [16])
    with pytest.raises(DatasetError, match="none"):
        plan(*words, f"data.train={tmp_path}/cache", f"data.mix=[{tmp_path}/none]")
    (tmp_path / "cache" / "manifest.json").write_text("{")
    with pytest.raises(DatasetError):
        plan(*words, f"data.train={tmp_path}/cache")


def test_of_several_caches_the_largest_latents_count(tmp_path: Path) -> None:
    make_cache(str(tmp_path / "small"), [16])
    make_cache(str(tmp_path / "large"), [16], 4)
    urls = (f"data.train={tmp_path}/small", f"data.mix=[{tmp_path}/large]")
    mixed, large = plan(*CACHE_WORDS, *urls), plan(*CACHE_WORDS, f"data.train={tmp_path}/large")
    assert mixed.chosen is not None and large.chosen is not None
    assert mixed.chosen.peak == large.chosen.peak
    section = mixed.section("encode")
    assert section is not None and "the largest latents of data.train and data.mix, 4x4x4" in section.notes[-1]


@pytest.mark.parametrize(
    ("words", "gigabytes"),
    [
        (("cluster=a100",), 80),
        (("cluster=a100", "gpu=h200"), 141),
        (("cluster=a100", "gpu=a100-40gb"), 80),
        (("cluster=a100", "gpu=h200", "cluster.gpu_memory_gb=100"), 100),
        (("gpu=A100-SXM4-40GB",), 40),
    ],
    ids=["cluster", "another", "same", "given", "named"],
)
def test_the_memory_is_that_of_the_gpu_that_is_meant(words: tuple[str, ...], gigabytes: float) -> None:
    assert f"of the {gigabytes} GB" in plan(*DEMO, *words).why


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA A100-SXM4-40GB", ("a100", 40)),
        ("A100 80GB PCIe", ("a100", 80)),
        ("gpu:h100:4", ("h100", 80)),
        ("Tesla V100-SXM2-16GB", ("v100", 16)),
        ("NVIDIA A10G", ("a10g", 24)),
        ("NVIDIA GH200 480GB", None),
        ("gb200", None),
        ("h2000", None),
    ],
)
def test_a_gpu_is_known_by_a_whole_word_and_its_memory_by_its_name(name: str, expected: tuple[str, int] | None) -> None:
    found = gpu_of(name)
    assert (found and (found.name, found.memory_gb)) == expected
    if found:
        assert found == gpu_of(found.name), "of whatever memory"


# --------------------------------------------------------------------------------------------------------------------
# Encoding


def test_pictures_that_are_flipped_as_well_are_encoded_twice() -> None:
    words = ("experiment=sd1_256", "images=1000", "gpu=v100")
    once, twice = (
        figures(plan(*words, f"encode.flip={one}"), "encode")["hours with 1 GPU"][0] for one in ("false", "true")
    )
    assert 1.9 * once < twice < 2 * once, "captions are encoded once"


def test_processes_that_share_a_machines_cores_are_shown_as_they_are_alone() -> None:
    found = figures(plan(*DEMO, "launch.processes=2"), "encode")
    assert [name for name in found if name.startswith("hours with")] == ["hours with 2 processes"]


def test_requests_of_several_resolutions_are_those_of_all(tmp_path: Path) -> None:
    write_shards(str(tmp_path / "shapes"), 40, 1, "train", shard_size=10)
    words = ("experiment=demo", f"source={tmp_path}/shapes/*.tar")
    one, two = (
        figures(plan(*words, f"encode.resolution={sides}"), "encode")["requests"] for sides in ("[64]", "[64,32]")
    )
    assert two[0] > 1.4 * one[0]
    read = [int(kinds.partition(",")[0].removeprefix("GET ")) for _, _, kinds in (one, two)]
    assert read[1] == read[0] + 4 + 4, "the source is read once, and a report of each of 4 shards for each resolution"


def test_a_sum_is_calibrated_where_all_of_it_is(tmp_path: Path) -> None:
    file = tmp_path / "rates.json"
    add(file, calibration())
    alone, one = plan(*DEMO, "price=1", f"rates={file}"), plan(*DEMO, "price=1")
    for name in ("hours", "hours of encoding", "device-hours of both", "price of both"):
        assert figures(alone, "whole")[name][1] == "calibrated"
        assert figures(one, "whole")[name][1] == "arithmetic"
    assert of_sum(["calibrated", "arithmetic"]) == of_sum(["measured"]) == "arithmetic"


@pytest.mark.parametrize(("send_s", "expected"), [(0.005, "calibrated"), (0.5, "arithmetic")])
def test_a_step_in_which_sending_counts_is_as_good_as_the_assumed_bandwidth(send_s: float, expected: str) -> None:
    asked = plan(*DEMO, "gpu=h100")
    assert asked.chosen is not None
    chosen = replace(asked.chosen, compute_s=1.0, send_s=send_s)
    job = Job(config=load("train", ["run=r", "data.train=c"]), cache=contract(), machines=Machines(gpu="h100"))

    class Known(Speeds):
        def training(self, job: Job) -> Rate:
            return Rate(1.0, "images/s", "calibrated", "here")

    section = training_section(job, chosen, Known(Rates()))
    bases = {figure.name: figure.basis for figure in section.figures}
    assert bases["images/s of a rank that sends nothing"] == "calibrated"
    assert {bases[name] for name in ("images/s", "seconds of a step", "MFU", "hours of steps")} == {expected}


def test_model_flops_utilization_leaves_out_the_text_tower() -> None:
    words = ("experiment=sd1_256", "images=1M", "gpu=h100", "encode.text_storage=tokens")
    made = plan(*words)
    found = figures(made, "training")
    trained = found["FLOPs of an image"][0] - found["FLOPs of an image in the text tower"][0]
    assert found["MFU"][0] == pytest.approx(trained * found["images/s"][0] / 989.4e12, rel=1e-6)


@pytest.mark.parametrize("hours", [3650.4, 0.0618])
def test_the_line_of_submit_is_written_for_people(hours: float) -> None:
    whole = tuple(Figure(name, hours, "hours", "arithmetic", "-") for name in ("hours", "device-hours"))
    number = {3650.4: "3,650", 0.0618: "0.0618"}[hours]
    assert Plan("", (Section("whole", whole),)).line() == f"{number} hours, {number} device-hours"
