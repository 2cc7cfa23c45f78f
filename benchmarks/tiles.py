"""Decoding in tiles beside decoding whole: what tiles cost in dB, whether their borders show, and their memory.

.venv/bin/python -m benchmarks.tiles [KEY=VALUE ...] [--write]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from benchmarks.encoding.presets import changed
from pipeline.distributed.exits import guarded
from pipeline.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.models.encoders.first_stage import NetworkStage

EPILOG = """\
keys: work=quality (quality, memory) vae=demo sides=128,256 pictures=24 tile=64 overlaps=0,16,32
      norms=tile,small,whole middles=tile,whole seed=0
      with work=memory: side=2048 tile=512 threads=0 whole=0 (1: decode whole as well, where the memory is there)

Quality: pictures are scenes of captioned shapes of 64 x 64 on one background, moved so that no tile ends where a scene
does. The autoencoder's latents of each are decoded whole and in tiles, and both are compared with the picture.
middle: whether the middle block sees a tile or the whole picture. norms: of what the norms after it take mean and
deviation: of the tile, of the picture made as small as a tile, or of the whole picture, which is then decoded twice.
Lost: beside decoding whole. To whole: PSNR to what is decoded whole. The jump is the mean difference of neighbouring
pixels across the borders of tiles over that elsewhere.

Memory: one picture of side x side pixels is decoded in tiles by the architecture of Stable Diffusion's autoencoder with
random weights, in a process of its own, and its peak resident memory is compared with the model of memory.
"""
LOST, JUMP = 0.3, 1.5
"""dB that decoding in tiles may lose, and its jump at most."""
BAND = 4
"""Pixels on either side of a border that are its band."""
OFFSET = (24, 40)
"""Where a picture is cut from the scenes, in pixels."""
SCENE = 64


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    work: Literal["quality", "memory", "job"] = "quality"
    vae: str = "demo"
    sides: str = "128,256"
    pictures: int = 24
    tile: int = 64
    overlaps: str = "0,16,32"
    norms: str = "tile,small,whole"
    middles: str = "tile,whole"
    seed: int = 0
    side: int = 2048
    threads: int = 0
    whole: int = 0


@dataclass(frozen=True)
class Found:
    """One way of decoding. pictures: (n, H, W, 3) uint8. psnr: to the true ones, in dB. band: the same near borders.
    jump: ratio. seconds: for all pictures."""

    pictures: np.ndarray
    psnr: float
    band: float
    jump: float
    seconds: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tiles",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG,
    )
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--write", action="store_true", help="also write the tables to benchmarks/results/")
    options = parser.parse_intermixed_args(list(sys.argv[1:] if arguments is None else arguments))
    plan = changed(Plan(), options.overrides)
    if plan.work == "job":
        return job(plan)
    command = " ".join(["python -m benchmarks.tiles", *options.overrides])
    return guarded("benchmarks.tiles", lambda: run(plan, command, options.write))


def run(plan: Plan, command: str, write: bool) -> int:
    """Measure and print."""
    import torch

    from benchmarks.machine import device_slug, keep, machine

    if plan.threads:
        torch.set_num_threads(plan.threads)
    head = f"# {command}\n\n" + "\n".join(machine(torch.device("cpu"), torch.get_num_threads()))
    parts = quality(plan) if plan.work == "quality" else memory(plan)
    page = "\n\n".join([head, *parts]) + "\n"
    print(page)
    if write:
        path = keep(f"tiles-{plan.work}-{device_slug(torch.device('cpu'))}", page)
        print(f"written to benchmarks/results/{path.name}", file=sys.stderr)
    return 0


# --------------------------------------------------------------------------------------------------------------------
# Quality


def quality(plan: Plan) -> Iterator[str]:
    """A table for each size."""
    import torch

    from pipeline.config import EncodersConfig
    from pipeline.inference.pictures import from_uint8
    from pipeline.models.encoders.autoencoder import load_network

    stage = load_network(EncodersConfig(vae=plan.vae))
    for side in map(int, plan.sides.split(",")):
        truth = composed(plan.pictures, side, plan.seed)
        moments = [stage.mean(from_uint8(picture[None])) for picture in truth]
        yield table_of(plan, stage, truth, (torch.cat(moments) - stage.shift) * stage.scale)


def table_of(plan: Plan, stage: NetworkStage, truth: np.ndarray, z: Tensor) -> str:
    """The table of one size."""
    from benchmarks.machine import figure, table
    from pipeline.inference.tiles.stage import TiledStage, Way, overlap_of

    factor = stage.downsampling
    side = plan.tile // factor
    default = overlap_of(stage.model, side) * factor
    whole = measured(stage, truth, z, plan.tile, default)
    rows = [["whole", "", "", *_cells(whole, whole)]]
    ways = product(plan.middles.split(","), plan.norms.split(","), map(int, plan.overlaps.split(",")))
    for middle, norms, overlap in ways:
        way = Way(middle=middle, norms="tile" if norms == "tile" else "whole")  # type: ignore[arg-type]
        tiled = (small_stage() if norms == "small" else TiledStage)(stage, side, overlap // factor, way=way)
        found = measured(tiled, truth, z, plan.tile, overlap)
        rows.append([f"middle {middle}, norms {norms}", str(overlap), _verdict(found, whole), *_cells(found, whole)])
    head = ["way", "overlap", "held", "PSNR, dB", "lost, dB", "at borders, dB", "to whole, dB", "jump", "time, x whole"]
    pixels = truth.shape[1]
    title = f"## {len(truth)} pictures of {pixels} x {pixels} in tiles of {plan.tile} pixels"
    says = f"Held: at most {LOST} dB lost, jump at most {JUMP}. By default tiles share {figure(default)} pixels here."
    return f"{title}\n\n{table(head, rows)}\n\n{says}"


def _cells(found: Found, whole: Found) -> list[str]:
    return [
        f"{found.psnr:.2f}",
        f"{whole.psnr - found.psnr:.2f}",
        f"{found.band:.2f}",
        "" if found is whole else f"{_psnr(_errors(found.pictures, whole.pictures)):.2f}",
        f"{found.jump:.2f}",
        f"{found.seconds / whole.seconds:.1f}",
    ]


def _verdict(found: Found, whole: Found) -> str:
    return "yes" if whole.psnr - found.psnr <= LOST and found.jump <= JUMP else "no"


def measured(stage: Any, truth: np.ndarray, z: Tensor, tile: int, overlap: int) -> Found:
    """What a stage makes of latents, beside the pictures, in terms of the borders of tiles in pixels."""
    from pipeline.evaluation.metrics.seams import jump
    from pipeline.inference.pictures import to_uint8
    from pipeline.inference.tiles.windows import borders, spans

    began = time.perf_counter()
    pictures = to_uint8(stage.decode(z))
    seconds = time.perf_counter() - began
    side = truth.shape[1]
    at = borders(side, tile, spans(side, tile, overlap, stage.downsampling))
    near = np.zeros((side, side), bool)
    for border in at:
        near[max(0, border - BAND) : border + BAND] = True
        near[:, max(0, border - BAND) : border + BAND] = True
    errors = _errors(pictures, truth)
    return Found(pictures, _psnr(errors), _psnr(errors[:, near]), jump(pictures, at, at).ratio, seconds)


def small_stage() -> Any:
    """A TiledStage whose norms take the statistics of the picture made as small as a tile."""
    import torch.nn.functional as F

    from pipeline.inference.tiles.stage import TiledStage
    from pipeline.inference.tiles.windows import windows

    class Small(TiledStage):
        def _decode(self, z: Tensor, out: Tensor) -> None:
            self.z = z
            super()._decode(z, out)

        def _gather(self, norms: Any, *_: Any) -> None:
            sides = [max(1, side * self.side // max(self.z.shape[2:])) for side in self.z.shape[2:]]
            small = F.interpolate(self.z, sides, mode="nearest-exact")
            (only,) = windows(sides[0], sides[1], max(sides), 0)
            with norms.gathered_from(only):
                self._after_middle(self._until_middle(small), small)

    return Small


def _errors(pictures: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Squared differences of levels from 0 to 1."""
    return ((pictures.astype(np.float64) - others) / 255) ** 2


def _psnr(errors: np.ndarray) -> float:
    """PSNR of the pooled squared errors, of values up to 1."""
    return float(-10 * np.log10(errors.mean()))


def composed(count: int, side: int, seed: int) -> np.ndarray:
    """Pictures (count, side, side, 3) uint8 of many scenes on one background, cut so that borders of scenes lie OFFSET
    before multiples of 64."""
    from preprocess.shapes.drawing import render, scene

    across = -(-(side + max(OFFSET)) // SCENE)
    pictures = []
    for number in range(count):
        scenes = [scene(seed, number * across**2 + i, "val") for i in range(across**2)]
        drawn = [render(replace(one, background=scenes[0].background)) for one in scenes]
        grid = np.concatenate([np.concatenate(drawn[i * across : (i + 1) * across], axis=1) for i in range(across)])
        pictures.append(grid[OFFSET[0] : OFFSET[0] + side, OFFSET[1] : OFFSET[1] + side])
    return np.stack(pictures)


# --------------------------------------------------------------------------------------------------------------------
# Memory


def memory(plan: Plan) -> Iterator[str]:
    """Peaks of a decode of Stable Diffusion's architecture, measured and by the model."""
    from benchmarks.machine import table
    from pipeline.models.encoders.autoencoder import STABLE_DIFFUSION
    from pipeline.planning.inference import decode_bytes, stage_shape, tile_bytes

    shape = stage_shape(STABLE_DIFFUSION)
    latents = plan.side // shape.downsampling
    models = {
        "whole": decode_bytes(shape, 1, latents, latents),
        f"tiles of {plan.tile}": tile_bytes(shape, latents, latents, plan.tile // shape.downsampling),
    }
    rows = []
    for (name, modelled), whole in zip(models.items(), (1, 0), strict=True):
        found = process(replace(plan, whole=whole)) if plan.whole or not whole else None
        cells = [f"{found['bytes'] / 1e9:.2f}", f"{found['seconds']:.0f}"] if found else ["-", "-"]
        rows.append([name, f"{modelled / 1e9:.2f}", *cells])
    weights = 4 * shape.parameters / 1e9
    title = f"## One picture of {plan.side} x {plan.side} pixels by Stable Diffusion's autoencoder, fp32"
    head = ["decoded", "model of memory, GB", "measured, GB", "seconds"]
    yield f"{title}\n\n{table(head, rows)}\n\nBeside the weights, {weights:.2f} GB. Seconds are of this machine's load."


def process(plan: Plan) -> dict[str, float]:
    """What a decode in a process of its own takes: bytes at the peak beyond what it had before, and seconds."""
    import subprocess

    words = [f"{key}={getattr(plan, key)}" for key in ("side", "tile", "threads", "whole")]
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.tiles", "work=job", *words],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        raise DataError(f"the process that was to decode ended with status {ended.returncode}: {ended.stderr[-300:]}")
    return json.loads(ended.stdout.splitlines()[-1])


def job(plan: Plan) -> int:
    """Decode in this process, and print what it took."""
    import psutil
    import torch

    from pipeline.inference.tiles.stage import TiledStage
    from pipeline.models.encoders import packages
    from pipeline.models.encoders.autoencoder import STABLE_DIFFUSION
    from pipeline.models.encoders.first_stage import KLStage

    if plan.threads:
        torch.set_num_threads(plan.threads)
    torch.manual_seed(plan.seed)
    stage = KLStage(packages.AutoencoderKL.from_config(STABLE_DIFFUSION), torch.float32, torch.device("cpu"))
    side = plan.side // stage.downsampling
    decoder = stage if plan.whole else TiledStage(stage, plan.tile // stage.downsampling)
    stage.decode(torch.randn(1, 4, 8, 8))
    before = psutil.Process().memory_info().rss
    began = time.perf_counter()
    decoder.decode(torch.randn(1, 4, side, side))
    print(json.dumps({"bytes": most_resident() - before, "seconds": time.perf_counter() - began}))
    return 0


def most_resident() -> int:
    """Peak resident bytes of this process."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


if __name__ == "__main__":
    raise SystemExit(main())
