"""The tiles in which an evaluation draws its pictures, chosen before any weights are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from pipeline.config import EvalRunConfig, SamplerConfig
from pipeline.data.format.contract_json import contract_from_json
from pipeline.data.format.manifest import load_manifest
from pipeline.errors import ConfigError
from pipeline.inference.tiles.choice import Drawn, Tiles, choose
from pipeline.inference.trained import located_encoders
from pipeline.log import show
from pipeline.runs.directory import load_run
from pipeline.storage.urls import open_storage


def tiles_of(
    config: EvalRunConfig,
    samplers: Sequence[SamplerConfig],
    device: torch.device,
    sides: Mapping[str, int] | None = None,
) -> Tiles:
    """The tiles of config.tile for pictures of the size of data.val, or those of a card.

    samplers: of the evaluations. sides: on the card, by what is done in tiles. Raises ConfigError for pictures that are
    too large, RunError.
    """
    info = load_run(config.run)
    run, cache = info.config, contract_from_json(info.contract)
    val = config.data.val or run.data.val
    if not val:
        raise ConfigError(f"{config.run} has no data.val: give the dataset that is sampled for with data.val=")
    _, height, width = load_manifest(open_storage(val)).contract.latent_shape
    sampler = max(samplers, key=lambda one: one.guidance != 1)  # with guidance the network's batch is twice as large
    size = (width * cache.downsampling, height * cache.downsampling)
    encoders = located_encoders(info, config.encoders, (val,))
    drawn = Drawn(run.model, run.task, cache, encoders, sampler, [size], config.images)
    if height % drawn.stride or width % drawn.stride:
        raise ConfigError(
            f"data.val={val} holds pictures of {size[0]} x {size[1]} pixels, and this model makes multiples of "
            f"{drawn.stride * cache.downsampling}"
        )
    if sides is not None:
        return drawn.tiles(sides)
    tiles = choose(config.tile, drawn, device)
    if config.tile == "auto":
        show(f"eval: {tiles.words() or 'whole pictures'}")
    return tiles
