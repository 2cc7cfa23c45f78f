"""`latentmill export push=`: what comes to (a stand-in for) the hub of each kind of export, and what its card says."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from made.autoencoder_run import KL, make_autoencoder_run, make_pixels
from made.hub import serve
from made.run import make_cache, make_run
from made.task_run import make_task_run
from pipeline import cli, export
from pipeline.conditions.facts import ClassFacts, Conditions
from pipeline.config import ClassTask, ExportConfig
from pipeline.config.check.verbs import check
from pipeline.errors import ConfigError, StorageError
from pipeline.inference.trained import load_trained
from pipeline.interchange import unet as convert
from pipeline.interchange.hub import card as cards
from pipeline.models.weights import weights_digest
from pipeline.storage.local import LocalStorage
from servers.hub import TOKEN
from servers.hub import Hub as Server

REPO = "someone/small"
DIGEST = "b" * 64
HOSTILE = "a `line`\n| of | others |\n# <script>alert(1)</script> https://me:secret99@host/x"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    make_cache(folder)
    make_run(folder)
    evaluation(folder / "run", "", attribute_accuracy=0.5, attribute_accuracy_low=0.25, attribute_accuracy_high=0.75)
    evaluation(folder / "run", "fid", fid_democlip=12.5, fid_democlip_error=0.5, fid_democlip_floor_real=1.25)
    evaluation(folder / "run", "raw", weights="raw", clip_score=77.0)
    evaluation(folder / "run", "kept", steering={"keep": True}, psnr_kept=88.0)
    evaluation(folder / "run", "early", n=64, clip_score=99.0)
    return folder


def evaluation(
    run: Path, name: str, n: int = 128, weights: str = "ema", steering: Any = None, sha256: str = "", **figures: Any
) -> None:
    """Writes an evaluation of a run with invented figures."""
    place = run / "evals" / (f"{n:012d}" + (f"-{name}" if name else ""))
    place.mkdir(parents=True)
    facts = {"n": n, "images": 12, "weights": weights, **figures}
    (place / "metrics.json").write_text(json.dumps(facts))
    card = {"line": HOSTILE if name == "fid" else f"line of {name}", "weights": weights, "steering": steering or {}}
    card |= {"weights_sha256": sha256} if sha256 else {}
    (place / "card.json").write_text(json.dumps({**card, "captions": {"dataset": DIGEST, "records": 12}}))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    yield from serve(monkeypatch)


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> ExportConfig:
    return ExportConfig(run=str(folder / "run"), dest=str(tmp_path / "sd"), push=f"hub:{REPO}", license="mit")


def exported(config: ExportConfig) -> int:
    check(config)
    return export.main(config)


def parts(card: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The metadata of a card, and its sections by heading."""
    _, front, body = card.split("---\n", 2)
    sections = dict(section.split("\n", 1) for section in body.split("\n## ")[1:])
    return yaml.safe_load(front), sections


def assert_clean(hub: Server, *places: Path, but: str = "") -> None:
    """Nothing that came there names a place, a token or a secret of this machine."""
    branches = [files for made in hub.repositories.values() for _, files in made.branches.values()]
    for files in branches:
        for path, data in files.items():
            if path == but:
                continue
            for word in (TOKEN, "secret99", *map(str, places)):
                assert word.encode() not in data, f"{path} holds {word}"


def test_a_folder_comes_there_as_it_lies_here_with_a_card(
    config: ExportConfig, folder: Path, hub: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import ModelCard

    config = replace(config, datasets=("someone/shapes",))
    assert exported(config) == 0
    dest = Path(config.dest)
    here = {path.relative_to(dest).as_posix(): path.read_bytes() for path in dest.rglob("*") if path.is_file()}
    assert hub.files(REPO) == here
    assert_clean(hub, folder, tmp_path)
    facts, sections = parts(here["README.md"].decode())
    assert facts == {
        "license": "mit",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["latentmill", "latent-diffusion", "text"],
        "datasets": ["someone/shapes"],
    }
    theirs: Any = ModelCard(here["README.md"].decode()).data  # as the library reads it
    assert (theirs.license, theirs.pipeline_tag, theirs.datasets) == ("mit", "text-to-image", ["someone/shapes"])
    stored = json.loads((folder / "run" / "run.json").read_text())
    what = sections["What it is"]
    hashes = stored["manifests"]["train"], stored["contract"]["vae_sha256"]
    for word in (*hashes, "| seed | 0 |", "| samples seen | 128"):
        assert word in what
    figures = sections["Figures"]
    assert r"| Attribute accuracy | 0.500 | \[0.250, 0.750\] |" in figures
    assert r"| fid\_democlip | 12.50 | ± 0.5 | real 1.25 | lower is better |" in figures
    assert DIGEST in figures and "line of early" not in figures
    assert not [number for number in ("77.0", "88.0", "99.0") if number in figures]
    assert "<script>" not in re.sub(r"`[^`\n]*`", "", figures) and "\n# " not in figures
    unmeasured = sections["What was not measured"]
    assert "CLIP score" in unmeasured and "KID" in unmeasured and "bias" in unmeasured
    assert "FID," not in unmeasured and "Attribute accuracy" not in unmeasured
    assert f'snapshot_download("{REPO}")' in sections["How to load it"]
    assert "StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)" in sections["How to load it"]
    capsys.readouterr()
    words = [f"run={config.run}", f"dest={config.dest}", f"push=hub:{REPO}", "license=mit", "datasets=[someone/shapes]"]
    assert cli.main(["export", *words]) == 0
    assert "nothing changed" in capsys.readouterr().out and len(hub.repositories[REPO].history) == 2


def test_the_lines_of_a_card_bring_the_model_back(
    config: ExportConfig, hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import StableDiffusionPipeline
    from huggingface_hub import constants

    exported(replace(config, revision="ema-128"))
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix("https://huggingface.co")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "downloads"))
    loading = parts(hub.files(REPO, "ema-128")["README.md"].decode())[1]["How to load it"]
    names: dict[str, Any] = {}
    exec(re.search(r"```python\n(.*?)```", loading, re.S)[1], names)  # type: ignore[index]
    pipe = StableDiffusionPipeline.from_pretrained(names["folder"], safety_checker=None)
    ours = load_file(Path(config.dest) / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, ours[name]) for name, tensor in pipe.unet.state_dict().items())


def test_without_push_nothing_is_asked_and_readme_is_as_ever(config: ExportConfig, hub: Server) -> None:
    exported(replace(config, push="", license=""))
    assert hub.requests == []
    assert (Path(config.dest) / "README.md").read_text().startswith("Exported by latentmill ")
    exported(config)
    assert (Path(config.dest) / "README.md").read_text().startswith("---\nlicense: mit\n")
    exported(replace(config, push="", license=""))
    assert (Path(config.dest) / "README.md").read_text().startswith("Exported by latentmill ")


def test_an_export_that_computes_something_else_is_not_pushed(
    config: ExportConfig, hub: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_all = convert.to_diffusers
    monkeypatch.setattr(convert, "to_diffusers", lambda *a: {k: v * 1.01 for k, v in convert_all(*a).items()})
    with pytest.raises(export.ExportDiffers, match="denoiser"):
        exported(config)
    assert hub.repositories == {} and not Path(config.dest).exists()


@pytest.mark.parametrize("form", ["diffusers", "compvis"])
def test_a_file_that_changes_between_check_and_push_is_not_pushed(
    config: ExportConfig, hub: Server, monkeypatch: pytest.MonkeyPatch, form: Any
) -> None:
    from pipeline.interchange.hub import exported as module

    if form == "compvis":
        config = replace(config, format=form, dest=f"{config.dest}.safetensors")
    file = Path(config.dest) if form == "compvis" else Path(config.dest) / "unet" / "config.json"

    def changing(*arguments: Any) -> Any:
        file.write_bytes(file.read_bytes() + b" ")
        return pushing(*arguments)

    pushing = module.push_export
    monkeypatch.setattr(export, "push_export", changing)
    with pytest.raises(StorageError, match=rf"{file.name} is not what was exported and compared"):
        exported(config)
    assert hub.repositories == {}


def test_a_hub_that_refuses_is_told_before_any_weights_are_read(
    config: ExportConfig, hub: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "load_trained", lambda *a: 1 / 0)
    monkeypatch.setenv("HF_TOKEN", "hf_another0123456789")
    with pytest.raises(ConfigError, match="does not take the token of HF_TOKEN"):
        exported(config)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ConfigError, match="HF_TOKEN is not set"):
        exported(config)


def test_a_card_that_was_edited_here_is_pushed_as_it_is(config: ExportConfig, hub: Server) -> None:
    exported(config)
    mine = b"---\nlicense: apache-2.0\n---\nMy words\n"
    (Path(config.dest) / "README.md").write_bytes(mine)
    exported(config)
    assert hub.files(REPO)["README.md"] == mine
    (Path(config.dest) / "README.md").write_bytes(mine + b"and more\n")
    exported(config)
    assert hub.files(REPO)["README.md"] == mine + b"and more\n"


def test_a_run_without_evaluations_says_that_it_has_none(config: ExportConfig, folder: Path, hub: Server) -> None:
    exported(replace(config, weights="raw", format="compvis", dest=f"{config.dest}.safetensors"))
    assert "raw, 12 pictures" in parts(hub.files(REPO)["README.md"].decode())[1]["Figures"].replace("`", "")
    (folder / "run" / "evals").rename(folder / "run" / "hidden")
    try:
        exported(replace(config, push="hub:someone/bare", license=""))
    finally:
        (folder / "run" / "hidden").rename(folder / "run" / "evals")
    facts, sections = parts(hub.files("someone/bare")["README.md"].decode())
    assert "license" not in facts
    assert "No evaluation of these weights (averaged weights (ema) at 128 samples)" in sections["Figures"]


def test_figures_are_of_the_exported_weights_alone_and_those_that_are_not_shown_are_counted(
    config: ExportConfig, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(config.run, run, ignore=shutil.ignore_patterns("evals"))
    trained = load_trained(str(run))
    evaluation(run, "a", sha256=weights_digest(trained.state), steering={"guide.clip": 0.0}, fid_democlip=1.25)
    evaluation(run, "b", sha256="c" * 64, fid_democlip=66.0)
    evaluation(run, "c", steering={"guide.clip": 2.0}, fid_democlip=77.0)
    for number in range(cards.MOST - 1):
        evaluation(run, f"d{number:02d}", kid_democlip=0.5)
    evaluation(run, "e", clip_score=0.5)
    sections = parts(cards.card(replace(config, run=str(run)), trained, ""))[1]
    assert (
        "| 1.25 |" in sections["Figures"] and "66.00" not in sections["Figures"] and "77.00" not in sections["Figures"]
    )
    assert "`d10`" in sections["Figures"] and "`e`" not in sections["Figures"]
    assert "1 more of these weights are in the run and not shown here" in sections["Figures"]
    assert "CLIP score" in sections["What was not measured"]  # e alone has it


def test_one_file_in_compvis_names_comes_with_a_card_beside_it(config: ExportConfig, folder: Path, hub: Server) -> None:
    file = Path(f"{config.dest}.safetensors")
    exported(replace(config, format="compvis", dest=str(file), revision="ema-128"))
    files = hub.files(REPO, "ema-128")
    assert files.keys() == {file.name, "README.md", "SHA256SUMS"} and files[file.name] == file.read_bytes()
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    facts, sections = parts(files["README.md"].decode())
    assert "library_name" not in facts and "compvis" in facts["tags"]
    assert f'hf_hub_download("{REPO}", "{file.name}", revision="ema-128")' in sections["How to load it"]
    assert "12.50" in sections["Figures"]
    assert_clean(hub, folder, file.parent)


def test_a_task_without_a_pipeline_keeps_the_loop_that_draws(hub: Server, tmp_path: Path) -> None:
    facts = Conditions(classes=ClassFacts(count=5, key="cls", names=("a", "b", "c", "d", "e")))
    made = make_task_run(tmp_path, ClassTask(), facts)
    config = ExportConfig(run=made.config.run, dest=str(tmp_path / "plain"))
    exported(config)
    loop = (tmp_path / "plain" / "README.md").read_text()
    exported(replace(config, dest=str(tmp_path / "pushed"), push=f"hub:{REPO}"))
    card = hub.files(REPO)["README.md"].decode()
    assert loop.strip() in card and "pictures = vae.decode(" in loop
    assert "pipeline_tag" not in parts(card)[0] and parts(card)[0]["tags"] == [
        "latentmill",
        "latent-diffusion",
        "class",
    ]
    assert_clean(hub, tmp_path, but="latentmill.json")  # no `encode` has written this run's contract


@pytest.mark.parametrize("form", ["diffusers", "compvis"])
def test_an_autoencoder_is_pushed_too(hub: Server, tmp_path: Path, form: Any) -> None:
    make_pixels(str(tmp_path / "pixels"), [16])
    run = make_autoencoder_run(tmp_path, KL)
    evaluation(Path(run.run), "", psnr=21.5, psnr_error=0.25)
    dest = str(tmp_path / ("ae" if form == "diffusers" else "ae.safetensors"))
    exported(ExportConfig(run=run.run, dest=dest, format=form, push=f"hub:{REPO}", license="mit"))
    facts, sections = parts(hub.files(REPO)["README.md"].decode())
    assert "autoencoder" in facts["tags"] and "pipeline_tag" not in facts
    assert "| PSNR | 21.50 | ± 0.25 |" in sections["Figures"]
    assert "rFID" in sections["What was not measured"]
    assert ("AutoencoderKL.from_pretrained(folder)" if form == "diffusers" else "`file` holds") in sections[
        "How to load it"
    ]
    assert_clean(hub, tmp_path)


def test_an_export_in_a_bucket_is_pushed_from_copies(
    config: ExportConfig, hub: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store without local paths, as S3 is."""
    from pipeline.interchange.hub import exported as module

    class Far:
        def __init__(self, url: str) -> None:
            self.near = LocalStorage(url)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.near, name)

        def local_path(self, key: str) -> None:
            return None

    monkeypatch.setattr(module, "open_storage", Far)
    exported(config)
    assert hub.files(REPO)["unet/config.json"] == (Path(config.dest) / "unet" / "config.json").read_bytes()
    assert len(hub.files(REPO)) == len([path for path in Path(config.dest).rglob("*") if path.is_file()])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"push": "someone/small"}, "hub:OWNER/NAME is wanted"),
        ({"push": "hub:small"}, "hub:OWNER/NAME is wanted"),
        ({"push": "hub:a/../b"}, "hub:OWNER/NAME is wanted"),
        ({"push": "hub:a/b--c"}, "hub:OWNER/NAME is wanted"),
        ({"push": "hub:a/b.git"}, "hub:OWNER/NAME is wanted"),
        ({"check": False}, "check=false"),
        ({"revision": "refs/pr/1"}, "the name of a branch"),
        ({"revision": "a..b"}, "the name of a branch"),
        ({"license": "MIT License"}, "the hub's name of a license"),
        ({"license": "other"}, "license_name and license_link"),
        ({"datasets": ("s3://bucket/x",)}, "the hub's name of a data set"),
        ({"push": ""}, "license=mit says how to push"),
        ({"push": "", "license": "", "public": True}, "public=True says how to push"),
    ],
)
def test_what_cannot_be_pushed_so_is_refused(config: ExportConfig, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        check(replace(config, **changes))
