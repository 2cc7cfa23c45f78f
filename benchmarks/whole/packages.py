"""The packages that a machine with PyTorch, torchvision, transformers and timm lacks for what runs here.

They are fetched as wheels where there is a network, lie beside the tree, and are installed without a network. Nothing
but Python's own library is imported here, since nothing else may be there yet.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = ".whl"
"""Where the wheels lie, below the top of the tree."""
MOST_BYTES = 48 << 20
"""Of all wheels: tree and wheels are to travel together in 64 MiB."""
BUILT = ("antlr4-python3-runtime", "deepspeed")
"""Packages of which the index has sources alone."""
CARRIED = (
    *("annotated-types", "braceexpand", "diffusers", "ftfy", "hjson", "hydra-core", "importlib-metadata", "omegaconf"),
    *("open-clip-torch", "pydantic", "pydantic-core", "typing-extensions", "typing-inspection", "wcwidth"),
    *("webdataset", "zipp", *BUILT),
)
"""Packages that are carried, in the versions of constraints.txt."""
NEEDED = {
    "PIL": "pillow",
    "accelerate": "accelerate",
    "annotated_types": "annotated-types",
    "antlr4": "antlr4-python3-runtime",
    "braceexpand": "braceexpand",
    "cpuinfo": "py-cpuinfo",
    "deepspeed": "deepspeed",
    "diffusers": "diffusers",
    "einops": "einops",
    "ftfy": "ftfy",
    "hjson": "hjson",
    "hydra": "hydra-core",
    "importlib_metadata": "importlib-metadata",
    "msgpack": "msgpack",
    "ninja": "ninja",
    "numpy": "numpy",
    "omegaconf": "omegaconf",
    "open_clip": "open-clip-torch",
    "psutil": "psutil",
    "pydantic": "pydantic",
    "pydantic_core": "pydantic-core",
    "regex": "regex",
    "safetensors": "safetensors",
    "scipy": "scipy",
    "timm": "timm",
    "torch": "torch",
    "torchvision": "torchvision",
    "tqdm": "tqdm",
    "transformers": "transformers",
    "wcwidth": "wcwidth",
    "webdataset": "webdataset",
    "yaml": "pyyaml",
    "zipp": "zipp",
}
"""Module -> package: what the parts of the benchmark import."""
PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 17)), "manylinux2014_x86_64")


class Unavailable(Exception):
    """Packages could not be fetched or installed. One line."""


def missing() -> list[str]:
    """The packages that are needed and not there."""
    return sorted(package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None)


def advice(lacking: Sequence[str]) -> str:
    """What is missing, and how it is had, in one line."""
    others = [package for package in lacking if package not in CARRIED]
    carried = [package for package in lacking if package in CARRIED]
    words = [f"{', '.join(lacking)}: not installed here"]
    if carried:
        which = f" for {', '.join(carried)}" if others else ""
        words.append(f"run it with --fetch{which} where there is a network, and bring {FOLDER}/ along")
    if others:
        words.append(f"install {' '.join(others)} yourself, in the versions of constraints.txt; --fetch brings none")
    return "; ".join(words)


def pinned(packages: Sequence[str]) -> list[str]:
    """The packages as NAME==VERSION, by constraints.txt. Raises KeyError for one that is not pinned there."""
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {_normal(line.partition("==")[0]): line.strip() for line in lines if "==" in line and line[0] != "#"}
    return [pins[package] for package in packages]


def _normal(name: str) -> str:
    """A package's name in the one spelling that stands for all."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def fetch_commands(folder: Path, python: str) -> list[list[str]]:
    """What fetches the wheels for that version of Python (3.12) on x86-64 Linux into a folder, and builds those that
    the index has not."""
    pip = [sys.executable, "-m", "pip"]
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    for_target = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp", *platforms]
    ready = pinned([package for package in CARRIED if package not in BUILT])
    return [
        [*pip, "download", "-q", "--no-deps", *for_target, "-d", str(folder), *ready],
        [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), *pinned(BUILT)],
    ]


def fetch(python: str) -> list[Path]:
    """Fetch the wheels. Returns their paths. Raises Unavailable where pip does not, and where they are too large
    to travel."""
    folder = REPOSITORY / FOLDER
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    for command in fetch_commands(folder, python):
        _pip(command, "fetch the wheels", env=os.environ | {"DS_BUILD_OPS": "0"})
    wheels = sorted(folder.glob("*.whl"))
    if (size := sum(wheel.stat().st_size for wheel in wheels)) > MOST_BYTES:
        raise Unavailable(f"{len(wheels)} wheels have {size / 2**20:.1f} MiB, more than {MOST_BYTES >> 20}")
    return wheels


def install(target: Path) -> int:
    """Install the wheels that lie beside the tree into a folder, for this process and those that it starts. Returns
    their number, 0 where there are none, or where nothing is missing. Raises Unavailable."""
    wheels = sorted((REPOSITORY / FOLDER).glob("*.whl"))
    if not wheels or not missing():
        return 0
    options = ["-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade", "--target", str(target)]
    _pip([sys.executable, "-m", "pip", "install", *options, *map(str, wheels)], f"install the wheels of {FOLDER}/")
    sys.path.insert(1, str(target))
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(target), before]))
    importlib.invalidate_caches()
    return len(wheels)


def _pip(command: Sequence[str], what: str, **options: Any) -> None:
    """Run pip. Raises Unavailable."""
    try:
        subprocess.run(command, check=True, **options)
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"pip could not {what} (status {error.returncode}); what it says stands above") from None
