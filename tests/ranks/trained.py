"""A rank of `latentmill train`: `python -m ranks.trained CONFIG`, which is what `pack` makes of a configuration."""

from __future__ import annotations

import sys
from functools import partial

from pipeline import train
from pipeline.config import TrainConfig
from pipeline.config.loading.stored import unpack
from pipeline.distributed.exits import guarded, leave


def main(argv: list[str]) -> int:
    return guarded("train", partial(train.main, unpack(TrainConfig, argv[0])))


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
