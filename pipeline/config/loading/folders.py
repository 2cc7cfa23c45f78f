"""The folders that hold YAML, and the groups in them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from pipeline.errors import ConfigError, ParseError
from pipeline.parsing.values import YAML_BYTES, parse_yaml

FILES = 1000
"""Most YAML files of a user's own folder."""


def conf_dir() -> Path:
    """The conf directory: inside the package when installed, beside it in a checkout."""
    packaged = Path(__file__).parent.parent.parent / "conf"
    return packaged if packaged.is_dir() else packaged.parent.parent / "conf"


def own_conf_dir() -> Path | None:
    """The user's own folder of groups (with files such as experiment/mine.yaml), which LATENTMILL_CONF names; None
    where it is not set. Raises ConfigError where it names no folder."""
    folder = os.environ.get("LATENTMILL_CONF", "")
    if folder and not Path(folder).is_dir():
        raise ConfigError(f"LATENTMILL_CONF={folder} is not a folder")
    return Path(folder).resolve() if folder else None


def check_own_files() -> None:
    """Raise ConfigError for a YAML file in a group of the user's own folder that is not made of plain values: Hydra
    would follow its tags, and copy what its aliases repeat."""
    folder = own_conf_dir()
    files = sorted(folder.glob("*/*.yaml")) if folder else []
    if len(files) > FILES:
        raise ConfigError(f"LATENTMILL_CONF={folder} holds {len(files)} YAML files; {FILES} at most are read")
    for path in files:
        try:
            if not path.is_file():  # a device or a pipe would never end
                raise ParseError("it is not a file")
            with path.open("rb") as file:
                tree = parse_yaml(file.read(YAML_BYTES + 1))
            if not isinstance(tree, dict | None):
                raise ParseError("it is not a group of keys")
        except (ParseError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise ConfigError(f"{path}: {reason}; mend the file, or take it out of LATENTMILL_CONF") from None


def groups(verb: str) -> dict[str, list[str]]:
    """The choices of each group that a verb composes, such as {"model": ["sd1", "sd2", "small", "tiny"], ...}. What
    chooses of a group that the verb lacks, such as an experiment of another verb, is none."""
    packaged, own = _packaged(verb), own_conf_dir()
    return {name: sorted({*known, *_choices(own, name, packaged)}) for name, known in packaged.items()}


@cache
def _packaged(verb: str) -> dict[str, list[str]]:
    """The packaged choices of each group of a verb. The files stay as they are while a process runs. Not to be
    changed."""
    import yaml

    primary = yaml.safe_load((conf_dir() / f"{verb}.yaml").read_text(encoding="utf-8")) or {}
    names = [next(iter(entry)).split()[-1] for entry in primary.get("defaults", []) if isinstance(entry, dict)]
    return {name: _choices(conf_dir(), name, names) for name in names}


def _choices(folder: Path | None, group: str, others: Iterable[str]) -> list[str]:
    """The files of a group in a folder that choose of no other group than these."""
    files: Iterable[Path] = (folder / group).glob("*.yaml") if folder else ()
    return [path.stem for path in files if _chosen(path) <= {*others}]


def _chosen(path: Path) -> set[str]:
    """The groups of which a file chooses in its defaults."""
    if not path.is_file():  # check_own_files says so
        return set()
    with path.open("rb") as file:
        return {name.decode() for name in re.findall(rb"^ *- *override +/?(\w+):", file.read(YAML_BYTES), re.M)}
