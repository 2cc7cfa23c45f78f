"""scikit-learn's handwritten digits as WebDataset shards: a small set of real pictures with classes and captions.

    python examples/digits.py digits                # needs scikit-learn: pip install 'latentmill[examples]'

    digits/00000.tar ...         three quarters of the digits, to train on
    digits/val/00000.tar ...     the others, drawn by `--seed` from each class alike
    digits/classes.txt           the ten classes' names, in order

A record is KEY.png (64 x 64 pixels, RGB, white on black), KEY.cls (its class, 0 to 9) and KEY.txt ("a handwritten
seven"). The set has 1,797 digits of 8 x 8 pixels, of which each becomes a picture by bicubic interpolation (Alpaydin &
Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI). Equal arguments give equal pictures in an equal order.
"""

from __future__ import annotations

import argparse
import io
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INK = 16
"""The greatest value of a digit's pixels."""
HELD_OUT = 0.25
SHARD = 250
"""Pictures in a shard."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the shards; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dest", type=Path, help="folder to write, which must be new or empty")
    parser.add_argument("--side", type=int, default=64, help="pixels of a picture along a side")
    parser.add_argument("--seed", type=int, default=0, help="which digits are held out, and in which order they lie")
    args = parser.parse_args(arguments)
    if args.dest.exists() and (not args.dest.is_dir() or any(args.dest.iterdir())):
        return _fail(f"{args.dest} exists and is not empty: choose another folder")
    if args.side < 8:
        return _fail(f"--side {args.side}: 8 or more is wanted, as the digits have")
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        return _fail("scikit-learn ships the digits and is not installed: pip install 'latentmill[examples]'")
    digits, classes = load_digits(return_X_y=True)
    train, val = split(classes, args.seed)
    for folder, chosen in ((args.dest, train), (args.dest / "val", val)):
        write(folder, digits[chosen].reshape(-1, 8, 8), classes[chosen], args.side)
    (args.dest / "classes.txt").write_text("".join(f"{name}\n" for name in NAMES), encoding="utf-8")
    sys.stdout.write(f"{args.dest}: {len(train):,} digits to train on, {len(val):,} in {args.dest / 'val'}\n")
    return 0


def split(classes: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the digits to train on, and of those held out: HELD_OUT of each class, each in a drawn order."""
    order = np.random.default_rng(seed).permutation(len(classes))
    held_out = np.zeros(len(classes), dtype=bool)
    for number in range(len(NAMES)):
        of_class = order[classes[order] == number]
        held_out[of_class[: round(HELD_OUT * len(of_class))]] = True
    return order[~held_out[order]], order[held_out[order]]


def picture(digit: np.ndarray, side: int) -> Image.Image:
    """A digit (8, 8) with values from 0 to INK as a picture of `side` pixels."""
    grey = Image.fromarray(np.rint(digit * (255 / INK)).astype(np.uint8))
    return grey.resize((side, side), Image.Resampling.BICUBIC).convert("RGB")


def write(folder: Path, digits: np.ndarray, classes: np.ndarray, side: int) -> None:
    """Write the shards of digits (N, 8, 8) with classes (N,)."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, first in enumerate(range(0, len(digits), SHARD)):
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for row, (digit, number) in enumerate(zip(digits[first : first + SHARD], classes[first : first + SHARD])):
                png = io.BytesIO()
                picture(digit, side).save(png, "png")
                key, caption = f"{shard:05d}{row:04d}", f"a handwritten {NAMES[number]}"
                for suffix, data in (("cls", str(number)), ("png", png.getvalue()), ("txt", caption)):
                    payload = data.encode() if isinstance(data, str) else data
                    member = tarfile.TarInfo(f"{key}.{suffix}")  # mtime 0 and owner 0, whoever writes it
                    member.size = len(payload)
                    tar.addfile(member, io.BytesIO(payload))


def _fail(words: str) -> int:
    sys.stderr.write(f"digits: {words}\n")
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
