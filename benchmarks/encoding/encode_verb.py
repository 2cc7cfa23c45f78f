"""`latentmill encode` in this process, timed; and the same with encoders that cost nothing."""

from __future__ import annotations

import contextlib
import io
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil

from pipeline.config import EncodeConfig
from preprocess import encode
from preprocess.encoding.encoder import Batch, Encoded, Encoder
from preprocess.encoding.stage import Stage, Tally
from preprocess.source.decoders import Decoders


class TimedStage(Stage):
    """The stage, which says afterwards how long it took, by the clock and in CPU time."""

    last: TimedStage

    def run(self, *arguments: Any, **options: Any) -> str:
        TimedStage.last = self
        started, cpu = time.perf_counter(), cpu_seconds()
        self.line = super().run(*arguments, **options)
        self.seconds, self.cpu_seconds = time.perf_counter() - started, cpu_seconds() - cpu
        return self.line


class IdleEncoder(Encoder):
    """Zeros of the right shapes, at once."""

    def encode(self, batch: Batch) -> Encoded:
        width, height = batch.items[0].picture.crop.size
        factor, channels = self.first_stage.downsampling, 2 * self.first_stage.latent_channels
        moments = np.zeros((len(batch.items), channels, height // factor, width // factor), np.float16)
        assert self.text is not None, "captions are encoded"
        text = np.zeros((len(batch.items), self.text.length, self.text.width), np.float16)
        return Encoded(
            batch=batch,
            stored="moments",
            images=moments,
            text=text,
            masked=None,
            retried=False,
            eot=self.text.eot,
            seconds=(0.0, 0.0),
        )


class ReadyDecoders(Decoders):
    """Decoding workers that have started, as they have when the verb has loaded its encoders."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        for answer in [self.submit([]) for _ in range(2 * self.count)]:
            answer.result()


@dataclass(frozen=True)
class StageRun:
    """What a run of the verb took. seconds: of its stage alone; verb_seconds: with loading and everything else."""

    images: int
    seconds: float
    verb_seconds: float
    cpu_seconds: float
    tally: Tally
    line: str

    @property
    def per_second(self) -> float:
        return self.images / self.seconds


@contextlib.contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """A folder that does not exist yet, and is gone afterwards."""
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def run_verb(config: EncodeConfig) -> StageRun:
    """`latentmill encode` in this process; what it prints is kept for its line about time alone."""
    with (
        mock.patch.object(encode, "Stage", TimedStage),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        started = time.perf_counter()
        encode.main(config)
        seconds = time.perf_counter() - started
    stage = TimedStage.last
    return StageRun(stage.tally.accepted, stage.seconds, seconds, stage.cpu_seconds, stage.tally, stage.line)


def cpu_seconds() -> float:
    """CPU time of this process and its running descendants, without those that have ended."""
    this_process = psutil.Process()
    total = 0.0
    for process in (this_process, *this_process.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total
