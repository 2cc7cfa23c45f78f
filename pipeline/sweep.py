"""`latentmill VERB -m key=a,b ...`: Hydra's multirun over a verb.

Hydra expands the sweep and launches the jobs; each is the same verb in a process of its own, because a training run
initialises what a process can initialise only once. Jobs write to DEST/<swept keys>, where DEST is the run= or dest=
that the command line gives; training runs are a group of that name in wandb, unless tracking.group= says otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from pipeline.configload import OVERRIDE, conf_dir, quote, search_path, translate
from pipeline.errors import ConfigError, RunError
from pipeline.launch import run_command

OUTPUT = {"train": "run", "synth": "dest", "encode": "dest", "sample": "dest", "export": "dest"}
"""The key under which each verb writes; a verb that is not here cannot be swept."""


def sweep(verb: str, overrides: Sequence[str]) -> int:
    """Run every job of a sweep; 0 when all of them ended with 0. Raises ConfigError, RunError."""
    if verb not in OUTPUT:
        raise ConfigError(f"-m sweeps {', '.join(OUTPUT)}, not {verb}")
    key = OUTPUT[verb]
    given = [match["value"] for match in map(OVERRIDE.fullmatch, overrides) if match and match["key"] == key]
    if not given:
        raise ConfigError(f"{key} is missing: give {key}=..., under which each job gets a folder")
    words = translate(verb, [word for word in overrides if not word.startswith(f"{key}=")])
    failed = _launch(verb, key, given[-1].rstrip("/"), words)
    if failed:
        raise RunError(f"{len(failed)} of the sweep's jobs failed: {', '.join(failed)}")
    return 0


def _launch(verb: str, key: str, root: str, words: list[str]) -> list[str]:
    """Hand the sweep to Hydra; the names of the jobs that failed."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.override_parser.overrides_parser import OverridesParser

    swept = {word.key_or_group for word in OverridesParser.create().parse_overrides(words) if word.is_sweep_override()}
    if not swept:
        raise ConfigError("-m sweeps over values such as optim.lr=1e-4,2e-4, and none is given")
    failed = []

    def job(_: Any) -> None:
        task = [word.removeprefix("++") for word in HydraConfig.get().overrides.task]
        name = ",".join(word for word in task if word.split("=")[0] in swept)
        grouped = verb == "train" and not any(word.startswith("tracking.group=") for word in task)
        group = [f"tracking.group={root.rsplit('/', 1)[-1]}"] if grouped else []
        command = [sys.executable, "-m", "pipeline.cli", verb, *map(_plain, task), *group, f"{key}={root}/{name}"]
        print(f"== {name}", flush=True)
        if run_command(command):
            failed.append(name)

    folder = "runs" if "://" in root else root
    settings = [
        f"hydra.sweep.dir={quote(folder)}",
        "hydra.sweep.subdir='.hydra/${hydra.job.num}'",
        "hydra.output_subdir=null",
    ]
    argv, sys.argv = sys.argv, [sys.argv[0], "-m", *settings, *search_path(), *words]
    try:
        hydra.main(config_path=str(conf_dir()), config_name=verb, version_base="1.3")(job)()
    finally:
        sys.argv = argv
    return failed


def _plain(word: str) -> str:
    """An override of Hydra's grammar as our command line takes it: text without quotes."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    key, _, value = word.partition("=")
    if not value.startswith("'"):
        return word
    (override,) = OverridesParser.create().parse_overrides([word])
    text = override.value()
    assert isinstance(text, str)
    return f"{key}={text}"
