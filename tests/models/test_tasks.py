from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor, nn

from pipeline.config import ModelConfig, TaskConfig
from pipeline.config.tasks import TASK_FACTS
from pipeline.diffusion.conditioning import Conditioning
from pipeline.errors import ConfigError, ShapeError
from pipeline.models.denoiser import Denoiser
from pipeline.models.tasks.choose import TASKS, make_task
from pipeline.models.tasks.task import Task

LATENT = (4, 8, 8)
EMPTY = torch.arange(5 * 16, dtype=torch.float16).view(5, 16) / 80
CONFIG = ModelConfig(
    channels=16, multipliers=(1, 2), attention=(2,), blocks=1, heads=2, context_width=16, norm_groups=8
)


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
    task = make_task(TaskConfig(name="text"), LATENT, EMPTY)
    assert task.members == ("text",)
    assert task.in_channels(4) == 4
    _, _, members = batch()
    given = task.condition(members)
    assert given.context is members["text"]
    null = task.null(2, "cpu")
    assert null.context is not None
    assert torch.equal(null.context, EMPTY.float().expand(2, -1, -1))
    assert not list(task.state_dict())  # the empty caption belongs to the cache, not to the weights


def test_dropped_rows_become_null_and_others_stay():
    task = make_task(TaskConfig(), LATENT, EMPTY)
    _, _, members = batch()
    dropped = task.drop(task.condition(members), torch.tensor([False, True, False])).context
    assert dropped is not None
    assert dropped.dtype == torch.float16
    assert torch.equal(dropped[0], members["text"][0])
    assert torch.equal(dropped[1], EMPTY)
    assert torch.equal(dropped[2], members["text"][2])


def test_dropping_in_the_denoiser_equals_giving_the_empty_caption():
    denoiser = awake(Denoiser(CONFIG, make_task(TaskConfig(), LATENT, EMPTY)))
    x, t, members = batch()
    dropped = denoiser(x, t, members, torch.tensor([True, False, True]))
    null = denoiser(x, t, denoiser.task.null(3, "cpu"))
    full = denoiser(x, t, members)
    assert torch.allclose(dropped, torch.stack([null[0], full[1], null[2]]), atol=1e-6)
    assert not torch.allclose(null[0], full[0], atol=1e-4)


def test_a_ready_conditioning_and_raw_members_give_the_same_prediction():
    denoiser = awake(Denoiser(CONFIG, make_task(TaskConfig(), LATENT, EMPTY)))
    x, t, members = batch()
    assert torch.equal(denoiser(x, t, members), denoiser(x, t, denoiser.task.condition(members)))


def test_unconditional_needs_nothing_and_drops_nothing():
    task = make_task(TaskConfig(name="unconditional"), LATENT, None)
    assert task.members == ()
    denoiser = awake(Denoiser(replace(CONFIG, context_width=0), task))
    x, t, _ = batch()
    assert torch.equal(denoiser(x, t, {}), denoiser(x, t, {}, torch.tensor([True, False, True])))


def test_masks_are_dropped_and_joined_with_their_tokens():
    task = make_task(TaskConfig(), LATENT, EMPTY)
    _, _, members = batch(2)
    mask = torch.tensor([[True, True, False, False, False]]).expand(2, -1)
    given = task.condition(members | {"text_mask": mask})
    dropped = task.drop(given, torch.tensor([False, True]))
    assert dropped.context_mask is not None
    assert dropped.context_mask.tolist() == [[True, True, False, False, False], [True] * 5]
    joined = given.cat(task.null(2, "cpu"))
    assert joined.context_mask is not None
    assert joined.context_mask.sum(dim=1).tolist() == [2, 2, 5, 5]
    assert joined.context is not None
    assert torch.equal(joined.context[1], members["text"][1])
    assert joined.concat is None


def test_text_of_another_length_or_width_is_refused():
    task = make_task(TaskConfig(), LATENT, EMPTY)
    with pytest.raises(ShapeError, match=r"\(7, 16\)"):
        task.condition({"text": torch.zeros(2, 7, 16)})


def test_a_text_task_without_an_empty_caption_is_refused():
    with pytest.raises(ConfigError, match="empty caption"):
        make_task(TaskConfig(), LATENT, None)


def test_the_tasks_in_the_configuration_are_those_that_exist():
    assert get_args(get_type_hints(TaskConfig)["name"]) == tuple(TASKS) == tuple(TASK_FACTS)


@pytest.mark.parametrize("name", TASKS)
def test_the_table_without_torch_says_what_each_task_reads_and_concatenates(name: Any) -> None:
    facts, task = TASK_FACTS[name], make_task(TaskConfig(name=name), LATENT, EMPTY)
    assert facts.members == task.members == TASKS[name].members
    assert task.in_channels(4) == 4 + facts.extra_channels
    assert facts.needs_text == ("text" in facts.members)


class EveryInput(Task):
    """A task with everything that tasks may have: learned tokens for a class, a concatenated mask, a vector."""

    members = ("cond.class", "cond.mask")

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 16)  # class 10 is the null one

    def in_channels(self, latent_channels: int) -> int:
        return latent_channels + 1

    def condition(self, batch: Mapping[str, Tensor]) -> Conditioning:
        vector = batch["cond.mask"].flatten(1).mean(dim=1, keepdim=True)
        return Conditioning(self.tokens(batch["cond.class"])[:, None], concat=batch["cond.mask"], vector=vector)

    def null(self, batch_size: int, device: torch.device | str) -> Conditioning:
        nothing = torch.full((batch_size,), 10, device=device)
        members = {"cond.class": nothing, "cond.mask": torch.zeros(batch_size, 1, 8, 8, device=device)}
        return self.condition(members)

    def reset_parameters(self, seed: int) -> None:
        nn.init.normal_(self.tokens.weight, generator=torch.Generator().manual_seed(seed))


def test_a_task_that_learns_and_concatenates_needs_no_change_elsewhere():
    denoiser = awake(Denoiser(replace(CONFIG, vector_width=1), EveryInput()))
    assert denoiser.unet.config.in_channels == 5
    assert "task.tokens.weight" in dict(denoiser.named_parameters())
    x, t, _ = batch()
    members = {"cond.class": torch.tensor([1, 2, 3]), "cond.mask": torch.ones(3, 1, 8, 8)}
    denoiser(x, t, members, torch.tensor([False, True, False])).square().sum().backward()
    rows = denoiser.get_parameter("task.tokens.weight").grad
    assert rows is not None
    assert rows.norm(dim=1).nonzero().flatten().tolist() == [1, 3, 10]
