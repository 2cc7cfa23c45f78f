"""Ranks for tests of training: `python -m ranks.scenarios FOLDER SCENARIO...`.

A small denoiser and an arithmetic stream replace the UNet and a cache; engine, trainer, checkpoints and launcher are
the real ones. Results are written to FOLDER as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from made.facts import Facts
from pipeline import philox
from pipeline.config import (
    CheckpointConfig,
    DeepSpeedConfig,
    DiffusionConfig,
    EmaConfig,
    GuardConfig,
    ModelConfig,
    OptimConfig,
    TextTask,
    TrackingConfig,
    TrainConfig,
    UnconditionalTask,
)
from pipeline.data.format.contract import TextFacts
from pipeline.data.reading.batch import Batch
from pipeline.distributed import world as distributed
from pipeline.distributed.exits import leave
from pipeline.distributed.world import World
from pipeline.errors import Interrupted, ShardCorrupt
from pipeline.models.denoiser import Denoiser
from pipeline.models.encoders.latents import Latents
from pipeline.models.tasks.choose import make_task
from pipeline.models.tasks.unconditional import Unconditional
from pipeline.runs.checkpoint import read_commit
from pipeline.runs.directory import checkpoint_folder, committed
from pipeline.storage.base import Storage
from pipeline.storage.urls import open_storage
from pipeline.tracking.tracker import Tracker
from pipeline.training.assembly import make_trainer
from pipeline.training.engines.base import Engine
from pipeline.training.engines.choose import make_engine
from pipeline.training.evaluations import Evaluate
from pipeline.training.inputs import Inputs
from pipeline.training.objectives.diffusion import DiffusionObjective
from pipeline.training.trainer import Trainer
from pipeline.training.validation import Rows, ValidationLoss

SHAPE = (4, 4, 4)
BATCH = 16
RECORDS = 100
OPTIM = OptimConfig(lr=2e-3, warmup=64, batch=BATCH, clip=0.5, weight_decay=0.1)
TEXT = TextFacts(layer="last", length=5, width=8, pad=7, eot=10, start=9, vocabulary=11)


class TinyDenoiser(nn.Module):
    """Convolutions, two matrices fused in one weight without bias, and a norm: parameters of several ranks and odd
    sizes."""

    FUSED: ClassVar[dict[str, int]] = {"text": 2}
    ADAM_ONLY = ("leave",)

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.enter = nn.Conv2d(4, 13, 3, padding=1)
            self.norm = nn.GroupNorm(1, 13)
            self.text = nn.Linear(8, 26, bias=False)
            self.leave = nn.Conv2d(13, 4, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, inputs: Mapping[str, Tensor], drop_B: Tensor) -> Tensor:
        dtype = self.enter.weight.dtype
        text = inputs["text"].to(dtype).mean(1) * ~drop_B[:, None]
        h = (
            self.norm(self.enter(x.to(dtype)))
            + self.text(text).view(-1, 2, 13).sum(dim=1)[:, :, None, None]
            + (t / 1000).to(dtype).view(-1, 1, 1, 1)
        )
        return self.leave(nn.functional.silu(h))


def text_transformer() -> Denoiser:
    """The smallest UNet, and the transformer over token ids that is trained with it."""
    task = TextTask(encoder="transformer", depth=2, heads=2, head_width=4)
    model = ModelConfig(channels=8, multipliers=(1,), blocks=1, attention=(1,), heads=2, norm_groups=4, context_width=8)
    denoiser = Denoiser(model, make_task(task, model, Facts(latent_shape=SHAPE, text=TEXT)))
    denoiser.reset_parameters(0)
    return denoiser


class ArithmeticStream:
    """Batches like those of pipeline.data.reading.stream, computed from sample numbers.

    bad: a sample whose latent is NaN. wild: samples whose latents are far too large. stop_at, lost_at: the n at which
    the last rank gets SIGTERM or a damaged shard.
    """

    def __init__(
        self,
        world: World,
        batch: int,
        start_n: int,
        bad: int = -1,
        stop_at: int = -1,
        lost_at: int = -1,
        wild: tuple[int, ...] = (),
    ) -> None:
        self.world, self.batch, self.n, self.wild = world, batch, start_n, wild
        self.bad, self.stop_at, self.lost_at = bad, stop_at, lost_at

    def __enter__(self) -> ArithmeticStream:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self.world.rank == self.world.size - 1:
            if self.n == self.stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            if self.n == self.lost_at:
                raise ShardCorrupt("000007.tar is not what the manifest promises")
        share = self.batch // self.world.size
        numbers = torch.arange(share) + self.n + self.world.rank * share
        moments = philox.normal(7, 0, numbers % RECORDS, (8, 4, 4)).half()
        moments[numbers == self.bad] = torch.nan
        moments[torch.isin(numbers, torch.tensor(self.wild, dtype=torch.int64))] *= 40
        text = philox.normal(7, 1, numbers % RECORDS, (3, 8)).half()
        tokens = (philox.words(7, 2, numbers % RECORDS, TEXT.length) % TEXT.vocabulary).int()
        keys = [f"{number % RECORDS:06d}" for number in numbers.tolist()]
        tensors = {"moments": moments, "text": text, "tokens": tokens}
        batch = Batch(self.n, numbers, tensors, numbers * 0, numbers % RECORDS, lambda: [(key, "") for key in keys])
        self.n += self.batch
        return batch


INPUTS = Inputs(Latents("moments", 0.5, 0.1), Unconditional(UnconditionalTask(), ModelConfig(), Facts(), None), 3)


def config_of(**changes: Any) -> TrainConfig:
    base = TrainConfig(
        run="unused",
        samples=20 * BATCH,
        seed=INPUTS.seed,
        optim=OPTIM,
        ema=EmaConfig(half_life=100.0),
        deepspeed=DeepSpeedConfig(stage=2),
        checkpoint=CheckpointConfig(every=10 * BATCH, keep=2),
        tracking=TrackingConfig(wandb="off", every=BATCH),
        device="cpu",
    )
    return replace(base, **changes)


def build(
    config: TrainConfig,
    world: World,
    run: Storage,
    evaluate: Evaluate | None = None,
    make: Callable[[], nn.Module] = TinyDenoiser,
    **trouble: Any,
) -> tuple[Engine, Trainer]:
    engine = make_engine(make(), config, world)
    stream_from = partial(ArithmeticStream, world, config.optim.batch, **trouble)
    trainer = make_trainer(
        config,
        world=world,
        engine=engine,
        stream_from=stream_from,  # type: ignore[arg-type]
        objective=DiffusionObjective(config.diffusion, config.task.drop, engine=engine, inputs=INPUTS),
        run=run,
        folder=Path(run.url),
        tracker=Tracker(run, config.tracking, enabled=world.rank == 0),
        manifests={"train": "0" * 64},
        evaluate=evaluate,
    )
    return engine, trainer


def train(config: TrainConfig, world: World, folder: Path) -> None:
    """One execution of a run: resumes from a commit if there is one, and trains to config.samples."""
    engine, trainer = build(config, world, open_storage(str(folder)))
    try:
        trainer.run()
        trainer.recorder.tracker.close()
    finally:
        engine.destroy()


# --------------------------------------------------------------------------------------------------------------------
# Scenarios


ZERO = tuple(f"zero{stage}" for stage in range(4))
OFFLOADED = tuple(f"offload{stage}" for stage in (1, 2, 3))
ORACLES = ("torch", "torch-muon")
FIRST: dict[int, tuple[str, ...]] = {
    1: (*ZERO, "zero1-muon"),
    2: (*ZERO, *OFFLOADED, *(f"{name}-muon" for name in ZERO), "offload3-muon"),
    4: ("zero2", "zero3-muon"),
}
"""Number of ranks -> the engines that `engines` trains with AdamW, and with Muon (-muon)."""


def names_of(ranks: int) -> tuple[str, ...]:
    """All engines in a world, by the names of their folders."""
    return tuple(f"{name}{end}" for end in ("", "-muon") for name in (*ZERO, *(OFFLOADED if ranks == 2 else ())))


def engines(world: World, folder: Path) -> None:
    """Those that come first, and the oracles in a world of one, train for 50 steps."""
    train_each(world, folder, (*(ORACLES if world.size == 1 else ()), *FIRST[world.size]), TinyDenoiser, 50)


def engines_left(world: World, folder: Path) -> None:
    """The others train."""
    left = [name for name in names_of(world.size) if name not in FIRST[world.size]]
    train_each(world, folder, left, TinyDenoiser, 50)


def transformer(world: World, folder: Path) -> None:
    """A transformer over token ids trains: with every stage on two ranks, with the oracles on one."""
    names = ORACLES if world.size == 1 else (*ZERO, *(f"{name}-muon" for name in ZERO))
    train_each(world, folder, names, text_transformer, 8)


def train_each(world: World, folder: Path, names: Sequence[str], make: Callable[[], nn.Module], steps: int) -> None:
    """Trains with each engine. Losses, norms, weights and shares are stored."""
    for name in names:
        kind, _, muon = name.partition("-")
        settings: dict[str, Any] = {"engine": "torch"} if kind == "torch" else {"stage": int(kind[-1])}
        settings |= {"offload": True} if kind in OFFLOADED else {}
        config = config_of(
            samples=steps * BATCH,
            deepspeed=DeepSpeedConfig(**settings),
            optim=replace(OPTIM, name="muon" if muon else "adamw", micro_batch=0 if kind == "torch" else 4),
            checkpoint=CheckpointConfig(every=0),
        )
        engine, trainer = build(config, world, open_storage(str(folder / name)), make=make)
        trainer.run()
        trainer.recorder.tracker.close()
        shares = {
            kind: [[fragment.name, fragment.offset, len(fragment.view)] for fragment in fragments]
            for kind, fragments in engine.moments().items()
        }
        shares["weights"] = [[fragment.name, fragment.offset, len(fragment.view)] for fragment in engine.weights()]
        full_weights = {name: tensor.clone() for name, tensor in engine.gather(engine.weights()).items()}
        (folder / name / f"shares{world.rank}.json").write_text(json.dumps(shares))
        if world.rank == 0:
            torch.save(full_weights, folder / name / "weights.pt")
        engine.destroy()
        del engine, trainer


def bf16(world: World, folder: Path) -> None:
    """Trains in bf16 in stages 1 to 3."""
    for stage in (1, 2, 3):
        config = config_of(
            precision="bf16",
            deepspeed=DeepSpeedConfig(stage=stage),
            optim=replace(OPTIM, micro_batch=4),
            checkpoint=CheckpointConfig(every=0),
        )
        train(config, world, folder / f"zero{stage}")
        train(replace(config, optim=replace(config.optim, name="muon")), world, folder / f"zero{stage}-muon")


def straight(world: World, folder: Path) -> None:
    """Trains 40 steps at once, and 20 + 20 with a new trainer in between: stage 2, this world, with AdamW and Muon."""
    for name, optim in (("", OPTIM), ("-muon", replace(OPTIM, name="muon"))):
        train(config_of(samples=40 * BATCH, optim=optim), world, folder / f"straight{world.size}{name}")
        for samples in (20 * BATCH, 40 * BATCH):
            train(config_of(samples=samples, optim=optim), world, folder / f"halves{world.size}{name}")


def moves(world: World, folder: Path) -> None:
    """Continues the runs FOLDER/moved* for 10 more steps in another stage."""
    stages: dict[int, Literal[0, 1, 2, 3]] = {0: 2, 10: 0, 20: 3}
    for name, optim in (("", OPTIM), ("-muon", replace(OPTIM, name="muon"))):
        run = folder / f"moved{name}"
        done = (committed(open_storage(str(run))) or [0])[0]
        settings = DeepSpeedConfig(stage=stages[done // BATCH])
        train(config_of(samples=done + 10 * BATCH, deepspeed=settings, optim=optim), world, run)


def faults(world: World, folder: Path) -> None:
    """Ends all ranks in the same way by a NaN in the latent of one rank, by SIGTERM to one rank in a step or in the
    last evaluation, and by a shard that is damaged for one rank."""

    def evaluate(weights: dict[str, Tensor], n: int, stopped: Callable[[], bool]) -> None:
        if n == 20 * BATCH and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        world.raise_together(Interrupted("the evaluation was stopped") if stopped() else None)

    trouble: dict[str, Any]
    for name, trouble in (
        ("nan", {"bad": 5 * BATCH + BATCH - 1}),
        ("term", {"stop_at": 7 * BATCH}),
        ("shard", {"lost_at": 3 * BATCH}),
        ("evaluation", {"evaluate": evaluate}),
    ):
        engine, trainer = build(config_of(), world, open_storage(str(folder / name)), **trouble)
        try:
            trainer.run()
            outcome = ["finished", ""]
        except Exception as error:
            outcome = [type(error).__name__, str(error)]
        finally:
            trainer.recorder.tracker.close()
            engine.destroy()
        (folder / name / f"outcome{world.rank}.json").write_text(json.dumps([*outcome, trainer.n]))
        del engine, trainer


def signals(world: World, folder: Path) -> None:
    """Sends SIGTERM to the last rank at start-up, in a step, and during a save; then starts the same run again. Stores
    the saves of 40 steps."""
    for name in ("start-up", "step", "save"):
        run = open_storage(str(folder / name))
        trouble: dict[str, Any] = {"stop_at": 7 * BATCH} if name == "step" else {}
        engine, trainer = build(config_of(samples=40 * BATCH), world, run, **trouble)

        def terminate(then: Callable[..., Any], *args: Any, name: str = name) -> Any:
            if world.rank == world.size - 1 and not (folder / f"{name}.told").exists():
                (folder / f"{name}.told").touch()
                os.kill(os.getpid(), signal.SIGTERM)
            return then(*args)

        if name == "start-up":
            trainer.recorder.ledger.start = partial(terminate, trainer.recorder.ledger.start)  # type: ignore[method-assign]
        elif name == "save":
            trainer.commits.saver.before = [partial(terminate, bring) for bring in trainer.commits.saver.before]
        try:
            trainer.run()
            outcome = ["finished", ""]
        except Exception as error:
            outcome = [type(error).__name__, str(error)]
        finally:
            trainer.recorder.tracker.close()
            engine.destroy()
        (folder / name / f"outcome{world.rank}.json").write_text(json.dumps([*outcome, trainer.n]))
        del engine, trainer
        train(config_of(samples=40 * BATCH), world, folder / name)


AVERAGES = EmaConfig(half_life=100.0, warmup=10.0, half_lives=(50.0, 1000.0), widths=(0.05, 0.1), snapshots=4 * BATCH)


def averages(world: World, folder: Path) -> None:
    """Keeps several averages over 40 steps, with the oracle or with stages 0 to 3, and a snapshot at every second
    commit. Stage 3 also trains in two halves."""
    names = ["torch"] if world.size == 1 else ["zero0", "zero1", "zero2", "zero3"]
    for name in names:
        engine: dict[str, Any] = {"engine": "torch"} if name == "torch" else {"stage": int(name[-1])}
        config = config_of(
            samples=40 * BATCH,
            ema=AVERAGES,
            deepspeed=DeepSpeedConfig(**engine),
            checkpoint=CheckpointConfig(every=2 * BATCH, keep=1),
        )
        train(config, world, folder / name)
        if name == "zero3":
            for samples in (19 * BATCH, 40 * BATCH):
                train(replace(config, samples=samples), world, folder / "halves")


def validated(world: World, folder: Path) -> None:
    """Every stage trains 20 steps twice: with a validation on held-out records every second step, and without."""
    for stage in range(4):
        for name in ("with", "without"):
            run = open_storage(str(folder / f"zero{stage}-{name}"))
            settings = DeepSpeedConfig(stage=stage)  # type: ignore[arg-type]
            config = config_of(deepspeed=settings)
            engine, trainer = build(config, world, run)
            if name == "with":
                held_out = next(ArithmeticStream(world, BATCH, 50 * BATCH))
                rows = Rows(held_out.numbers, held_out.tensors, torch.ones(len(held_out.numbers)))
                validation = ValidationLoss([rows, rows], 2 * BATCH, config.diffusion, world)
                objective = trainer.objective
                assert isinstance(objective, DiffusionObjective)
                trainer.evaluations.validation = partial(
                    validation, objective.sample_losses, INPUTS.latents, INPUTS.conditions
                )
                trainer.evaluations.validate_every = 2 * BATCH
            trainer.run()
            trainer.recorder.tracker.close()
            engine.destroy()
            del engine, trainer


WILD = (12 * BATCH + 3, 15 * BATCH, 16 * BATCH + BATCH - 1)  # samples of the first and of the last rank
GUARD = GuardConfig(action="skip", window=8, loss=3.0, grad_norm=0.0)


def guarded(world: World, folder: Path) -> None:
    """Every stage and the oracle train 20 steps, of which the guard skips those with WILD samples. Stage 2 also trains
    in two halves that share the memory of a skipped step, until three skips in a row end it, and with a guard that
    stops."""
    kinds: list[tuple[str, dict[str, Any]]] = [(f"zero{stage}", {"stage": stage}) for stage in range(4)]
    if world.size == 1:
        kinds = [("torch", {"engine": "torch"})]

    def attempt(name: str, config: TrainConfig, wild: tuple[int, ...] = WILD) -> list[Any]:
        config = replace(config, diffusion=DiffusionConfig(prediction="v"))  # its loss grows with the latent
        engine, trainer = build(config, world, open_storage(str(folder / name)), wild=wild)
        try:
            trainer.run()
            return ["finished", "", trainer.n]
        except Exception as error:
            return [type(error).__name__, str(error), trainer.n]
        finally:
            trainer.recorder.tracker.close()
            engine.destroy()

    for name, settings in kinds:
        attempt(name, config_of(samples=20 * BATCH, guard=GUARD, deepspeed=DeepSpeedConfig(**settings)))
    if world.size > 1:
        for steps in (13, 20):
            attempt("halves", config_of(samples=steps * BATCH, guard=GUARD))
        wild_samples = tuple(range(12 * BATCH, 20 * BATCH, BATCH))
        outcomes = {
            "most": attempt("most", config_of(guard=replace(GUARD, most=2)), wild_samples),
            "stop": attempt("stop", config_of(guard=replace(GUARD, action="stop"))),
        }
        (folder / f"outcomes{world.rank}.json").write_text(json.dumps(outcomes))


def damaged(world: World, folder: Path) -> None:
    """Damages the newest of two checkpoints. The run continues from the one before."""
    train(config_of(samples=20 * BATCH), world, folder)
    if world.rank == 0:
        name = read_commit(open_storage(str(folder)), 20 * BATCH).files[1]["name"]
        path = folder / checkpoint_folder(20 * BATCH) / name
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    world.barrier()
    train(config_of(samples=30 * BATCH), world, folder)


def main(scenarios: list[str], folder: Path) -> int:
    world = distributed.start("cpu", threads=1)
    for scenario in scenarios:
        name = scenario.partition("_")[0]  # engines_left are engines too
        scenario_folder = folder if scenario in ("straight", "moves") else folder / f"{name}{world.size}"
        scenario_folder.mkdir(parents=True, exist_ok=True)
        globals()[scenario](world, scenario_folder)
    distributed.stop(world)
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[2:], Path(sys.argv[1])))
