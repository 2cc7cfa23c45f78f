"""Conditions are the same bytes whatever instructions a processor has."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import numpy as np

from made.places import REPOSITORY
from pipeline.conditions.draws import Draws
from pipeline.conditions.facts import LowresFacts, MaskFacts
from pipeline.conditions.lowres import lowres
from pipeline.conditions.mask import masks


def digest() -> str:
    """Of all that is drawn for one record."""
    y, x = np.mgrid[:64, :64]
    pixels = np.stack([x * 4, y * 4, (x * y) % 256], axis=-1).astype(np.uint8)
    found = hashlib.sha256(Draws("x", "k").normal((64, 64)).tobytes())
    for degradation in ("bsr", "bicubic", "box"):
        facts = LowresFacts(factor=4, degradation=degradation, variants=8)  # type: ignore[arg-type]
        found.update(lowres(pixels, facts, "k").tobytes())
    found.update(
        masks("k", (256, 192), MaskFacts(kinds=("thin", "medium", "thick", "rectangles"), variants=16)).tobytes()
    )
    return found.hexdigest()


def test_arrays_are_the_same_without_vector_instructions() -> None:
    """NumPy's sums and exponentials differ with them; JPEG's need not."""
    found = np.show_config("dicts")["SIMD Extensions"].get("found", [])  # type: ignore[call-overload]
    environment = os.environ | {
        "NPY_DISABLE_CPU_FEATURES": " ".join(found),
        "JSIMD_FORCENONE": "1",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")]),
    }
    code = "from conditions.test_machines import digest; print(digest())"
    command = [sys.executable, "-W", "ignore", "-c", code]
    plain = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert plain.stdout.strip() == digest()
