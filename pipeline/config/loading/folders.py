"""Where YAML is found, and which groups there are."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.errors import ConfigError


def conf_dir() -> Path:
    """The conf directory: inside the package when installed, beside it in a checkout."""
    inside = Path(__file__).parent.parent.parent / "conf"
    return inside if inside.is_dir() else inside.parent.parent / "conf"


def own_conf_dir() -> Path | None:
    """The user's own folder of groups, such as experiment/mine.yaml, that LATENTMILL_CONF names."""
    named = os.environ.get("LATENTMILL_CONF", "")
    if named and not Path(named).is_dir():
        raise ConfigError(f"LATENTMILL_CONF={named} is not a folder")
    return Path(named).resolve() if named else None


def groups(verb: str) -> dict[str, list[str]]:
    """The choices of each group that a verb composes, such as {"model": ["sd1", "sd2", "small", "tiny"], ...}."""
    import yaml

    primary = yaml.safe_load((conf_dir() / f"{verb}.yaml").read_text(encoding="utf-8")) or {}
    names = [next(iter(entry)).split()[-1] for entry in primary.get("defaults", []) if isinstance(entry, dict)]
    folders = [folder for folder in (own_conf_dir(), conf_dir()) if folder]
    return {name: sorted({path.stem for top in folders for path in (top / name).glob("*.yaml")}) for name in names}
