"""All encode figures of one NVIDIA GPU, in one command of at most eight minutes:

    .venv/bin/python -m benchmarks.gpu_encode

Compares bfloat16 with float32 moments, then measures the presets sd1-256 and sd1-512; tables go to benchmarks/results/.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

# Decoding workers import this module when it runs, so nothing heavy is imported at its top.
from benchmarks.encoding.presets import PRESETS, SD1_BF16, Preset
from pipeline.config import EncodersConfig
from pipeline.distributed.exits import guarded

if TYPE_CHECKING:
    import torch

SECONDS = 450  # for everything
SIDES = (256, 512)
MOST_ERROR = 0.02  # of bfloat16 moments, relative (RMS over RMS)
IMAGES = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark. Returns exit status 1 without a GPU or when bfloat16 errors are too large."""
    import torch

    command_line = list(sys.argv[1:] if arguments is None else arguments)
    if command_line:
        print(f"benchmarks.gpu_encode takes no arguments, not {' '.join(command_line)}\n\n{__doc__}", file=sys.stderr)
        return 0 if command_line[0] in ("-h", "--help") else 2
    if not torch.cuda.is_available():
        print(
            "benchmarks.gpu_encode: PyTorch sees no CUDA device here: run it on a machine with an NVIDIA GPU and a "
            "CUDA build of PyTorch (`python -m benchmarks.encode` measures CPUs)",
            file=sys.stderr,
        )
        return 1
    shares = {PRESETS["sd1-256"]: 0.5, PRESETS["sd1-512"]: 1.0}
    return guarded("benchmarks.gpu_encode", lambda: measure_all(torch.device("cuda"), SD1_BF16, SIDES, shares))


def measure_all(
    device: torch.device, encoders: EncodersConfig, sides: Sequence[int], shares: dict[Preset, float]
) -> int:
    """Compare precisions, then measure presets and store their tables. Returns the exit status.

    shares: for each preset the share of SECONDS by which it must be finished.
    """
    from benchmarks.encoding.encode_rounds import measure, report
    from benchmarks.machine import device_slug, keep

    started = time.perf_counter()
    errors = precision(encoders, device, sides)
    lines = [f"- bfloat16 against float32 moments, {told(side, error)}" for side, error in errors.items()]
    _say("\n".join(lines))
    with tempfile.TemporaryDirectory(prefix="latentmill-benchmark-") as folder:
        for preset, share in shares.items():
            seconds_left = max(1, int(SECONDS * share - (time.perf_counter() - started)))
            preset_folder = Path(folder) / preset.name
            preset_folder.mkdir()
            kind: Literal["cuda", "cpu"] = "cuda" if device.type == "cuda" else "cpu"
            timed_preset = replace(preset, device=kind, seconds=seconds_left, folder=f"{folder}/source")
            text = report(measure(timed_preset, preset_folder, _say), "python -m benchmarks.gpu_encode")
            text = text.rstrip("\n") + "\n" + "\n".join(lines) + "\n"
            print(text)
            path = keep(f"encode-{preset.name}-{device_slug(device)}", text)
            _say(f"written to benchmarks/results/{path.name}")
    _say(f"all of it took {time.perf_counter() - started:.0f} s")
    return 0 if all(error <= MOST_ERROR for error in errors.values()) else 1


def precision(encoders: EncodersConfig, device: torch.device, sides: Sequence[int]) -> dict[int, float]:
    """Relative error (RMS over RMS) of a bfloat16 autoencoder's moments of photo-like images, by side."""
    import torch

    from benchmarks.encoding.photos import photo
    from pipeline.config import LimitsConfig
    from pipeline.models.encoders.autoencoder import load_autoencoder
    from preprocess.encoding.encoder import to_unit_range
    from preprocess.source.image import crop_image, decode_image, open_image, place_crop

    rough = load_autoencoder(replace(encoders, vae_dtype="bfloat16"), device)
    exact = rough.float32()
    errors = {}
    for side in sides:
        crops = []
        for number in range(IMAGES):
            data = photo(number, 2 * side, 3 * side // 2)
            image = decode_image(open_image(data, LimitsConfig()), data)
            crop = place_crop(*image.size, (side, side), "centre", 0, "")
            crops.append(torch.from_numpy(crop_image(image, crop).copy()))
        images = to_unit_range(torch.stack(crops)).to(device)
        expected = exact.encode(images)
        errors[side] = float((rough.encode(images) - expected).norm() / expected.norm())
    return errors


def told(side: int, error: float) -> str:
    """One side's error and its verdict."""
    verdict = "met" if error <= MOST_ERROR else "MISSED"
    return f"{side}x{side}: relative error {error:.2g} (target <= {MOST_ERROR:g}: {verdict})"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
