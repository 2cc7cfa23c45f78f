"""Where an array lies in a record of other software: `FILE[:ARRAY][:DTYPE[:SHAPE]]`.

latent.npy:bfloat16               a .npy of uint16 that holds the bits of bfloat16
npz:latents                       the array `latents` of KEY.npz
x.safetensors:mean                a tensor of KEY.x.safetensors
latents_256:float16:4x32x32       a column of raw bytes of an MDS shard
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipeline.errors import ConfigError

FLOATS = ("float16", "float32", "float64", "bfloat16")
INTEGERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "int64")
CONTAINERS = ("npz", "safetensors")
"""Ends of the names of files that hold several arrays."""
SIDES = re.compile(r"[1-9]\d{0,5}(x[1-9]\d{0,5}){0,7}")


@dataclass(frozen=True)
class Place:
    """The place of an array. file: the file of the record, named after the key and the dot, or the column. array: its
    name in a file of several arrays. dtype, shape: what the file does not say, or is to be taken for; "" and () = what
    it says."""

    file: str
    array: str = ""
    dtype: str = ""
    shape: tuple[int, ...] = ()

    @property
    def container(self) -> str:
        """The kind of file that holds several arrays: npz, safetensors; "" for others."""
        end = self.file.rpartition(".")[2].lower()
        return end if end in CONTAINERS else ""


def parse_place(text: str) -> Place:
    """The place that a text names. Raises ConfigError, whose message goes on after the text."""
    file, *rest = text.split(":")
    if not file or "/" in file or "\0" in file:
        raise ConfigError("FILE[:ARRAY][:DTYPE[:SHAPE]] is wanted, such as latent.npy:bfloat16 or npz:latents")
    place = Place(file)
    if place.container:
        if not rest or not rest[0]:
            raise ConfigError(f"it does not say which array of the file, as in {file}:latents")
        place = Place(file, rest.pop(0))
    dtype, shape, *more = [*rest, "", ""][: max(len(rest), 2)]
    if dtype and dtype not in FLOATS + INTEGERS:
        raise ConfigError(f"{dtype} is no dtype: one of {', '.join(FLOATS + INTEGERS)} is wanted")
    if (shape and not SIDES.fullmatch(shape)) or more:
        raise ConfigError("a shape such as 4x32x32 is wanted at its end")
    return Place(place.file, place.array, dtype, tuple(map(int, shape.split("x"))) if shape else ())
