"""models/encoders/autoencoder.py: range, scale and hash, and the files that it reads."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pipeline.config import EncodersConfig
from pipeline.diffusion.posterior import sample_posterior
from pipeline.errors import ConfigError, WeightsError
from pipeline.models.encoders import autoencoder
from pipeline.models.encoders.autoencoder import load_network
from pipeline.models.weights import weights_hash

SMALL: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "latent_channels": 3,
    "norm_num_groups": 4,
    "scaling_factor": 0.4,
    "shift_factor": 0.2,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    return tmp_path


def test_moments_and_decoding_have_the_stated_shapes_and_scales(folder: Path) -> None:
    stage = load_network(EncodersConfig(vae=str(folder), seed=0))
    assert (stage.scale, stage.shift, stage.downsampling, stage.latent_channels) == (0.4, 0.2, 2, 3)
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    moments = stage.encode(x)
    assert moments.shape == (2, 6, 8, 8)
    assert moments.dtype == torch.float32
    with torch.no_grad():
        posterior = stage.model.encode(x).latent_dist
        torch.testing.assert_close(moments[:, :3], posterior.mean)
        z = sample_posterior(moments, None, stage.scale, stage.shift)
        torch.testing.assert_close(z, (posterior.mean - 0.2) * 0.4)
        torch.testing.assert_close(stage.decode(z), stage.model.decode(posterior.mean).sample.clamp(-1, 1))


def test_posterior_samples_have_the_posteriors_mean_and_spread() -> None:
    mean = torch.full((1, 2, 1, 1), 3.0)
    logvar = torch.tensor([-60.0, 2.0]).view(1, 2, 1, 1)  # the first is clamped to -30
    noise = torch.tensor([1.0, -0.5]).view(1, 2, 1, 1)
    z = sample_posterior(torch.cat([mean, logvar], dim=1).half(), noise, 0.5, 1.0)
    expected = [(3 + 2.71828**-15 - 1) * 0.5, (3 - 0.5 * 2.71828 - 1) * 0.5]
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.flatten(), torch.tensor(expected), atol=1e-5, rtol=0)


def test_seeded_weights_are_the_same_each_time_and_leave_torchs_generator_alone(folder: Path) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    hashes = [load_network(EncodersConfig(vae=str(folder), seed=seed)).weights_sha256 for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_hash_is_of_the_weights_not_of_their_file(folder: Path) -> None:
    stage = load_network(EncodersConfig(vae=str(folder), seed=0))
    half = {name: tensor.half() for name, tensor in stage.model.state_dict().items()}
    save_file(half, folder / "diffusion_pytorch_model.safetensors")
    save_file(dict(reversed([(k, v.float()) for k, v in half.items()])), folder / "again.safetensors")
    from_folder = load_network(EncodersConfig(vae=str(folder)))
    from_file = load_network(EncodersConfig(vae=str(folder / "again.safetensors")))
    assert from_folder.weights_sha256 == from_file.weights_sha256 == weights_hash(half.items())
    assert from_folder.weights_sha256 != stage.weights_sha256
    assert next(from_folder.model.parameters()).dtype == torch.float32
    half["encoder.conv_in.bias"][0] += 0.5
    assert weights_hash(half.items()) != from_folder.weights_sha256


def test_a_single_file_in_compvis_names_is_read(folder: Path) -> None:
    """Names of the first stage in a Stable Diffusion checkpoint, some with the prefix."""
    stage = load_network(EncodersConfig(vae=str(folder), seed=0))
    state = stage.model.state_dict()
    renamed = {}
    for name, tensor in state.items():
        new = name
        for side, ours, theirs in (("encoder", "down_blocks", "down"), ("decoder", "up_blocks", "up")):
            if not name.startswith(f"{side}.{ours}."):
                continue
            block, rest = name.removeprefix(f"{side}.{ours}.").split(".", 1)
            number = int(block) if side == "encoder" else 1 - int(block)
            rest = rest.replace("resnets.", "block.").replace("conv_shortcut", "nin_shortcut")
            rest = rest.replace("downsamplers.0.", "downsample.").replace("upsamplers.0.", "upsample.")
            new = f"{side}.{theirs}.{number}.{rest}"
        new = new.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
        new = new.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_norm_out", "norm_out")
        for ours, theirs in (
            ("group_norm", "norm"),
            ("to_q", "q"),
            ("to_k", "k"),
            ("to_v", "v"),
            ("to_out.0", "proj_out"),
        ):
            new = new.replace(f"attn_1.{ours}.", f"attn_1.{theirs}.")
        if ".attn_1." in new and new.endswith("weight") and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        renamed[f"first_stage_model.{new}"] = tensor.contiguous()
    renamed["model.diffusion_model.out.0.weight"] = torch.zeros(1)  # other parts of a whole checkpoint are left alone
    save_file(renamed, folder / "model.safetensors")
    again = load_network(EncodersConfig(vae=str(folder / "model.safetensors")))
    assert again.weights_sha256 == stage.weights_sha256


def test_bfloat16_stays_near_float32(folder: Path) -> None:
    full = load_network(EncodersConfig(vae=str(folder), seed=0))
    half = load_network(EncodersConfig(vae=str(folder), seed=0, vae_dtype="bfloat16"))
    assert half.weights_sha256 == full.weights_sha256
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    moments = half.encode(x)
    assert moments.dtype == torch.float32
    torch.testing.assert_close(moments, full.encode(x), atol=0.1, rtol=0.1)
    assert not torch.equal(moments, full.encode(x))


def test_stable_diffusions_architecture_is_used_where_only_its_name_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    built = {}
    monkeypatch.setattr(autoencoder, "_build", lambda config, name: built.update(config) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load_network(EncodersConfig(vae="stabilityai/sd-vae-ft-mse", seed=0))
    assert built["block_out_channels"] == (128, 256, 512, 512)
    assert built["scaling_factor"] == 0.18215


def test_wrong_weights_are_refused_with_a_reason(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    config = EncodersConfig(vae=str(folder))
    with pytest.raises(WeightsError, match="cannot load"):
        load_network(config)
    stage = load_network(dataclasses.replace(config, seed=0))
    state = dict(stage.model.state_dict())
    dropped = state.pop("encoder.conv_in.bias")
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    for vae in (folder, folder / "diffusion_pytorch_model.safetensors"):
        with pytest.raises(WeightsError, match="1 weights missing"):
            load_network(EncodersConfig(vae=str(vae)))
    save_file(state | {"encoder.conv_in.bias": torch.zeros(len(dropped) + 1)}, folder / "odd.safetensors")
    with pytest.raises(WeightsError, match="another architecture"):
        load_network(EncodersConfig(vae=str(folder / "odd.safetensors")))
    (folder / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(WeightsError, match="damaged"):
        load_network(EncodersConfig(vae=str(folder / "cut.safetensors")))
    (folder / "model.ckpt").write_bytes(b"pickle")
    with pytest.raises(WeightsError, match="could run code"):
        load_network(EncodersConfig(vae=str(folder / "model.ckpt")))
    with pytest.raises(WeightsError, match=r"config\.json"):
        load_network(EncodersConfig(vae=str(tmp_path_factory.mktemp("empty")), seed=0))
    with pytest.raises(ConfigError, match="float32"):
        load_network(dataclasses.replace(config, seed=0, vae_dtype="float16"))  # type: ignore[arg-type]


def test_scale_and_shift_are_those_beside_the_file_or_stable_diffusions(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = load_network(EncodersConfig(vae=str(folder), seed=0)).model.state_dict()
    save_file(state, folder / "any.safetensors")
    beside = load_network(EncodersConfig(vae=str(folder / "any.safetensors")))
    assert (beside.scale, beside.shift) == (0.4, 0.2)
    bare = {name: value for name, value in SMALL.items() if name not in ("scaling_factor", "shift_factor")}
    monkeypatch.setattr(autoencoder, "STABLE_DIFFUSION", autoencoder.STABLE_DIFFUSION | bare)
    alone = tmp_path_factory.mktemp("alone") / "vae.safetensors"
    save_file(state, alone)
    stage = load_network(EncodersConfig(vae=str(alone)))
    assert (stage.scale, stage.shift) == (0.18215, 0.0)
    assert stage.weights_sha256 == beside.weights_sha256


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_attention_in_the_names_of_older_files_is_read(folder: Path, kind: str) -> None:
    """Such as the published files of stabilityai/sd-vae-ft-mse."""
    stage = load_network(EncodersConfig(vae=str(folder), seed=0))
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = stage.model.state_dict()
    for new, old in older.items():
        state = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in state.items()}
    assert any(".proj_attn." in name for name in state)
    weights = folder / "diffusion_pytorch_model.safetensors"
    save_file(state, weights)
    again = load_network(EncodersConfig(vae=str(folder if kind == "folder" else weights)))
    assert again.weights_sha256 == stage.weights_sha256


def test_a_bfloat16_stage_gives_its_weights_in_float32_as_they_were(folder: Path) -> None:
    """The weights are loaded again, not cast back: bfloat16 loses 16 bits of a weight."""
    seeded = load_network(EncodersConfig(vae=str(folder), seed=0))
    weights = folder / "diffusion_pytorch_model.safetensors"
    save_file(seeded.model.state_dict(), weights)
    config = EncodersConfig(vae=str(folder), vae_dtype="bfloat16")
    half, other = load_network(config), load_network(config)
    full = half.float32()
    assert full is half.float32()
    assert full is full.float32()
    assert (full.dtype, full.weights_sha256) == (torch.float32, half.weights_sha256)
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    assert torch.equal(full.encode(x), seeded.encode(x))
    assert half.dtype == torch.bfloat16
    assert torch.equal(load_network(dataclasses.replace(config, seed=0)).float32().encode(x), seeded.encode(x))
    save_file({name: tensor + 1 for name, tensor in seeded.model.state_dict().items()}, weights)
    with pytest.raises(WeightsError, match="have changed"):
        other.float32()


def test_a_place_where_there_is_nothing_is_refused_without_asking_the_hub(tmp_path: Path) -> None:
    for vae in (str(tmp_path / "none"), "./none", "~/none", "a/b/c", "vae.safetensors"):
        with pytest.raises(WeightsError, match="there is no such folder or file"):
            load_network(EncodersConfig(vae=vae))
