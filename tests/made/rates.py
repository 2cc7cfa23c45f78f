"""Calibrations in memory, for tests of what reads them."""

from __future__ import annotations

from typing import Any

from pipeline.planning.rates.calibration import Calibration
from pipeline.planning.rates.layers import LayerRate, Terms

FLOPS = {"conv": 50e9, "linear": 80e9, "attention": 20e9}
"""FLOP/s of a rank at the larger of two sizes; half of it at the smaller."""


def calibration(**changes: Any) -> Calibration:
    """A calibration of two processes of one thread each on a CPU."""
    layers = tuple(
        LayerRate(kind=kind, size=size, rows=rows, training=share * flops, forward=share * flops)  # type: ignore[arg-type]
        for kind, flops in FLOPS.items()
        for size, share in ((64.0, 0.5), (1024.0, 1.0))
        for rows in (512.0, 4096.0)
    )
    values: dict[str, Any] = {
        "device": "cpu",
        "machine": "a processor, 2 cores",
        "date": "2026-11-30",
        "versions": {"torch": "2.13.0"},
        "processes": 2,
        "threads": 1,
        "precision": "fp32",
        "compile": False,
        "layers": layers,
        "training": Terms(layers=1.1, elements=2e-9, pieces=1e-5),
        "parameter_s": 3e-9,
        "muon": 1.5,
        "step_s": 0.002,
        "forward": Terms(layers=1.0, elements=1e-9, pieces=1e-5),
        "first_stage": Terms(layers=1.2, elements=1e-9, pieces=1e-5),
        "decoded_pixels_s": 40e6,
        "networks": (),
    }
    return Calibration(**{**values, **changes})
