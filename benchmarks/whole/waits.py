"""The trainer over the bare step on one device, and what it costs that a step waits for the device.

As it was, a step waited for flags that all ranks sum up, for this rank's share of the gradient's norm, for the norm of
all ranks, which must be finite, for DeepSpeed's own check of that, and where small tensors were copied from memory that
is not page-locked. Now it waits once, for the norm. Both are measured beside a step that never waits, whose norm is
taken to be that of an earlier step: no step with clipping and the check left on the device can be faster.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.machine import figure, median, spread, table
from benchmarks.network.gpu_parts import Inputs, Side, Training, free, inputs_of, synchronize, weights_of
from benchmarks.streaming.latents import Latents, write_cache
from benchmarks.training.trainer_peers import Ours, fitting
from benchmarks.whole.journal import Journal
from pipeline.config import DeepSpeedConfig, ModelConfig
from pipeline.config.loading.load import load
from pipeline.distributed.world import World
from pipeline.storage.urls import open_storage
from pipeline.training import recorder
from pipeline.training.engines import base
from pipeline.training.objectives import diffusion
from pipeline.training.trainer import Trainer

SECTION = "The trainer over the bare step, and its waits for the host"
BARE, NOW, BEFORE, NEVER = "bare step", "this trainer", "the same as it was", "the same without any wait"
MOST_OVER_BARE, MOST_WAITING = 5.0, 1.0  # per cent
CHECK = "check_grad_overflow"  # of DeepSpeed's optimizers in ZeRO 1 and 2
LOOKS = 3  # steps whose waits are counted
TEXT = {"tiny": (8, 32), "small": (8, 32)}  # model -> side of a latent, tokens; others: 64, 77


@dataclass(frozen=True)
class Plan:
    """What is measured: a model of conf/model, with its engine and batch, in rounds of so many steps of each side.
    samples: of the cache on disk that is streamed."""

    model: str
    batch: int
    rounds: int
    steps: int
    samples: int
    compiled: bool
    engine: Literal["deepspeed", "torch"] = "deepspeed"
    stage: Literal[1, 2] = 2


def latents_of(model: ModelConfig, plan: Plan) -> Latents:
    """Random latents on which the model can be trained."""
    side, length = TEXT.get(plan.model, (64, 77))
    width = model.context_width
    shard_bytes = 60_000_000 if side == 64 else 4_000_000
    return Latents(
        name="whole", side=side, text="full", samples=plan.samples, length=length, width=width, shard_bytes=shard_bytes
    )


class Bare:
    """Forward, backward, norm, clipping and the optimizer, for one batch in memory."""

    def __init__(self, model: ModelConfig, latents: Latents, plan: Plan, device: torch.device) -> None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        side = Side("ours", model, weights_of(model), device, dtype)
        if plan.compiled:
            side.compile("inductor")
        self.training = Training(side)
        inputs = inputs_of(model, plan.batch, latents.side, latents.length, device)
        self.inputs = Inputs(inputs.latents, inputs.noise, inputs.timestep, inputs.context.to(dtype))

    def step(self) -> None:
        self.training.step(self.inputs)


# ---------------------------------------------------------------------------------------------------------------------
# Ways to take a step of the trainer


@dataclass(frozen=True)
class AskingDevices(World):
    """A world whose flags are summed on the devices and read back."""

    def counted(self, flags: Sequence[bool]) -> list[int]:
        return [int(count) for count in read_sum([float(flag) for flag in flags], self)]


def read_sum(values: list[float], world: World) -> list[float]:
    """The sum over ranks of numbers that go to the device and come back from it, for which the host waits."""
    total = torch.tensor(values, dtype=torch.float64, device=world.device)
    if world.grouped:
        dist.all_reduce(total)
    return [float(value) for value in total.tolist()]


@contextmanager
def before(trainer: Trainer) -> Iterator[None]:
    """Inside, a step waits wherever it did before it waited once: DeepSpeed looks whether gradients in bf16 are finite,
    too, and small tensors are copied from memory that is not page-locked."""
    engine, world = trainer.engine, trainer.world

    def grad_norms() -> dict[str, float]:
        shares = [float(share) for share in engine.square_sums().tolist()]
        return {part: total**0.5 for part, total in zip(engine.parts, read_sum(shares, world), strict=True)}

    asking = AskingDevices(world.rank, world.size, world.device, world.grouped, world.hosts)
    with ExitStack() as stack:
        for module in (recorder, diffusion, base):
            stack.enter_context(mock.patch.object(module, "to_device", Tensor.to))
        stack.enter_context(mock.patch("pipeline.data.reading.device.to_device", Tensor.to))
        stack.enter_context(mock.patch.object(trainer, "world", asking))
        stack.enter_context(mock.patch.object(engine, "grad_norms", grad_norms))
        deepspeed: Any = getattr(engine, "_engine", None)
        if deepspeed is not None and deepspeed.bfloat16_enabled() and hasattr(deepspeed.optimizer, CHECK):
            stack.enter_context(mock.patch.object(deepspeed.optimizer, CHECK, True))
        yield


@contextmanager
def never(trainer: Trainer, norms: Mapping[str, float]) -> Iterator[None]:
    """Inside, the norm is computed and not looked at. norms: what it is taken to be."""
    engine = trainer.engine

    def grad_norms() -> dict[str, float]:
        engine.square_sums()
        return dict(norms)

    with mock.patch.object(engine, "grad_norms", grad_norms):
        yield


def norms_of_a_step(ours: Ours) -> dict[str, float]:
    """The norms by which a step of the trainer is clipped."""
    seen: list[dict[str, float]] = []
    engine = ours.trainer.engine
    grad_norms = engine.grad_norms

    def noted() -> dict[str, float]:
        seen.append(grad_norms())
        return seen[-1]

    with mock.patch.object(engine, "grad_norms", noted):
        ours.step()
    return seen[-1]


# ---------------------------------------------------------------------------------------------------------------------
# Measurements


def measure(plan: Plan, folder: Path, world: World, journal: Journal) -> None:
    """Measure and note all of it. folder: for the cache. The world's engines are gone afterwards."""
    torch.backends.cudnn.benchmark = True  # as train has it
    named: ModelConfig = load("train", [f"model={plan.model}", "data.train=none", "run=none"]).model
    latents = latents_of(named, plan)
    model = fitting(named, latents)
    cache = folder / f"random-{plan.model}"
    if not (cache / "manifest.json").exists():
        write_cache(latents, open_storage(str(cache)))
    bare = Bare(model, latents, plan, world.device)
    settings = DeepSpeedConfig(engine=plan.engine, stage=plan.stage)
    ours = Ours(model, latents, plan.batch, world, str(cache), settings, compiled=plan.compiled, row_steps=plan.steps)
    try:
        note(plan, world, journal, bare, ours)
    finally:
        ours.close()
        del bare
        free(world.device)


def note(plan: Plan, world: World, journal: Journal, bare: Bare, ours: Ours) -> None:
    """Measure sides that are there."""
    for _ in range(2):
        bare.step()
        ours.step()
    norms = norms_of_a_step(ours)
    sides: dict[str, tuple[Callable[[], None], Callable[[], AbstractContextManager[Any]]]] = {
        BARE: (bare.step, nullcontext),
        NOW: (ours.step, nullcontext),
        BEFORE: (ours.step, lambda: before(ours.trainer)),
        NEVER: (ours.step, lambda: never(ours.trainer, norms)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _, (name, (step, mode)) in itertools.product(range(plan.rounds), sides.items()):
        with mode():
            seconds[name].append(seconds_a_step(step, plan.steps, world.device))
    counted = {name: waits(step, mode, world.device) for name, (step, mode) in sides.items() if name != BARE}
    journal.note(SECTION, *told(plan, ours.parameters, world, seconds, counted))
    over_bare, waiting = shares(seconds)
    sentence = f"the trainer is at most {MOST_OVER_BARE:g}% over the bare step"
    journal.check(SECTION, sentence, over_bare <= MOST_OVER_BARE, f"{over_bare:.2f}%")
    journal.check(SECTION, f"waiting costs at most {MOST_WAITING:g}%", waiting <= MOST_WAITING, f"{waiting:.2f}%")


def seconds_a_step(step: Callable[[], None], steps: int, device: torch.device) -> float:
    """Seconds of a step: the mean over `steps` of them, after one that is not timed."""
    step()
    synchronize(device)
    began = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(device)
    return (time.perf_counter() - began) / steps


def ratio(seconds: Mapping[str, list[float]], side: str, other: str) -> float:
    """A side's time by another's: the median over rounds of the ratio within the round."""
    return median([one / two for one, two in zip(seconds[side], seconds[other], strict=True)])


def shares(seconds: Mapping[str, list[float]]) -> tuple[float, float]:
    """The trainer over the bare step, and over itself without any wait, in per cent."""
    return 100 * (ratio(seconds, NOW, BARE) - 1), 100 * (ratio(seconds, NOW, NEVER) - 1)


def told(
    plan: Plan,
    parameters: int,
    world: World,
    seconds: Mapping[str, list[float]],
    counted: Mapping[str, Counter[str]],
) -> list[str]:
    """The table, and what follows from it."""
    rows = []
    for name, rounds in seconds.items():
        waits_text = str(sum(counted[name].values())) if name in counted and world.device.type == "cuda" else ""
        over = "" if name == BARE else f"{100 * (ratio(seconds, name, BARE) - 1):+.2f}%"
        over_never = "" if name in (BARE, NEVER) else f"{100 * (ratio(seconds, name, NEVER) - 1):+.2f}%"
        middle = median(rounds)
        cells = [f"{1e3 * middle:.2f}", spread([1e3 * one for one in rounds]), figure(plan.batch / middle)]
        rows.append([name, *cells, over, over_never, waits_text])
    engine = f"ZeRO {plan.stage}" if plan.engine == "deepspeed" else "plain PyTorch"
    head = ("side", "ms a step", "rounds", "images/s", "over bare", "over no wait", "waits")
    lines = [
        f"{plan.model} ({parameters / 1e6:.1f} M parameters), batch {plan.batch}, {engine}"
        f"{', blocks compiled' if plan.compiled else ''}; {plan.rounds} rounds of {plan.steps} steps of each side; "
        "latents are streamed from a disk, with EMA, ledger and a row of metrics a round:",
        "",
        table(head, rows),
        "",
    ]
    lines += [f"- {name} waits at {place} ({count}x)" for name in counted for place, count in counted[name].items()]
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# Waits, as PyTorch counts them


def waits(
    step: Callable[[], None], mode: Callable[[], AbstractContextManager[Any]], device: torch.device
) -> Counter[str]:
    """Where the host waits for the device in a step: FILE:LINE -> times, of the step of LOOKS that waits least: another
    may make a row of metrics, which waits too. Empty on a CPU, for which nothing waits."""
    if device.type != "cuda":
        return Counter()
    looks = []
    with mode():
        for _ in range(LOOKS):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    step()
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            looks.append(places(caught))
    return min(looks, key=Counter.total)


def places(caught: Sequence[warnings.WarningMessage]) -> Counter[str]:
    """FILE:LINE -> times, of the warnings about waiting."""
    found: Counter[str] = Counter()
    for warning in caught:
        if "synchroniz" in str(warning.message):
            found[f"{'/'.join(Path(warning.filename).parts[-3:])}:{warning.lineno}"] += 1
    return found
