"""fetch.py, fetched.py: encoders that were fetched once are the same wherever they are loaded, without a network."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from made.encoders import FILES, assert_same_encoders, fetch, make_sources, own, small_clip, with_weights
from pipeline import cli
from pipeline import config as c
from pipeline.config.loading.load import load
from pipeline.config.loading.merge import from_dict
from pipeline.errors import ConfigError, ContractMismatch, DestinationExists, WeightsError
from pipeline.inference.trained import load_encoders
from pipeline.models.encoders import fetched, tokenizer
from pipeline.models.encoders.autoencoder import load_autoencoder
from pipeline.models.encoders.text import load_text
from pipeline.models.encoders.torchvision_ops import declare_torchvision_ops
from pipeline.storage.urls import open_storage

declare_torchvision_ops()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the test fail at any connection."""
    import socket

    def refuse(*arguments: Any) -> None:
        raise AssertionError(f"a connection to {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# --------------------------------------------------------------------------------------------------------------------
# What is fetched is what is loaded


def test_the_shipped_encoders_load_from_the_folder_without_a_network(tmp_path: Path, no_network: None) -> None:
    demo = load("fetch", ["dest=d"]).encoders
    fetch(demo, tmp_path / "e")
    assert sorted(info.key for info in open_storage(str(tmp_path / "e")).list()) == FILES
    assert_same_encoders(demo, with_weights(demo, tmp_path / "e"))


@pytest.mark.parametrize(("name", "layer", "pad"), [("ViT-L-14", "last", 49407), ("ViT-H-14", "penultimate", 0)])
def test_architectures_of_stable_diffusion_1_and_2_survive(
    sources: Path, tmp_path: Path, name: str, layer: Any, pad: int, no_network: None
) -> None:
    encoders = own(sources, text=str(sources / name), text_layer=layer, text_pad=pad)
    manifest = fetch(encoders, tmp_path / "e")
    loaded = with_weights(encoders, tmp_path / "e")
    assert_same_encoders(encoders, loaded)
    tower = load_text(loaded)
    gelu = type(tower.model.transformer.resblocks[0].mlp.gelu).__name__
    assert gelu == ("QuickGELU" if name == "ViT-L-14" else "GELU")
    assert tower._mean.flatten().tolist() == pytest.approx([0.5, 0.4, 0.3])
    assert manifest["text"]["model_cfg"]["quick_gelu"] == (name == "ViT-L-14")
    assert (manifest["text"]["layer"], manifest["text"]["pad"], manifest["text"]["length"]) == (layer, pad, 77)


def test_one_file_of_an_autoencoder_is_fetched_with_its_scale_and_shift(sources: Path, tmp_path: Path) -> None:
    encoders = own(sources, vae=str(sources / "vae" / "diffusion_pytorch_model.safetensors"))
    fetch(encoders, tmp_path / "e")
    stage = load_autoencoder(with_weights(encoders, tmp_path / "e"))
    assert (stage.scale, stage.shift) == (0.4, 0.2)
    assert stage.weights_sha256 == load_autoencoder(encoders).weights_sha256


def test_random_weights_of_a_seed_can_be_fetched(tmp_path: Path) -> None:
    demo = load("fetch", ["dest=d", "encoders.seed=3"]).encoders
    assert fetch(demo, tmp_path / "e")["vae"]["source"] == "random weights of seed 3"
    assert_same_encoders(demo, with_weights(demo, tmp_path / "e"))


def test_names_of_the_hub_are_fetched_as_it_serves_them(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    """The hub's cache, filled by hand, takes the place of the hub; the rest is code of diffusers and open_clip."""
    import open_clip
    from huggingface_hub import constants
    from open_clip import pretrained

    hub = tmp_path / "hub"
    for repository, folder in (("org/vae", "vae"), ("org/clip", "ViT-H-14")):
        top = hub / f"models--{repository.replace('/', '--')}"
        (top / "refs").mkdir(parents=True)
        (top / "refs" / "main").write_text("0" * 40)
        (top / "snapshots").mkdir()
        (top / "snapshots" / ("0" * 40)).symlink_to(sources / folder)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    listed = small_clip("ViT-H-14")  # whose name says nothing of the approximate GELU that the tag's weights want
    (tmp_path / "model_configs").mkdir()
    (tmp_path / "model_configs" / "small.json").write_text(json.dumps(listed))
    (tmp_path / "bpe_simple_vocab_16e6.txt.gz").symlink_to(tokenizer._open_clip() / "bpe_simple_vocab_16e6.txt.gz")
    monkeypatch.setattr(tokenizer, "_open_clip", lambda: tmp_path)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "small", listed)
    tag = pretrained._pcfg(hf_hub="org/clip/", quick_gelu=True, mean=(0.1, 0.2, 0.3))
    monkeypatch.setitem(pretrained._PRETRAINED, "small", {"tag": tag})

    encoders = c.EncodersConfig(vae="org/vae", text="small", text_pretrained="tag", text_length=77)
    manifest = fetch(encoders, tmp_path / "e")
    assert (manifest["vae"]["name"], manifest["vae"]["source"]) == ("org/vae", "the Hugging Face hub")
    assert (manifest["text"]["name"], manifest["text"]["pretrained"]) == ("small", "tag")
    assert manifest["text"]["model_cfg"]["quick_gelu"] is True
    loaded = with_weights(encoders, tmp_path / "e")
    assert_same_encoders(encoders, loaded)
    assert load_text(loaded)._mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(tokenizer, "_open_clip", lambda: tmp_path / "empty")
    assert load_text(loaded).weights_sha256 == manifest["text"]["text_sha256"]
    assert fetch(encoders, tmp_path / "e") == manifest  # complete: the hub is not asked


# --------------------------------------------------------------------------------------------------------------------
# The manifest


def test_the_manifest_says_what_there_is_and_nothing_of_this_machine(sources: Path, tmp_path: Path) -> None:
    encoders = own(sources)
    manifest = fetch(encoders, tmp_path / "e")
    stage, tower = load_autoencoder(encoders), load_text(encoders)
    assert manifest["names"] == {"vae": "vae", "vae_subfolder": "", "text": "ViT-L-14", "text_pretrained": ""}
    assert manifest["vae"]["vae_sha256"] == stage.weights_sha256
    assert manifest["text"]["text_sha256"] == tower.weights_sha256
    assert manifest["text"]["image_sha256"] == tower.image_sha256
    assert (manifest["vae"]["architecture"], manifest["vae"]["source"]) == ("AutoencoderKL", "this machine")
    for part in ("vae", "text"):
        for key, facts in manifest[part]["files"].items():
            fetched.verify(tmp_path / "e" / key, facts, "here")
    for key in FILES:
        assert str(tmp_path).encode() not in (tmp_path / "e" / key).read_bytes(), key
        assert str(sources).encode() not in (tmp_path / "e" / key).read_bytes(), key


def test_a_contract_does_not_say_where_weights_were_loaded_from(sources: Path, tmp_path: Path) -> None:
    from preprocess.encoding.contract import portable

    encoders = own(sources)
    stored = portable(with_weights(encoders, tmp_path))
    assert "weights" not in stored
    assert stored == portable(encoders)
    assert from_dict(c.EncodersConfig, stored).weights == ""


@pytest.mark.parametrize("verb", ["encode", "train", "eval", "sample", "export", "verify", "reference"])
def test_every_verb_that_loads_encoders_takes_fetched_ones(verb: str) -> None:
    required = {name: f"{name}=x" for name in ("run", "dataset", "source", "dest")}
    fields = {field.name for field in dataclasses.fields(c.CONFIGS[verb])}
    words = [word for name, word in required.items() if name in fields]
    words += ["data.train=c"] if verb == "train" else []
    encoders = load(verb, [*words, "encoders=sd1", "encoders.weights=s3://b/sd1"]).encoders
    assert encoders == dataclasses.replace(load("fetch", ["dest=d", "encoders=sd1"]).encoders, weights="s3://b/sd1")
    assert verb == "encode" or load(verb, words).encoders is None


def test_a_caches_encoders_are_found_where_they_were_fetched(sources: Path, tmp_path: Path) -> None:
    from preprocess.encoding.contract import portable

    encoders = own(sources)
    manifest = fetch(encoders, tmp_path / "e")
    contract: Any = SimpleNamespace(
        encoders=portable(encoders),
        stored="moments",
        vae_sha256=manifest["vae"]["vae_sha256"],
        text_sha256=manifest["text"]["text_sha256"],
        text=SimpleNamespace(
            layer="last", pad=49407, length=77, quick_gelu=bool(manifest["text"]["model_cfg"].get("quick_gelu"))
        ),
        scale=0.4,
        shift=0.2,
    )
    stage, tower = load_encoders(contract, override=with_weights(encoders, tmp_path / "e"))
    assert tower is not None
    assert (stage.weights_sha256, tower.weights_sha256) == (contract.vae_sha256, contract.text_sha256)
    contract.text_sha256 = "0" * 64
    with pytest.raises(ContractMismatch, match="text tower"):
        load_encoders(contract, override=with_weights(encoders, tmp_path / "e"))


# --------------------------------------------------------------------------------------------------------------------
# Running it again


def times(folder: Path) -> dict[str, int]:
    return {key: (folder / key).stat().st_mtime_ns for key in FILES}


def test_a_second_fetch_writes_nothing_and_a_damaged_file_is_mended_alone(
    sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoders, dest = own(sources), tmp_path / "e"
    fetch(encoders, dest)
    before = times(dest)
    capsys.readouterr()
    fetch(encoders, dest)
    assert times(dest) == before
    assert capsys.readouterr().out.count("is there already") == 2

    weights = dest / "text" / "open_clip_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    loaded = with_weights(encoders, dest)
    with pytest.raises(WeightsError, match=r"open_clip_model\.safetensors is missing or damaged.*fetch .* again"):
        load_text(loaded)
    load_autoencoder(loaded)
    fetch(encoders, dest)
    after = times(dest)
    assert {key for key in FILES if after[key] != before[key]} == {"encoders.json", "text/open_clip_model.safetensors"}
    (dest / "vae" / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"config\.json is missing"):
        load_autoencoder(loaded)
    fetch(encoders, dest)
    assert_same_encoders(encoders, loaded)


def test_another_set_in_the_same_place_is_refused(sources: Path, tmp_path: Path) -> None:
    encoders, dest = own(sources), tmp_path / "e"
    fetch(encoders, dest)
    with pytest.raises(DestinationExists, match=r"other encoders \(text=ViT-L-14\)"):
        fetch(own(sources, text=str(sources / "ViT-H-14")), dest)
    with pytest.raises(DestinationExists, match="other weights than vae has now"):
        fetch(dataclasses.replace(encoders, seed=1), dest)
    with pytest.raises(WeightsError, match=r"holds encoders.text=ViT-L-14, not ViT-H-14"):
        load_text(with_weights(own(sources, text=str(sources / "ViT-H-14")), dest))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "vae").write_text("somebody's")
    with pytest.raises(DestinationExists, match="something else"):
        fetch(encoders, tmp_path / "full")


def test_what_was_interrupted_is_not_loaded_and_goes_on(sources: Path, tmp_path: Path) -> None:
    encoders, dest = own(sources), tmp_path / "e"
    manifest = fetch(encoders, dest)
    (dest / "encoders.json").write_text(json.dumps({key: manifest[key] for key in manifest if key != "text"}))
    loaded = with_weights(encoders, dest)
    with pytest.raises(WeightsError, match="is not complete: run"):
        load_text(loaded)
    written = (dest / "vae" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    assert fetch(encoders, dest) == manifest
    assert (dest / "vae" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns == written


def test_wrong_places_are_refused_with_a_reason(sources: Path, tmp_path: Path) -> None:
    encoders = own(sources)
    with pytest.raises(WeightsError, match=r"holds no encoders\.json: run `latentmill fetch"):
        load_text(with_weights(encoders, tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="choose one"):
        load_text(dataclasses.replace(encoders, weights=str(tmp_path), seed=0))
    dest = tmp_path / "e"
    manifest = fetch(encoders, dest)
    others: list[Any] = [
        manifest | {"format": 9},
        manifest | {"vae": {"files": {"vae/../../x": {"size": 1, "sha256": "0" * 64}}}},
        manifest | {"vae": {"files": {"text/x": {"size": 1, "sha256": "0" * 64}}}},
        {"format": 1},
        [],
    ]
    for spoilt in others:
        (dest / "encoders.json").write_text(json.dumps(spoilt))
        with pytest.raises(WeightsError, match=r"encoders\.json cannot be read"):
            load_autoencoder(with_weights(encoders, dest))


@pytest.mark.parametrize(
    ("vae", "source"),
    [("stabilityai/sd-vae-ft-mse", "stabilityai/sd-vae-ft-mse"), ("demo", "timm/vit_large_patch14_clip_224.openai")],
    ids=["vae", "text"],
)
def test_an_unreachable_hub_is_one_line_that_says_what_to_do_instead(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], vae: str, source: str
) -> None:
    words = [f"dest={tmp_path / 'e'}", "encoders=sd1", f"encoders.vae={vae}"]
    assert cli.main(["fetch", *words]) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert len(line) < 600
    for part in (source, "Hugging Face hub", "no connection", "into a folder", "`latentmill fetch` where there is"):
        assert part in line
    if vae != "demo":  # what failed before it had anything does not hold the place
        fetch(c.EncodersConfig(text_length=24), tmp_path / "e")
