"""The validation loss: the same on any number of ranks, over every record once, with noise of its own seed."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from made.cache import LATENT, WIDTH, make_cache
from made.thread_world import on_ranks
from pipeline.config import DataConfig, DiffusionConfig, ModelConfig, TrainConfig
from pipeline.data.format.manifest import load_manifest
from pipeline.distributed.world import World
from pipeline.errors import ContractMismatch, DatasetError
from pipeline.models.encoders.latents import Latents
from pipeline.runs.datasets import check_against_contract
from pipeline.storage.urls import open_storage
from pipeline.training.validation import ValidationLoss

DIFFUSION = DiffusionConfig()
SIZES = [7, 12, 5]


def look(folder, world, count=20, batch=8):
    storage = open_storage(str(folder))
    found = ValidationLoss.load(storage, load_manifest(storage), ("moments", "text"), count, batch, DIFFUSION, world)
    seen = []

    def losses(latents, draws, inputs):
        seen.append((latents, draws.noise, draws.timestep, inputs["text"].sum((1, 2))))
        assert not draws.drop.any()
        return latents.square().mean((1, 2, 3)) * draws.timestep

    latents = Latents("moments", 0.5, 0.25)
    return found(losses, latents, lambda given, *_: given), seen, [rows.weights.sum().item() for rows in found.batches]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    make_cache(str(folder), SIZES)
    return folder


def test_it_is_the_mean_over_the_first_records_and_the_same_on_any_number_of_ranks(cache):
    alone, seen, _ = look(cache, World(), batch=20)
    ((latents, _, times, _),) = seen
    expected = (latents.square().mean((1, 2, 3)).double() * times.double()).mean()
    assert alone["loss"] == pytest.approx(float(expected), rel=1e-6)
    assert alone["images"] == 20
    for size, batch in ((1, 8), (2, 8), (3, 12), (4, 4)):
        for row, _, weights in on_ranks(size, partial(look, cache, batch=batch)):
            assert row["loss"] == pytest.approx(alone["loss"], rel=1e-6)
            assert row["loss_by_noise"] == pytest.approx(alone["loss_by_noise"], rel=1e-6)
            assert len(weights) == -(-20 // (batch // size * size))  # as many forward passes on every rank


def test_it_looks_at_the_same_noise_every_time_and_at_every_noise_level(cache):
    first, second = (look(cache, World())[1] for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    row, _, _ = look(cache, World())
    assert len(row["loss_by_noise"]) == 5


def test_a_cache_that_has_fewer_records_is_taken_whole(cache):
    assert look(cache, World(), count=1000)[0]["images"] == sum(SIZES)


def test_a_cache_without_records_is_refused(cache):
    storage = open_storage(str(cache))
    manifest = load_manifest(storage)
    with pytest.raises(DatasetError, match="no records to take a validation loss of"):
        ValidationLoss.load(storage, replace(manifest, shards=()), ("text",), 10, 8, DIFFUSION, World())


def test_held_out_records_without_the_conditions_that_the_task_reads_are_refused(cache):
    manifest = load_manifest(open_storage(str(cache)))
    held = tuple(member for member in manifest.contract.members if member.name != "text")
    other = replace(manifest, contract=replace(manifest.contract, members=held))
    config = TrainConfig(
        run="r",
        data=DataConfig(train="a", val="b"),
        model=ModelConfig(in_channels=LATENT[0], out_channels=LATENT[0], context_width=WIDTH),
    )
    check_against_contract(config, manifest, manifest)
    with pytest.raises(ContractMismatch, match=r"data\.val=b lacks text, which task=text reads; encode it with capt"):
        check_against_contract(config, manifest, other)
