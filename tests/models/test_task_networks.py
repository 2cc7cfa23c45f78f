"""The seven tasks: what each makes of a batch, held to the facts of Rombach et al. 2021 and of Stable Diffusion."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from made.facts import EVERYTHING, Facts
from pipeline.conditions.facts import LowresFacts, MaskFacts
from pipeline.config import (
    ClassTask,
    InpaintTask,
    LayoutTask,
    ModelConfig,
    SemanticTask,
    SuperresTask,
    TaskConfig,
    TextTask,
)
from pipeline.data.format.contract import TextFacts
from pipeline.models.denoiser import Denoiser
from pipeline.models.tasks.choose import make_task
from pipeline.models.tasks.task import Task

B, WIDTH = 3, 16
TEXT = TextFacts(layer="last", length=5, width=WIDTH, pad=7, eot=49, start=48, vocabulary=50)
CACHE = Facts(conditions=EVERYTHING, text=TEXT, scale=0.5, shift=0.25)
EMPTY = torch.arange(5 * WIDTH, dtype=torch.float16).view(5, WIDTH) / 80
MODEL = ModelConfig(channels=16, multipliers=(1, 2), attention=(2,), blocks=1, heads=2, context_width=0, norm_groups=8)
NUMBERS = torch.arange(100, 100 + B)
CASES: list[TaskConfig] = [
    ClassTask(),
    ClassTask(mode="vector"),
    LayoutTask(),
    LayoutTask(encoder="transformer", paint=3, coordinates=False, heads=2, head_width=8),
    LayoutTask(text=True),
    SemanticTask(),
    SemanticTask(labels="average", width=3),
    SuperresTask(),
    SuperresTask(noise=350, text=True, drop=0.1),
    InpaintTask(),
    InpaintTask(text=True, drop=0.1),
    TextTask(encoder="transformer", depth=2, heads=2, head_width=8),
]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def records(cache: Facts = CACHE) -> dict[str, Tensor]:
    """Every array that a task may read, as a cache of these facts stores it, of B records."""
    g, (channels, height, width), f = seeded(), cache.latent_shape, cache.downsampling
    facts = cache.conditions
    assert facts.boxes and facts.labels and facts.lowres and facts.mask and facts.classes
    edges = torch.rand(B, facts.boxes.most, 2, 2, generator=g).sort(dim=2).values.flatten(2)[..., [0, 1, 2, 3]]
    boxes = torch.cat([torch.randint(0, 25, (B, facts.boxes.most, 1), generator=g).float(), edges], dim=2).half()
    boxes[0, 2:] = -1
    small, (rows, columns) = facts.lowres, (height * f, width * f)
    variants = (facts.mask.variants,) if facts.mask.variants > 1 else ()
    mask_shape = (rows, columns // 8) if facts.mask.packed else (rows, columns)
    return {
        "text": torch.randn(B, 5, WIDTH, generator=g).half(),
        "tokens": torch.randint(0, 50, (B, 5), generator=g, dtype=torch.int32),
        "cond.class": torch.randint(0, 10, (B,), generator=g, dtype=torch.int32),
        "cond.boxes": boxes,
        "cond.labels": torch.randint(0, 25, (B, 4 * height, 4 * width), generator=g, dtype=torch.uint8),
        "cond.lowres": torch.randint(
            0,
            256,
            (B, *((small.variants,) if small.variants > 1 else ()), 3, rows // small.factor, columns // small.factor),
            generator=g,
            dtype=torch.uint8,
        ),
        "cond.mask": torch.randint(
            0, 256 if facts.mask.packed else 2, (B, *variants, *mask_shape), generator=g, dtype=torch.uint8
        ),
        "cond.masked": torch.randn(B, *variants, channels, height, width, generator=g).half(),
    }


def made(config: TaskConfig, cache: Facts = CACHE) -> tuple[Task, dict[str, Tensor], ModelConfig]:
    """A task with weights, the batch that it has prepared, and the model that takes it."""
    model = replace(
        MODEL, context_width=WIDTH if config.makes_context else 0, vector_width=12 if config.makes_vector else 0
    )
    task = make_task(config, model, cache, EMPTY)
    task.reset_parameters(0)
    given = {name: array for name, array in records(cache).items() if name in task.members}
    return task, task.prepare(given, 5, NUMBERS), model


def named(config: TaskConfig) -> str:
    return f"{config.name}-{'-'.join(f'{v}' for k, v in vars(config).items() if k not in ('name', 'drop'))}"


@pytest.mark.parametrize("config", CASES, ids=named)
def test_a_dropped_row_is_the_null_row_and_the_others_stay(config: TaskConfig) -> None:
    """Also in the network: what is concatenated, attended to or added to the timestep."""
    task, batch, model = made(config)
    denoiser = Denoiser(model, task)
    denoiser.reset_parameters(0)
    generator = seeded(1)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            if not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    x, t = torch.randn(B, *CACHE.latent_shape, generator=generator), torch.tensor([10, 500, 900])
    with torch.no_grad():
        given, null = denoiser(x, t, batch), denoiser(x, t, task.null(batch))
        dropped = denoiser(x, t, batch, torch.tensor([False, True, False]))
    torch.testing.assert_close(dropped[[0, 2]], given[[0, 2]])
    torch.testing.assert_close(dropped[1], null[1])
    assert config.droppable == bool((given - null).abs().amax() > 1e-6)


@pytest.mark.parametrize("config", CASES, ids=named)
def test_every_weight_of_a_task_gets_a_gradient_and_dropping_acts_on_inputs_once(config: TaskConfig) -> None:
    task, batch, model = made(config)
    denoiser = Denoiser(model, task)
    denoiser.reset_parameters(0)
    torch.nn.init.normal_(denoiser.unet.conv_out.weight, generator=seeded())
    for name, parameter in denoiser.unet.named_parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1, generator=seeded(len(name)))
    calls = []
    task.register_forward_hook(lambda *_: calls.append(1))
    denoiser(torch.randn(B, *CACHE.latent_shape), torch.tensor([1, 2, 3]), batch, torch.tensor([True, False, False]))[
        :, :, ::3
    ].square().sum().backward()
    assert len(calls) == 1
    assert [name for name, p in task.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("config", CASES, ids=named)
def test_what_is_drawn_depends_on_the_sample_number_alone(config: TaskConfig) -> None:
    """Variants and noise are the same in any division into batches, so every world and every resume sees the same."""
    task, whole, _ = made(config)
    given = {name: array for name, array in records().items() if name in task.members}
    for i in range(B):
        alone = task.prepare({name: array[i : i + 1] for name, array in given.items()}, 5, NUMBERS[i : i + 1])
        assert all(torch.equal(alone[name][0], whole[name][i]) for name in whole)
    if "cond.lowres" in task.members or "cond.mask" in task.members:
        others = [task.prepare(given, 5, NUMBERS + 10 * step) for step in range(1, 8)]
        name = next(name for name in task.members if name in ("cond.lowres", "cond.masked"))
        assert any(not torch.equal(whole[name], other[name]) for other in others)


def test_layout_is_a_set_whose_order_does_not_matter() -> None:
    for config in CASES:
        if isinstance(config, LayoutTask):
            task, batch, _ = made(config)
            order = torch.randperm(6, generator=seeded(3))
            one, other = task(batch), task(batch | {"cond.boxes": batch["cond.boxes"][:, order]})
            first = one.context[:, 1:7][:, order]
            torch.testing.assert_close(other.context[:, 1:7], first, rtol=1e-4, atol=1e-5)
            assert torch.equal(other.context_mask[:, 1:7], one.context_mask[:, 1:7][:, order])
            if one.concat is not None:
                torch.testing.assert_close(other.concat, one.concat, rtol=1e-4, atol=1e-5)


def test_layout_attends_to_its_boxes_and_never_to_rows_without_one() -> None:
    task, batch, _ = made(LayoutTask())
    context = task(batch)
    assert context.context_mask is not None
    assert context.context_mask.sum(dim=1).tolist() == [3, 7, 7]  # the token that is always there, and the boxes
    null = task(task.null(batch))
    assert null.context_mask is not None
    assert null.context_mask.sum(dim=1).tolist() == [1, 1, 1]


def test_layout_knows_where_each_latent_position_is_at_any_size() -> None:
    task, _, _ = made(LayoutTask())
    given = {"cond.boxes": records()["cond.boxes"]}
    planes = task(task.prepare(given, 0, NUMBERS, sides=(4, 16))).concat
    assert planes is not None
    assert planes.shape == (B, 2, 4, 16)
    assert planes[0, 0, 0].tolist() == pytest.approx([(2 * i + 1) / 16 - 1 for i in range(16)])
    assert planes[0, 1, :, 0].tolist() == pytest.approx([-0.75, -0.25, 0.25, 0.75])


def test_painted_boxes_cover_the_share_of_each_position_that_they_have() -> None:
    task, _, _ = made(LayoutTask(paint=1, coordinates=False))
    boxes = torch.full((B, 6, 5), -1.0)
    boxes[:, 0] = torch.tensor([4, 0.125, 0.25, 0.3125, 0.5])  # 1 to 2.5 of 8 columns, 2 to 4 of 8 rows
    planes = task({"cond.boxes": boxes}).concat
    expected = torch.zeros(8, 8)
    expected[2:4, 1], expected[2:4, 2] = 1, 0.5
    torch.testing.assert_close(planes[0, 0], expected * task.get_parameter("paint.weight")[4, 0])


def test_averaged_labels_are_the_papers_one_hot_planes_pooled_and_mapped_to_channels() -> None:
    """One-hot planes, average pooling and a 1x1 convolution (Rombach et al.'s SpatialRescaler), never built."""
    task, batch, _ = made(SemanticTask(labels="average", width=3))
    one_hot = F.one_hot(batch["cond.labels"].long(), 26).permute(0, 3, 1, 2).float()
    weight = task.get_parameter("embed.weight").T[:, :, None, None]
    expected = F.conv2d(F.avg_pool2d(one_hot, 4), weight)
    torch.testing.assert_close(task(batch).concat, expected, rtol=1e-5, atol=1e-5)


def test_shuffled_labels_keep_where_in_a_position_each_cell_lies() -> None:
    task, batch, _ = made(SemanticTask(width=2))
    concat = task(batch).concat
    assert concat is not None
    assert concat.shape == (B, 32, 8, 8)
    moved = batch["cond.labels"].clone()
    moved[:, 0, 0], moved[:, 0, 1] = batch["cond.labels"][:, 0, 1], batch["cond.labels"][:, 0, 0]
    moved[:, 0, :2] += (moved[:, 0, :1] == moved[:, 0, 1:2]).to(torch.uint8) * torch.tensor([0, 1], dtype=torch.uint8)
    assert not torch.equal(task({"cond.labels": moved}).concat[:, :, 0, 0], concat[:, :, 0, 0])


@pytest.mark.parametrize(("factor", "downsampling", "channels"), [(4, 4, 3), (4, 8, 12), (2, 8, 48), (8, 4, 3)])
def test_a_small_image_meets_latents_of_another_grid(factor: int, downsampling: int, channels: int) -> None:
    lowres = LowresFacts(factor=factor, degradation="bicubic")
    cache = replace(CACHE, downsampling=downsampling, conditions=replace(EVERYTHING, lowres=lowres))
    task, batch, _ = made(SuperresTask(), cache)
    concat = task(batch).concat
    assert concat is not None
    assert concat.shape == (B, channels, 8, 8) == (B, task.extra_channels, 8, 8)
    given = records(cache)["cond.lowres"].float() / 127.5 - 1
    if factor == downsampling:
        torch.testing.assert_close(concat, given)
    elif factor < downsampling:
        assert torch.equal(F.pixel_shuffle(concat, downsampling // factor), batch["cond.lowres"])
    else:
        torch.testing.assert_close(concat, F.interpolate(given, size=(8, 8), mode="bilinear"))


def test_noise_on_a_small_image_has_the_level_that_the_model_is_told() -> None:
    """x = sqrt(kept) x + sqrt(1 - kept) noise, of betas from 1e-4 to 2e-2 (Stable Diffusion's upscaler)."""
    config = SuperresTask(noise=350)
    task, _, _ = made(config)
    given = {"cond.lowres": records()["cond.lowres"]}
    levels = torch.cat([task.prepare(given, 1, NUMBERS + B * i)["lowres.level"] for i in range(300)])
    assert levels.min() == 0 or levels.min() < 5
    assert 345 < levels.max() <= 350
    clean = task.prepare(given, 1, NUMBERS, training=False)
    assert not clean["lowres.level"].any()
    kept = torch.prod(1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)[:200])
    differences = []
    for i in range(30):
        numbers = NUMBERS + B * i
        clean = task.prepare(given, 1, numbers, training=False)
        noisy = task.prepare(given | {"lowres.level": torch.full((B,), 200)}, 1, numbers, training=False)
        differences.append(noisy["cond.lowres"] - kept.sqrt() * clean["cond.lowres"])
    assert float(torch.cat(differences).std() / (1 - kept).sqrt()) == pytest.approx(1, abs=0.01)


def mask_facts(**changes: Any) -> Facts:
    facts: dict[str, Any] = {"kinds": ("rectangles",), "packed": False}
    return replace(CACHE, conditions=replace(EVERYTHING, mask=MaskFacts(**(facts | changes))))


def test_stable_diffusions_nine_channels_are_mask_then_masked_latent_with_a_mask_of_0_and_1() -> None:
    task, batch, _ = made(InpaintTask(), mask_facts(pooling="nearest"))
    given = records(mask_facts())
    concat = task(batch).concat
    assert concat is not None
    assert concat.shape == (B, 5, 8, 8)  # after the latent's four
    expected = F.interpolate(given["cond.mask"][:, None].float(), size=(8, 8))  # as diffusers resizes a mask
    assert torch.equal(concat[:, :1], expected)
    torch.testing.assert_close(concat[:, 1:], (given["cond.masked"].float() - 0.25) * 0.5)


def test_rombachs_seven_channels_are_masked_latent_then_mask_of_minus_1_and_1() -> None:
    facts = mask_facts(pooling="nearest", order="masked_mask", low=-1, hole="black")
    task, batch, _ = made(InpaintTask(), facts)
    concat = task(batch).concat
    assert concat is not None
    hidden = F.interpolate(records(facts)["cond.mask"][:, None].float(), size=(8, 8))
    assert torch.equal(concat[:, 4:], 2 * hidden - 1)


def test_a_pooled_mask_hides_every_position_of_which_one_pixel_is_hidden() -> None:
    task, _, _ = made(InpaintTask(), mask_facts())
    mask = torch.zeros(B, 64, 64, dtype=torch.uint8)
    mask[:, 7, 9] = 1
    given = {"cond.mask": mask, "cond.masked": torch.zeros(B, 4, 8, 8)}
    pooled = task(task.prepare(given, 0, NUMBERS)).concat[:, 0]
    assert pooled[0].nonzero().tolist() == [[0, 1]]


def test_a_packed_mask_is_the_mask() -> None:
    task, _, _ = made(InpaintTask(), mask_facts(packed=True))
    plain, _, _ = made(InpaintTask(), mask_facts())
    mask = torch.randint(0, 2, (B, 64, 64), generator=seeded(2), dtype=torch.uint8)
    bits = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8)
    packed = (mask.view(B, 64, 8, 8) * bits).sum(dim=-1, dtype=torch.uint8)
    masked = torch.zeros(B, 4, 8, 8)
    assert torch.equal(
        task.prepare({"cond.mask": packed, "cond.masked": masked}, 0, NUMBERS)["cond.mask"],
        plain.prepare({"cond.mask": mask, "cond.masked": masked}, 0, NUMBERS)["cond.mask"],
    )


def test_the_papers_text_transformer_has_the_papers_number_of_parameters() -> None:
    """Table 17 and the released configuration: 1.45 G with the UNet; without the logits of BERT's head, which nothing
    reads (39 M), 1.415 G."""
    from pipeline.config.loading.load import load
    from pipeline.models.unet.model import UNet

    model = load("train", ["model=ldm_text", "data.train=x", "run=y"]).model
    text = replace(TEXT, length=77, vocabulary=30522)
    with torch.device("meta"):
        task = make_task(TextTask(encoder="transformer"), model, replace(CACHE, text=text), None)
        unet = UNet(model)
    counts = [sum(p.numel() for p in module.parameters()) for module in (task, unet)]
    head = 30522 * 1280 + 30522
    assert sum(counts) + head == pytest.approx(1.45e9, rel=0.005)


def test_the_transformers_null_is_the_empty_captions_tokens() -> None:
    task, batch, _ = made(TextTask(encoder="transformer", depth=1, heads=2, head_width=8))
    assert task.null(batch)["tokens"].tolist() == [[48, 49, 7, 7, 7]] * B
