"""latentmill eval: a checkpoint's FID, CLIP score and its task's figures, each with a card that says how it was made.

Of an autoencoder's run: how near its reconstructions are (evaluation/reconstruction/). Of a classifier's: how often it
is right, by noise level (evaluation/classifier.py).

With from_card the figures of a card are made again, and compared.
One evaluation for each sampler, number of steps and guidance scale; several draw the curve of FID against CLIP score
into the run's report. Results lie in RUN/evals/, in a folder whose name holds all that they depend on
(evaluation/kept.py): figures that are there are not made again, and others stand beside them.

Any number of ranks share the images (launch.processes, torchrun, srun). Rank 0 decides what is to be done, stores and
prints it.
"""

from __future__ import annotations

import logging
import math
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from typing import Any

from pipeline.config import AutoencoderConfig, EvalRunConfig, TrainConfig
from pipeline.diffusion.levels import levels_for
from pipeline.distributed import world as distributed
from pipeline.distributed.exits import leave
from pipeline.distributed.place import adopt_step, in_world, require_place
from pipeline.distributed.ranks import run_ranks
from pipeline.distributed.world import World, pick_device
from pipeline.errors import ConfigError, LatentmillError
from pipeline.evaluation import classifier
from pipeline.evaluation.card import Card
from pipeline.evaluation.kept import full_name, kept_card
from pipeline.evaluation.reconstruction import runs as autoencoders
from pipeline.evaluation.runs.cards import reproduce
from pipeline.evaluation.runs.commits import prepare, settings
from pipeline.evaluation.runs.snapshots import evaluate_pending
from pipeline.evaluation.stored import write
from pipeline.log import log, show
from pipeline.report import page
from pipeline.report.publish import require_page
from pipeline.runs.directory import load_any_run
from pipeline.tracking import terminal

COLLECTIVE_SECONDS = 4 * 3600
"""Longest time that ranks wait for each other: rank 0 computes figures of all images alone, and of several runs of
figures FID-infinity takes the longest. Launchers end ranks whose peers have died sooner."""


def main(config: EvalRunConfig) -> int:
    """Run the verb: start the ranks that are asked for, or be one of those that a launcher has started."""
    require_place(config.launch.processes)
    adopt_step()
    if not in_world() and config.launch.processes > 1:
        return run_ranks("eval", config, config.launch.processes, config.launch.threads)
    if not in_world() and not config.launch.threads:
        return evaluate(config, World(device=pick_device(config.device)))
    world = distributed.start(config.device, config.launch.threads, group=False, timeout=COLLECTIVE_SECONDS)
    if world.rank:
        log.setLevel(max(log.level, logging.ERROR))  # what rank 0 says holds for all
    failure: LatentmillError | None = None
    status = 0
    try:
        status = evaluate(config, world)
    except LatentmillError as error:
        if not distributed.is_shared(error):
            raise
        traceback.clear_frames(error.__traceback__)
        failure, status = error, error.exit_code
    distributed.stop(world)
    if failure is not None and world.rank == 0:
        raise failure
    return status


def evaluate(config: EvalRunConfig, world: World) -> int:
    """What is asked, as one rank. Returns the exit status. Collective."""
    if config.pending:
        return evaluate_pending(config, world)
    if config.from_card:
        return reproduce(config, world)
    trained = world.together(lambda: look(config))
    if isinstance(trained, AutoencoderConfig):
        measured = autoencoders.evaluate_run(config, world)
        return _told(world, autoencoders.table(measured), [measured.line()])
    if isinstance(trained, TrainConfig) and not trained.task.draws:
        classified = classifier.evaluate_run(config, world)
        return _told(world, classifier.table(classified), [classified.line()])
    dest = f"{config.run.rstrip('/')}/{page.DEFAULT_DEST}"
    if len(settings(config)) > 1:
        world.together(lambda: require_page(dest, page.MARK), rank=0)  # before hours of work
    cards = evaluate_run(config, world)
    _told(world, table(cards), [card.line() for card in cards])
    if len(cards) > 1:

        def draw() -> None:
            page.write([config.run], dest)
            show(f"report: {dest}")

        world.together(draw, rank=0)
    return 0


def look(config: EvalRunConfig) -> AutoencoderConfig | TrainConfig:
    """The run's configuration. Raises RunError, and ConfigError for what a run that draws no pictures cannot do."""
    trained = load_any_run(config.run).config
    if config.guide.weights and not (isinstance(trained, TrainConfig) and trained.task.draws):
        raise ConfigError(f"guide={','.join(config.guide.weights)}: {config.run} draws no pictures: leave guide out")
    assert isinstance(trained, AutoencoderConfig | TrainConfig), "a run of another kind"
    return trained


def _told(world: World, figures: str, lines: Sequence[str]) -> int:
    """Rank 0 prints figures and their cards' lines. Returns the exit status."""
    if world.rank == 0:
        show(figures, end="")
        for line in lines:
            show(line)
    return 0


def evaluate_run(config: EvalRunConfig, world: World | None = None) -> list[Card]:
    """Evaluate every sampler, number of steps and guidance scale, store the results in the run directory and return a
    card for each. Collective.

    Raises RunError, ContractMismatch for a dataset, reference or encoders that do not fit the run, and ConfigError for
    steps that a sampler cannot take, all before the first image.
    """
    if config.images < 2 or not config.guidance:
        raise ConfigError("images must be 2 or more, and guidance at least one scale")
    ranks = world or World(device=pick_device(config.device))
    trained, evaluator, denoiser, sha256 = prepare(config, world=ranks)
    samplers = settings(config)

    def check() -> None:
        for sampler in samplers:
            levels_for(evaluator.diffusion, sampler.sampler, sampler.steps)

    ranks.together(check)
    storage, cards = trained.info.storage, list[Card]()
    for i, sampler in enumerate(samplers):
        made_of = (config.images, sampler, trained.weights, sha256)
        card = ranks.first(ranks.together(partial(kept_card, storage, trained.n, evaluator, *made_of), rank=0))
        if card is None:
            name = full_name(evaluator, *made_of)
            if len(samplers) > 1 and ranks.rank == 0:
                show(f"eval: {i + 1} of {len(samplers)}: {name}")
            result = evaluator(
                denoiser,
                trained.n,
                images=config.images,
                sampler=sampler,
                weights=trained.weights,
                weights_sha256=sha256,
            )
            ranks.together(partial(write, storage, result, name), rank=0)
            card = result.card
        cards.append(card)
    return cards


def table(cards: Sequence[Card]) -> str:
    """A table of the figures with a column for each evaluation."""
    figures = {name: value for card in reversed(cards) for name, value in card.metrics.items()}
    names = [
        name
        for name, value in (cards[0].metrics | figures).items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in ("n", "seconds", "guidance")
    ]
    headings = ["sampler", *(card.sampler for card in cards)]
    rows = [
        ["steps", *(str(card.steps) for card in cards)],
        ["guidance", *(f"{card.guidance:g}" for card in cards)],
    ]
    rows += [[name, *(_shown(card.metrics.get(name)) for card in cards)] for name in names]
    return terminal.table(headings, rows, left=(0,))


def _shown(figure: Any) -> str:
    """A figure in a table; - for one that is missing or no number."""
    return f"{figure:.4g}" if isinstance(figure, int | float) and math.isfinite(figure) else "-"


if __name__ == "__main__":
    from pipeline import cli

    leave(cli.main(["eval", *sys.argv[1:]]))
