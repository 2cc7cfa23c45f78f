"""models/encoders/first_stage.py: what each kind of first stage stores, its scale, and how it decodes; the folders of
diffusers' VQModel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from made.first_stages import vq_folder
from pipeline.config import EncodersConfig
from pipeline.errors import WeightsError
from pipeline.models.encoders import compvis_vae
from pipeline.models.encoders.autoencoder import load_autoencoder, save_autoencoder
from pipeline.models.encoders.first_stage import Identity, VQStage
from pipeline.models.first_stage import codebook

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vq_folder(tmp_path_factory.mktemp("vq"))


def load(folder: Path, **changes: Any) -> VQStage:
    stage = load_autoencoder(EncodersConfig(vae=str(folder), **changes))
    assert isinstance(stage, VQStage)
    return stage


def pictures(count: int = 2, side: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_a_vq_model_of_diffusers_stores_latents_before_quantisation_and_quantises_when_it_decodes(folder: Path) -> None:
    from pipeline.models.encoders.packages import VQModel

    stage, theirs, x = load(folder), VQModel.from_pretrained(folder).eval(), pictures()
    assert (stage.stored, stage.scale, stage.shift, stage.downsampling, stage.latent_channels) == (
        "latents",
        1.0,
        0.0,
        2,
        3,
    )
    latents = stage.encode(x)
    with torch.no_grad():
        torch.testing.assert_close(latents, theirs.encode(x).latents)
        torch.testing.assert_close(stage.decode(latents), theirs.decode(latents).sample.clamp(-1, 1))
        as_they_are = theirs.decode(latents, force_not_quantize=True).sample.clamp(-1, 1)
    assert (latents.dtype, latents.shape) == (torch.float32, (2, 3, 8, 8))
    assert torch.equal(stage.mean(x), latents)
    assert (stage.decode(latents) - as_they_are).abs().max() > 0.1, "quantisation changes nothing here"
    entries = stage.quantise(latents)
    assert torch.equal(stage.decode(entries), stage.decode(latents))
    assert {tuple(row) for row in entries.permute(0, 2, 3, 1).reshape(-1, 3).tolist()} <= {
        tuple(row) for row in theirs.quantize.embedding.weight.tolist()
    }


def test_scaled_latents_of_a_vq_model_decode_to_the_same_pictures(tmp_path: Path) -> None:
    plain, scaled = load(vq_folder(tmp_path / "1")), load(vq_folder(tmp_path / "2", scaling_factor=0.25))
    assert (plain.scale, scaled.scale) == (1.0, 0.25)
    latents = plain.encode(pictures())
    assert torch.equal(scaled.encode(pictures()), latents)
    assert torch.equal(scaled.decode(latents * 0.25), plain.decode(latents))


def test_a_vq_model_whose_file_has_no_scale_has_none(tmp_path: Path, folder: Path) -> None:
    """diffusers takes Stable Diffusion's 0.18215 for it, and decodes latents that are five times too large."""
    from pipeline.models.encoders.packages import VQModel

    bare = vq_folder(tmp_path / "bare", without=("scaling_factor",))
    assert VQModel.from_pretrained(bare).config.scaling_factor == 0.18215
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "config.json").write_text((bare / "config.json").read_text())
    save_file(load_file(bare / WEIGHTS), alone / "any.safetensors")
    for vae, seed in ((bare, -1), (bare, 0), (alone / "any.safetensors", -1)):
        stage = load_autoencoder(EncodersConfig(vae=str(vae), seed=seed))
        assert (stage.scale, stage.stored) == (1.0, "latents"), (vae, seed)
    assert load(bare).weights_sha256 == load(folder).weights_sha256


def test_a_saved_vq_model_states_its_scale_and_comes_back_as_it_was(tmp_path: Path) -> None:
    from pipeline.models.encoders.packages import VQModel

    stage = load(vq_folder(tmp_path / "bare", without=("scaling_factor",)))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_autoencoder(stage, tmp_path / name)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["scaling_factor"] == 1.0
    assert VQModel.from_pretrained(tmp_path / "a").config.scaling_factor == 1.0
    for file in ("config.json", WEIGHTS):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    again = load(tmp_path / "a")
    assert again.weights_sha256 == stage.weights_sha256
    assert torch.equal(again.decode(again.encode(pictures())), stage.decode(stage.encode(pictures())))


def test_entries_of_another_width_than_the_encoders_output_are_the_latents(tmp_path: Path) -> None:
    stage = load(vq_folder(tmp_path / "narrow", vq_embed_dim=2))
    latents = stage.encode(pictures())
    assert stage.latent_channels == 2 and latents.shape == (2, 2, 8, 8)
    assert stage.decode(latents).shape == (2, 3, 16, 16)


def test_distances_to_a_large_codebook_are_taken_in_pieces(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = load(folder)
    latents = stage.encode(pictures())
    whole, most, real = stage.quantise(latents), list[int](), torch.addmm

    def counted(squares: torch.Tensor, rows: torch.Tensor, codes: torch.Tensor, **options: Any) -> torch.Tensor:
        most.append(len(rows))
        return real(squares, rows, codes, **options)

    monkeypatch.setattr(codebook, "DISTANCES", 10 * 32)
    monkeypatch.setattr(torch, "addmm", counted)
    assert torch.equal(stage.quantise(latents), whole)
    assert max(most) == 10 and sum(most) == 2 * 8 * 8


def test_bfloat16_quantises_in_float32_and_reloads_what_it_was(folder: Path) -> None:
    full, half = load(folder), load(folder, vae_dtype="bfloat16")
    assert half.weights_sha256 == full.weights_sha256
    latents = full.encode(pictures())
    assert torch.equal(half.quantise(latents), full.quantise(latents))
    torch.testing.assert_close(half.decode(latents), full.decode(latents), atol=0.1, rtol=0.1)
    assert torch.equal(half.float32().encode(pictures()), latents)


def test_a_vq_model_under_compvis_names_is_read(folder: Path, tmp_path: Path) -> None:
    state = compvis_vae.to_compvis(load_file(folder / WEIGHTS))
    assert {"quantize.embedding.weight", "encoder.mid.block_1.conv1.weight"} <= state.keys()
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file({f"first_stage_model.{n}": t.contiguous() for n, t in state.items()}, tmp_path / "model.safetensors")
    assert load(tmp_path / "model.safetensors").weights_sha256 == load(folder).weights_sha256


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"in_channels": 2}, "in_channels"),
        ({"out_channels": 1}, "out_channels"),
        ({"num_vq_embeddings": 1 << 40}, "num_vq_embeddings"),
        ({"num_vq_embeddings": 0}, "num_vq_embeddings"),
        ({"vq_embed_dim": 0}, "vq_embed_dim"),
        ({"norm_type": "other"}, "norm_type"),
        ({"scaling_factor": 0}, "scaling_factor"),
        ({"_class_name": "AutoencoderTiny"}, "AutoencoderTiny; AutoencoderKL and VQModel are read"),
        ({"_class_name": None}, "AutoencoderKL and VQModel are read"),
        ({"block_out_channels": [8]}, "down_block_types"),
        ({"vq_embed_dim": 5}, "cannot load an? VQModel|another architecture"),
    ],
)
def test_a_vq_folder_that_cannot_be_right_is_one_line(
    changes: dict[str, Any], words: str, folder: Path, tmp_path: Path
) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    with pytest.raises(WeightsError, match=words) as told:
        load(tmp_path)
    assert "\n" not in str(told.value)


def test_weights_of_an_autoencoder_of_the_other_kind_are_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"_class_name": "AutoencoderKL"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    with pytest.raises(WeightsError, match=r"cannot load an AutoencoderKL|holds another architecture"):
        load_autoencoder(EncodersConfig(vae=str(tmp_path)))


def test_pixels_come_back_to_the_bit_in_the_range_that_networks_have() -> None:
    stage = load_autoencoder(EncodersConfig(vae="pixels", vae_dtype="bfloat16"))
    assert isinstance(stage, Identity) and stage.float32() is stage
    assert (stage.stored, stage.scale, stage.shift, stage.downsampling, stage.latent_channels) == (
        "pixels",
        1.0,
        0.0,
        1,
        3,
    )
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    x = levels.float() / 127.5 - 1
    assert torch.equal(stage.encode(x), levels)
    assert torch.equal(stage.mean(x), x)
    assert torch.equal(stage.decode(2 * x), (2 * x).clamp(-1, 1))
    assert stage.weights_sha256 == "689f6a627384c7dcb2dcc1487e540223e77bdf9dcd0d8be8a326eda65b0ce9a4"


def test_pixel_scale_and_random_weights_change_nothing_of_pixels() -> None:
    seeded = load_autoencoder(EncodersConfig(vae="pixels", seed=3))
    assert seeded.weights_sha256 == Identity().weights_sha256
