"""A rank of runs of autoencoders: `python -m ranks.first_stage_runs FOLDER begin|finish`.

begin: every engine takes the gradients of single steps with L1, in FOLDER/gradients{world}, and trains both kinds for
some steps, in FOLDER/engines{world}; then runs in FOLDER/disturbed{world} are left without a word before the step at
LOST, and the last one is killed with its process. finish: each goes on to its end, and an undisturbed run of the same
kind follows.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from made.first_stage_reference import batch_of, share_of, step_of, weights_of
from made.pixels import BATCH, KL, VQ, config_of
from pipeline import autoencoder
from pipeline.config import AutoencoderConfig, DeepSpeedConfig, FirstStageLossConfig
from pipeline.distributed import world as distributed
from pipeline.distributed.exits import leave
from pipeline.distributed.world import World
from pipeline.models.first_stage.trainable import TrainableAutoencoder
from pipeline.training.engines.choose import make_engine
from pipeline.training.objectives.first_stage import FirstStageObjective
from ranks import lost

STAGES = {"kl": KL, "vq": VQ}
ENGINES = {
    1: ("kl-torch", "kl-zero0", "kl-zero1", "kl-zero2", "kl-torch-2", "kl-zero2-2", "vq-torch", "vq-zero2"),
    2: ("kl-zero0", "kl-zero1", "kl-zero2", "vq-zero1", "vq-zero2"),
}
"""Ranks -> regularizer, engine, and the number of micro-batches where it is not 1."""
LOST = {"kl-start": 3 * BATCH, "vq-ramp": 5 * BATCH, "vq-start": 3 * BATCH}
"""Name of a run -> n at which it is left. It resumes a batch earlier: where the discriminator is not trained yet and no
code was restarted, or where its weight rises."""
assert list(LOST)[-1] == "vq-start", "the last one is killed"
STEPS = {"rests": 0, "trains": 3 * BATCH, "whole": 6 * BATCH}
"""What the discriminator does in a step -> its n."""


def engine_config(folder: Path, name: str, world: World) -> AutoencoderConfig:
    stage, engine, *micro_batches = name.split("-")
    settings: Any = {"engine": "torch"} if engine == "torch" else {"stage": int(engine[-1])}
    config = config_of(str(folder / "pixels"), folder / f"engines{world.size}" / name, STAGES[stage])
    optim = replace(config.optim, micro_batch=BATCH // world.size // int(*micro_batches or "1"))
    return replace(config, deepspeed=DeepSpeedConfig(**settings), optim=optim)


def take_gradients(folder: Path, name: str, world: World) -> None:
    """One engine's step at each n of STEPS from the same weights: gradients, norms and figures as files of rank 0."""
    config = gradient_config(engine_config(folder, name, world))
    module = TrainableAutoencoder(config.autoencoder, config.gan)
    module.load_state_dict(weights_of(config))
    engine = make_engine(module, config, world)
    where = folder / f"gradients{world.size}" / name
    for step, n in STEPS.items():
        objective = FirstStageObjective(config, engine=engine)
        found = step_of(engine, objective, objective.prepare(batch_of(n, share_of(config, n, world))))
        engine.skip()
        if world.rank == 0:
            where.mkdir(parents=True, exist_ok=True)
            save_file(found.gradients, where / f"{step}.safetensors")
            (where / f"{step}.json").write_text(json.dumps([found.figures, found.norms]))
    engine.destroy()


def gradient_config(config: AutoencoderConfig) -> AutoencoderConfig:
    """A run's configuration with the paper's L1 for single steps."""
    return replace(config, loss=FirstStageLossConfig(l1=1.0, kl=1e-3))


def lost_config(folder: Path, name: str, world: World, kind: str) -> AutoencoderConfig:
    config = config_of(str(folder / "pixels"), folder / f"{kind}{world.size}" / name, STAGES[name.partition("-")[0]])
    stage = 2 if world.size > 1 else 1
    return replace(config, deepspeed=DeepSpeedConfig(stage=stage), samples=7 * BATCH)  # type: ignore[arg-type]


def main(argv: list[str]) -> int:
    folder, what = Path(argv[0]), argv[1]
    world = distributed.start("cpu", threads=1)
    if what == "begin":
        for name in ENGINES[world.size]:
            take_gradients(folder, name, world)
            autoencoder.train(engine_config(folder, name, world), world)
        lost.lose(
            lambda trainer: LOST.get(Path(trainer.config.run).name),
            lambda trainer: Path(trainer.config.run).name == list(LOST)[-1],
        )
    for name in LOST:
        config = lost_config(folder, name, world, "disturbed")
        if what == "finish":
            autoencoder.train(config, world)
            autoencoder.train(lost_config(folder, name, world, "undisturbed"), world)
        else:
            lost.train_until_lost(autoencoder.train, config, world)
    distributed.stop(world)
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
