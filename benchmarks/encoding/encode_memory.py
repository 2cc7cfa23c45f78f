"""Whether the memory of the encoding process and of its decoding workers stays flat over many samples."""

from __future__ import annotations

import contextlib
import io
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import psutil
import torch
from PIL import Image

from benchmarks.encoding.encode_verb import IdleEncoder, StageRun, run_verb
from benchmarks.encoding.photos import caption, photo
from benchmarks.encoding.presets import MemoryPreset
from benchmarks.machine import machine, table
from pipeline.config import EncodeConfig, LaunchConfig
from pipeline.data.format.records import END_OF_TAR, tar_member
from pipeline.distributed.place import cores
from preprocess import encode

DISTINCT = 256  # number of different images
SIDE = 64  # pixels
TENTHS = 10
MB = 1e6


@dataclass
class Watched:
    """Measurements of memory. seen: (seconds since the start, RSS of the process, RSS of its workers), in bytes."""

    preset: MemoryPreset
    run: StageRun
    seen: list[tuple[float, int, int]]
    device: torch.device

    def tenths(self) -> list[tuple[float, int, int, int]]:
        """For each tenth of the time: its end in seconds, and the peaks of the process, of the workers, and of their
        sum."""
        duration = self.seen[-1][0]
        rows = []
        for tenth in range(TENTHS):
            in_tenth = [entry for entry in self.seen if tenth * duration <= TENTHS * entry[0] <= (tenth + 1) * duration]
            if in_tenth:
                _, process, workers = zip(*in_tenth)
                total = max(entry[1] + entry[2] for entry in in_tenth)
                rows.append(((tenth + 1) * duration / TENTHS, max(process), max(workers), total))
        return rows

    @property
    def growth_mb(self) -> float:
        """Growth in MB of the summed peak from the first tenth to the later ones."""
        first, *later = (total for *_, total in self.tenths())
        return (max(later) - first) / MB if later else 0.0


class Watch(threading.Thread):
    """Records the memory of this process and its descendants every `every` seconds until it is stopped."""

    def __init__(self, every: float) -> None:
        super().__init__(name="benchmark-memory", daemon=True)
        self.every, self.seen = every, list[tuple[float, int, int]]()
        self._ended = threading.Event()

    def run(self) -> None:
        started = time.perf_counter()
        while True:
            self.seen.append((time.perf_counter() - started, *resident()))
            if self._ended.wait(self.every):
                return

    def stop(self) -> None:
        self._ended.set()
        self.join()


def resident() -> tuple[int, int]:
    """RSS in bytes of this process, and of its descendants."""
    process = psutil.Process()
    below = 0
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            below += child.memory_info().rss
    return process.memory_info().rss, below


def write_small(folder: Path, samples: int, shard: int) -> str:
    """Write tars of small captioned JPEGs and return their pattern."""
    place = folder / f"small-{samples}-{shard}"
    last = -(-samples // shard) - 1
    pattern = str(place / f"{{00000..{last:05d}}}.tar")
    if (place / "complete").exists():
        return pattern
    place.mkdir(parents=True, exist_ok=True)
    jpegs = [_small(number) for number in range(min(DISTINCT, samples))]
    texts = [caption(number).encode() for number in range(min(DISTINCT, samples))]
    for number in range(last + 1):
        with (place / f"{number:05d}.tar").open("wb") as tar:
            for row in range(number * shard, min((number + 1) * shard, samples)):
                key, image = f"{row:09d}", row % len(jpegs)
                tar.write(tar_member(f"{key}.jpg", jpegs[image]))
                tar.write(tar_member(f"{key}.txt", texts[image] + b", sample %d" % row))
            tar.write(END_OF_TAR)
    (place / "complete").touch()
    return pattern


def _small(number: int) -> bytes:
    out = io.BytesIO()
    Image.open(io.BytesIO(photo(number, 2 * SIDE, 2 * SIDE))).resize((SIDE, SIDE)).save(out, "JPEG", quality=85)
    return out.getvalue()


def watch(preset: MemoryPreset, folder: Path) -> Watched:
    """Encode the preset's samples with the verb in this process and record its memory."""
    source = write_small(Path(preset.folder).expanduser() if preset.folder else folder, preset.samples, preset.shard)
    config = EncodeConfig(
        source=source,
        dest=str(folder / "cache"),
        resolution=(SIDE,),
        workers=preset.workers or cores(),
        max_rejects=0.0,
        launch=LaunchConfig(threads=cores()),
        device="cpu",
    )
    watch = Watch(preset.every)
    real = encode.encode_units

    def watched(*arguments: object) -> str:
        """Watch only the stage, not the loading before it or the manifest after it."""
        watch.start()
        try:
            return real(*arguments)  # type: ignore[arg-type]
        finally:
            watch.stop()

    encoder = IdleEncoder if preset.encoders == "none" else encode.Encoder
    with mock.patch.multiple(encode, Encoder=encoder, encode_units=watched):
        run = run_verb(config)
    return Watched(preset, run, watch.seen, torch.device("cpu"))


def told(watched: Watched, command: str) -> str:
    """A page of Markdown."""
    preset, run = watched.preset, watched.run
    growth = watched.growth_mb
    encoders = {
        "none": "replaced by zeros of the shapes that the demo encoders give",
        "demo": "the demo encoders",
    }
    rows = [
        [f"{seconds:.1f} s", f"{process / MB:.0f}", f"{workers / MB:.0f}", f"{total / MB:.0f}"]
        for seconds, process, workers, total in watched.tenths()
    ]
    return "\n".join(
        [
            "# encode, memory",
            "",
            f"- command: `{command}`",
            *machine(watched.device, cores()),
            f"- {run.images:,} JPEGs of {SIDE}x{SIDE} in tars of {preset.shard:,}; encoders: "
            f"{encoders[preset.encoders]}; all else is the verb's own",
            f"- `{run.line}`",
            "",
            table(("until", "process, MB", "its workers, MB", "together, MB"), rows),
            "",
            "Peaks of resident memory (RSS) in each tenth of the stage's time; what processes share counts in each.",
            "",
            f"- growth after the first tenth: {growth:.0f} MB; flat (at most {preset.flat_mb:g} MB): "
            f"{'yes' if growth <= preset.flat_mb else 'NO'}",
            "",
        ]
    )
