"""Builds colour profiles (ICC.1:2001-04, version 2) byte by byte, and says what colours they make."""

from __future__ import annotations

import struct
from collections.abc import Mapping

import numpy as np

D50 = (0.9642, 1.0, 0.8249)
ADOBE = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
"""Columns: XYZ (D50) of red, green and blue."""
CORNERS: dict[tuple[int, ...], tuple[int, int, int]] = {
    (0, 0, 0, 0): (255, 0, 0), (255, 0, 0, 0): (140, -38, -46), (0, 255, 0, 0): (122, 72, -8),
    (0, 0, 255, 0): (225, -8, 90), (0, 0, 0, 255): (30, 0, 0),
}  # fmt: skip
"""L (0 to 255), a and b of white paper and of single inks."""


def fixed(*numbers: float) -> bytes:
    """s15Fixed16 numbers."""
    return struct.pack(f">{len(numbers)}i", *(round(number * 65536) for number in numbers))


def xyz(numbers: tuple[float, ...]) -> bytes:
    return b"XYZ \0\0\0\0" + fixed(*numbers)


def curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def table(values: np.ndarray) -> bytes:
    """A curve of values from 0 to 1."""
    return b"curv\0\0\0\0" + struct.pack(">I", len(values)) + (values * 65535).round().astype(">u2").tobytes()


def profile(kind: bytes, space: bytes, connection: bytes, tags: Mapping[bytes, bytes]) -> bytes:
    """A profile of these tags."""
    place, entries, bodies = 132 + 12 * len(tags), b"", b""
    for name, body in tags.items():
        entries += name + struct.pack(">II", place + len(bodies), len(body))
        bodies += body + bytes(-len(body) % 4)
    head = struct.pack(">I4sI4s4s4s12s4s", place + len(bodies), b"", 0x02400000, kind, space, connection, b"", b"acsp")
    head += bytes(28) + fixed(*D50) + bytes(48)
    assert len(head) == 128
    return head + struct.pack(">I", len(tags)) + entries + bodies


def rgb_profile(matrix: np.ndarray = ADOBE, gamma: float | bytes = 2.2, kind: bytes = b"mntr") -> bytes:
    """A profile of red, green and blue."""
    shape = gamma if isinstance(gamma, bytes) else curve(gamma)
    tags = {b"wtpt": xyz(D50)}
    for i, name in enumerate("rgb"):
        tags[f"{name}XYZ".encode()] = xyz(tuple(matrix[:, i]))
        tags[f"{name}TRC".encode()] = shape
    return profile(kind, b"RGB ", b"XYZ ", tags)


def srgb_profile() -> bytes:
    """sRGB, as others write it: its curve as a table of 1024 values."""
    return rgb_profile(SRGB, table(linear(np.linspace(0, 1, 1024))))


def grey_profile(gamma: float | bytes = 1.0) -> bytes:
    shape = gamma if isinstance(gamma, bytes) else curve(gamma)
    return profile(b"mntr", b"GRAY", b"XYZ ", {b"wtpt": xyz(D50), b"kTRC": shape})


def lifted(black: float, gamma: float) -> bytes:
    """The curve of a device whose black has the share `black` of the light of its white."""
    return table(black + (1 - black) * np.linspace(0, 1, 4096) ** gamma)


def cmyk_profile(black: int | None = None) -> bytes:
    """A profile of a press whose single inks have the colours of CORNERS; several inks together are black: L = 0, or
    `black` (0 to 255), which the profile then also says in its way back, from all that is dark to all inks."""
    straight = np.arange(256, dtype=np.uint8).tobytes()
    nodes = b""
    for number in range(16):
        inks = tuple(255 * (number >> shift & 1) for shift in (3, 2, 1, 0))
        light, a, b = CORNERS.get(inks, (black or 0, 0, 0))
        nodes += bytes((light, a + 128, b + 128))
    head = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    lut = head + straight * 4 + nodes + straight * 3
    tags = {b"wtpt": xyz(D50), b"A2B0": lut, b"A2B1": lut}
    if black is not None:
        head = b"mft1\0\0\0\0" + bytes((3, 4, 2, 0)) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
        tags[b"B2A0"] = head + straight * 3 + b"\xff" * 16 + bytes(16) + straight * 4
    return profile(b"prtr", b"CMYK", b"Lab ", tags)


def linear(values: np.ndarray) -> np.ndarray:
    """sRGB values from 0 to 1 as amounts of light (IEC 61966-2-1)."""
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def encoded(light: np.ndarray) -> np.ndarray:
    """The inverse of `linear`, of what lies in sRGB, as whole numbers to 255."""
    light = light.clip(0, 1)
    values = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return (255 * values).round().astype(int)


def meant(colours: np.ndarray, matrix: np.ndarray = ADOBE, gamma: float = 2.2) -> np.ndarray:
    """The sRGB of colours (N, 3) uint8 under `rgb_profile`."""
    gamma = round(gamma * 256) / 256
    return encoded((colours / 255.0) ** gamma @ (np.linalg.inv(SRGB) @ matrix).T)


def light_of(light: int, a: int, b: int) -> np.ndarray:
    """X, Y and Z (D50) of L (0 to 255), a and b (CIE 1976)."""
    y = (light / 2.55 + 16) / 116
    parts = np.array([y + a / 500, y, y - b / 200])
    return np.asarray(np.where(parts > 6 / 29, parts**3, 3 * (6 / 29) ** 2 * (parts - 4 / 29)) * D50)


def meant_inks(light: int, a: int, b: int, black: int = 0) -> np.ndarray:
    """The sRGB of L (0 to 255), a and b (CIE 1976). black: L of the darkest of the press, which becomes black: black
    point compensation scales X, Y and Z about white (Adobe, Black Point Compensation, 2006; ISO 18619)."""
    white, dark = np.array(D50), light_of(black, 0, 0)
    found = white * (light_of(light, a, b) - dark) / (white - dark)
    return encoded(np.linalg.inv(SRGB) @ found)
