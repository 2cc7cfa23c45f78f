"""inference/steering: the scores of pictures, captions and classes, and what their gradients keep in memory."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from made import asked
from made.asked import pixels
from pipeline.conditions.resampling import resize
from pipeline.config import DiffusionConfig, GuideConfig
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.hooks import Steer
from pipeline.diffusion.levels import Level
from pipeline.diffusion.sampling import initial_noise, sample
from pipeline.errors import RunError
from pipeline.evaluation.measure import clip_scores
from pipeline.inference.pictures import from_uint8
from pipeline.inference.steering.classifier import ClassifierScore
from pipeline.inference.steering.clip import ClipScore, cut
from pipeline.inference.steering.decoded import Decoded
from pipeline.inference.steering.guide import make_guides
from pipeline.inference.steering.image import LUMA, ImageScore, Target, brightness
from pipeline.models.encoders.first_stage import Identity

CPU = torch.device("cpu")
LEVEL = Level(500, 0.6, 0.8)
IDENTITY = Identity()


def score_of(score: Any, pictures: Tensor) -> Tensor:
    result: Tensor = score(pictures, pictures, LEVEL)
    return result


# --------------------------------------------------------------------------------------------------------------------
# A picture


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("factor", [1, 4])
def test_the_likeness_to_a_picture_is_the_log_likelihood_of_what_is_seen_of_it(
    factor: int, masked: bool, grey: bool
) -> None:
    """-1/2 of the squared differences in the range of -1 to 1, after the house's own antialiased bicubic."""
    height, width = 32 // factor, 48 // factor
    mask = (pixels(height, width, 1)[..., 0] > 128).astype(np.uint8) if masked else None
    targets = [Target(pixels(height, width, seed), factor, mask, grey) for seed in (2, 3)]
    x = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    got = score_of(ImageScore(Decoded(IDENTITY), targets, CPU), x)
    for i, target in enumerate(targets):
        small = resize(np.ascontiguousarray(x[i].permute(1, 2, 0).numpy()), (height, width), "antialiased")
        wanted = target.picture.astype(np.float64) / 127.5 - 1
        difference = (small - wanted) @ np.array(LUMA)[:, None] if grey else small - wanted
        counts = 1 if mask is None else mask[..., None]
        assert got[i].item() == pytest.approx(-0.5 * (counts * difference**2).sum(), rel=1e-4)


def test_a_picture_that_is_seen_as_its_target_is_the_likeliest() -> None:
    """At its target the score is 0, and its gradient leads there from elsewhere."""
    target = Target(pixels(8, 8, 2), 4)
    score = ImageScore(Decoded(IDENTITY), [target], CPU)
    x = torch.zeros(1, 3, 32, 32)
    for _ in range(200):
        x = x.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(score_of(score, x).sum(), x)
        x = x + 4 * gradient
    assert score_of(score, x.detach()).item() == pytest.approx(0, abs=1e-2)


def test_a_target_is_shown_as_far_as_it_counts() -> None:
    mask = np.zeros((2, 2), np.uint8)
    mask[0] = 1
    shown = Target(pixels(2, 2), 3, mask, grey=True).shown()
    assert shown.shape == (6, 6, 3) and (shown[3:] == shown[3, 0]).all()
    assert (shown[:3, :3] == brightness(pixels(2, 2))[0, 0]).all()


# --------------------------------------------------------------------------------------------------------------------
# A caption


def test_the_likeness_to_a_caption_is_the_clip_score_of_the_whole_picture() -> None:
    """As an evaluation takes it, but for the 8 bits of its resizing."""
    _, tower = asked.encoders()
    captions, pictures = ["a red circle", "a blue star"], np.stack([pixels(64, 64, seed) for seed in (0, 1)])
    score = ClipScore(Decoded(IDENTITY), tower, captions, 0, 0, [0, 1])
    got = score_of(score, from_uint8(pictures))
    torch.testing.assert_close(got.double(), clip_scores(tower, pictures, captions).double(), atol=0.1, rtol=0.01)


def test_a_cut_out_of_the_whole_is_what_pytorch_resizes_it_to() -> None:
    x = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    whole = torch.tensor([[0.0, 0.0, 40.0, 40.0]], dtype=torch.float64).expand(2, 1, 4)
    for size in ((16, 16), (40, 40), (64, 64)):
        expected = F.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False)
        torch.testing.assert_close(cut(x, whole, size)[:, 0], expected, atol=1e-5, rtol=1e-4)
    part = torch.tensor([[8.0, 4.0, 16.0, 16.0]], dtype=torch.float64).expand(2, 1, 4)
    inner = cut(x, part, (16, 16))[:, 0]
    torch.testing.assert_close(inner, x[:, :, 8:24, 4:20], atol=1e-5, rtol=1e-4)


def test_cut_outs_are_drawn_for_the_seed_the_image_and_the_prediction_alone() -> None:
    _, tower = asked.encoders()
    x = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    captions = ["a red circle"] * 3

    def scores(numbers: list[int], seed: int = 0) -> list[Tensor]:
        score = ClipScore(Decoded(IDENTITY), tower, captions[: len(numbers)], 3, seed, numbers)
        return [score_of(score, x[numbers]) for _ in range(2)]

    together, alone = scores([0, 1, 2]), scores([1])
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[1:2], b, atol=1e-4, rtol=1e-5)
    assert (together[0] - together[1]).abs().min() > 1e-4, "other cut-outs at the next prediction"
    assert (together[0] - scores([0, 1, 2], seed=1)[0]).abs().min() > 1e-4
    boxes = ClipScore(Decoded(IDENTITY), tower, captions, 3, 0, [0, 1, 2])._boxes(48, 64)
    assert len({tuple(one.flatten().tolist()) for one in boxes[:, 1:]}) == 3, "each image has cut-outs of its own"
    assert boxes.shape == (3, 4, 4) and boxes[:, 0].tolist() == [[0, 8, 48, 48]] * 3
    assert (boxes >= 0).all() and (boxes[..., 0] + boxes[..., 2] <= 48).all() and (boxes[..., 1] <= 64).all()
    assert (boxes[..., 2] == boxes[..., 3]).all() and (boxes[:, 1:, 2] >= 0.6 * 48).all()


# --------------------------------------------------------------------------------------------------------------------
# A class


class Brightness:
    """A classifier of two classes: the brighter an image, the likelier the second."""

    def log_probability(self, x_BCHW: Tensor, timestep: float, sigma: float, classes_B: Tensor) -> Tensor:
        logit = x_BCHW.mean((1, 2, 3)) * (1 - sigma)
        return F.log_softmax(torch.stack([-logit, logit], 1), 1).gather(1, classes_B[:, None])[:, 0]


def test_a_classifier_reads_the_noisy_latents_their_level_and_each_images_class() -> None:
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    score = ClassifierScore(Brightness(), [0, 1, 1], CPU)
    got = score(torch.full_like(x, torch.nan), x, LEVEL)
    expected = Brightness().log_probability(x, 500, 0.8, torch.tensor([0, 1, 1]))
    assert torch.equal(got, expected) and (got < 0).all()


# --------------------------------------------------------------------------------------------------------------------
# Together


def steers(config: GuideConfig, numbers: list[int], stage: Any = None) -> list[Steer]:
    first_stage, tower = asked.encoders()
    guides = make_guides(config, stage or first_stage, tower, Brightness(), 0, CPU)
    wanted: dict[str, list[Any]] = {
        "classifier": [i % 2 for i in numbers],
        "image": [Target(pixels(16, 16, i), 4) for i in numbers],
        "clip": ["a red circle"] * len(numbers),
    }
    return [steer for name, guide in guides.items() for steer in guide.hooks(numbers, wanted[name]).steer]


ALL = GuideConfig(image=4.0, clip=0.5, classifier=2.0, run="c", cutouts=2)


def test_pictures_are_decoded_once_for_all_guides_that_look_at_them() -> None:
    stage, _ = asked.encoders()
    decoded: list[int] = []

    class Counting:
        def float32(self) -> Counting:
            return self

        def decode_with_gradient(self, z: Tensor) -> Tensor:
            decoded.append(len(z))
            return stage.decode_with_gradient(z)

    noise = initial_noise(0, torch.arange(2), (4, 8, 8))
    guides = steers(ALL, [0, 1], Counting())
    assert [steer.name for steer in guides] == ["classifier", "image", "clip"]
    sample(network, DiffusionConfig(), noise, Conditioning(), sampler="ddim", steps=4, steer=guides)
    assert decoded == [2] * 4


def test_nothing_of_a_steps_graph_is_left_when_the_next_one_begins() -> None:
    """Memory is that of one step, however many there are."""
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most: list[int] = []

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor.detach()  # an output would keep its own graph
            alive.add(self)

    def counted(x: Tensor, timestep_B: Tensor, conditioning: Conditioning | None = None) -> Tensor:
        gc.collect()
        most.append(len(alive))
        return network(x, timestep_B, conditioning)

    noise = initial_noise(0, torch.arange(2), (4, 8, 8))
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        sample(counted, DiffusionConfig(), noise, Conditioning(), sampler="heun", steps=3, steer=steers(ALL, [0, 1]))
    assert len(most) == 5 and most == [0] * 5  # heun predicts twice in each step but the last


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "unipc"])
def test_guided_images_do_not_depend_on_their_batch(sampler: Any) -> None:
    def go(numbers: list[int]) -> Tensor:
        noise = initial_noise(0, torch.tensor(numbers), (4, 8, 8))
        guides = steers(ALL, numbers)
        return sample(network, DiffusionConfig(), noise, Conditioning(), sampler=sampler, steps=4, steer=guides)

    together = go([0, 1, 2])
    torch.testing.assert_close(torch.cat([go([2]), go([0])]), together[[2, 0]], atol=1e-4, rtol=1e-4)


def test_a_network_that_runs_without_gradients_is_an_error_and_no_picture() -> None:
    """x_0 has a gradient all the same, that of x alone."""

    @torch.no_grad()
    def without(x: Tensor, timestep_B: Tensor, conditioning: Conditioning | None = None) -> Tensor:
        return network(x, timestep_B, conditioning)

    noise = initial_noise(0, torch.arange(2), (4, 8, 8))
    guides = steers(GuideConfig(image=1.0), [0, 1])
    with pytest.raises(RunError, match="the prediction has no gradient by the image"):
        sample(without, DiffusionConfig(), noise, Conditioning(), sampler="ddim", steps=4, steer=guides)
    alone = steers(GuideConfig(classifier=1.0, run="c"), [0, 1])
    sample(without, DiffusionConfig(), noise, Conditioning(), sampler="ddim", steps=4, steer=alone)


def network(x: Tensor, timestep_B: Tensor, conditioning: Conditioning | None = None) -> Tensor:
    """A fixed smooth function in place of a denoiser."""
    return 0.9 * x + 0.1 * torch.sin(x.roll(1, dims=-1))
