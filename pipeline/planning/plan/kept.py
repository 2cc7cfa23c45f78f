"""What a run stores: a checkpoint's bytes, how many are kept by the run's rules, snapshots of averages."""

from __future__ import annotations

from itertools import pairwise

from pipeline.config import AutoencoderConfig, RunConfig
from pipeline.planning.first_stage import autoencoder_cost
from pipeline.planning.memory import AVERAGE, MASTER, MOMENTS
from pipeline.planning.parts import Cost
from pipeline.planning.plan.figures import Figure
from pipeline.planning.plan.job import Job
from pipeline.planning.plan.sections import Section

MUON_MOMENTS = 4
"""Bytes of Muon's one moment."""
ADAM_ONLY = (
    *("conv_in", "conv_out", "embed", "task.embed", "task.tokens.embed", "task.tokens.place"),
    *("task.paint", "task.embed_level", "task.perceptron.first", "task.perceptron.last", "pool.pool.out"),
)
"""Parts of a network, and layers of parts, that Muon leaves to AdamW (training/engines/optimizer.py), but for those of
autoencoders."""
ADAM_ONLY_PIXELS = (
    *("model.encoder.conv_in", "model.encoder.conv_out", "model.decoder.conv_in", "model.decoder.conv_out"),
    *("model.quant_conv", "model.post_quant_conv", "model.quantize", "discriminator"),
)
MOST_COMMITS = 1_000_000
"""Commits of a run that are counted one by one."""


def commit_bytes(config: RunConfig, cost: Cost, averaged: int) -> int:
    """Bytes of a checkpoint: weights, moments and averages in float32, on however many ranks. cost: of what is trained.
    averaged: parameters of which averages are kept. Biases of Muon's layers count as its own, and what names and hashes
    take is left out."""
    moments = MOMENTS * cost.parameters
    if config.optim.name == "muon":
        excluded = ADAM_ONLY_PIXELS if isinstance(config, AutoencoderConfig) else ADAM_ONLY
        hidden = sum(
            layer.parameters
            for part in cost.parts
            if not (part.name in excluded or part.name.startswith("discriminator"))
            for layer in part.layers
            if f"{part.name}.{layer.name}" not in excluded
        )
        moments -= (MOMENTS - MUON_MOMENTS) * hidden
    averages = 1 + len(config.ema.half_lives) + len(config.ema.widths)
    return MASTER * cost.parameters + moments + AVERAGE * averages * averaged


def events(end: int, every: int, batch: int) -> int:
    """Steps after which something happens that comes every `every` samples (0 = never) and at the end: one for each
    step in which a multiple lies, however many. end: samples of the run, in whole batches."""
    if not every:
        return 1
    period = max(every, batch)
    last = end // period
    return last if last and -(-last * period // batch) * batch == end else last + 1


def commits(config: RunConfig) -> list[int]:
    """n of every commit of a run that nothing stops: at or after each multiple of checkpoint.every, before each
    evaluation on the ranks, and at the end."""
    batch = config.optim.batch
    end = -(-config.samples // batch) * batch
    periods = [config.checkpoint.every]
    if config.data.val and config.eval.every and config.eval.where == "train":
        periods.append(config.eval.every)
    steps = [max(period, batch) for period in periods]  # a step commits once, whatever lies in it
    due = {-(-n // batch) * batch for period in steps for n in range(period, end + 1, period)}
    return sorted({n for n in due if n <= end} | {end})


def snapshots_of(made: list[int], every: int) -> int:
    """Snapshots of averages that a run keeps with its commits: with the first at or after a multiple of `every`, one
    for however many multiples lie before it (training/commits.py). every: 0 = never."""
    return sum(n // every > before // every for before, n in pairwise([0, *made])) if every else 0


def kept_commits(config: RunConfig, made: list[int]) -> int:
    """How many of the commits of a run stay when it has ended (runs/retention.py): the newest, the first of each
    period, and the best, which is taken to be none of these."""
    settings = config.checkpoint
    kept = set(made[-settings.keep :])
    if settings.keep_every:
        first: dict[int, int] = {}
        for n in made:
            first.setdefault(n // settings.keep_every, n)
        kept |= {n for period, n in first.items() if period}
    return len(kept) + (1 if settings.best and len(kept) < len(made) else 0)


def averaged_parameters(job: Job, cost: Cost) -> int:
    """Parameters of which averages are kept: of an autoencoder, not its discriminator's."""
    if isinstance(job.config, AutoencoderConfig):
        f = job.config.autoencoder.downsampling
        return autoencoder_cost(job.config.autoencoder, 1, f, f).parameters
    return cost.parameters


def storage_section(job: Job, cost: Cost, cache_total: int = 0) -> Section:
    """What the bucket will hold. cost: of what is trained. cache_total: bytes of the cache; 0 = not known."""
    config, world = job.config, job.machines.world
    averaged = averaged_parameters(job, cost)
    one = commit_bytes(config, cost, averaged)
    many = events(job.samples, config.checkpoint.every, config.optim.batch)
    if config.data.val and config.eval.every and config.eval.where == "train":
        many += events(job.samples, config.eval.every, config.optim.batch)  # at most: some are the same
    made = commits(config) if many <= MOST_COMMITS else []
    kept = kept_commits(config, made) if made else config.checkpoint.keep
    number = len(made) or many
    every = config.ema.snapshots if config.ema.widths else 0
    snapshots = snapshots_of(made, every) if made else min(job.samples // every, many) if every else 0
    of_snapshots = snapshots * AVERAGE * len(config.ema.widths) * averaged
    averages = 1 + len(config.ema.half_lives) + len(config.ema.widths)
    rules = f"checkpoint.keep={config.checkpoint.keep}, keep_every={config.checkpoint.keep_every:,}"
    rules += f", best={config.checkpoint.best}" if config.checkpoint.best else ""
    figures = [
        Figure(
            "bytes of a checkpoint",
            one,
            "bytes",
            "arithmetic",
            f"weights, moments of {config.optim.name} and {averages} average{'s' * (averages > 1)} in float32",
        ),
        Figure("checkpoints written", number, "", "arithmetic", f"checkpoint.every={config.checkpoint.every:,}"),
        Figure("bytes written for them", number * one, "bytes", "arithmetic", "all of them, over the whole run"),
        Figure(
            "objects written for them", number * (2 * world + 1), "", "arithmetic", "two of each rank, and commit.json"
        ),
        Figure("checkpoints kept", kept, "", "arithmetic", rules),
        Figure("bytes kept of them", kept * one, "bytes", "arithmetic", "at the end"),
    ]
    if snapshots:
        figures.append(Figure("bytes of snapshots", of_snapshots, "bytes", "arithmetic", f"{snapshots}, never removed"))
    most = (kept + 1) * one + of_snapshots
    figures.append(Figure("bytes of the run at most", most, "bytes", "arithmetic", "with the one being written"))
    if cache_total:
        figures.append(
            Figure("bytes of cache and run", cache_total + most, "bytes", "arithmetic", "what the bucket will hold")
        )
    return Section("storage", tuple(figures))
