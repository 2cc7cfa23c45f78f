"""The autoencoders of conf/autoencoder, by configuration alone in diffusers' classes: the paper's and the demo's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from made.first_stage import KL, VQ, made, noise, pictures
from pipeline.config import FirstStageConfig
from pipeline.config.check.first_stage import check_architecture
from pipeline.config.loading.folders import conf_dir
from pipeline.config.loading.load import load
from pipeline.config.loading.merge import from_dict
from pipeline.models.encoders.autoencoder import CONFIG, DEMO, STABLE_DIFFUSION, WEIGHTS
from pipeline.models.first_stage.architecture import build, diffusers_config
from pipeline.models.weights import read_file, save_tensors

NAMES = sorted(path.stem for path in (conf_dir() / "autoencoder").glob("*.yaml"))

PUBLISHED: dict[str, tuple[tuple[int, ...], tuple[int, ...], int, int]] = {
    # name: ch_mult, attn_resolutions at 256 pixels, z_channels, n_embed
    "kl_f4": ((1, 2, 4), (), 3, 0),
    "kl_f8": ((1, 2, 4, 4), (), 4, 0),
    "kl_f16": ((1, 1, 2, 2, 4), (16,), 16, 0),
    "kl_f32": ((1, 1, 2, 2, 4, 4), (16, 8), 64, 0),
    "vq_f4": ((1, 2, 4), (), 3, 8192),
    "vq_f4_no_attention": ((1, 2, 4), (), 3, 8192),
    "vq_f4_n256": ((1, 2, 4), (), 3, 256),
    "vq_f8": ((1, 2, 2, 4), (32,), 4, 16_384),
    "vq_f8_n256": ((1, 2, 2, 4), (32,), 4, 256),
    "vq_f16": ((1, 1, 2, 2, 4), (16,), 8, 16_384),
}
"""The ddconfig of each released first stage (models/first_stage_models/*/config.yaml of CompVis/latent-diffusion: ch
128, num_res_blocks 2, resolution 256; its no-attention variant has attn_type none)."""

COUNTS = {
    "kl_f4": 55_312_063,
    "kl_f8": 83_653_863,  # Stable Diffusion's, which its users know as 83.65M
    "kl_f16": 69_610_963,
    "kl_f32": 103_880_131,
    "vq_f4": 55_322_782,  # with the denoiser's 113.6M the paper's 169M for super-resolution (table 15)
    "vq_f4_no_attention": 53_219_486,
    "vq_f4_n256": 55_298_974,
    "vq_f8": 67_717_295,
    "vq_f8_n256": 67_652_783,
    "vq_f16": 69_593_371,
}


TRAINED: dict[str, tuple[int, int, int, float, int]] = {
    # name: steps (CompVis' README), pictures a step, then of CompVis' file disc_start, disc_weight, disc_num_layers
    "kl_f4": (176_991, 24, 50_001, 0.5, 3),
    "kl_f8": (246_803, 24, 50_001, 0.5, 3),
    "kl_f16": (442_998, 24, 50_001, 0.5, 3),
    "kl_f32": (406_763, 24, 50_001, 0.5, 3),
    "vq_f4": (533_066, 8, 0, 0.75, 3),
    "vq_f8": (971_043, 10, 1, 0.6, 2),
    "vq_f8_n256": (1_608_649, 10, 250_001, 0.75, 3),
    "vq_f16": (1_101_166, 14, 250_001, 0.75, 2),
}
"""Pictures a step are a VQ file's batch_size. A KL file's (10, 4, 6, 6) is of a number of GPUs that is not known: 24 is
that of configs/autoencoder/*.yaml, 12 twice accumulated."""


def preset(name: str) -> FirstStageConfig:
    return from_dict(FirstStageConfig, yaml.safe_load((conf_dir() / "autoencoder" / f"{name}.yaml").read_text()))


def diffusers_class(described: dict[str, Any]) -> Any:
    """diffusers' own, with none of our layers."""
    from pipeline.models.encoders import packages

    cls = getattr(packages, described["_class_name"])
    return cls(**{key: value for key, value in described.items() if key != "_class_name"})


def shapes(model: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def by_hand(name: str) -> int:
    """Parameters, counted from a published ddconfig layer by layer, in the order of CompVis' Encoder and Decoder."""
    multipliers, attended, z, codes = PUBLISHED[name]
    widths = [128 * multiplier for multiplier in multipliers]
    sides = [256 // 2**level for level in range(len(widths))]
    last = widths[-1]

    def conv(a: int, b: int, taps: int = 9) -> int:
        return taps * a * b + b

    def res(a: int, b: int) -> int:
        return 2 * a + conv(a, b) + 2 * b + conv(b, b) + (conv(a, b, 1) if a != b else 0)

    def attention(a: int) -> int:
        return 2 * a + 4 * conv(a, a, 1)  # norm, q, k, v, proj_out

    middle = 2 * res(last, last) + (0 if name.endswith("no_attention") else attention(last))
    total = conv(3, 128) + middle  # encoder
    a = 128
    for level, b in enumerate(widths):
        for _ in range(2):
            total += res(a, b) + (attention(b) if sides[level] in attended else 0)
            a = b
        total += conv(b, b) if level < len(widths) - 1 else 0  # downsample
    total += 2 * last + conv(last, z if codes else 2 * z)
    total += conv(z, last) + middle  # decoder
    for level in reversed(range(len(widths))):
        b = widths[level]
        for _ in range(3):
            total += res(a, b) + (attention(b) if sides[level] in attended else 0)
            a = b
        total += conv(b, b) if level else 0  # upsample
    total += 2 * widths[0] + conv(widths[0], 3)
    return total + conv(z, z, 1) + (codes * z + conv(z, z, 1) if codes else conv(2 * z, 2 * z, 1))


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_papers_autoencoders_have_the_parameters_of_their_published_configurations(name: str) -> None:
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build(preset(name)).parameters())
    assert parameters == by_hand(name) == COUNTS[name]


@pytest.mark.parametrize("name", sorted(TRAINED))
def test_the_papers_experiments_have_the_numbers_of_their_published_configurations(name: str) -> None:
    """Counted in samples, and with losses per pixel value."""
    config = load("autoencoder", ["data.train=pixels", "run=run", f"experiment={name}"])
    steps, batch, start, weight, layers = TRAINED[name]
    gan, loss, optim = config.gan, config.loss, config.optim
    assert config.autoencoder == preset(name)
    assert (config.samples, optim.batch, optim.lr) == (steps * batch, batch, pytest.approx(4.5e-6 * batch))
    assert (gan.after, gan.weight, gan.layers, gan.warmup, gan.ramp) == (start * batch, weight, layers, 0, 0)
    assert (loss.l1, loss.l2, loss.perceptual_weight, loss.kl) == (1, 0, 1, 1e-6)
    assert (loss.codebook, loss.commitment, loss.restart) == (1, 0.25, 0)
    assert (optim.betas, optim.weight_decay, optim.clip, config.crop) == ((0.5, 0.9), 0, 0, 256)


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_builds_with_the_keys_and_shapes_of_diffusers_class(name: str) -> None:
    config = preset(name)
    assert config.name == name
    check_architecture(config)
    with torch.device("meta"):
        assert shapes(build(config)) == shapes(diffusers_class(diffusers_config(config)))


def test_kl_f8_is_stable_diffusions_autoencoder() -> None:
    described = {key: tuple(v) if isinstance(v, list) else v for key, v in diffusers_config(preset("kl_f8")).items()}
    for key, value in STABLE_DIFFUSION.items():
        assert key in ("sample_size", "scaling_factor") or described[key] == value


def test_kl_small_is_the_demos_autoencoder() -> None:
    shipped = json.loads((DEMO / CONFIG).read_text())
    described = diffusers_config(preset("kl_small"), scale=shipped["scaling_factor"], side=64)
    assert described == shipped
    build(preset("kl_small")).load_state_dict(read_file(DEMO / WEIGHTS)[0])


@pytest.mark.parametrize("name", NAMES)
def test_sizes_of_latents_are_those_that_a_presets_name_says(name: str) -> None:
    config = preset(name)
    said = [int(word[1:]) for word in name.split("_") if word[0] == "f" and word[1:].isdigit()]
    assert config.downsampling == (said[0] if said else 8)
    assert name.startswith(config.regularizer)


@pytest.mark.parametrize("config", [KL, VQ], ids=lambda config: config.name)
def test_diffusers_class_loads_what_is_saved_and_gives_equal_outputs(config: FirstStageConfig, tmp_path: Path) -> None:
    """Its own layers: what ours compute is the same function."""
    ours = made(config).model
    (tmp_path / CONFIG).write_text(json.dumps(diffusers_config(config, scale=1.7)))
    save_tensors({name: tensor.contiguous() for name, tensor in ours.state_dict().items()}, tmp_path / WEIGHTS)
    cls = type(diffusers_class(diffusers_config(config)))
    theirs = cls.from_pretrained(tmp_path, low_cpu_mem_usage=False).eval()
    assert theirs.config.scaling_factor == 1.7
    assert type(ours) is cls
    x = pictures()
    with torch.no_grad():
        encoded = [
            one.encode(x).latent_dist.parameters if config.regularizer == "kl" else one.encode(x).latents
            for one in (ours, theirs)
        ]
        torch.testing.assert_close(*encoded, rtol=1e-4, atol=1e-5)
        z = encoded[1][:, : config.latent_channels]
        torch.testing.assert_close(ours.decode(z).sample, theirs.decode(z).sample, rtol=1e-4, atol=1e-5)
        reconstruction = made(config)(x, None).reconstruction
        torch.testing.assert_close(reconstruction, theirs.decode(z).sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [KL, VQ], ids=lambda config: config.name)
def test_gradients_are_those_of_diffusers_layers(config: FirstStageConfig) -> None:
    """Of a loss of the reconstruction alone: diffusers' quantiser has its losses aside."""
    ours = made(config)
    theirs = diffusers_class(diffusers_config(config))
    theirs.load_state_dict(ours.model.state_dict())
    x, weight = pictures(), pictures(seed=5)
    outputs = ours(x, noise(config))
    (outputs.reconstruction * weight).sum().backward()
    if config.regularizer == "kl":
        posterior = theirs.encode(x).latent_dist
        y = theirs.decode(posterior.mean + posterior.std * noise(config)).sample
    else:
        y = theirs(x).sample
    (y * weight).sum().backward()
    mine = dict(ours.model.named_parameters())
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters() if "quantize" not in name}
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in wanted.items():  # that of an attention's to_k.bias is 0 but for rounding
        torch.testing.assert_close(mine[name].grad, gradient, rtol=1e-3, atol=1e-6 * largest, msg=name)


@pytest.mark.parametrize("config", [KL, VQ], ids=lambda config: config.name)
def test_the_scaling_factor_is_always_written(config: FirstStageConfig) -> None:
    """diffusers takes 0.18215 where it is missing, also for a VQModel, whose latents are not of that scale."""
    assert diffusers_config(config)["scaling_factor"] == 1.0
    assert diffusers_config(config, scale=0.7)["scaling_factor"] == 0.7
    assert diffusers_class({"_class_name": "VQModel"}).config.scaling_factor == 0.18215


def test_building_leaves_torchs_generator_alone() -> None:
    before = torch.random.get_rng_state()
    build(KL)
    assert torch.equal(torch.random.get_rng_state(), before)
