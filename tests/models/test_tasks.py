"""Tasks: what a batch becomes, what dropping and guidance put in its place, and what the table says of each."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from made.facts import EVERYTHING, Facts
from pipeline.config import ClassTask, ModelConfig, TaskConfig, TextTask, UnconditionalTask
from pipeline.config.tasks.base import Cache
from pipeline.config.tasks.found import facts_of
from pipeline.config.tasks.table import TASK_FACTS
from pipeline.data.format.contract import TextFacts
from pipeline.diffusion.conditioning import Conditioning
from pipeline.errors import ConfigError, ShapeError
from pipeline.models.denoiser import Denoiser
from pipeline.models.tasks.choose import make_task
from pipeline.models.tasks.task import Task

LATENT = (4, 8, 8)
EMPTY = torch.arange(5 * 16, dtype=torch.float16).view(5, 16) / 80
TEXT = TextFacts(layer="last", length=5, width=16, pad=0, eot=49, start=48, vocabulary=50)
CACHE = Facts(latent_shape=LATENT, conditions=EVERYTHING, text=TEXT)
CONFIG = ModelConfig(
    channels=16, multipliers=(1, 2), attention=(2,), blocks=1, heads=2, context_width=16, norm_groups=8
)


def text_task(**changes: Any) -> Task:
    return make_task(TextTask(), CONFIG, replace(CACHE, **changes), EMPTY)


def awake(denoiser: Denoiser) -> Denoiser:
    """Set random weights where reset_parameters sets zeros, so that every input affects the output."""
    denoiser.reset_parameters(0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            if not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return denoiser


def batch(size: int = 3) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(1)
    text = torch.randn(size, 5, 16, generator=g).half()
    return torch.randn(size, *LATENT, generator=g), torch.tensor([1, 500, 999])[:size], {"text": text}


def test_text_reads_the_cached_text_and_its_null_is_the_encoded_empty_caption():
    task = text_task()
    assert task.members == ("text",)
    assert task.extra_channels == 0
    _, _, members = batch(2)
    given = task(members)
    assert given.context is members["text"]
    null = task(task.null(members))
    assert torch.equal(null.context, EMPTY.expand(2, -1, -1))
    assert not list(task.state_dict())  # the empty caption belongs to the cache, not to the weights


def test_dropped_rows_become_null_and_others_stay():
    _, _, members = batch()
    dropped = text_task()(members, torch.tensor([False, True, False])).context
    assert dropped is not None
    assert dropped.dtype == torch.float16
    assert torch.equal(dropped[0], members["text"][0])
    assert torch.equal(dropped[1], EMPTY)
    assert torch.equal(dropped[2], members["text"][2])


def test_dropping_in_the_denoiser_equals_giving_the_empty_caption():
    denoiser = awake(Denoiser(CONFIG, text_task()))
    x, t, members = batch()
    dropped = denoiser(x, t, members, torch.tensor([True, False, True]))
    null = denoiser(x, t, denoiser.task.null(members))
    full = denoiser(x, t, members)
    assert torch.allclose(dropped, torch.stack([null[0], full[1], null[2]]), atol=1e-6)
    assert not torch.allclose(null[0], full[0], atol=1e-4)


def test_a_ready_conditioning_and_raw_members_give_the_same_prediction():
    denoiser = awake(Denoiser(CONFIG, text_task()))
    x, t, members = batch()
    assert torch.equal(denoiser(x, t, members), denoiser(x, t, denoiser.task(members)))


def test_unconditional_needs_nothing_and_drops_nothing():
    task = make_task(UnconditionalTask(), CONFIG, CACHE)
    assert task.members == ()
    denoiser = awake(Denoiser(replace(CONFIG, context_width=0), task))
    x, t, _ = batch()
    assert torch.equal(denoiser(x, t, {}), denoiser(x, t, {}, torch.tensor([True, False, True])))


def test_masks_are_dropped_and_joined_with_their_tokens():
    task = text_task()
    _, _, members = batch(2)
    mask = torch.tensor([[True, True, False, False, False]]).expand(2, -1)
    members |= {"text_mask": mask}
    given, dropped = task(members), task(members, torch.tensor([False, True]))
    assert dropped.context_mask.tolist() == [[True, True, False, False, False], [True] * 5]
    joined = given.cat(task(task.null(members)))
    assert joined.context_mask is not None
    assert joined.context_mask.sum(dim=1).tolist() == [2, 2, 5, 5]
    assert joined.context is not None
    assert torch.equal(joined.context[1], members["text"][1])
    assert joined.concat is None


def test_text_of_another_length_or_width_is_refused():
    task = text_task()
    with pytest.raises(ShapeError, match=r"\(7, 16\)"):
        task({"text": torch.zeros(2, 7, 16)})


def test_a_text_task_without_an_empty_caption_is_refused():
    with pytest.raises(ConfigError, match="empty caption"):
        make_task(TextTask(), CONFIG, CACHE)


@pytest.mark.parametrize("name", TASK_FACTS)
def test_the_table_without_torch_says_what_each_task_reads_and_concatenates(name: str) -> None:
    config = TASK_FACTS[name].config()
    assert config.name == name
    assert facts_of(config) is TASK_FACTS[name]
    model = replace(CONFIG, context_width=16 if config.makes_context else 0)
    task = make_task(config, model, CACHE, EMPTY)
    assert task.members == config.members
    assert task.extra_channels == config.channels(CACHE)


class EveryInput(Task):
    """A task with everything that tasks may have: learned tokens for a class, a concatenated mask, a vector."""

    def __init__(self, config: TaskConfig, model: ModelConfig, cache: Cache, empty_LD: Tensor | None = None) -> None:
        super().__init__(config, model, cache, empty_LD)
        self.extra_channels = 1
        self.tokens = nn.Embedding(11, 16)  # class 10 is the null one

    def condition(self, batch: Mapping[str, Tensor]) -> Conditioning:
        vector = batch["cond.mask"].flatten(1).mean(dim=1, keepdim=True)
        return Conditioning(self.tokens(batch["cond.class"])[:, None], concat=batch["cond.mask"], vector=vector)

    def null(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            "cond.class": torch.full_like(batch["cond.class"], 10),
            "cond.mask": torch.zeros_like(batch["cond.mask"]),
        }


def test_a_task_that_learns_and_concatenates_needs_no_change_elsewhere():
    model = replace(CONFIG, vector_width=1)
    denoiser = awake(Denoiser(model, EveryInput(ClassTask(), model, CACHE)))
    assert denoiser.unet.config.in_channels == 5
    assert "task.tokens.weight" in dict(denoiser.named_parameters())
    x, t, _ = batch()
    members = {"cond.class": torch.tensor([1, 2, 3]), "cond.mask": torch.ones(3, 1, 8, 8)}
    denoiser(x, t, members, torch.tensor([False, True, False])).square().sum().backward()
    rows = denoiser.get_parameter("task.tokens.weight").grad
    assert rows is not None
    assert rows.norm(dim=1).nonzero().flatten().tolist() == [1, 3, 10]
