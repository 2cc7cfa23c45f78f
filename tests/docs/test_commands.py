"""Commands of the pages: each is one that the command line takes, and those of docs/coming_from run as they are
written, in small.

A block that begins `# run by tests/docs/NAME` is run by that test (made/page_blocks.py). Here networks and counts are
made small by words that are added to a command's own (SMALL); data of the names on the pages are made first.
"""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from made.others import MAKES, ROWS, SCALE, write_mlperf, write_mosaicml, write_sd_scripts, write_simpletuner
from made.page_blocks import blocks, ours, read
from made.places import REPOSITORY
from made.run import make_cache, make_run
from pipeline import cli, export
from pipeline.config import CONFIGS, ExportConfig
from pipeline.config.loading.folders import groups
from pipeline.config.loading.merge import flat_types
from pipeline.data.format.manifest import load_manifest
from pipeline.errors import ConfigError, LatentmillError, OverrideError
from pipeline.models.encoders.torchvision_ops import declare_torchvision_ops
from pipeline.storage.urls import open_storage

DOCS = REPOSITORY / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), *(REPOSITORY / name for name in ("README.md", "AGENTS.md", "CONTRIBUTING.md"))]
COMING_FROM = sorted(page for page in (DOCS / "coming_from").glob("*.md") if page.stem != "what_breaks_elsewhere")
HERE = "tests/docs/test_commands.py"

SHIPPED = (
    "encoders.vae=demo encoders.text=demo encoders.text_pretrained= encoders.text_layer=last encoders.text_pad=636"
)
ENCODERS = [*SHIPPED.split(), "encoders.text_length=24", "encoders.vae_subfolder="]
"""The encoders that come with latentmill, whatever their name: Stable Diffusion's cannot be had here."""
NETWORK = "channels=32 multipliers=[1,2] blocks=1 attention=[2] heads=2 head_width=0 context_width=128"
TRAIN = "samples=4 optim.batch=4 optim.micro_batch=0 launch.processes=1 launch.threads=1 device=cpu precision=fp32"
SMALL = {
    "encode": [*ENCODERS, "batch=4", "decode_in=threads", "workers=1", "launch.threads=1", "device=cpu"],
    "index": ENCODERS,
    "train": [
        *(f"model.{word}" for word in (*NETWORK.split(), "linear_projection=false", "checkpointing=false")),
        *TRAIN.split(),
        *("deepspeed=off", "tracking.wandb=off", "eval.every=0"),
    ],
}
"""Words that make a command small; the last of a key holds."""


def name(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def test_who_is_said_to_run_a_block_runs_it() -> None:
    said = {(page.parent.name, block.run_by) for page in PAGES for block in blocks(page) if block.run_by}
    assert said == {
        ("coming_from", HERE),
        ("coming_from", "tests/docs/test_what_breaks.py"),
        ("how_to", "tests/docs/test_own_loop.py"),
    }


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_of_a_page_is_one_that_the_command_line_takes(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCRATCH", "/scratch")
    refused = []
    for block in blocks(page):
        if block.kind not in ("commands", "run"):
            continue
        for words in ours(block):
            try:
                read(words)
            except LatentmillError as error:
                refused.append(f"{name(page)}:{block.line}: latentmill {shlex.join(words)}: {error}")
    assert refused == []


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("trian run=a", "no such verb"),
        ("train run=a data.train=c optim.learning_rate=1", "no such key"),
        ("train run=a data.train=c optim.lr=fast", "optim.lr"),
        ("train run=a data.train=c model=sd9", "sd9"),
        ("train data.train=c", "run is missing"),
        ("train ... optim.lrr=1", "no such key"),
        ("encode source=a.tar", "dest is missing"),
        ("submit train nodes=2 data.train=c run=a then eval run=a imges=3", "no such key"),
        ("plan experiment=nonesuch images=1M", "no such experiment"),
        ("train -m cluster=a100 optim.lr=1e-4,2e-4 data.train=c run=r --no-wiat", "no flag of a sweep"),
        ("train -m cluster.tme=1 optim.lr=1e-4,2e-4 data.train=c run=r", "no such key"),
        ("train -m optim.lr=1e-4,fast data.train=c run=r", "fast"),
        ("submit train -m nodes=2 optim.lrr=1e-4,2e-4 data.train=c run=r", "no such key"),
        ("status --wacht runs/a", "usage"),
    ],
)
def test_a_command_that_the_command_line_refuses_is_found(words: str, error: str) -> None:
    with pytest.raises((ConfigError, OverrideError), match=error):
        read(words.split())


def test_a_block_is_told_by_its_first_line_and_its_lines_are_joined(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A\n\n    # run by tests/x.py\n    a b \\\n        'c d'  # e\n    f#g\n\n    # theirs, not run\n    h\n"
    )
    run, theirs = blocks(page)
    assert (run.kind, run.run_by, run.line) == ("run", "tests/x.py", 3)
    assert run.commands == [["a", "b", "c d"], ["f#g"]]
    assert (theirs.kind, theirs.run_by) == ("theirs", "")
    page.write_text("text\n\n    # run by tests/x.py\n    a\n\n    b\n\nmore\n\n    c\n\n")
    assert [(one.line, one.lines) for one in blocks(page, through_empty_lines=True)] == [
        (3, ("# run by tests/x.py", "a", "", "b")),
        (10, ("c",)),
    ]


# --------------------------------------------------------------------------------------------------------------------
# Coming from


@pytest.mark.parametrize("page", COMING_FROM, ids=name)
def test_commands_of_others_stand_beside_ours_and_say_that_they_are_theirs(page: Path) -> None:
    kinds = [block.kind for block in blocks(page)]
    assert kinds[:2] == ["theirs", "run"]
    for block in blocks(page):
        foreign = [words for words in block.commands if words[0] != "latentmill"]
        if block.kind == "theirs":
            assert len(foreign) == len(block.commands)
        else:
            assert all(words[:1] == ["python"] and words[1].startswith("examples/") for words in foreign), block
        assert block.run_by in ("", HERE)


@pytest.mark.parametrize("page", COMING_FROM, ids=name)
def test_keys_that_stand_for_options_of_others_are_keys(page: Path) -> None:
    """The second column of the tables: `KEY=` and `KEY=VALUE`, alone or several in one command."""
    known = {key for config in CONFIGS.values() for key, _ in flat_types(config)} | {"nodes"}
    known |= {group for verb in CONFIGS for group in groups(verb)}
    rows = re.findall(r"^\|[^|]+\|([^|]+)\|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    words = [word for row in rows for span in re.findall(r"`([^`]+)`", row) for word in span.split() if "=" in word]
    keys = {word.partition("=")[0] for word in words}
    assert len(keys) >= 10
    assert keys - known == set()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a small network as a diffusers folder, a CompVis file and an average that diffusers saved, under the
    names of the pages."""
    declare_torchvision_ops()
    from diffusers import UNet2DConditionModel
    from diffusers.training_utils import EMAModel

    folder = tmp_path_factory.mktemp("weights")
    make_cache(folder)
    given = folder / "given"
    config = ExportConfig(run=make_run(folder).run, dest=str(given / "stable-diffusion-v1-4"))
    export.main(config)
    export.main(replace(config, format="compvis", dest=str(given / "sd14.safetensors")))
    unet = UNet2DConditionModel.from_pretrained(given / "stable-diffusion-v1-4/unet")
    average = EMAModel(unet.parameters(), model_cls=UNet2DConditionModel, model_config=unet.config)
    average.save_pretrained(given / "sd-theirs/checkpoint-15000/unet_ema")  # as their script saves it
    return given


def shrunk(words: list[str]) -> list[str]:
    """A command in small."""
    verb, *rest = words
    small = SMALL.get(verb, [])
    groups = {word.partition("=")[0] for word in small} & {"deepspeed"}
    rest = [word for word in rest if word.partition("=")[0] not in groups]
    rest = ["resolution=64" if word.startswith("resolution=") else word for word in rest]
    return [verb, *rest, *small]


@pytest.mark.parametrize("page", COMING_FROM, ids=name)
def test_runs_of_the_pages_can_be_planned_in_their_own_size(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Network, batch, ranks and memory fit together, as `latentmill plan` sees them, on a GPU of 80 GB."""
    monkeypatch.chdir(tmp_path)
    for words in [words for block in blocks(page) for words in ours(block) if words[0] == "train"]:
        model = next(word for word in words if word.startswith("model="))
        own = [word for word in words[1:] if word.partition("=")[0] not in ("run", "data.train", "init")]
        side = "256" if "256" in " ".join(words) else "512"
        cached = [f"encode.{model.replace('model', 'encoders')}", f"encode.resolution={side}", "images=1M", "gpu=h100"]
        assert cli.main(["plan", *own, *cached, "data.val="]) == 0, f"{shlex.join(words)}\n{capsys.readouterr().err}"
        assert "does not fit" not in capsys.readouterr().out


@pytest.mark.parametrize("page", COMING_FROM, ids=name)
def test_our_commands_run_as_they_are_written(
    page: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With every word of theirs, on data that are laid out as others write them; networks and counts are small."""
    text = page.read_text(encoding="utf-8")
    for named, (make, where) in MAKES.items():
        if named in text:
            make(tmp_path / where)
    for path in weights.iterdir():
        if path.name in text:
            (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    monkeypatch.chdir(tmp_path)
    datasets = []
    for block in blocks(page):
        if block.run_by != HERE:
            continue
        for words in block.commands:
            line = f"{name(page)}:{block.line}: {shlex.join(words)}"
            words = [word.replace("{00000..00831}", "{00000..00001}") for word in words]
            if words[0] == "python":
                monkeypatch.setattr(sys, "argv", words[1:])
                with pytest.raises(SystemExit) as ended:
                    runpy.run_path(str(REPOSITORY / words[1]), run_name="__main__")
                status = ended.value.code
            else:
                status = cli.main(shrunk(words[1:]))
            assert status == 0, f"{line}\n{capsys.readouterr().err}"
            datasets += [word[5:] for word in words if words[1] in ("encode", "index") and word.startswith("dest=")]
    capsys.readouterr()
    assert datasets
    for dataset in datasets:
        manifest = load_manifest(open_storage(dataset))
        left_out = 1 if page.stem == "mosaicml_streaming" and dataset == "cache" else 0
        flipped = 2 if page.stem == "diffusers" and dataset == "cache" else 1
        assert sum(shard.samples for shard in manifest.shards) == (ROWS - left_out) * flipped, dataset
        if (facts := manifest.contract.converted) is not None:
            deviation = sum(manifest.statistics.std) / len(manifest.statistics.std)
            if not facts.scaled:  # latents of Stable Diffusion, multiplied by the scale of the shipped autoencoder
                deviation *= float(SCALE) / manifest.contract.scale
            assert 0.5 < deviation < 2, f"{dataset}: latents of deviation {deviation:.3f} are wrongly scaled"


REFUSED = [
    # what the pages say of it
    ("index dataset={} source={}/*.tar moments_member=npy text_member=", "it is neither moments nor latents"),
    ("index dest=c source=cache/vae/*.pt moments_member=pt text_member=", "by examples/simpletuner_latents.py"),
    ("encode dest=c source=cache/vae/*.pt", "first by examples/simpletuner_latents.py"),
    ("encode dest=c source=mds/**/index.json", "become tars by examples/mds_to_tars.py"),
    ("encode dest=c source=mds/*/*.mds", "become tars by examples/mds_to_tars.py"),
    ("encode dest=c source=cached/**/*.npz", "are converted by `latentmill index dest=`"),
    (
        "index dest=c source=mds/**/index.json stored=latents scaled=true text_member= "
        "moments_member=latents_256:float16:4x32x32",
        "has 0 bytes of float16",
    ),
]


def test_what_is_not_read_is_refused_and_the_way_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_mlperf(tmp_path)
    write_mosaicml(tmp_path / "mds")
    write_simpletuner(tmp_path / "cache/vae")
    write_sd_scripts(tmp_path / "cached")
    monkeypatch.chdir(tmp_path)
    for words, reason in REFUSED:
        assert cli.main(words.replace("{}", "webdataset-moments-filtered").split()) == 1
        said = capsys.readouterr().err
        assert reason in said and len(said.splitlines()) == 1, said
    assert not (tmp_path / "c").exists()


def test_scaled_latents_that_are_not_said_to_be_are_recognised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_mosaicml(tmp_path / "mds")
    monkeypatch.chdir(tmp_path)
    words = "index dest=c source=mds/**/index.json stored=latents text_member= max_rejects=0.3"
    assert cli.main([*words.split(), "moments_member=latents_256:float16:4x32x32"]) == 0
    assert "their deviation is 0.182 and not about 1, as of latents that are scaled already" in capsys.readouterr().out
