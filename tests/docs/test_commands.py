"""Commands of the pages: each is one that the command line takes, and those of docs/coming_from run as they are
written, in small.

A block that begins `# run by tests/docs/NAME` is run by that test (made/page_blocks.py). Here networks and counts are
made small by words that are added to a command's own (SMALL); data of the names on the pages are made first.
"""

from __future__ import annotations

import hashlib
import io
import runpy
import shlex
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from made.encode import write_tar
from made.gathered import rows_of, write_parquet
from made.latents import CAPTIONS, half, latent, logvar, npy, npz, write_mds
from made.page_blocks import blocks, ours, read
from made.places import REPOSITORY
from made.run import make_cache, make_run
from pipeline import cli, export
from pipeline.config import ExportConfig
from pipeline.data.format.manifest import load_manifest
from pipeline.errors import ConfigError, LatentmillError, OverrideError
from pipeline.storage.urls import open_storage
from preprocess.shapes.shards import write_shards

DOCS = REPOSITORY / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), *(REPOSITORY / name for name in ("README.md", "AGENTS.md", "CONTRIBUTING.md"))]
COMING_FROM = sorted(page for page in (DOCS / "coming_from").glob("*.md") if page.stem != "what_breaks_elsewhere")
HERE = "tests/docs/test_commands.py"
ROWS = 8

SHIPPED = (
    "encoders.vae=demo encoders.text=demo encoders.text_pretrained= encoders.text_layer=last encoders.text_pad=636"
)
ENCODERS = [*SHIPPED.split(), "encoders.text_length=24", "encoders.vae_subfolder="]
"""The encoders that come with latentmill, whatever their name: Stable Diffusion's cannot be had here."""
NETWORK = "channels=32 multipliers=[1,2] blocks=1 attention=[2] heads=2 head_width=0 context_width=128"
TRAIN = "samples=8 optim.batch=4 optim.micro_batch=0 launch.processes=1 launch.threads=1 device=cpu precision=fp32"
SMALL = {
    "encode": [*ENCODERS, "batch=4", "decode_in=threads", "workers=1", "launch.threads=1", "device=cpu"],
    "index": ENCODERS,
    "train": [
        *(f"model.{word}" for word in (*NETWORK.split(), "linear_projection=false", "checkpointing=false")),
        *TRAIN.split(),
        *("deepspeed=off", "tracking.wandb=off", "eval.every=0", "checkpoint.every=4"),
    ],
}
"""Words that make a command small; the last of a key holds."""


def name(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


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


@cache
def pictures() -> list[bytes]:
    """Captioned shapes, which the shipped autoencoder knows, as files of pictures."""
    with tempfile.TemporaryDirectory() as folder:
        write_shards(folder, ROWS, 1, "val", shard_size=ROWS)
        with tarfile.open(next(Path(folder).glob("*.tar"))) as tar:
            files = {member.name: tar.extractfile(member) for member in tar}
            return [file.read() for name, file in sorted(files.items()) if file and name.endswith((".png", ".jpg"))]


def write_photos(folder: Path) -> None:
    """Images with captions beside them and in metadata.jsonl."""
    folder.mkdir()
    lines = []
    for row in range(ROWS):
        caption = CAPTIONS[row % len(CAPTIONS)]
        (folder / f"{row}.png").write_bytes(pictures()[row])
        (folder / f"{row}.txt").write_text(caption)
        lines.append(f'{{"file_name": "{row}.png", "text": "{caption}"}}\n')
    (folder / "metadata.jsonl").write_text("".join(lines))


def write_naruto(folder: Path) -> None:
    """A data set of the hub: Parquet files of images and texts."""
    write_parquet(folder / "data/train-00000.parquet", rows_of(range(ROWS)))


def write_sd_scripts(folder: Path) -> None:
    """What sd-scripts caches beside images: .npz of one latent, its size and crop, and a mirrored one."""
    (folder / "10_things").mkdir(parents=True)
    for row in range(ROWS):
        facts = {"latents": latent(row), "original_size": np.array([64, 64]), "crop_ltrb": np.array([0, 0, 64, 64])}
        (folder / f"10_things/{row}_0064x0064_sd.npz").write_bytes(npz(**facts, latents_flipped=latent(row)))
        (folder / f"10_things/{row}.txt").write_text(CAPTIONS[row % len(CAPTIONS)])
    (folder / "10_things/0_te_outputs.npz").write_bytes(npz(hidden_state1=np.zeros((2, 3), np.float32)))


def write_simpletuner(folder: Path) -> None:
    """What SimpleTuner caches of `photos`: a tensor by torch.save, under the SHA-256 of the image's name."""
    folder.mkdir(parents=True)
    for row in range(ROWS):
        out = io.BytesIO()
        torch.save(torch.from_numpy(latent(row)).bfloat16(), out)
        (folder / f"{hashlib.sha256(str(row).encode()).hexdigest()}.pt").write_bytes(out.getvalue())


def write_mosaicml(folder: Path) -> None:
    """MDS shards of mosaicml/diffusion: pictures, latents that are scaled, none of them of small pictures."""
    columns = {"caption": "str", "jpg": "bytes", "latents_256": "bytes", "caption_latents": "bytes"}
    columns |= {"similarity": "float64", "width": "int32"}
    samples = [
        {
            "caption": CAPTIONS[row % len(CAPTIONS)].encode(),
            "jpg": pictures()[row],
            "latents_256": half(latent(row, 32, 32) * 0.18215).tobytes() if row else b"",
            "caption_latents": np.zeros((77, 8), np.float16).tobytes(),
            "similarity": np.float64(0.3).tobytes(),
            "width": np.int32(256 if row else 64).tobytes(),
        }
        for row in range(ROWS)
    ]
    for number in range(2):
        write_mds(folder / str(number), columns, [samples[4 * number : 4 * number + 4]])


def write_mlperf(folder: Path) -> None:
    """Tars as the reference's script writes them: moments with a batch axis of one, and img2dataset's files."""
    for kind in ("webdataset-moments-filtered", "webdataset-filtered"):
        (folder / kind).mkdir()
        for tar in range(2):
            members = []
            for row in range(4 * tar, 4 * tar + 4):
                moments = np.concatenate([latent(row), logvar(row)])[None]
                picture = ("npy", npy(moments)) if "moments" in kind else ("png", pictures()[row])
                for end, data in (picture, ("txt", CAPTIONS[row % 5].encode()), ("json", b'{"status": "success"}')):
                    members.append((f"{row:09d}.{end}", data))
            write_tar(folder / kind / f"{tar:05d}.tar", members)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a small network as a diffusers folder and as a CompVis file, under the names of the pages."""
    folder = tmp_path_factory.mktemp("weights")
    make_cache(folder)
    given = folder / "given"
    config = ExportConfig(run=make_run(folder).run, dest=str(given / "stable-diffusion-v1-4"))
    export.main(config)
    export.main(replace(config, format="compvis", dest=str(given / "sd14.safetensors")))
    return given


MAKES: dict[str, tuple[Callable[[Path], None], str]] = {
    "photos": (write_photos, "photos"),
    "naruto": (write_naruto, "naruto"),
    "cached": (write_sd_scripts, "cached"),
    "cache/vae": (write_simpletuner, "cache/vae"),
    "mds": (write_mosaicml, "mds"),
    "webdataset": (write_mlperf, ""),
}
"""Data that a page names -> what makes them, and where."""


def shrunk(words: list[str]) -> list[str]:
    """A command in small."""
    verb, *rest = words
    small = SMALL.get(verb, [])
    groups = {word.partition("=")[0] for word in small} & {"deepspeed"}
    rest = [word for word in rest if word.partition("=")[0] not in groups]
    rest = ["resolution=64" if word.startswith("resolution=") else word for word in rest]
    return [verb, *rest, *small]


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
