"""What every benchmark reports about its machine, and the format and storage of its tables."""

from __future__ import annotations

import datetime
import os
import re
import statistics
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from pipeline.distributed.place import cores

RESULTS = Path(__file__).resolve().parent / "results"
TUNING = ("OMP_", "GOMP_", "MKL_", "MALLOC_", "GLIBC_TUNABLES", "PYTORCH_CUDA_ALLOC_CONF")  # beginnings of names
PACKAGES = ("torch", "diffusers", "open_clip_torch", "webdataset", "pillow", "numpy")


def processor() -> str:
    """The CPU's name."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return " ".join(line.partition(":")[2].split())
    return "an unknown processor"


def machine(device: torch.device, threads: int) -> list[str]:
    """Lines about hardware, load, versions and the date, without names of hosts or folders."""
    memory = psutil.virtual_memory().total / 2**30
    lines = [f"- machine: {processor()}, {cores()} cores, {memory:.0f} GiB; PyTorch with {threads} threads"]
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        lines.append(f"- GPU: {facts.name}, {facts.total_memory / 2**30:.0f} GiB; CUDA {torch.version.cuda}")
    tuned = sorted(f"{name}={os.environ[name]}" for name in os.environ if name.startswith(TUNING))
    if tuned:
        lines.append(f"- environment: {' '.join(tuned)}")
    lines.append(f"- load of the machine before the first round: {os.getloadavg()[0]:.1f}")
    lines.append("- " + ", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    lines.append(f"- date: {datetime.date.today().isoformat()}")
    return lines


def _version(package: str) -> str:
    """A package's version; "absent" where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def device_slug(device: torch.device) -> str:
    """The device in a file's name: amd-epyc-2-cores, nvidia-h100-80gb-hbm3."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{processor()} {cores()} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table that is also aligned as plain text. All columns but the first are aligned on the right."""
    cells = [list(head), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "| "
        + " | ".join(f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths)))
        + " |"
        for row in cells
    ]
    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def figure(value: float) -> str:
    """Three significant digits below 100, else a whole number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def spread(values: Sequence[float]) -> str:
    """The lowest and the highest value."""
    return f"{figure(min(values))} to {figure(max(values))}"


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def verdict(value: float, least: float) -> str:
    """A ratio, its target, and whether it is met."""
    return f"{value:.2f} (target >= {least:g}: {'met' if value >= least else 'missed'})"


def keep(name: str, text: str) -> Path:
    """Write a result and return its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.md"
    path.write_text(text, encoding="utf-8")
    return path
