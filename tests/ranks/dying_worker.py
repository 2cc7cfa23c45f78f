"""A decoding worker on which samples have effects, by their keys: "signal 11" ends the process by that signal, "once 11
FILE" only if FILE is not there yet, "sleep" keeps a processor busy, "memory" asks for all there is."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from preprocess.source import worker
from preprocess.source.recipe import Recipe
from preprocess.source.sample import Prepared
from preprocess.source.shard import Sample

prepare = worker.prepare


def dying(sample: Sample, recipe: Recipe, tokenize: Callable[[str], tuple[list[int], int]] | None) -> Prepared:
    """What takes the place of `prepare`."""
    what, *words = sample.key.split()
    if what == "once" and not Path(words[1]).exists():
        Path(words[1]).touch()
        what = "signal"
    if what == "signal":
        os.kill(os.getpid(), int(words[0]))
    if what == "exit":
        os._exit(int(words[0]))
    while what == "sleep":
        pass
    if what == "memory":
        np.ones(1 << 38, np.uint8)
    return prepare(sample, recipe, tokenize)


if __name__ == "__main__":
    worker.prepare = dying
    worker.serve(sys.argv[1:])
