"""Contradictions in the configuration of the verb that makes columns."""

from __future__ import annotations

import re

from pipeline import config as c
from pipeline.config.values.bounds import require
from pipeline.config.values.places import place

NAME = re.compile(r"[a-z0-9_]{1,57}")
"""Names of features and scores."""


def check_columns_verb(config: c.ColumnsConfig) -> None:
    """latentmill columns."""
    names = [*config.features, *config.scores]
    require(
        bool(config.caption_key or names),
        "nothing is asked for: give caption_key=json:KEY, features=[NAME] or scores=[NAME]",
    )
    key = config.caption_key
    require(
        key in ("", "txt") or (key.startswith("json:") and len(key) > 5),
        f"caption_key={key}: txt, or json:KEY for a key of the .json member or of the line",
    )
    require(
        key != "" or config.text_storage == "tokens",
        f"text_storage={config.text_storage} without caption_key: no caption is read, so leave it out",
    )
    for name in names:
        require(
            NAME.fullmatch(name) is not None,
            f"{'features' if name in config.features else 'scores'}: {name!r} is no name of a column: up to 57 of a-z, "
            "0-9 and _ are wanted",
        )
    require(len(set(names)) == len(names), f"features and scores: {', '.join(names)} names one of them twice")
    require(len(names) < 32, f"features and scores: {len(names)} are named, and 31 at most go together")
    require(
        not f"{place(config.dest)}/".startswith(f"{place(config.dataset)}/"),
        f"dest={config.dest} is the cache, or lies in it: columns lie in a place of their own, so choose another dest",
    )
