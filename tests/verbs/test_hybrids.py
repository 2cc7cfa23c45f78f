"""Tasks that read captions beside their own condition, each in one small run: trained, left and resumed, sampled.

Super-resolution with captions is among the runs of tests/system/test_tasks.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from made.asked import boxes_file, picture, pixels
from made.run import make_cache
from pipeline import sample, train
from pipeline.config import (
    CheckpointConfig,
    DataConfig,
    DeepSpeedConfig,
    EmaConfig,
    EvalConfig,
    InpaintTask,
    LaunchConfig,
    LayoutTask,
    ModelConfig,
    OptimConfig,
    SampleConfig,
    SamplerConfig,
    TaskConfig,
    TrackingConfig,
    TrainConfig,
)
from pipeline.config.conditions import BoxesConfig, MaskConfig
from pipeline.data.reading.batch import Batch
from pipeline.data.reading.stream import Stream
from pipeline.distributed.world import World
from pipeline.ledger import examine
from pipeline.models.tasks.task import Task
from pipeline.runs.directory import committed, load_run
from pipeline.storage.urls import open_storage
from pipeline.training.trainer import Trainer
from ranks.faulty_run import state

BATCH, RECORDS = 4, 8
EVERY, LOST, END = 2 * BATCH, 3 * BATCH, 5 * BATCH
HYBRIDS: dict[str, TaskConfig] = {
    "layout": LayoutTask(text=True, paint=2, drop=0.5),
    "inpaint": InpaintTask(text=True, drop=0.5),
}
EACH = pytest.mark.parametrize("name", HYBRIDS)


class Lost(Exception):
    """A run that is left."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with captions, boxes and masks."""
    where = tmp_path_factory.mktemp("hybrids")
    make_cache(
        where,
        RECORDS,
        conditions=("boxes", "mask"),
        boxes=BoxesConfig(count=25, most=4),
        mask=MaskConfig(kinds=("thin", "all"), variants=2),
    )
    return where


def config_of(folder: Path, name: str, run: str) -> TrainConfig:
    return TrainConfig(
        run=str(folder / run / name),
        seed=3,
        data=DataConfig(train=str(folder / "cache")),
        model=ModelConfig(
            channels=8, multipliers=(1,), blocks=1, attention=(1,), heads=2, norm_groups=4, context_width=128
        ),
        task=HYBRIDS[name],
        optim=OptimConfig(lr=2e-2, warmup=8, batch=BATCH),
        ema=EmaConfig(half_life=8.0),
        deepspeed=DeepSpeedConfig(engine="torch"),
        checkpoint=CheckpointConfig(every=EVERY, keep=20),
        eval=EvalConfig(loss_images=0),
        tracking=TrackingConfig(wandb="off", every=BATCH),
        samples=END,
        device="cpu",
        launch=LaunchConfig(threads=1),
    )


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[str, list[tuple[dict[str, Tensor], dict[str, Tensor], Tensor]]]:
    """An undisturbed run of each task, with what its task was given in each step: the batch as it was stored, the batch
    of which the conditioning was made, and the rows that were dropped."""
    seen: dict[str, list[tuple[dict[str, Tensor], dict[str, Tensor], Tensor]]] = {}
    forward = Task.forward
    for name, task in HYBRIDS.items():
        steps = seen.setdefault(name, [])

        def spied(self: Task, batch: Mapping[str, Tensor], drop_B: Tensor | None = None, steps: list = steps) -> object:
            condition, given = self.condition, list[Mapping[str, Tensor]]()

            def noted(final: Mapping[str, Tensor]) -> Any:
                given.append(final)
                return condition(final)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(self, "condition", noted)
                made = forward(self, batch, drop_B)
            assert drop_B is not None
            steps.append((dict(batch), dict(given[0]), drop_B))
            return made

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Task, "forward", spied)
            train.train(config_of(folder, name, "undisturbed"), World())
        assert task.takes_text
    return seen


@EACH
def test_a_hybrid_that_is_left_resumes_bit_equal_and_its_ledger_proves_it(
    folder: Path, trained: object, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    next_batch, config = Trainer._next_batch, config_of(folder, name, "disturbed")

    def lost(self: Trainer, stream: Stream) -> Batch:
        if self.n == LOST:
            raise Lost
        return next_batch(self, stream)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_next_batch", lost)
        with pytest.raises(Lost):
            train.train(config, World())
    assert committed(open_storage(config.run)) == [EVERY]
    train.train(config, World())
    urls = [str(folder / kind / name) for kind in ("disturbed", "undisturbed")]
    assert state(urls[0])[0] == END
    assert state(urls[0]) == state(urls[1])
    for url in urls:
        assert not examine(load_run(url), url)[1].problems


@EACH
def test_training_drops_the_caption_of_a_hybrid_and_nothing_else(
    folder: Path, trained: dict[str, list[tuple[dict[str, Tensor], dict[str, Tensor], Tensor]]], name: str
) -> None:
    empty = torch.from_numpy(np.load(folder / "cache" / "uncond.npy"))
    dropped = kept = 0
    for stored, final, drop_B in trained[name]:
        assert stored.keys() == final.keys() >= set(HYBRIDS[name].members)
        for member, array in stored.items():
            wanted = torch.where(drop_B[:, None, None], empty, array) if member == "text" else array
            assert torch.equal(final[member], wanted), member
        assert not (stored["text"] == empty).flatten(1).all(dim=1).any()
        dropped, kept = dropped + int(drop_B.sum()), kept + int((~drop_B).sum())
    assert dropped > 4 and kept > 4 and dropped + kept == END


@EACH
def test_a_trained_hybrid_is_sampled_by_both_of_its_conditions(
    folder: Path, trained: object, tmp_path: Path, name: str
) -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 8:40] = 255
    ways: list[dict[str, Any]] = {
        "layout": [
            {"boxes": (boxes_file(tmp_path / f"{i}.json", [[i, 0.0, 0.0, 0.5, 0.5 + 0.1 * i]]),)} for i in range(2)
        ],
        "inpaint": [
            {
                "image": (picture(tmp_path / f"{i}.png", pixels(64, 64, i)),),
                "mask": (picture(tmp_path / "m.png", mask),),
            }
            for i in range(2)
        ],
    }[name]
    asked = SampleConfig(
        run=str(folder / "undisturbed" / name),
        weights="raw",
        n=1,
        sampler=SamplerConfig(sampler="euler", steps=2, guidance=2.0),
        device="cpu",
    )
    first, words, condition = (
        sample.sample_rows(replace(asked, prompt=(prompt,), **way))[0].images[0]
        for prompt, way in (("a red star", ways[0]), ("a blue square", ways[0]), ("a red star", ways[1]))
    )
    hole = mask != 0
    assert (first[hole] != words[hole]).any(), "the caption says nothing"
    assert (first[hole] != condition[hole]).any(), "the condition says nothing"
    if name == "inpaint":
        with Image.open(ways[0]["image"][0]) as given:
            assert (first[~hole] == np.asarray(given)[~hole]).all()
