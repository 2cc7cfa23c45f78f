"""Others' weights for our UNet: what is taken from diffusers' folders and CompVis' files, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.config import DiffusionConfig, ModelConfig
from pipeline.config.loading.merge import to_dict
from pipeline.errors import WeightsError
from pipeline.interchange import pretrained
from pipeline.interchange import unet as convert
from pipeline.interchange.scheduler import scheduler_config
from pipeline.models.encoders.torchvision_ops import declare_torchvision_ops
from pipeline.models.unet.model import UNet

MODEL = ModelConfig(
    name="small", channels=16, multipliers=(1, 2), blocks=1, attention=(1,), heads=2, context_width=12, norm_groups=8
)
VECTOR = replace(MODEL, vector_width=8 + 256, vector_time_ids=1, transformer_depth=(1, 2))
UNCONDITIONAL = replace(MODEL, context_width=0, heads=0, head_width=16)


def random_state(config: ModelConfig = MODEL, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(value.shape, generator=generator) for name, value in UNet(config).state_dict().items()}


def diffusers_model(config: ModelConfig, **changes: Any) -> Any:
    declare_torchvision_ops()
    import diffusers

    torch.manual_seed(0)
    return getattr(diffusers, convert.diffusers_class(config))(**(convert.diffusers_config(config) | changes))


def equal(mine: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


# --------------------------------------------------------------------------------------------------------------------
# diffusers


@pytest.mark.parametrize("config", [MODEL, VECTOR, UNCONDITIONAL], ids=["context", "sdxl", "unconditional"])
def test_a_folder_that_diffusers_saved_is_taken_whole(tmp_path: Path, config: ModelConfig) -> None:
    theirs = diffusers_model(config)
    theirs.save_pretrained(tmp_path / "unet")
    expected = convert.from_diffusers(theirs.state_dict(), config)
    for folder in (tmp_path, tmp_path / "unet"):
        found = pretrained.load_diffusers(folder, config)
        assert equal(found.state, expected)
        assert (found.prediction, found.scale, found.shift, found.text_width) == (None, None, None, None)


@pytest.mark.parametrize("kind", ["shards", "half", "pickle"])
def test_shards_half_precision_and_tensors_in_a_pickle_are_read(tmp_path: Path, kind: str) -> None:
    theirs = diffusers_model(MODEL)
    if kind == "half":
        theirs = theirs.half()
    settings: dict[str, Any] = {"shards": {"max_shard_size": "50KB"}, "pickle": {"safe_serialization": False}}
    theirs.save_pretrained(tmp_path / "unet", **settings.get(kind, {}))
    assert (len(list((tmp_path / "unet").glob("*.safetensors"))) > 1) == (kind == "shards")
    found = pretrained.load_diffusers(tmp_path, MODEL)
    assert equal(found.state, {n: t.float() for n, t in convert.from_diffusers(theirs.state_dict(), MODEL).items()})
    assert all(tensor.dtype == torch.float32 for tensor in found.state.values())


def test_what_lies_beside_the_unet_says_how_it_was_trained(tmp_path: Path) -> None:
    diffusers_model(MODEL).save_pretrained(tmp_path / "unet")
    for name, facts in {
        "scheduler/scheduler_config.json": {"prediction_type": "v_prediction"},
        "vae/config.json": {"scaling_factor": 0.13, "shift_factor": 0.5},
        "text_encoder/config.json": {"hidden_size": 768},
    }.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(json.dumps(facts))
    found = pretrained.load_diffusers(tmp_path / "unet", MODEL)
    assert (found.prediction, found.scale, found.shift, found.text_width) == ("v", 0.13, 0.5, 768)
    for name in ("scheduler/scheduler_config.json", "vae/config.json"):
        (tmp_path / name).write_text("{}")  # as Stable Diffusion 1's own, older than these keys
    found = pretrained.load_diffusers(tmp_path, MODEL)
    assert (found.prediction, found.scale, found.shift) == ("epsilon", 0.18215, 0.0)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0", "flow", "edm"])
def test_the_exported_scheduler_says_what_is_predicted(tmp_path: Path, prediction: Any) -> None:
    diffusers_model(MODEL).save_pretrained(tmp_path / "unet")
    (tmp_path / "scheduler").mkdir()
    facts = scheduler_config(DiffusionConfig(prediction=prediction))
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(facts))
    assert pretrained.load_diffusers(tmp_path, MODEL).prediction == prediction


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"attention_head_dim": 4}, r"attention_head_dim: \[4, 4\] there, \[2, 2\] here"),  # the same keys and shapes
        ({"cross_attention_dim": 24}, "cross_attention_dim: 24 there, 12 here"),
        ({"norm_num_groups": 4}, "norm_num_groups: 4 there, 8 here"),
        ({"layers_per_block": 2}, "layers_per_block"),
        ({"act_fn": "gelu"}, "act_fn: gelu there, silu here"),
        ({"in_channels": 9}, "in_channels: 9 there, 4 here"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type"),
    ],
)
def test_another_architecture_is_refused_by_what_differs(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    diffusers_model(MODEL, **change).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=named) as caught:
        pretrained.load_diffusers(tmp_path, MODEL)
    assert "\n" not in str(caught.value)


def test_what_changes_no_number_is_let_pass(tmp_path: Path) -> None:
    changes = {"sample_size": 96, "upcast_attention": True, "attention_head_dim": [2, 2], "layers_per_block": [1, 1]}
    diffusers_model(MODEL, **changes).save_pretrained(tmp_path)
    pretrained.load_diffusers(tmp_path, MODEL)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "UNet2DModel"}))
    with pytest.raises(WeightsError, match="a UNet2DModel; model=small is a UNet2DConditionModel"):
        pretrained.load_diffusers(tmp_path, MODEL)


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    diffusers_model(MODEL).save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(WeightsError, match=r"diffusion_pytorch_model\.safetensors is missing or damaged"):
        pretrained.load_diffusers(tmp_path, MODEL)
    weights.unlink()
    with pytest.raises(WeightsError, match="has no weights"):
        pretrained.load_diffusers(tmp_path, MODEL)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"config\.json cannot be read"):
        pretrained.load_diffusers(tmp_path, MODEL)


# --------------------------------------------------------------------------------------------------------------------
# CompVis


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_compvis_file_is_taken_and_the_rest_left_alone(tmp_path: Path, suffix: str) -> None:
    ours, path = random_state(), tmp_path / f"model{suffix}"
    state = convert.to_compvis(ours, MODEL) | {"first_stage_model.x": torch.zeros(1), "betas": torch.zeros(3)}
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "global_step": 3}, path)
    found = pretrained.load_compvis(path, MODEL)
    assert equal(found.state, ours)
    assert (found.prediction, found.scale) == (None, None)


def test_averages_are_taken_where_a_file_has_them(tmp_path: Path) -> None:
    raw, ema = (convert.to_compvis(random_state(seed=seed), MODEL) for seed in (1, 2))
    averages = {f"model_ema.{name.partition('.')[2].replace('.', '')}": tensor for name, tensor in ema.items()}
    assert "model_ema.diffusion_modelinput_blocks00weight" in averages
    save_file(raw | averages, tmp_path / "both.safetensors")
    save_file(raw, tmp_path / "one.safetensors")
    assert equal(pretrained.load_compvis(tmp_path / "both.safetensors", MODEL).state, random_state(seed=2))
    assert equal(pretrained.load_compvis(tmp_path / "both.safetensors", MODEL, "raw").state, random_state(seed=1))
    assert equal(pretrained.load_compvis(tmp_path / "one.safetensors", MODEL).state, random_state(seed=1))


def test_what_a_file_says_of_itself_is_read(tmp_path: Path) -> None:
    state, path = convert.to_compvis(random_state(), MODEL), tmp_path / "model.safetensors"
    save_file(state, path, metadata={"modelspec.prediction_type": "v"})
    assert pretrained.load_compvis(path, MODEL).prediction == "v"
    save_file(state | {"scale_factor": torch.tensor(0.5)}, path)
    found = pretrained.load_compvis(path, MODEL)
    assert (found.scale, found.shift) == (0.5, 0.0)
    facts = {"prediction": "epsilon", "scale": 0.7, "shift": 0.0, "model": to_dict(replace(MODEL, heads=4))}
    torch.save({"state_dict": state, "latentmill": json.dumps(facts)}, tmp_path / "model.ckpt")
    with pytest.raises(WeightsError, match=r"heads: \[4, 4\] there, \[2, 2\] here"):  # the same keys and shapes
        pretrained.load_compvis(tmp_path / "model.ckpt", MODEL)
    found = pretrained.load_compvis(tmp_path / "model.ckpt", replace(MODEL, heads=4))
    assert (found.prediction, found.scale, found.shift) == ("epsilon", 0.7, 0.0)


class Callback:
    """What a pickle may hold besides tensors."""


def test_a_pickle_that_needs_more_than_tensors_is_refused_in_one_line(tmp_path: Path) -> None:
    state = convert.to_compvis(random_state(), MODEL)
    torch.save({"state_dict": state, "callbacks": Callback()}, tmp_path / "model.ckpt")
    with pytest.raises(
        WeightsError, match=r"it needs [\w.]*Callback\); a pickle with other content may run code"
    ) as caught:
        pretrained.load_compvis(tmp_path / "model.ckpt", MODEL)
    assert "\n" not in str(caught.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_file({"conv_in.weight": torch.zeros(1)}, tmp_path / "unet.safetensors")
    with pytest.raises(WeightsError, match="Of diffusers' files give the folder"):
        pretrained.load_compvis(tmp_path / "unet.safetensors", MODEL)
    (tmp_path / "cut.ckpt").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(WeightsError, match="cannot be read as tensors alone"):
        pretrained.load_compvis(tmp_path / "cut.ckpt", MODEL)
    (tmp_path / "model.h5").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"the file must be \.safetensors, \.ckpt or \.pt"):
        pretrained.load_compvis(tmp_path / "model.h5", MODEL)
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(WeightsError, match="holds a list, not a state dict"):
        pretrained.load_compvis(tmp_path / "list.pt", MODEL)
    wide = replace(MODEL, channels=32)
    save_file(convert.to_compvis(random_state(wide), wide), tmp_path / "wide.safetensors")
    with pytest.raises(WeightsError, match=r"wide\.safetensors: weights of another architecture"):
        pretrained.load_compvis(tmp_path / "wide.safetensors", MODEL)


# --------------------------------------------------------------------------------------------------------------------
# Input channels, architectures


@pytest.mark.parametrize("layout", ["diffusers", "compvis"])
def test_new_input_channels_start_at_zero_and_change_nothing(tmp_path: Path, layout: str) -> None:
    ours = random_state()
    nine = replace(MODEL, in_channels=9)
    if layout == "diffusers":
        theirs = diffusers_model(MODEL)
        theirs.load_state_dict(convert.to_diffusers(ours, MODEL))
        theirs.save_pretrained(tmp_path)
        found = pretrained.load_diffusers(tmp_path, nine)
    else:
        save_file(convert.to_compvis(ours, MODEL), tmp_path / "model.safetensors")
        found = pretrained.load_compvis(tmp_path / "model.safetensors", nine)
    assert equal(found.state, ours)
    narrow, wide = UNet(MODEL), UNet(nine)
    narrow.load_state_dict(ours)
    wide.load_state_dict(pretrained.widened(found.state, nine))
    assert not wide.conv_in.weight[:, 4:].any()
    x, t, context = torch.randn(2, 9, 4, 4), torch.tensor([3, 700]), torch.randn(2, 5, 12)
    with torch.no_grad():
        torch.testing.assert_close(wide(x, t, context), narrow(x[:, :4], t, context), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"heads": 4}, "heads"),
        ({"heads": 0, "head_width": 16}, "heads"),
        ({"attention": (2,)}, "attends"),
        ({"transformer_depth": 2}, "transformer_depth"),
        ({"multipliers": (1, 1)}, "widths"),
        ({"context_width": 16}, "context_width"),
        ({"norm_groups": 16}, "norm_groups"),
    ],
)
def test_architectures_that_differ_are_told_apart(change: dict[str, Any], named: str) -> None:
    with pytest.raises(WeightsError, match=f"{named}: "):
        pretrained.require_same_architecture("there", replace(MODEL, **change), MODEL)


def test_one_architecture_may_be_written_in_several_ways() -> None:
    for change in (
        {"name": "other", "dropout": 0.1, "checkpointing": True, "linear_projection": True, "in_channels": 9},
        {"attention": (1, 32)},
        {"transformer_depth": (1, 1)},
    ):
        pretrained.require_same_architecture("there", replace(MODEL, **change), MODEL)  # type: ignore[arg-type]
    by_width = replace(MODEL, attention=(), heads=0, head_width=16)  # the middle alone attends: 32 channels
    pretrained.require_same_architecture("there", by_width, replace(by_width, heads=2, head_width=0))
