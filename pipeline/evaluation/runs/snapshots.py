"""Evaluations that training with eval.where=job has left to be made (evaluation/beside.py)."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.config import AutoencoderConfig, EvalRunConfig, RunConfig, TrackingConfig, TrainConfig
from pipeline.config.loading.merge import to_dict
from pipeline.data.format.contract import require_match
from pipeline.data.format.contract_json import contract_from_json
from pipeline.data.joined.opening import joined
from pipeline.distributed.allocator import keep_memory
from pipeline.distributed.signals import SCHEDULER, StopRequest
from pipeline.distributed.world import World, pick_device
from pipeline.errors import NotFound, RunError, WeightsError
from pipeline.evaluation import beside, classifier
from pipeline.evaluation.reconstruction import runs as autoencoders
from pipeline.evaluation.runs.while_training import in_training
from pipeline.log import log, show
from pipeline.parsing.text import one_line
from pipeline.runs.datasets import empty_caption
from pipeline.runs.directory import RunInfo, load_any_run
from pipeline.storage.urls import open_storage
from pipeline.tracking.event_files import installed
from pipeline.tracking.tracker import Tracker


def evaluate_pending(config: EvalRunConfig, world: World | None = None) -> int:
    """Evaluate the snapshots that training has written as training itself would. Returns the exit status. Collective.

    A snapshot that is damaged is passed over with a line, and the status is 1 then. Raises RunError, and Interrupted
    after a signal to stop, when the remaining snapshots stay pending."""
    ranks = world or World(device=pick_device(config.device))
    info = ranks.together(lambda: load_any_run(config.run))
    tracking = ranks.together(lambda: installed(info.config.tracking), rank=0)
    run = info.storage
    stop, evaluate, damaged = StopRequest(), None, set[int]()

    def waiting() -> list[int]:
        return [n for n in beside.pending(run) if config.at in (0, n) and n not in damaged]

    with tempfile.TemporaryDirectory(prefix="latentmill-") as folder, stop.listening(SCHEDULER):
        while unevaluated := ranks.first(ranks.together(waiting, rank=0)):
            n = unevaluated[0]
            if evaluate is None:
                evaluate = ranks.together(lambda: _as_training(info, ranks))
            try:
                weights = ranks.together(partial(_weights, info, n, ranks))
                metrics = evaluate(weights, n, lambda: stop.number is not None)
            except NotFound:  # another job has evaluated it
                continue
            except (WeightsError, RunError) as error:
                damaged.add(n)
                if ranks.rank == 0:
                    log.error(f"eval: the snapshot at {n:,} samples is passed over: {one_line(str(error))}")
                continue
            ranks.together(partial(_finish, info, tracking, n, Path(folder), metrics), rank=0)
    return 1 if damaged else 0


def _weights(info: RunInfo[RunConfig], n: int, world: World) -> dict[str, Tensor]:
    """The weights of a snapshot, on this rank's device."""
    return {name: tensor.to(world.device) for name, tensor in beside.read_snapshot(info.storage, n).items()}


def _as_training(info: RunInfo[RunConfig], world: World) -> autoencoders.Evaluate:
    """The function by which a run's training evaluates weights, in this world."""
    if world.device.type == "cpu":
        keep_memory()
    if isinstance(info.config, AutoencoderConfig):
        return autoencoders.in_training(info.config, info.storage, world)
    assert isinstance(info.config, TrainConfig)
    if not info.config.task.draws:
        return classifier.in_training(info.config, info.storage, world)
    train = info.config.data.train
    cache = open_storage(train)
    manifest = joined(cache, info.config.data.columns)
    require_match(contract_from_json(info.contract), manifest.contract, f"data.train={train}")
    return in_training(info.config, info.storage, world, manifest, empty_caption(cache, manifest))


def _finish(
    info: RunInfo[RunConfig], tracking: TrackingConfig, n: int, folder: Path, metrics: Mapping[str, Any]
) -> None:
    """Delete a snapshot whose figures are stored, and report them."""
    beside.finish(info.storage, n, partial(_track, info, tracking, n, folder))
    show(f"eval: {n:,} samples: {_figures(metrics)}")


def _track(info: RunInfo[RunConfig], tracking: TrackingConfig, n: int, folder: Path) -> None:
    """Send figures to the run's tracker after the end of training."""
    with Tracker(info.storage, tracking, settings=to_dict(info.config), folder=folder) as tracker:
        if n not in tracker.evaluations:
            beside.bring(info.storage, n, tracker)


def _figures(metrics: Mapping[str, Any]) -> str:
    """The figures of an evaluation in one line."""
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if isinstance(value, float))
