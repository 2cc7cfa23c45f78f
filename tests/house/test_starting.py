"""Starting time: `latentmill --help` is there at once, and a verb imports what it uses and no more."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from house.test_imports import MODULES, imports, module_of

from pipeline.verbs import VERBS

HEAVY = {
    *("torch", "torchvision", "numpy", "scipy", "PIL", "webdataset", "diffusers", "transformers", "open_clip"),
    *("accelerate", "deepspeed", "wandb", "tensorboard", "boto3", "botocore", "hydra", "omegaconf"),
}
"""Packages that take more than a moment to import."""

ENCODERS = {"torch", "numpy", "PIL", "diffusers", "open_clip"}
IMPORTED = {
    "status": set(),
    "submit": set(),
    "report": set(),
    "demo": set(),
    "fetch": set(),
    "calibrate": set(),
    "plan": {"numpy", "PIL"},
    "train": {"numpy"},
    "autoencoder": {"numpy"},
    "synth": {"numpy", "PIL"},
    "convert": {"numpy", "PIL"},
    "data": {"torch", "numpy"},
    "ledger": {"torch", "numpy"},
    "encode": ENCODERS,
    "columns": ENCODERS,
    "index": ENCODERS,
    "verify": ENCODERS,
    "sample": ENCODERS,
    "export": ENCODERS,
    "reference": ENCODERS | {"scipy"},
    "eval": ENCODERS | {"scipy"},
    "reconstruct": ENCODERS | {"scipy"},
}
"""Verb -> the heavy packages that our own modules import when its module is imported, directly or by one another."""
ALONE = {"pipeline.cli": set(), "pipeline.training.trainer": {"torch", "numpy"}}
"""The same for modules that are no verbs."""


def imported(module: str) -> set[str]:
    """The heavy packages that a module of ours imports at its import, read off the source; with its parents, as
    Python imports those first."""
    packages: set[str] = set()
    todo, reached = [module], {module}
    while todo:
        for name in imports(MODULES[todo.pop()], True):
            packages |= {name.partition(".")[0]} & HEAVY
            ours = module_of(name)
            while ours in MODULES:
                if ours not in reached:
                    reached.add(ours)
                    todo.append(ours)
                ours = ours.rpartition(".")[0]
    return packages


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_a_verb_imports_what_it_uses_and_no_more(verb: str) -> None:
    assert imported(VERBS[verb][0]) <= IMPORTED[verb]


@pytest.mark.parametrize("module", sorted(ALONE))
def test_the_command_line_and_the_trainer_import_little(module: str) -> None:
    assert imported(module) <= ALONE[module]


def test_packages_that_are_imported_bring_no_others() -> None:
    """In a fresh process, from the lightest to the heaviest, since a package imports packages too."""
    verbs = ["status", "submit", "report", "demo", "fetch", "train", "autoencoder", "data", "ledger"]
    modules = ["pipeline.cli", *(VERBS[verb][0] for verb in verbs), "pipeline.training.trainer"]
    code = "import importlib, json, sys\nloaded = []\n"
    code += f"for module in {modules!r}:\n    importlib.import_module(module)\n"
    code += f"    loaded.append(sorted({HEAVY!r} & set(sys.modules)))\nprint(json.dumps(loaded))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    allowed = [ALONE["pipeline.cli"], *(IMPORTED[verb] for verb in verbs), ALONE["pipeline.training.trainer"]]
    for module, packages, may in zip(modules, json.loads(done.stdout), allowed, strict=True):
        assert set(packages) <= may, module


def test_help_costs_less_than_three_tenths_of_a_second_of_cpu() -> None:
    """CPU seconds rather than the clock's, because other processes share the machine."""

    def seconds() -> float:
        before = os.times()
        subprocess.run([sys.executable, "-m", "pipeline.cli", "--help"], check=True, stdout=subprocess.DEVNULL)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(seconds() for _ in range(3)) < 0.3
