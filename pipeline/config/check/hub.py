"""What may be pushed to the Hugging Face hub, and under which names."""

from __future__ import annotations

import re
from dataclasses import fields

from pipeline import config as c
from pipeline.config.values.bounds import require

NAME = r"(?!.*(--|\.\.))[A-Za-z0-9]([A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?(?<!\.git)"
REPOSITORY = re.compile(rf"hub:{NAME}/{NAME}")
DATASET = re.compile(rf"({NAME}/)?{NAME}")
BRANCH = re.compile(r"(?!refs/)(?!.*(\.\.|//|\.lock$))[A-Za-z0-9][A-Za-z0-9._/-]{0,99}(?<![./])")
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")
WITH_PUSH = ("public", "revision", "license", "datasets")
"""Keys that say something of a push alone."""


def check_push(config: c.ExportConfig) -> None:
    """The keys of `export push=`."""
    if not config.push:
        defaults = {field.name: field.default for field in fields(config)}
        for key in WITH_PUSH:
            value = getattr(config, key)
            require(
                value == defaults[key], f"{key}={value} says how to push: give push=hub:OWNER/NAME, or leave it out"
            )
        return
    require(
        REPOSITORY.fullmatch(config.push) is not None,
        f"push={config.push}: hub:OWNER/NAME is wanted, a repository of the Hugging Face hub",
    )
    require(config.check, "check=false: what is pushed is loaded and compared before; leave check out, or push")
    require(
        BRANCH.fullmatch(config.revision) is not None,
        f"revision={config.revision}: the name of a branch is wanted, such as main",
    )
    require(
        config.license == "" or LICENSE.fullmatch(config.license) is not None,
        f"license={config.license}: the hub's name of a license is wanted, such as apache-2.0 or mit",
    )
    require(
        config.license != "other",
        "license=other: the hub wants its name and a link to it as well; write license, license_name and license_link "
        "at the top of the README.md of dest, which is pushed as you leave it",
    )
    for name in config.datasets:
        require(
            DATASET.fullmatch(name) is not None,
            f"datasets={name}: the hub's name of a data set is wanted, such as OWNER/NAME",
        )
