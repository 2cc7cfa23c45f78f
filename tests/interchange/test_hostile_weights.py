"""Weights and configurations of strangers for `init=`: what diffusers writes is read, all else ends in one line."""

from __future__ import annotations

import json
import re
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from interchange.test_pretrained import MODEL, diffusers_model, equal, random_state
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.config.loading.merge import to_dict
from pipeline.errors import WeightsError
from pipeline.interchange import pretrained
from pipeline.interchange import unet as convert
from pipeline.models.weights import read_file

WEIGHTS = "diffusion_pytorch_model.safetensors"
DEEP = "[" * 200_000 + "]" * 200_000


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as diffusers saves it, in one file."""
    folder = tmp_path_factory.mktemp("saved")
    diffusers_model(MODEL).save_pretrained(folder)
    return folder


@pytest.fixture
def unet(saved: Path, tmp_path: Path) -> Path:
    (tmp_path / "unet").mkdir()
    for file in saved.iterdir():
        (tmp_path / "unet" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "unet"


def refusal(load: Callable[[], Any], file: Path) -> str:
    """The one line with which `load` refuses, within a second; it names the file."""
    began = time.process_time()
    with pytest.raises(WeightsError) as caught:
        load()
    assert time.process_time() - began < 1
    line = str(caught.value)
    assert file.name in line and "\n" not in line and len(line) < 2000
    return line


# --------------------------------------------------------------------------------------------------------------------
# Variants and shards


def save(folder: Path, factor: float, **settings: Any) -> None:
    """A model whose weights are `factor` times those of the first."""
    theirs = diffusers_model(MODEL)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(factor)
    theirs.save_pretrained(folder, **settings)


def factor_of(folder: Path, which: str = "ema") -> float:
    """By how much the weights that are read differ from the first's."""
    mine = pretrained.load_diffusers(folder, MODEL, which).state["conv_in.weight"]
    return float(mine.flatten()[0] / diffusers_model(MODEL).conv_in.weight.detach().flatten()[0])


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "50KB"}])
@pytest.mark.parametrize("variant", [None, "fp16", "non_ema", "bf16"])
def test_whatever_diffusers_saves_is_read(
    tmp_path: Path, safe: bool, shards: dict[str, Any], variant: str | None
) -> None:
    save(tmp_path, 2, safe_serialization=safe, variant=variant, **shards)
    names = {path.name for path in tmp_path.iterdir()}
    assert (len(names) > 2) == bool(shards) and (WEIGHTS in names) == (safe and not shards and not variant)
    assert factor_of(tmp_path) == pytest.approx(2)


def test_the_variant_that_was_asked_for_is_taken(tmp_path: Path) -> None:
    save(tmp_path, 2)
    save(tmp_path, 3, variant="non_ema")
    save(tmp_path, 4, variant="fp16")
    assert factor_of(tmp_path) == pytest.approx(2)
    assert factor_of(tmp_path, "raw") == pytest.approx(3)
    (tmp_path / WEIGHTS).unlink()
    assert factor_of(tmp_path) == pytest.approx(4)
    (tmp_path / "diffusion_pytorch_model.non_ema.safetensors").unlink()
    assert factor_of(tmp_path, "raw") == pytest.approx(4)


# --------------------------------------------------------------------------------------------------------------------
# Weights that are no weights


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_with_nan_or_infinity_are_refused_by_the_tensors_name(unet: Path, tmp_path: Path, value: float) -> None:
    state = load_file(unet / WEIGHTS)
    state["mid_block.resnets.0.conv1.weight"].view(-1)[7] = value
    save_file(state, unet / WEIGHTS)
    line = refusal(lambda: pretrained.load_diffusers(unet, MODEL), unet)
    assert "mid_block.resnets.0.conv1.weight holds NaN or infinity (1 of" in line
    single = convert.to_compvis(random_state(), MODEL)
    single["model.diffusion_model.out.2.bias"][0] = value
    for name in ("model.safetensors", "model.ckpt"):
        (save_file if name.endswith("safetensors") else torch.save)(single, tmp_path / name)
        line = refusal(partial(pretrained.load_compvis, tmp_path / name, MODEL), tmp_path / name)
        assert "model.diffusion_model.out.2.bias holds NaN or infinity (1 of 4 values)" in line


def test_large_weights_whose_sum_overflows_are_no_infinity(tmp_path: Path) -> None:
    state = convert.to_compvis(random_state(), MODEL)
    state["model.diffusion_model.out.2.bias"][:] = 3e38
    save_file(state, tmp_path / "model.safetensors")
    assert equal(
        pretrained.load_compvis(tmp_path / "model.safetensors", MODEL).state, convert.from_compvis(state, MODEL)
    )


def test_weights_of_whole_numbers_are_refused(tmp_path: Path) -> None:
    state = convert.to_compvis(random_state(), MODEL)
    state["model.diffusion_model.out.2.bias"] = torch.ones(4, dtype=torch.int8)
    save_file(state, tmp_path / "model.safetensors")
    assert "out.2.bias holds int8" in refusal(
        lambda: pretrained.load_compvis(tmp_path / "model.safetensors", MODEL), tmp_path / "model.safetensors"
    )


def single_files(path: Path, state: dict[str, Tensor], facts: Any, monkey: Any = None) -> None:
    if path.suffix == ".safetensors":
        save_file(state, path, metadata={"latentmill": facts if isinstance(facts, str) else json.dumps(facts)})
    else:
        torch.save({"state_dict": state, "latentmill": facts}, path)


HOSTILE_FACTS: dict[str, Any] = {
    "deep": DEEP,
    "a list": "[1]",
    "cut": '{"prediction":',
    "scale is text": {"scale": "x"},
    "scale 0": {"scale": 0},
    "scale is huge": '{"scale": 1' + "0" * 400 + "}",
    "NaN": '{"scale": NaN}',
    "shift is a list": {"shift": [1]},
    "prediction is a list": {"prediction": [1]},
    "model is text": {"model": "x"},
    "model of an unknown key": {"model": {"x": 1}},
    "model without heads": {"model": to_dict(MODEL) | {"heads": 0, "head_width": 0}},
    "model of 10**6 levels": {"model": to_dict(MODEL) | {"multipliers": [1] * 10**5}},
    "model of negative width": {"model": to_dict(MODEL) | {"channels": -4}},
    "model of text": {"model": to_dict(MODEL) | {"channels": "4"}},
    "twice": '{"scale": 1, "scale": 2}',
    "half a pair": '{"prediction": "\\ud800"}',
}


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("name", HOSTILE_FACTS)
def test_hostile_facts_of_a_single_file_end_in_one_line(tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    single_files(path, convert.to_compvis(random_state(), MODEL), HOSTILE_FACTS[name])
    refusal(lambda: pretrained.load_compvis(path, MODEL), path)


def test_names_that_are_no_text_and_dicts_that_hold_themselves_are_passed_over(tmp_path: Path) -> None:
    state: dict[Any, Any] = dict(convert.to_compvis(random_state(), MODEL))
    state[7] = torch.zeros(1)
    state[None] = "x"
    torch.save({"state_dict": {"state_dict": state}}, tmp_path / "model.ckpt")
    assert equal(pretrained.load_compvis(tmp_path / "model.ckpt", MODEL).state, random_state())
    itself: dict[str, Any] = {}
    itself["state_dict"] = itself
    torch.save(itself, tmp_path / "itself.ckpt")
    assert "holds no model.diffusion_model." in refusal(
        lambda: pretrained.load_compvis(tmp_path / "itself.ckpt", MODEL), tmp_path / "itself.ckpt"
    )


def test_a_packed_pickle_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(4)}, tmp_path / "whole.ckpt")
    with zipfile.ZipFile(tmp_path / "whole.ckpt") as source, zipfile.ZipFile(tmp_path / "bomb.ckpt", "w") as dest:
        for entry in source.infolist():
            dest.writestr(entry.filename, source.read(entry), zipfile.ZIP_STORED)
        dest.writestr("archive/data/9", bytes(50_000_000), zipfile.ZIP_DEFLATED)
    assert "its parts are larger than the file" in refusal(
        lambda: read_file(tmp_path / "bomb.ckpt"), tmp_path / "bomb.ckpt"
    )


@pytest.mark.parametrize("shape", [(10**9,), (10**9, 10**9)])
def test_a_scale_or_a_weight_of_a_huge_shape_takes_no_memory(tmp_path: Path, shape: tuple[int, ...]) -> None:
    state = convert.to_compvis(random_state(), MODEL)
    torch.save(state | {"scale_factor": torch.ones(1).expand(shape)}, tmp_path / "scale.ckpt")
    assert "scale_factor is no scale" in refusal(
        lambda: pretrained.load_compvis(tmp_path / "scale.ckpt", MODEL), tmp_path / "scale.ckpt"
    )
    torch.save(state | {"model.diffusion_model.out.2.bias": torch.ones(1).expand(shape)}, tmp_path / "weight.ckpt")
    assert "out.2.bias is (1000000000," in refusal(
        lambda: pretrained.load_compvis(tmp_path / "weight.ckpt", MODEL), tmp_path / "weight.ckpt"
    )


# --------------------------------------------------------------------------------------------------------------------
# Folders


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (DEEP, "nests deeper"),
        ("{}", "lists no files"),
        ('{"weight_map": ["a"]}', "lists no files"),
        ('{"weight_map": {"conv_in.weight": ["a"]}}', "lists no files"),
        ('{"weight_map": {"conv_in.weight": 3}}', "lists no files"),
        ('{"weight_map": {"conv_in.weight": "../../model.safetensors"}}', "lists no files"),
        ('{"weight_map": {"conv_in.weight": "/etc/passwd"}}', "lists no files"),
        ('{"weight_map": {"conv_in.weight": ".."}}', "lists no files|must be"),
    ],
)
def test_a_hostile_index_of_shards_ends_in_one_line(unet: Path, index: str, words: str) -> None:
    (unet / WEIGHTS).unlink()
    path = unet / f"{WEIGHTS}.index.json"
    path.write_text(index)
    with pytest.raises(WeightsError) as caught:
        pretrained.load_diffusers(unet, MODEL)
    assert re.search(words, str(caught.value)) and "\n" not in str(caught.value)


def test_a_shard_that_is_not_there_is_named(unet: Path) -> None:
    (unet / WEIGHTS).unlink()
    (unet / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"conv_in.weight": "part-1.safetensors"}}')
    assert "part-1.safetensors is missing" in refusal(
        lambda: pretrained.load_diffusers(unet, MODEL), unet / "part-1.safetensors"
    )


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", DEEP),
        ("config.json", "[1]"),
        ("config.json", b"\xff\xfe"),
        ("config.json", '{"block_out_channels": ' + json.dumps([1] * 10**5) + "}"),
        ("../vae/config.json", '{"scaling_factor": "x"}'),
        ("../vae/config.json", '{"scaling_factor": 0}'),
        ("../vae/config.json", '{"scaling_factor": -1}'),
        ("../vae/config.json", '{"shift_factor": [1]}'),
        ("../vae/config.json", DEEP),
        ("../scheduler/scheduler_config.json", '{"beta_start": "x"}'),
        ("../scheduler/scheduler_config.json", DEEP),
        ("../scheduler/scheduler_config.json", "null"),
        ("../text_encoder/config.json", '{"hidden_size": "x"}'),
        ("../text_encoder/config.json", DEEP),
    ],
)
def test_a_hostile_configuration_ends_in_one_line(unet: Path, file: str, content: str | bytes) -> None:
    path = unet / file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refusal(lambda: pretrained.load_diffusers(unet, MODEL), path)


def test_a_folder_in_place_of_a_file_is_no_file(unet: Path) -> None:
    (unet / WEIGHTS).unlink()
    (unet / WEIGHTS).mkdir()
    assert "has no weights" in refusal(lambda: pretrained.load_diffusers(unet, MODEL), unet)
