"""Command lines that name paths: which words are paths, and which are options."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence

from pipeline.errors import ConfigError

OPTION = re.compile(r"(?P<key>[A-Za-z_][\w.-]*)=(?P<value>.*)", re.DOTALL | re.ASCII)
"""A word that may be an option: what stands before its first `=` has no slash, as no key has."""
OF_HYDRA = "multirun.yaml"
"""File that sweeps of earlier versions left beside their runs, so that `runs/sweep/*` names it, too."""


def split_words(words: Sequence[str], keys: Sequence[str], verb: str) -> tuple[list[str], dict[str, str]]:
    """(paths, values of options by key) of the words of a verb that takes paths. keys: its options.

    A word is an option only where its part before the first `=` is one of the keys; everything else is a path, so
    that a path may contain `=`, as those of a sweep do. `./dest=x` is a path always. Raises ConfigError for a word that
    is neither an option nor a path that exists, though it looks like an option, for an empty word or value, and for an
    option that is given twice.
    """
    paths: list[str] = []
    options: dict[str, str] = {}
    for word in words:
        match = OPTION.fullmatch(word)
        if match and match["key"] in keys:
            key, value = match["key"], match["value"]
            if key in options:
                raise ConfigError(f"{key}= is given twice, as {options[key]} and as {value}: {verb} takes one")
            if not value:
                raise ConfigError(f"{key}= is empty: give a value, or leave {key}= out")
            options[key] = value
        elif not word:
            raise ConfigError(f"{verb} was given an empty word: give a path")
        elif (match or word.startswith("-")) and keys and not os.path.lexists(os.path.expanduser(word)):
            name = f"{match['key']}=" if match else word
            near = difflib.get_close_matches(name.strip("-="), keys, n=1)
            known = f"did you mean {near[0]}=?" if near else f"there {_are(keys)}"
            raise ConfigError(f"{name} is no option of {verb}, and there is no file or folder {word}; {known}")
        else:
            paths.append(word)
    return paths, options


def without_litter(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """(paths that may be runs, files that a sweep left beside its runs). A single path is never litter."""
    litter = [path for path in paths if os.path.basename(path) == OF_HYDRA and os.path.isfile(path)]
    runs = [path for path in paths if path not in litter]
    return (runs, litter) if runs else (list(paths), [])


def _are(keys: Sequence[str]) -> str:
    return f"is {keys[0]}=" if len(keys) == 1 else "are " + ", ".join(f"{key}=" for key in keys)
