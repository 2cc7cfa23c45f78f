"""One life of a run, from the command to the last sample: processes, data, lease, and what is written about the run.

What differs between kinds of networks is a Kind: how the data are opened, and what trains on them.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pipeline.config import AutoencoderConfig, RunConfig, TrainConfig
from pipeline.config.loading.merge import to_stored, to_yaml
from pipeline.config.loading.references import digests_of, references_of
from pipeline.distributed.place import adopt_step, in_world, require_place
from pipeline.distributed.ranks import run_ranks
from pipeline.distributed.signals import stopping_at_once
from pipeline.errors import ConfigError, LatentmillError, RunError
from pipeline.log import show
from pipeline.runs.directory import (
    committed,
    is_finished,
    last_sample,
    require_resumable,
    require_same_datasets,
)
from pipeline.runs.stored import read_facts
from pipeline.storage.base import Storage
from pipeline.storage.urls import open_storage
from pipeline.tracking.event_files import require_trackers
from pipeline.training.inputs import Data

if TYPE_CHECKING:
    from torch import nn

    from pipeline.data.format.manifest import Manifest
    from pipeline.distributed.world import World
    from pipeline.runs.lease import Lease
    from pipeline.tracking.tracker import Tracker
    from pipeline.training.engines.base import Engine
    from pipeline.training.evaluations import Evaluate, Validate
    from pipeline.training.objectives.base import Objective

C = TypeVar("C", bound=RunConfig)
D = TypeVar("D", bound=Data)


@dataclass(frozen=True)
class Kind(Generic[C, D]):
    """open_data: opens the datasets, as one rank, and raises LatentmillError where they do not fit. train_on: builds
    everything else and trains, as one rank. check: raises LatentmillError for what can be known before a process
    starts."""

    open_data: Callable[[C, Storage, World], D]
    train_on: Callable[[D, C, World, Lease | None], None]
    check: Callable[[C], None] = lambda config: None


def main(config: C, kind: Kind[C, D]) -> int:
    """The verb. Returns the exit status; raises LatentmillError."""
    require_place(config.launch.processes)
    adopt_step()
    if not in_world():
        run = open_storage(config.run)
        require_resumable(config, run)
        if is_finished(config, run):
            show(f"{config.run} is finished: it has seen all {last_sample(config)} samples; a larger samples= goes on")
            return 0
        kind.check(config)
        require_trackers(config.tracking)
        if config.launch.processes > 1:
            return run_ranks(config.verb, config, config.launch.processes, config.launch.threads)

    from pipeline.runs.lease import give_back

    giving_back = partial(give_back, open_storage(config.run))
    with stopping_at_once(giving_back):
        try:
            return as_rank(config, kind)
        finally:
            giving_back()  # nothing is left to give back, unless Ctrl-C came between taking the lease and holding it


def as_rank(config: C, kind: Kind[C, D]) -> int:
    """Train as the rank that the environment gives this process. Returns the exit status; raises LatentmillError."""
    import torch

    from pipeline.distributed import world as distributed
    from pipeline.training.watch.limit import longest_collective

    timeout = longest_collective(config.watchdog_s)
    grouped = config.deepspeed.engine == "deepspeed"
    world = distributed.start(config.device, config.launch.threads, group=grouped, timeout=timeout)
    failure: LatentmillError | None = None
    try:
        train(config, world, kind)
    except LatentmillError as error:
        if not distributed.is_shared(error):
            raise
        traceback.clear_frames(error.__traceback__)  # the frames hold references to the engine
        failure = error
    except torch.OutOfMemoryError as error:
        raise RunError(out_of_memory(error, world, config)) from error
    distributed.stop(world)
    if failure is None:
        return 0
    if world.rank == 0:
        raise failure
    return failure.exit_code  # rank 0 reports the failure for all ranks


def out_of_memory(error: Exception, world: World, config: RunConfig) -> str:
    """The error message for a GPU whose memory does not suffice for a step, in one line."""
    cause = str(error).partition("If reserved but unallocated")[0].strip()
    smaller = "set model.activation_gb" if isinstance(config, TrainConfig) else "lower crop"
    return (
        f"rank {world.rank} on {socket.gethostname()}: {cause} Lower optim.micro_batch (the batch stays the same), "
        f"{smaller}, or raise deepspeed.stage; latentmill submit {config.verb} --dry-run estimates what a step needs. "
        "The last commit is whole, and the same command goes on from there"
    )


@contextmanager
def leased(config: RunConfig, world: World) -> Iterator[Lease | None]:
    """Inside, rank 0 holds the run's lease. Collective: raises RunError on every rank when another process has it.

    Ranks of a launcher wait first where the other may be dead: a machine is back before the lease says so.
    """
    from pipeline.runs.lease import Lease, outlast

    def take() -> Lease:
        run = open_storage(config.run)
        if in_world():
            outlast(run)
        return Lease.take(run, first=next(iter(committed(run)), 0))

    lease = world.together(take, rank=0)
    with lease or nullcontext():
        yield lease


def train(config: C, world: World, kind: Kind[C, D]) -> None:
    """Open the data, take the run's lease, build everything and train, as one rank of the world."""
    import torch

    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    else:
        torch.backends.cudnn.benchmark = True  # latents have few sizes, so the fastest convolutions are found once

    run = open_storage(config.run)

    def open_checked() -> D:
        data = kind.open_data(config, run, world)
        if world.rank == 0:
            require_trackers(config.tracking)
            require_resumable(config, run)
            require_same_datasets(config, run, data.digests, data.mixture, data.dataset.columns)
        return data

    data = world.together(open_checked)
    with leased(config, world) as lease:
        kind.train_on(data, config, world, lease)


def begin(
    data: Data,
    config: TrainConfig | AutoencoderConfig,
    world: World,
    module: nn.Module,
    load_initial: Callable[[], Mapping[str, Any]],
) -> None:
    """Write what the run is, and give every rank the weights that it begins with. Collective.

    load_initial: loads those of config.init into the module, on rank 0, and returns facts about them.
    """
    from pipeline.training.start import share

    def describe() -> None:
        facts = load_initial()
        describe_run(config, open_storage(config.run), data.manifest, data.manifests, data.mixture, facts)

    world.together(describe, rank=0)
    if config.init:
        share(module, world)


@contextmanager
def tracked(config: RunConfig, world: World) -> Iterator[tuple[Tracker, Path]]:
    """Inside, the run's metrics are kept. Also yields a local folder for files that grow."""
    from pipeline.tracking.tracker import Tracker

    run, settings = open_storage(config.run), to_stored(config)
    with (
        tempfile.TemporaryDirectory(prefix="latentmill-") as name,
        Tracker(run, config.tracking, settings=settings, folder=Path(name), enabled=world.rank == 0) as tracker,
    ):
        yield tracker, Path(name)


def to_the_end(
    data: Data,
    config: RunConfig,
    world: World,
    lease: Lease | None,
    *,
    engine: Engine,
    objective: Objective,
    tracker: Tracker,
    folder: Path,
    evaluate: Evaluate | None,
    validation: Validate | None = None,
    validate_every: int = 0,
) -> None:
    """Resume, train to the last sample, and destroy the engine. Collective. The parameters are as make_trainer has
    them (assembly.py)."""
    from pipeline.training.assembly import make_trainer

    trainer = make_trainer(
        config,
        world=world,
        engine=engine,
        stream_from=lambda n: data.stream_from(start_n=n),
        objective=objective,
        run=open_storage(config.run),
        folder=folder,
        tracker=tracker,
        manifests=data.manifests,
        mixture=data.mixture,
        evaluate=evaluate,
        validation=validation,
        validate_every=validate_every,
        fence=lease.require_held if lease else None,
    )
    if lease:
        lease.progress = lambda: trainer.n
    try:
        trainer.run()
    finally:
        engine.destroy()


def require_compiler(device: str) -> None:
    """Raise ConfigError where torch.compile would find no C++ compiler at the first step."""
    compiler = os.environ.get("CXX", "g++")
    if device == "cpu" and shutil.which(compiler) is None:
        raise ConfigError(
            f"compile=true needs a C++ compiler on a CPU, and there is no {compiler}: install one, set CXX, or set "
            "compile=false"
        )


def describe_run(
    config: RunConfig,
    run: Storage,
    manifest: Manifest,
    manifests: Mapping[str, str],
    mixture: Sequence[int] = (),
    begun: Mapping[str, Any] | None = None,
) -> None:
    """Write config.yaml and run.json. manifest: of data.train. manifests, mixture: as Data has them. begun: facts about
    the initial weights. Rank 0 only."""
    from importlib.metadata import version

    from pipeline.data.format.contract import plain
    from pipeline.data.order.shuffle import ORDER
    from pipeline.training.changes import changes

    facts: dict[str, Any] = {
        "manifests": dict(manifests),
        "dataset_samples": manifest.samples,
        "order": ORDER,
        "contract": plain(manifest.contract),
        "versions": {name: version(name) for name in ("torch", "deepspeed")} | {"python": sys.version.split()[0]},
    }
    if mixture:
        facts["mixture"] = list(mixture)
    if begun:
        facts["init"] = dict(begun)
    if changed := changes(config, run):
        facts["changes"] = changed
    if references_of(config):
        former = read_facts(run).get("environment") if run.exists("run.json") else None
        facts["environment"] = digests_of(config, former)
    run.put("config.yaml", to_yaml(config).encode())
    run.put("run.json", json.dumps(facts, indent=1, sort_keys=True).encode())
