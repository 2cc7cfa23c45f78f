"""What is exported of each task draws in other software what it draws here from the same noise, to 2/255."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from made.task_run import MODEL, Made, make_task_run, noise
from pipeline import export
from pipeline.conditions.facts import BoxFacts, ClassFacts, Conditions, LabelFacts, LowresFacts, MaskFacts
from pipeline.conditions.mask import draw_mask, hide, pack
from pipeline.config import (
    ClassTask,
    DiffusionConfig,
    ExportConfig,
    InpaintTask,
    LayoutTask,
    SemanticTask,
    SuperresTask,
    TaskConfig,
    TextTask,
    UnconditionalTask,
)
from pipeline.diffusion.sampling import sample
from pipeline.errors import ConfigError
from pipeline.inference.trained import encode_captions, load_trained
from pipeline.models.encoders.torchvision_ops import declare_torchvision_ops
from pipeline.models.tasks.superres import LEVEL

declare_torchvision_ops()

STEPS, GUIDANCE = 5, 2.0
CAPTIONS = ["a large red circle left of a small blue square", "a small green cross"]
PLAIN = MaskFacts(kinds=("rectangles",))
STABLE = replace(PLAIN, pooling="nearest")
LDM = MaskFacts(kinds=("rectangles",), pooling="nearest", order="masked_mask", low=-1, hole="black", packed=False)
SMALL = LowresFacts(factor=4, degradation="bicubic")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def given(made: Made) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What is asked of two pictures: as the code of a README takes it, and the members of our batch."""
    asked: dict[str, Any] = {}
    batch: dict[str, Tensor] = {}
    side = made.contract.resolution
    facts = made.contract.conditions
    if made.tower is not None:
        asked["captions"] = CAPTIONS
        batch["text"] = encode_captions(made.tower, CAPTIONS, trimmed=made.contract.trimmed)
        batch["tokens"] = made.tower.tokenize(CAPTIONS)
    if facts.classes:
        asked["classes"], batch["cond.class"] = [3, 1], torch.tensor([3, 1], dtype=torch.int32)
    if facts.boxes:
        asked["boxes"] = [[[2, 0.1, 0.2, 0.5, 0.7], [0, 0.4, 0.0, 1.0, 0.31]], [[4, 0.0, 0.5, 0.25, 1.0]]]
        rows = torch.full((2, facts.boxes.most, 5), -1.0)
        for row, boxes in zip(rows, asked["boxes"], strict=True):
            row[: len(boxes)] = torch.tensor(boxes)
        batch["cond.boxes"] = rows.half()
    if facts.labels:
        cells = facts.labels.grid * made.contract.latent_shape[1]
        asked["labels"] = torch.randint(0, facts.labels.count, (2, 4, 4), generator=seeded()).to(torch.uint8)
        asked["labels"] = asked["labels"].repeat_interleave(cells // 4, 1).repeat_interleave(cells // 4, 2)
        batch["cond.labels"] = asked["labels"]
    if facts.lowres:
        small = side // facts.lowres.factor
        asked["small"] = torch.randint(0, 256, (2, 3, small, small), generator=seeded(), dtype=torch.uint8)
        batch["cond.lowres"] = asked["small"]
    if facts.mask:
        asked["image"] = torch.randint(0, 256, (2, 3, 8, 8), generator=seeded(), dtype=torch.uint8)
        asked["image"] = asked["image"].repeat_interleave(side // 8, 2).repeat_interleave(side // 8, 3)
        masks = np.stack([draw_mask("rectangles", key, (side, side)) for key in "ab"])
        asked["mask"] = torch.from_numpy(masks)
        pixels = asked["image"].permute(0, 2, 3, 1).numpy()
        hidden = np.stack([hide(*pair, facts.mask.hole) for pair in zip(pixels, masks, strict=True)])
        moments = made.first_stage.encode(torch.from_numpy(hidden).permute(0, 3, 1, 2))
        batch["cond.masked"] = moments[:, : made.first_stage.latent_channels].half()
        batch["cond.mask"] = torch.from_numpy(pack(masks) if facts.mask.packed else masks)
    return asked, batch


@torch.no_grad()
def drawn(made: Made, x: Tensor, batch: Mapping[str, Tensor], guidance: float) -> np.ndarray:
    """Our pictures (B, H, W, 3) from 0 to 1, before anything is pasted."""
    trained = load_trained(made.config.run)
    empty = None if made.tower is None else encode_captions(made.tower, [""], trimmed=made.contract.trimmed)[0]
    denoiser = trained.denoiser(empty)
    task = denoiser.task
    read = {name: array for name, array in batch.items() if name in (*task.members, LEVEL)}
    batch = task.prepare(read, 0, torch.arange(len(x)), training=False)
    null = task(task.null(batch)) if guidance != 1 else None
    process = made.config.diffusion
    latents = sample(denoiser, process, x, task(batch), null, sampler="ddim", steps=STEPS, guidance=guidance)
    pictures = made.first_stage.decode(latents)
    return (pictures.permute(0, 2, 3, 1).numpy() + 1) / 2


def exported(made: Made, folder: Path, **changes: Any) -> Path:
    assert export.main(ExportConfig(run=made.config.run, dest=str(folder / "out"), **changes)) == 0
    return folder / "out"


def by_readme(folder: Path, x: Tensor, asked: Mapping[str, Any], guidance: float) -> dict[str, Any]:
    """The variables of README.md's code after it has run."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {"folder": str(folder), "noise": x, "steps": STEPS, "guidance": guidance, **asked}
    exec(code, names)
    return names


def assert_alike(theirs: np.ndarray, ours: np.ndarray) -> None:
    assert theirs.shape == ours.shape
    assert np.abs(theirs - ours).max() <= 2 / 255
    assert ours.std() > 0.04, "pictures of one grey agree whatever is wrong"
    assert ((ours > 0) & (ours < 1)).mean() > 0.3, "and so do those that are clipped everywhere"
    assert np.abs(ours[0] - ours[1]).mean() > 0.02, "and so do pictures of no noise"


def conditions(**facts: Any) -> Conditions:
    return Conditions(**facts)


LOOPS: dict[str, tuple[TaskConfig, Conditions, dict[str, Any]]] = {
    "class-token": (ClassTask(), conditions(classes=ClassFacts(count=5)), {}),
    "class-vector": (ClassTask(mode="vector"), conditions(classes=ClassFacts(count=5)), {"shift": 0.2}),
    "layout": (LayoutTask(), conditions(boxes=BoxFacts(count=6, most=4)), {}),
    "layout-transformer": (
        LayoutTask(encoder="transformer", paint=3, heads=2, head_width=8, text=True),
        conditions(boxes=BoxFacts(count=6, most=4)),
        {"text": True, "storage": "trimmed"},
    ),
    "semantic": (SemanticTask(), conditions(labels=LabelFacts(count=5, grid=4)), {}),
    "semantic-flow": (
        SemanticTask(),
        conditions(labels=LabelFacts(count=5, grid=4)),
        {"diffusion": DiffusionConfig(prediction="flow")},
    ),
    "class-edm": (
        ClassTask(),
        conditions(classes=ClassFacts(count=5)),
        {"diffusion": DiffusionConfig(prediction="edm", timestep_density="log_normal", sigma_data=1.0)},
    ),
    "semantic-average": (SemanticTask(labels="average", width=3), conditions(labels=LabelFacts(count=5, grid=2)), {}),
    "superres-f8": (SuperresTask(), conditions(lowres=SMALL), {"levels": 3}),
    "superres-noise": (SuperresTask(noise=9), conditions(lowres=replace(SMALL, factor=8)), {}),
    "inpaint": (InpaintTask(), conditions(mask=PLAIN), {}),
    "inpaint-ldm": (InpaintTask(text=True, drop=0.1), conditions(mask=LDM), {"text": True, "channels": 3}),
    "text-transformer": (
        TextTask(encoder="transformer", depth=2, heads=2, head_width=8),
        conditions(),
        {"text": True, "storage": "tokens"},
    ),
}


@pytest.mark.parametrize("name", LOOPS)
def test_the_loop_of_readme_draws_our_pictures(name: str, tmp_path: Path) -> None:
    task, facts, changes = LOOPS[name]
    made = make_task_run(tmp_path, task, facts, **changes)
    folder = exported(made, tmp_path)
    assert not (folder / "model_index.json").exists()
    asked, batch = given(made)
    x, guidance = noise(made), GUIDANCE if task.droppable else 1.0
    names = by_readme(folder, x, asked, guidance)
    ours = drawn(made, x, batch, guidance)
    assert_alike((names["pictures"].permute(0, 2, 3, 1).numpy() + 1) / 2, ours)
    other = {key: value.flip(0) if key.startswith("cond.") else value for key, value in batch.items()}
    if facts != Conditions():
        assert np.abs(drawn(made, x, other, guidance) - ours).max() > 0.05, "what is asked changes nothing"
    if "pasted" in names:
        outside = (asked["mask"] == 0)[:, None].expand(-1, 3, -1, -1)
        assert torch.equal(names["pasted"][outside], (asked["image"].float() / 127.5 - 1)[outside])


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_ldm_pipeline_draws_unconditional_pictures(shift: float, tmp_path: Path) -> None:
    from diffusers import LDMPipeline

    made = make_task_run(tmp_path, UnconditionalTask(), conditions(), shift=shift)
    pipeline = LDMPipeline.from_pretrained(exported(made, tmp_path))
    pipeline.set_progress_bar_config(disable=True)
    x = torch.randn(2, *made.contract.latent_shape, generator=seeded(4))
    theirs = pipeline(batch_size=2, generator=seeded(4), num_inference_steps=STEPS, output_type="np").images
    assert_alike(theirs, drawn(made, x, {}, 1.0))


def test_an_unconditional_run_with_another_scheduler_gets_a_loop(tmp_path: Path) -> None:
    made = make_task_run(tmp_path, UnconditionalTask(), conditions())
    folder = exported(made, tmp_path, sampler="dpmpp_2m")
    assert not (folder / "model_index.json").exists()
    assert "LDMPipeline takes DDIM alone" in (folder / "README.md").read_text()
    assert by_readme(folder, noise(made), {}, 1.0)["pictures"].shape == (2, 3, 64, 64)


@pytest.mark.parametrize(("shift", "sampler"), [(0.0, "ddim"), (0.3, "ddim"), (0.0, "dpmpp_2m")])
def test_ldm_super_resolution_pipeline_draws_our_pictures(shift: float, sampler: Any, tmp_path: Path) -> None:
    from diffusers import LDMSuperResolutionPipeline

    made = make_task_run(tmp_path, SuperresTask(), conditions(lowres=SMALL), channels=3, shift=shift)
    pipeline = LDMSuperResolutionPipeline.from_pretrained(exported(made, tmp_path, sampler=sampler))
    pipeline.set_progress_bar_config(disable=True)
    asked, batch = given(made)
    small = asked["small"].float() / 127.5 - 1
    x = torch.randn(2, *made.contract.latent_shape, generator=seeded(4))
    theirs = pipeline(small, generator=seeded(4), num_inference_steps=STEPS, output_type="np").images
    if sampler == "ddim":
        assert_alike(theirs, drawn(made, x, batch, 1.0))
    else:
        assert pipeline.scheduler.scale_model_input(small, 0) is small


def test_super_resolution_with_eulers_scheduler_is_left_to_a_loop(tmp_path: Path) -> None:
    """It would scale the small image as well."""
    made = make_task_run(tmp_path, SuperresTask(), conditions(lowres=SMALL), channels=3)
    folder = exported(made, tmp_path, sampler="euler")
    assert not (folder / "model_index.json").exists()
    assert "would scale the small image" in (folder / "README.md").read_text()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("level", [1, 7])
def test_stable_diffusions_upscaler_draws_our_pictures(level: int, tmp_path: Path) -> None:
    from diffusers import StableDiffusionUpscalePipeline

    task = SuperresTask(noise=7, text=True, drop=0.1)
    made = make_task_run(tmp_path, task, conditions(lowres=SMALL), text=True, shift=0.2)
    pipeline = StableDiffusionUpscalePipeline.from_pretrained(exported(made, tmp_path))
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.vae.config.scaling_factor == 0.08333 and pipeline.config.max_noise_level == 6
    asked, batch = given(made)
    small, x = asked["small"].float() / 127.5 - 1, noise(made)
    theirs = pipeline(
        CAPTIONS,
        image=small,
        noise_level=level - 1,
        latents=x,
        generator=seeded(6),
        guidance_scale=GUIDANCE,
        num_inference_steps=STEPS,
        output_type="np",
    ).images
    # The pipeline's noise of the small images is its generator's; ours is replaced by it.
    added = torch.randn(small.shape, generator=seeded(6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.models.tasks.superres.philox.normal", lambda *_: added)
        ours = drawn(made, x, batch | {LEVEL: torch.full((2,), level)}, GUIDANCE)
    assert_alike(theirs, ours)


def test_stable_diffusions_inpainting_draws_our_pictures(tmp_path: Path) -> None:
    from diffusers import StableDiffusionInpaintPipeline
    from PIL import Image

    made = make_task_run(tmp_path, InpaintTask(text=True, drop=0.1), conditions(mask=STABLE), text=True)
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(exported(made, tmp_path), safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.unet.config.in_channels == 9
    asked, batch = given(made)
    x = noise(made)
    theirs = pipeline(
        CAPTIONS,
        image=[Image.fromarray(image) for image in asked["image"].permute(0, 2, 3, 1).numpy()],
        mask_image=[Image.fromarray(255 * mask) for mask in asked["mask"].numpy()],
        strength=1.0,
        height=64,
        width=64,
        latents=x,
        guidance_scale=GUIDANCE,
        num_inference_steps=STEPS,
        output_type="np",
    ).images
    ours = drawn(made, x, batch, GUIDANCE)
    assert_alike(theirs, ours)
    swapped = batch | {"cond.mask": batch["cond.mask"].flip(0), "cond.masked": batch["cond.masked"].flip(0)}
    assert np.abs(drawn(made, x, swapped, GUIDANCE) - ours).max() > 0.05


@pytest.mark.parametrize(
    ("task", "facts", "changes", "why"),
    [
        (InpaintTask(text=True), PLAIN, {"text": True}, "masks sampled by nearest"),
        (InpaintTask(text=True), replace(STABLE, order="masked_mask"), {"text": True}, "the mask before"),
        (InpaintTask(text=True), replace(STABLE, low=-1), {"text": True}, "masks of 0"),
        (InpaintTask(text=True), replace(STABLE, hole="black"), {"text": True}, "grey holes"),
        (InpaintTask(text=True), STABLE, {"text": True, "channels": 3}, "4 channels alone"),
        (InpaintTask(), STABLE, {}, "takes captions"),
    ],
)
def test_masks_that_stable_diffusion_does_not_make_get_no_pipeline(
    task: TaskConfig, facts: MaskFacts, changes: dict[str, Any], why: str, tmp_path: Path, capsys: Any
) -> None:
    folder = exported(make_task_run(tmp_path, task, conditions(mask=facts), **changes), tmp_path, check=False)
    assert not (folder / "model_index.json").exists()
    assert why in (folder / "README.md").read_text() and why in capsys.readouterr().out


def test_class_vectors_are_one_table_in_diffusers_class(tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    task, facts, _ = LOOPS["class-vector"]
    made = make_task_run(tmp_path, task, facts)
    unet = UNet2DModel.from_pretrained(exported(made, tmp_path), subfolder="unet")
    assert unet.config.num_class_embeds == 6
    x, t, labels = noise(made), torch.tensor([3, 900]), torch.tensor([2, 5])
    denoiser = load_trained(made.config.run).denoiser(None)
    with torch.no_grad():
        ours = denoiser(x, t, {"cond.class": labels})
        torch.testing.assert_close(unet(x, t, class_labels=labels).sample, ours, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------------------------
# CompVis' names


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("class-token", {"cond_stage_model.embedding.weight": (6, 128)}),
        ("class-vector", {"model.diffusion_model.label_emb.weight": (6, 128)}),
        ("semantic-average", {"cond_stage_model.channel_mapper.weight": (3, 6, 1, 1)}),
        ("semantic", {"cond_stage_model.embed.weight": (6, 2)}),
        ("superres-noise", {"model.diffusion_model.label_emb.weight": (10, 128)}),
        ("layout", {"cond_stage_model.first.weight": (128, 36)}),
        ("inpaint", {}),
        (
            "text-transformer",
            {
                "cond_stage_model.transformer.token_emb.weight": (512, 128),
                "cond_stage_model.transformer.pos_emb.emb.weight": (32, 128),
                "cond_stage_model.transformer.attn_layers.layers.0.1.to_q.weight": (16, 128),
                "cond_stage_model.transformer.attn_layers.layers.2.1.to_out.bias": (128,),
                "cond_stage_model.transformer.attn_layers.layers.3.1.net.0.0.weight": (512, 128),
                "cond_stage_model.transformer.norm.bias": (128,),
            },
        ),
    ],
)
def test_a_task_has_compvis_names_where_compvis_has_the_same(
    name: str, keys: dict[str, tuple[int, ...]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    task, facts, changes = LOOPS[name]
    made = make_task_run(tmp_path, task, facts, **{**changes, "shift": 0.0})
    dest = tmp_path / "model.safetensors"
    assert export.main(ExportConfig(run=made.config.run, dest=str(dest), format="compvis")) == 0
    state = load_file(dest)
    assert "first_stage_model.decoder.conv_out.weight" in state
    for key, shape in keys.items():
        vocabulary = made.contract.text.vocabulary if made.contract.text else 0
        assert tuple(state[key].shape) == (tuple(vocabulary if n == 512 and "token" in key else n for n in shape)), key
    others = {key for key in state if key.startswith("cond_stage_model.") or "label_emb" in key}
    assert bool(others) == bool(keys)
    said = capsys.readouterr().out
    assert "CompVis' own code has 32 groups in every norm, and this network 8" in said
    assert ("has our names" in said) == (name == "layout") and ("cannot run the file" in said) == (name == "semantic")


def test_a_compvis_file_of_32_groups_has_no_word_about_groups(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = replace(MODEL, norm_groups=32)
    made = make_task_run(tmp_path, UnconditionalTask(), conditions(), model=model)
    dest = str(tmp_path / "model.ckpt")
    assert export.main(ExportConfig(run=made.config.run, dest=dest, format="compvis")) == 0
    assert "groups" not in capsys.readouterr().out


def test_compvis_averaged_labels_are_its_spatial_rescaler(tmp_path: Path) -> None:
    """One-hot planes, halved bilinearly n_stages times, then a 1x1 convolution, are our vectors' mean."""
    task, facts, changes = LOOPS["semantic-average"]
    made = make_task_run(tmp_path, task, facts, **changes)
    dest = tmp_path / "model.safetensors"
    export.main(ExportConfig(run=made.config.run, dest=str(dest), format="compvis"))
    labels = given(made)[1]["cond.labels"]
    planes = torch.nn.functional.one_hot(labels.long(), 6).permute(0, 3, 1, 2).float()
    planes = torch.nn.functional.interpolate(planes, scale_factor=0.5, mode="bilinear")
    theirs = torch.nn.functional.conv2d(planes, load_file(dest)["cond_stage_model.channel_mapper.weight"])
    ours = load_trained(made.config.run).denoiser(None).task({"cond.labels": labels}).concat
    torch.testing.assert_close(theirs, ours)


@torch.no_grad()
def test_diffusers_own_bert_reads_compvis_names_as_our_transformer(tmp_path: Path) -> None:
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    task, facts, changes = LOOPS["text-transformer"]
    made = make_task_run(tmp_path, task, facts, **changes)
    dest = tmp_path / "model.safetensors"
    export.main(ExportConfig(run=made.config.run, dest=str(dest), format="compvis"))
    ours = load_trained(made.config.run).denoiser(None).task
    assert made.contract.text and isinstance(task, TextTask)
    sizes = {"vocab_size": made.contract.text.vocabulary, "max_position_embeddings": 32, "d_model": 128}
    heads = {"encoder_attention_heads": task.heads, "head_dim": task.head_width}
    config = LDMBertConfig(**sizes, **heads, encoder_layers=task.depth, encoder_ffn_dim=512)
    bert = LDMBertModel(config).eval()
    named = {"token_emb": "embed_tokens", "pos_emb.emb": "embed_positions", "norm": "layer_norm"}
    for i in range(task.depth):
        attention, feed, layer = (f"attn_layers.layers.{2 * i}", f"attn_layers.layers.{2 * i + 1}", f"layers.{i}")
        named |= {f"{attention}.1.to_{letter}": f"{layer}.self_attn.{letter}_proj" for letter in "qkv"}
        named |= {f"{attention}.0": f"{layer}.self_attn_layer_norm", f"{feed}.0": f"{layer}.final_layer_norm"}
        named |= {f"{attention}.1.to_out": f"{layer}.self_attn.out_proj"}
        named |= {f"{feed}.1.net.0.0": f"{layer}.fc1", f"{feed}.1.net.2": f"{layer}.fc2"}
    prefix, state = "cond_stage_model.transformer.", bert.model.state_dict()
    for name, tensor in load_file(dest).items():
        if name.startswith(prefix):
            module, _, kind = name.removeprefix(prefix).rpartition(".")
            state[f"{named[module]}.{kind}"] = tensor
    bert.model.load_state_dict(state)
    ids = torch.randint(0, made.contract.text.vocabulary, (2, 32), generator=seeded())
    theirs = bert.model(ids, position_ids=torch.arange(32)[None]).last_hidden_state
    torch.testing.assert_close(theirs, ours({"tokens": ids}).context, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize("sampler", ["ddim"])
def test_a_network_that_diffusers_has_no_class_for_is_refused_before_anything_is_written(
    sampler: Any, tmp_path: Path
) -> None:
    model = replace(MODEL, heads=4, head_width=0, attention=(1, 2))
    made = make_task_run(tmp_path, InpaintTask(), conditions(mask=PLAIN), model=model)
    dest = tmp_path / "out"
    with pytest.raises(ConfigError, match="one head width"):
        export.main(ExportConfig(run=made.config.run, dest=str(dest), sampler=sampler))
    assert not dest.exists()


def test_task_json_tells_what_a_reader_must_know(tmp_path: Path) -> None:
    task, facts, changes = LOOPS["inpaint-ldm"]
    folder = exported(make_task_run(tmp_path, task, facts, **changes), tmp_path)
    told = json.loads((folder / "task.json").read_text())
    mask = told["conditions"]["mask"]
    assert (mask["order"], mask["low"], mask["hole"], mask["pooling"]) == ("masked_mask", -1, "black", "nearest")
    assert told["latents"]["downsampling"] == 4 and told["task"]["name"] == "inpaint" and told["text"]["length"] == 32
