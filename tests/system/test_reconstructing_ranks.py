"""The evaluation of an autoencoder by two real ranks, inside training: its figures are those of one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from made.autoencoder_run import make_pixels as make_val
from made.pixels import BATCH, KL, VQ, config_of, make_pixels
from pipeline import autoencoder, cli
from pipeline.config import (
    CheckpointConfig,
    DataConfig,
    DeepSpeedConfig,
    FirstStageConfig,
    FirstStageEvalConfig,
    LaunchConfig,
    TrackingConfig,
)
from pipeline.evaluation.reconstruction.card import OF_THE_MACHINE, Card, parse_card

pytestmark = [pytest.mark.timeout(300), pytest.mark.long]
IMAGES = 13
END = 2 * BATCH


def card_at(run: str, pattern: str) -> tuple[Card, np.ndarray]:
    """An evaluation's card, and its worst reconstructions as pixels."""
    (place,) = Path(run).glob(f"evals/{pattern}")
    with Image.open(place / "grid.png") as grid:
        return parse_card((place / "card.json").read_bytes()), np.asarray(grid).astype(int)


def figures(card: Card) -> dict[str, Any]:
    """All figures but times, one number to a name."""
    flat = dict[str, Any]()
    for name, value in card.metrics.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": number for key, number in value.items()}
        elif name not in OF_THE_MACHINE and isinstance(value, int | float):
            flat[name] = value
    return flat


@pytest.mark.parametrize("stage", [KL, VQ], ids=lambda stage: stage.name)
def test_two_ranks_evaluate_as_one_process_does(stage: FirstStageConfig, tmp_path: Path) -> None:
    """At the beginning, against one process that trains; at the end, against `latentmill eval` of the commit."""
    make_pixels(tmp_path)
    make_val(str(tmp_path / "val"), [7, 0, 5, 3])
    alone = config_of(
        str(tmp_path / "pixels"),
        tmp_path / "alone",
        stage,
        data=DataConfig(train=str(tmp_path / "pixels"), val=str(tmp_path / "val")),
        eval=FirstStageEvalConfig(every=END, images=IMAGES, pairs=4, batch=2),
        checkpoint=CheckpointConfig(every=END),
        tracking=TrackingConfig(wandb="off", every=BATCH),
        samples=END,
    )
    together = replace(
        alone,
        run=str(tmp_path / "together"),
        deepspeed=DeepSpeedConfig(stage=2),
        launch=LaunchConfig(processes=2, threads=1),
    )
    assert autoencoder.main(alone) == autoencoder.main(together) == 0
    assert cli.main(["eval", f"run={together.run}", f"images={IMAGES}", "batch=2"]) == 0
    pairs = [
        (card_at(alone.run, f"{0:012d}"), card_at(together.run, f"{0:012d}")),
        (card_at(together.run, f"{END:012d}-*"), card_at(together.run, f"{END:012d}")),
    ]
    for (one, drawn_by_one), (two, drawn_by_two) in pairs:
        assert one.images == two.images == IMAGES and (one.vae_sha256, one.weights) == (two.vae_sha256, two.weights)
        assert figures(two) == pytest.approx(figures(one), rel=1e-6)
        assert np.abs(drawn_by_two - drawn_by_one).max() <= 1
    assert figures(pairs[0][0][0])["psnr"] != figures(pairs[1][0][0])["psnr"], "the weights are the same"
