"""training/objectives/codes.py: the use of a codebook over samples, and restarts of what is not used."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from made.pixels import BATCH, VQ, config_of
from made.thread_world import on_ranks
from pipeline.config import FirstStageLossConfig, GanConfig
from pipeline.distributed.world import World
from pipeline.models.first_stage.trainable import TrainableAutoencoder
from pipeline.training.ema import Ema
from pipeline.training.engines.choose import make_engine
from pipeline.training.objectives.codes import Codes, stretches
from pipeline.training.objectives.first_stage import CODEBOOK, FirstStageObjective

SIZE, RESTART, BATCH_SIZE = 6, 24, 8


def step(codes: Codes, n: int, chosen: list[int], world: World = World()) -> tuple[Tensor, Tensor]:  # noqa: B008
    """A step on samples n to n + 7, whose 2 x 2 latents have their sample's number and their place as values, and of
    which all choose from `chosen` in turn."""
    codes.begin()
    share = BATCH_SIZE // world.size
    numbers = torch.arange(n, n + BATCH_SIZE)[world.rank * share : (world.rank + 1) * share]
    for half in numbers.chunk(2):
        latents = half.view(-1, 1, 1, 1) + torch.tensor([[0.0, 0.25], [0.5, 0.75]]).expand(len(half), 2, 2, 2)
        places = torch.arange(4).view(1, 2, 2) + half.view(-1, 1, 1) * 4
        indices = torch.tensor(chosen)[places % len(chosen)]
        codes.see(SimpleNamespace(latents=latents, indices=indices))  # type: ignore[arg-type]
    return codes.stepped(n + BATCH_SIZE, numbers)


def made(world: World = World(), restart: int = RESTART, **changes: Any) -> Codes:  # noqa: B008
    return Codes(SIZE, restart, **{"seed": 3, "batch": BATCH_SIZE, "world": world, **changes})


def test_use_and_perplexity_are_of_all_samples_and_ranks_since_the_last_row() -> None:
    def rows(world: World) -> list[dict[str, float]]:
        codes, found = made(world, restart=0), []
        for n, chosen in ((0, [0, 1]), (8, [1, 2])):
            step(codes, n, chosen, world)
        found.append(codes.row())
        step(codes, 16, [5], world)
        return [*found, codes.row(), codes.row()]

    for size in (1, 2):
        for first, second, empty in on_ranks(size, rows):
            assert first["codes_used"] == 3 / SIZE
            assert first["perplexity"] == pytest.approx(math.exp(0.5 * math.log(2) + 0.5 * math.log(4)))
            assert second == {"codes_used": 1 / SIZE, "perplexity": 1.0}
            assert empty == {}


def test_a_code_starts_again_at_a_latent_of_the_batch_when_it_was_unused_for_so_many_samples() -> None:
    codes = made()
    assert len(step(codes, 0, [0, 1])[0]) == 0
    assert len(step(codes, 8, [1, 2])[0]) == 0
    dead, values = step(codes, 16, [1])
    assert dead.tolist() == [3, 4, 5], "never used in 24 samples; 0 was used 16 samples ago"
    assert codes.row()["codes_restarted"] == 3
    assert values.shape == (3, 2)
    assert all(16 <= value < 24 for value in values.flatten().tolist())
    assert len({tuple(row) for row in values.tolist()}) > 1, "all start at one latent"
    assert step(codes, 24, [1])[0].tolist() == [0]
    assert step(codes, 32, [1])[0].tolist() == [2]
    assert step(codes, 40, [1])[0].tolist() == [3, 4, 5], "they have been unused again for 24 samples"
    never = made(restart=0)
    assert all(len(step(never, n, [1])[0]) == 0 for n in range(0, 80, 8))


def test_restarts_are_the_same_in_any_world_and_after_any_resume() -> None:
    def run(world: World, resumed_at: int = -1) -> list[tuple[list[int], list[list[float]]]]:
        codes, found = made(world), []
        for n in range(0, 64, 8):
            if n == resumed_at:
                state = codes.state()
                codes = made(world)
                codes.load(state)
            dead, values = step(codes, n, [n // 8 % 3], world)
            found.append((dead.tolist(), values.tolist()))
        return found

    alone = run(World())
    assert sum(len(dead) for dead, _ in alone) >= 6
    for size in (2, 4):
        assert all(found == alone for found in on_ranks(size, run))
    assert run(World(), resumed_at=16) == run(World(), resumed_at=40) == alone


def test_a_step_that_is_dropped_leaves_no_trace() -> None:
    codes = made()
    step(codes, 0, [0])
    codes.begin()
    codes.see(SimpleNamespace(latents=torch.full((8, 2, 2, 2), torch.nan), indices=torch.full((8, 2, 2), 4)))  # type: ignore[arg-type]
    assert step(codes, 16, [1])[0].tolist() == [2, 3, 4, 5]
    assert codes.row()["codes_used"] == 2 / SIZE


def test_a_collapsing_codebook_is_said_once_with_what_to_change() -> None:
    for restart, words in ((0, "give loss.restart"), (1000, "loss.restart=1000 does not help: lower optim.lr")):
        codes = Codes(100, restart, seed=0, batch=BATCH_SIZE, world=World())
        step(codes, 0, [0])
        codes.row()
        assert codes.warning(learning=True) == "", "32 latents say nothing of 100 codes"
        for n in range(8, 8 * 14, 8):
            step(codes, n, [0, 1])
        codes.row()
        assert codes.warning(learning=False) == ""
        said = codes.warning(learning=True)
        assert said.startswith("2.0% of 100 codes are in use: the codebook collapses; ")
        assert words in said
        again = Codes(100, restart, seed=0, batch=BATCH_SIZE, world=World())
        again.load(codes.state())
        assert codes.warning(learning=True) == "" and again.warned
    healthy = made(restart=0)
    step(healthy, 0, list(range(SIZE)))
    healthy.row()
    assert healthy.warning(learning=True) == ""


def test_stretches_of_codes_cover_them_once() -> None:
    assert list(stretches(torch.tensor([0, 1, 2, 5, 7, 8]))) == [(0, 3), (3, 4), (4, 6)]
    assert list(stretches(torch.tensor([4]))) == [(0, 1)]
    assert list(stretches(torch.zeros(0, dtype=torch.int64))) == []


def test_a_restart_sets_the_code_and_its_moments_in_the_engine_and_nothing_else() -> None:
    config = config_of("c", "r", VQ, gan=GanConfig(), loss=FirstStageLossConfig(restart=2 * BATCH))
    module = TrainableAutoencoder(VQ, None)
    module.reset_parameters(0)
    with torch.no_grad():
        module.codebook[2:4] = 1e3  # too far from any latent
        module.codebook[9] = -1e3
    engine = make_engine(module, config, World())
    objective = FirstStageObjective(config, engine=engine)
    Ema(config.ema, [fragment.view for fragment in engine.averaged()])
    for n in (0, BATCH):
        batch: Any = SimpleNamespace(
            n=n,
            numbers=torch.arange(n, n + BATCH),
            tensors={
                "pixels": torch.randint(0, 256, (BATCH, 3, 32, 32), generator=torch.Generator().manual_seed(n)).byte()
            },
        )
        prepared = objective.prepare(batch)
        engine.backward(objective.losses(prepared, slice(None)).total)
        engine.step(1e-3, engine.grad_norms())
        before = {fragment.name: fragment.view.clone() for fragment in engine.weights()}
        latents = torch.cat([latents for latents, _ in objective.codes._step])  # type: ignore[union-attr]
        objective.after_step(n + BATCH)
    after = {fragment.name: fragment.view for fragment in engine.weights()}
    assert {name for name, value in before.items() if not torch.equal(value, after[name])} == {CODEBOOK}
    changed = (before[CODEBOOK] != after[CODEBOOK]).view(-1, 3).all(dim=1).nonzero().flatten().tolist()
    assert {2, 3, 9} <= set(changed) and len(changed) < VQ.codes
    candidates = {tuple(row) for row in latents.permute(0, 2, 3, 1).reshape(-1, 3).tolist()}
    assert all(tuple(row) in candidates for row in after[CODEBOOK].view(-1, 3)[changed].tolist())
    for fragments in engine.moments().values():
        moments = next(f.view for f in fragments if f.name == CODEBOOK).view(-1, 3)
        assert (moments[changed] == 0).all() and moments.abs().sum() > 0
