"""Batch scripts hold no secrets: Slurm stores them, and shows them to whoever may see the job."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from pipeline.errors import ConfigError

SECRET = frozenset(
    ["key", "apikey", "secret", "token", "password", "passwd", "passphrase", "credential", "credentials", "auth"]
)
"""Words in the names of environment variables whose values are secrets."""
SHORTEST = 8
"""Shortest value that is looked for: a shorter one is found by chance."""


def require_no_secrets(text: str, environ: Mapping[str, str] = os.environ) -> None:
    """Raise ConfigError where a script holds the value of an environment variable that is a secret by its name, such as
    one that a cluster's YAML refers to."""
    for name, value in environ.items():
        if len(value) < SHORTEST or value not in text or not SECRET.intersection(re.split(r"[^a-z]+", name.lower())):
            continue
        line = text[: text.index(value)].rpartition("\n")[2][:80]
        raise ConfigError(
            f"the batch script would hold the value of {name} (after {line.strip()!r}), and Slurm stores scripts: "
            "leave it in the environment, which jobs inherit"
        )
