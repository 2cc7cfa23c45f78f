"""SimpleTuner's cached latents as files that `latentmill index dest=` reads, each with its caption beside it.

    python examples/simpletuner_latents.py photos cache/vae latents

    latents/a.safetensors    the tensor `latents` of photos/a.jpg, as cached: (4, h, w), scaled (`index scaled=true`)
    latents/a.txt            the first line of photos/a.txt; SimpleTuner takes each line for a caption, an index one

SimpleTuner names what it caches of FOLDER/NAME.jpg FOLDER/HASH.pt, where HASH is the SHA-256 of NAME in hexadecimal.
Files are read as tensors alone (`torch.load(weights_only=True)`), gzipped or not. What is not there, or is no latent,
is named at the end, and nothing is written for it. Exit status 1 says that there was such a file.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

IMAGES = (".jpg", ".jpeg", ".png", ".webp")
GZIP = b"\x1f\x8b"
MOST = 1 << 26
"""Bytes of a file, once it is unpacked."""


def latent_of(path: Path) -> Tensor:
    """The latent (4, h, w) in a cached file. Raises ValueError, which says what is wrong with it."""
    try:
        data = path.read_bytes()
        if data.startswith(GZIP):
            data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(MOST + 1)
        if len(data) > MOST:
            raise ValueError(f"it has more than {MOST} bytes")
        held = torch.load(io.BytesIO(data), "cpu", weights_only=True)
    except ValueError:
        raise
    except Exception as error:  # of torch, gzip and zip files, which have no common base
        raise ValueError(f"it cannot be read as tensors ({type(error).__name__})") from None
    latent = held.get("latents") if isinstance(held, dict) else held
    if not isinstance(latent, Tensor) or latent.ndim != 3 or latent.shape[0] != 4 or not latent.is_floating_point():
        raise ValueError(f"it holds no latent (4, h, w) but {getattr(latent, 'shape', type(latent).__name__)}")
    return latent


def caption_of(image: Path) -> str:
    """The first line of an image's caption that is not empty. Raises ValueError."""
    try:
        lines = image.with_suffix(".txt").read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise ValueError(f"its caption cannot be read ({type(error).__name__})") from None
    caption = next((line.strip() for line in lines if line.strip()), "")
    if not caption:
        raise ValueError("its caption is empty")
    return caption


def convert(images: Path, cache: Path, dest: Path) -> tuple[int, list[str]]:
    """Writes what is cached of a folder of images. Returns how many latents, and a line for each that could not be."""
    written, problems, seen = 0, list[str](), set[Path]()
    for image in sorted(path for path in images.rglob("*") if path.suffix.lower() in IMAGES):
        place = image.relative_to(images)
        name = f"{hashlib.sha256(place.stem.encode()).hexdigest()}.pt"
        try:
            if place.with_suffix("") in seen:
                raise ValueError("another image has its name but for the suffix, and the cache holds one of them")
            seen.add(place.with_suffix(""))
            if not (cache / place.parent / name).is_file():
                raise ValueError(f"{cache / place.parent / name} is not there")
            latent, caption = latent_of(cache / place.parent / name), caption_of(image)
        except ValueError as error:
            problems.append(f"{image}: {error}")
            continue
        (dest / place).parent.mkdir(parents=True, exist_ok=True)
        save_file({"latents": latent.contiguous()}, (dest / place).with_suffix(".safetensors"))
        (dest / place).with_suffix(".txt").write_text(caption, encoding="utf-8")
        written += 1
    return written, problems


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="SimpleTuner's cached latents to .safetensors with captions beside.")
    parser.add_argument("images", type=Path, help="its instance_data_dir, with a .txt beside each image")
    parser.add_argument("cache", type=Path, help="its cache_dir_vae")
    parser.add_argument("dest", type=Path)
    options = parser.parse_args(arguments)
    written, problems = convert(options.images, options.cache, options.dest)
    sys.stderr.write("".join(f"left out: {problem}\n" for problem in problems))
    sys.stdout.write(f"{options.dest}: {written} latents, {len(problems)} left out\n")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
