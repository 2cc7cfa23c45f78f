"""Encoders' files of strangers: a wrong one ends in one line that names it, with nothing fetched and little memory."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import resource
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from made.encoders import fetch, with_weights
from made.limits import files_of_at_most, umask, wrong_modes
from pipeline.config import EncodersConfig
from pipeline.errors import DestinationExists, StorageError, WeightsError
from pipeline.models.encoders import compvis_vae, tokenizer
from pipeline.models.encoders.autoencoder import DEMO as DEMO_VAE
from pipeline.models.encoders.autoencoder import load_autoencoder, load_network
from pipeline.models.encoders.fetched import read_manifest
from pipeline.models.encoders.text import load_text
from pipeline.models.encoders.tokenizer import DEMO as DEMO_TEXT
from pipeline.models.encoders.tokenizer import load_tokenizer, read_merges
from pipeline.storage.local import LocalStorage

DEEP = "[" * 200_000 + "]" * 200_000
VAE, TEXT = "config.json", "open_clip_config.json"
DEMO = EncodersConfig(text_pad=636)
EVIL = Path("/nonexistent-evil")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection fails the test, and so does a hub that is told to be offline: it must not be asked at all."""
    import socket

    from huggingface_hub import file_download

    def refuse(*arguments: Any, **named: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(file_download, "_hf_hub_download_to_cache_dir", refuse)


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """The packages are in memory before time and memory are measured."""
    load_text(DEMO)
    load_autoencoder(DEMO)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's own encoders: vae/ and text/."""
    shutil.copytree(DEMO_VAE, tmp_path / "vae")
    shutil.copytree(DEMO_TEXT, tmp_path / "text")
    return tmp_path


def own(folder: Path, **changes: Any) -> EncodersConfig:
    fields: dict[str, Any] = {"name": "own", "vae": str(folder / "vae"), "text": str(folder / "text"), "text_pad": 636}
    return EncodersConfig(**fields | changes)


def refusal(load: Callable[[], Any], words: str) -> str:
    """The one line of a refusal, within a second of work and 200 MB."""
    began, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(WeightsError) as caught:
        load()
    assert time.process_time() - began < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200_000
    line = str(caught.value)
    assert re.search(words, line) and "\n" not in line and len(line) < 1000, line
    return line


def change(path: Path, *keys: str, **values: Any) -> None:
    """Sets values in the table of a JSON file that `keys` lead to."""
    content = json.loads(path.read_text())
    table = content
    for key in keys:
        table = table.setdefault(key, {})
    table.update(values)
    path.write_text(json.dumps(content))


# --------------------------------------------------------------------------------------------------------------------
# Autoencoders


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"scaling_factor": 0}, "scaling_factor=0"),
        ({"scaling_factor": "x"}, "scaling_factor=x: a finite number"),
        ({"scaling_factor": -1.0}, "scaling_factor=-1"),
        ({"scaling_factor": 1e300}, "scaling_factor=1e"),
        ({"shift_factor": [1]}, "shift_factor"),
        ({"layers_per_block": 10**7}, "layers_per_block=10000000"),
        ({"layers_per_block": 1.5}, "layers_per_block=1.5"),
        ({"block_out_channels": [16, 16, 32, 10**9]}, "block_out_channels"),
        ({"block_out_channels": [16] * 10**5}, "as many down_block_types"),
        ({"block_out_channels": []}, "as many down_block_types"),
        ({"block_out_channels": [16384, 16384, 16384, 16384]}, "cannot load it: the network that is described has"),
        ({"latent_channels": 10**9}, "latent_channels"),
        ({"latent_channels": 0}, "latent_channels=0"),
        ({"in_channels": 4}, "in_channels=4: one of 3"),
        ({"norm_num_groups": 0}, "norm_num_groups=0"),
        ({"norm_num_groups": 7}, "is no AutoencoderKL|cannot load"),
        ({"down_block_types": ["os.system"] * 4}, "is no AutoencoderKL|cannot load"),
        ({"act_fn": {"a": 1}}, "is no AutoencoderKL|cannot load"),
    ],
)
@pytest.mark.parametrize("single", [False, True])
def test_an_autoencoder_of_hostile_values_ends_in_one_line(
    folder: Path, values: dict[str, Any], words: str, single: bool
) -> None:
    change(folder / "vae" / VAE, **values)
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors" if single else folder / "vae"
    line = refusal(lambda: load_autoencoder(own(folder, vae=str(vae))), words)
    assert str(folder) in line


@pytest.mark.parametrize("content", [DEEP, "null", "{", b"\xff", '{"scaling_factor": NaN}', " " * (2 << 20)])
@pytest.mark.parametrize("part", ["vae", "text"])
def test_a_configuration_that_is_none_ends_in_one_line(folder: Path, part: str, content: str | bytes) -> None:
    path = folder / part / (VAE if part == "vae" else TEXT)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refusal(lambda: (load_autoencoder if part == "vae" else load_text)(own(folder)), path.name)


def test_a_name_that_counts_to_a_billion_builds_no_list() -> None:
    with pytest.raises(WeightsError, match="is no weight of an autoencoder"):
        compvis_vae.from_compvis({"decoder.up.999999999.block.0.conv1.weight": torch.zeros(1)})


@pytest.mark.parametrize("part", ["vae", "text"])
def test_encoders_with_nan_are_refused_by_the_tensors_name(folder: Path, part: str) -> None:
    path = next((folder / part).glob("*.safetensors"))
    state = load_file(path)
    name = "decoder.conv_in.weight" if part == "vae" else "transformer.resblocks.1.ln_1.weight"
    state[name].view(-1)[3] = float("nan")
    save_file(state, path)
    refusal(lambda: (load_autoencoder if part == "vae" else load_text)(own(folder)), f"{name} holds NaN or infinity")


# --------------------------------------------------------------------------------------------------------------------
# Text towers


@pytest.mark.parametrize(
    ("keys", "values", "words"),
    [
        (("text_cfg",), {"layers": 10**7}, "layers=10000000"),
        (("text_cfg",), {"layers": 10**6, "width": 10**9}, "width=1000000000"),
        (("text_cfg",), {"layers": 0}, "layers=0"),
        (("text_cfg",), {"layers": "3"}, "layers=3: a whole number"),
        (("text_cfg",), {"context_length": 10**9}, "context_length"),
        (("text_cfg",), {"vocab_size": 10**12}, "vocab_size"),
        (("text_cfg",), {"heads": 3}, "not an architecture of open_clip"),
        (("text_cfg",), {"mlp_ratio": 0}, "mlp_ratio=0"),
        (("text_cfg",), {"layers": 200, "width": 16384}, "cannot load it: the network that is described has"),
        (("text_cfg",), {"hf_model_name": str(EVIL)}, "text tower of transformers"),
        (("text_cfg",), {"hf_model_name": "evil/model", "hf_tokenizer_name": "evil/model"}, "another tokenizer"),
        (("text_cfg",), {"hf_tokenizer_name": ["evil"]}, "hf_tokenizer_name"),
        (("text_cfg",), {"no_such_key": 1}, "not an architecture of open_clip"),
        (("text_cfg",), {"act_kwargs": {"a": 1}}, "not an architecture of open_clip"),
        (("vision_cfg",), {"timm_model_name": "hf-hub:evil/model"}, "timm_model_name=hf-hub:evil/model"),
        (("vision_cfg",), {"timm_model_name": "local-dir:/evil"}, "timm_model_name=local-dir:/evil"),
        (("vision_cfg",), {"timm_model_name": "evil/model"}, "timm_model_name=evil/model"),
        (("vision_cfg",), {"timm_model_name": "no_such_model"}, "not an architecture of open_clip"),
        (("vision_cfg",), {"image_size": 10**6}, "image_size"),
        (("vision_cfg",), {"image_size": [64, 10**6]}, "image_size"),
        (("vision_cfg",), {"image_size": 4096, "patch_size": 1}, "cannot load it"),
        (("vision_cfg",), {"patch_size": 0}, "patch_size"),
        (("vision_cfg",), {"layers": [1, 2]}, "layers"),
        (("vision_cfg",), {"head_width": 0}, "head_width=0"),
        ((), {"embed_dim": 10**9}, "embed_dim"),
        ((), {"vision_cfg": 3}, "vision_cfg"),
        ((), {"text_cfg": None}, "text_cfg"),
        ((), {"multimodal_cfg": {}}, "CoCa"),
        ((), {"no_such_key": {}}, "not an architecture of open_clip"),
    ],
)
def test_a_text_tower_of_hostile_values_ends_in_one_line(
    folder: Path, keys: tuple[str, ...], values: dict[str, Any], words: str
) -> None:
    change(folder / "text" / TEXT, "model_cfg", *keys, **values)
    refusal(lambda: load_text(own(folder)), words)


@pytest.mark.parametrize(
    "values", [{"mean": [0, 0]}, {"mean": "x"}, {"std": [1, 0, 1]}, {"std": [1, 1, "x"]}, {"mean": [[0], [0], [0]]}]
)
def test_hostile_colours_of_a_tower_are_refused(folder: Path, values: dict[str, Any]) -> None:
    change(folder / "text" / TEXT, "preprocess_cfg", **values)
    refusal(lambda: load_text(own(folder)), next(iter(values)))


def test_settings_of_pictures_that_open_clip_does_not_know_are_left_out(folder: Path) -> None:
    change(folder / "text" / TEXT, "preprocess_cfg", evil=1)
    assert "evil" not in load_text(own(folder)).model.visual.preprocess_cfg


@pytest.mark.parametrize(
    ("change_lines", "words"),
    [
        (lambda lines: lines[:1], "has 0 merges, and a vocabulary of 637 wants 123"),
        (lambda lines: lines[:-1], "has 122 merges"),
        (lambda lines: [*lines, "l l"], "has 124 merges"),
        (lambda lines: [*lines[:-1], "l"], "line 124 is no pair"),
        (lambda lines: [*lines[:-1], "l l l"], "line 124 is no pair"),
        (lambda lines: [*lines[:5], "", *lines[6:]], "line 6 is no pair"),
        (lambda lines: [*lines[:-1], lines[1]], "a merge is there twice"),
    ],
)
def test_merges_that_are_no_list_of_pairs_are_refused(folder: Path, change_lines: Any, words: str) -> None:
    path = folder / "text" / "bpe.txt.gz"
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")
    path.write_bytes(gzip.compress("\n".join(change_lines(lines)).encode()))
    for load in (load_tokenizer, load_text):
        refusal(partial(load, own(folder)), words)


@pytest.mark.parametrize(
    "data", [b"", b"text", gzip.compress(b"\xff\xfe", mtime=0), gzip.compress(bytes(100_000_000), mtime=0)[:-1]]
)
def test_merges_that_are_no_text_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "bpe.txt.gz").write_bytes(data)
    refusal(lambda: read_merges(tmp_path / "bpe.txt.gz"), r"bpe\.txt\.gz")


def test_the_merges_that_are_shipped_pass() -> None:
    assert len(read_merges(tokenizer.merges_of(DEMO_TEXT))) == 123
    assert len(read_merges(tokenizer.merges_of(None))) == tokenizer.MOST_MERGES


# --------------------------------------------------------------------------------------------------------------------
# What `fetch` stored


@pytest.fixture(scope="module")
def fetched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dest = tmp_path_factory.mktemp("fetched") / "e"
    with umask(0o027):
        fetch(DEMO, dest)
    return dest


@pytest.fixture
def copy(fetched: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fetched, tmp_path / "e"))


def test_fetched_files_have_the_modes_of_the_umask(fetched: Path) -> None:
    assert wrong_modes(fetched, 0o027) == {}


def test_a_manifest_that_does_not_list_its_weights_proves_nothing_and_is_refused(copy: Path) -> None:
    manifest = json.loads((copy / "encoders.json").read_text())
    for part, key in (("vae", "vae/diffusion_pytorch_model.safetensors"), ("text", "text/bpe.txt.gz")):
        broken = json.loads(json.dumps(manifest))
        del broken[part]["files"][key]
        (copy / "encoders.json").write_text(json.dumps(broken))
        for load in (load_autoencoder, load_text):
            refusal(partial(load, with_weights(DEMO, copy)), rf"{part}\.files: {key} is missing")


@pytest.mark.parametrize("part", ["vae", "text"])
def test_weights_exchanged_with_their_entry_are_told_by_the_networks_hash(copy: Path, part: str) -> None:
    path = next((copy / part).glob("*.safetensors"))
    save_file({name: tensor * 2 for name, tensor in load_file(path).items()}, path)
    facts = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "size": path.stat().st_size}
    change(copy / "encoders.json", part, "files", **{f"{part}/{path.name}": facts})
    load = load_autoencoder if part == "vae" else load_text
    refusal(
        lambda: load(with_weights(DEMO, copy)), rf"{part} holds other weights than encoders\.json tells \({part}_sha256"
    )


@pytest.mark.parametrize(
    ("keys", "values", "words"),
    [
        ((), {"format": 2}, "format 2"),
        ((), {"format": "1"}, "format=1: a whole number"),
        ((), {"names": []}, "names"),
        (("names",), {"vae": 3}, r"names\.vae=3"),
        ((), {"vae": []}, "vae"),
        (("vae",), {"vae_sha256": "x"}, "64 hexadecimal"),
        (("vae",), {"vae_sha256": None}, "vae_sha256 are wanted"),
        (("text",), {"image_sha256": None}, "image_sha256"),
        (("vae", "files"), {"vae/../../x": {"sha256": "0" * 64, "size": 1}}, r"vae/\.\./\.\./x is too many"),
        (("vae", "files"), {"vae/config.json": {"sha256": "0" * 64, "size": -1}}, "size=-1"),
        (("vae", "files"), {"vae/config.json": {"sha256": "0" * 63, "size": 1}}, "64 hexadecimal"),
        (("vae", "files"), {"vae/config.json": {"sha256": 5, "size": 1}}, "sha256"),
        (("vae", "files"), {"vae/config.json": {"sha256": "0" * 64, "size": 2**60}}, "size"),
        (("vae", "files"), {"vae/config.json": "x"}, r"vae/config\.json"),
    ],
)
def test_a_hostile_manifest_ends_in_one_line(copy: Path, keys: tuple[str, ...], values: Any, words: str) -> None:
    change(copy / "encoders.json", *keys, **values)
    line = refusal(lambda: read_manifest(LocalStorage(copy)), words)
    assert "encoders.json cannot be read" in line and "Fetch the encoders again" in line


def test_a_manifest_that_is_no_table_ends_in_one_line(copy: Path) -> None:
    for content in (DEEP, "null", "[]", "{", ""):
        (copy / "encoders.json").write_text(content)
        refusal(lambda: read_manifest(LocalStorage(copy)), r"encoders\.json cannot be read")


# --------------------------------------------------------------------------------------------------------------------
# Where `fetch` writes


def test_others_files_in_the_way_of_fetch_are_never_written_over(copy: Path) -> None:
    manifest = json.loads((copy / "encoders.json").read_text())
    del manifest["text"]
    (copy / "encoders.json").write_text(json.dumps(manifest))
    fetch(DEMO, copy)  # what a killed fetch left has the same bytes
    (copy / "encoders.json").write_text(json.dumps(manifest))
    (copy / "text" / TEXT).write_text("mine")
    with pytest.raises(DestinationExists, match=r"open_clip_config\.json exists and no fetch wrote it"):
        fetch(DEMO, copy)
    assert (copy / "text" / TEXT).read_text() == "mine"


def test_a_place_where_fetch_cannot_write_is_told_before_anything_is_loaded(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline import fetch as verb

    monkeypatch.setattr(verb, "write_vae", lambda *a: 1 / 0)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name, words in (
        ("file", "is a file"),
        ("file/x", "is a file"),
        ("link", "link to a place that does not exist"),
    ):
        with pytest.raises(DestinationExists, match=words):
            fetch(DEMO, tmp_path / name)
    shutil.rmtree(copy / "vae")
    (copy / "vae").write_text("mine")
    with pytest.raises(DestinationExists, match="is a file"):
        fetch(DEMO, copy)


def test_a_full_disk_ends_a_fetch_in_one_line_and_leaves_no_file_behind(tmp_path: Path) -> None:
    with files_of_at_most(20_000), pytest.raises(StorageError, match=r"cannot write \S+safetensors") as caught:
        fetch(DEMO, tmp_path / "e")
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "e").rglob("*")] == ["encoders.json"]
    fetch(DEMO, tmp_path / "e")
    load_autoencoder(with_weights(DEMO, tmp_path / "e"))


@pytest.mark.parametrize("name", ["vae/config.json", "text/open_clip_config.json", "text/bpe.txt.gz"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    load = load_autoencoder if name.startswith("vae") else load_text
    refusal(lambda: load(own(folder)), rf"{re.escape(Path(name).name)} is no file")


@pytest.mark.parametrize("part", ["vae", "text"])
def test_a_pipe_or_a_device_in_place_of_weights_is_not_read(folder: Path, part: str) -> None:
    path = next((folder / part).glob("*.safetensors"))
    for make in (lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero")):
        path.unlink()
        make()
        refusal(lambda: (load_autoencoder if part == "vae" else load_text)(own(folder)), "cannot load it|no file")


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "200KB"}])
@pytest.mark.parametrize("variant", ["fp16", "non_ema"])
def test_an_autoencoders_folder_that_holds_a_variant_alone_is_read(
    folder: Path, shards: dict[str, Any], variant: str
) -> None:
    model = load_network(own(folder)).model
    expected = model.state_dict()
    shutil.rmtree(folder / "vae")
    with torch.random.fork_rng(devices=[]):
        plain = type(model).from_config(dict(model.config))
    plain.load_state_dict(expected)
    plain.save_pretrained(folder / "vae", variant=variant, **shards)
    assert (len(list((folder / "vae").iterdir())) > 2) == bool(shards)
    loaded = load_network(own(folder)).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
