"""A rank of runs of every task: `python -m ranks.task_runs FOLDER die|finish`.

die: each run is left without a word before the step at LOST, past a commit, and the last one is killed with its
process. finish: each goes on to its end, and an undisturbed run of the same kind follows.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

from made import toy_task
from pipeline import train
from pipeline.config import (
    CheckpointConfig,
    ClassifierTask,
    ClassTask,
    DataConfig,
    DeepSpeedConfig,
    EmaConfig,
    EvalConfig,
    InpaintTask,
    LaunchConfig,
    LayoutTask,
    ModelConfig,
    OptimConfig,
    SemanticTask,
    SuperresTask,
    TaskConfig,
    TextTask,
    TrackingConfig,
    TrainConfig,
    UnconditionalTask,
)
from pipeline.distributed import world as distributed
from pipeline.distributed.exits import leave
from ranks import lost

BATCH, RECORDS = 8, 24
EVERY, LOST, END = 2 * BATCH, 3 * BATCH, 4 * BATCH  # where the first epoch ends, and in the second
WIDTH = 128  # of the demo tower's states
TASKS: dict[str, tuple[TaskConfig, Literal[2, 3]]] = {
    "class": (ClassTask(), 2),
    "class-vector": (ClassTask(mode="vector"), 2),
    "layout": (LayoutTask(paint=2, encoder="transformer", heads=2, head_width=8), 3),
    "semantic": (SemanticTask(), 2),
    "superres": (SuperresTask(noise=100, text=True, drop=0.1), 2),
    "inpaint": (InpaintTask(), 2),
    "text": (TextTask(), 2),
    "text-transformer": (TextTask(encoder="transformer", depth=1, heads=2, head_width=8), 3),
    "toy": (toy_task.ToyTask(drop=0.2), 2),
    "classifier": (ClassifierTask(), 3),
    "unconditional": (UnconditionalTask(), 2),  # the last one is killed
}
"""Name of a run -> its task and ZeRO stage. Layout and the text transformer learn beside the UNet, in stage 3; so does
the classifier, which is no UNet."""


def config_of(folder: Path, name: str, run: str) -> TrainConfig:
    task, stage = TASKS[name]
    cache = folder / "tokens/cache" if "tokens" in task.members else folder / "cache"
    return TrainConfig(
        run=str(folder / run / name),
        seed=3,
        data=DataConfig(train=str(cache)),
        model=ModelConfig(
            channels=8,
            multipliers=(1,),
            blocks=1,
            attention=(1,),
            heads=2,
            norm_groups=4,
            context_width=WIDTH if task.makes_context else 0,
            vector_width=6 if task.makes_vector else 0,
        ),
        task=task,
        optim=OptimConfig(name="muon", lr=1e-3, warmup=80, batch=BATCH),
        ema=EmaConfig(half_life=200.0),
        deepspeed=DeepSpeedConfig(stage=stage),
        checkpoint=CheckpointConfig(every=EVERY, keep=20),
        eval=EvalConfig(loss_images=0),
        tracking=TrackingConfig(wandb="off", every=BATCH),
        samples=END,
        device="cpu",
        launch=LaunchConfig(threads=1),
    )


def main(argv: list[str]) -> int:
    folder, what = Path(argv[0]), argv[1]
    toy_task.add()
    world = distributed.start("cpu", threads=1)
    if what == "die":
        lost.lose(lambda trainer: LOST, lambda trainer: Path(trainer.config.run).name == list(TASKS)[-1])
    for name in TASKS:
        config = config_of(folder, name, "disturbed")
        if what == "finish":
            train.train(config, world)
            train.train(replace(config, run=str(folder / "undisturbed" / name)), world)
        else:
            lost.train_until_lost(train.train, config, world)
    distributed.stop(world)
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
