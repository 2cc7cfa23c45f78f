"""Translation of KEY=VALUE words into Hydra's grammar."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pipeline.config import CONFIGS
from pipeline.config.loading.folders import groups, own_conf_dir
from pipeline.config.loading.merge import flat_types, unknown_key
from pipeline.errors import ConfigError, OverrideError

NAMES = ("data.mix", "mix", "size", "leave_out", "forget")
"""Lists of names rather than of free text: they may be written [a,b]."""

OVERRIDE = re.compile(r"(?P<mark>~|\+\+|\+)?(?P<key>[A-Za-z_][\w./@-]*)=(?P<value>.*)", re.DOTALL)


def _check_grammar(word: str) -> None:
    """Raise OverrideError for a word that Hydra cannot parse, or one that is a sweep."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    shown = word.removeprefix("++")
    try:
        (override,) = OverridesParser.create().parse_overrides([word])
    except OverrideParseException as error:
        reason = " ".join(str(error).split(" See https")[0].split("\n")[0].split())
        raise OverrideError(f"{shown}: cannot be parsed: {reason}") from error
    if override.is_sweep_override():
        raise OverrideError(f"{shown}: several values are a sweep, which wants -m; a list is written [a,b]")


def search_path() -> list[str]:
    """The override that makes Hydra search the user's own folder too; empty where there is none."""
    folder = own_conf_dir()
    return [f"hydra.searchpath=[{quote(f'file://{folder}')}]"] if folder else []


def translate(verb: str, overrides: Sequence[str]) -> list[str]:
    """Overrides in Hydra's grammar.

    Text and paths are quoted, so that braces, commas, apostrophes and `${` in them are taken literally. Keys get
    Hydra's `++`, which adds a key that the YAML lacks, because YAML holds only what differs from the dataclasses. A
    list of texts is given by repeating its key (`prompt=a prompt=b`); a list of names may be written [a,b] too. Raises
    OverrideError for a word that is not KEY=VALUE, ConfigError for an unknown key or an unknown choice of a group.
    """
    choices, kinds = groups(verb), dict(flat_types(CONFIGS[verb]))
    words: list[str] = []
    lists: dict[str, list[str]] = {}
    for override in overrides:
        match = OVERRIDE.fullmatch(override)
        if not match:
            raise OverrideError(f"{override!r} is not KEY=VALUE")
        mark, key, value = match["mark"] or "", match["key"], match["value"]
        if mark == "~" or key.startswith("hydra."):
            words.append(override)
        elif key in choices:
            if value not in [*choices[key], "null"] and not re.search(r"[,(]", value):  # [,(]: a sweep, for -m
                raise ConfigError(f"{key}={value}: no such {key}; there are {', '.join(choices[key])}")
            words.append(f"{key}={value}")
        elif kinds.get(key) is str:
            words.append(f"++{key}={quote(value)}")
        elif kinds.get(key) == tuple[str, ...]:
            lists.setdefault(key, []).extend(listed(value) if key in NAMES else [value])
        elif key in kinds:
            words.append(f"++{key}={value}")
        else:
            raise ConfigError(unknown_key(key, [*kinds, *choices]))
    words += [f"++{key}=[{','.join(map(quote, values))}]" for key, values in lists.items()]
    return words


def listed(text: str) -> list[str]:
    """The names in [a,b]; any other text is one name."""
    if not (text.startswith("[") and text.endswith("]")):
        return [text]
    return [name.strip().strip("'\"") for name in text[1:-1].split(",")] if text[1:-1].strip() else []


def quote(text: str) -> str:
    """`text` as a quoted string of Hydra's grammar, which OmegaConf then gives back unchanged."""
    # OmegaConf takes ${ literally after an odd number of backslashes.
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    text = re.sub(r"(\\*)'", r"\1\1\\'", text)
    trailing = len(text) - len(text.rstrip("\\"))
    return f"'{text}{chr(92) * trailing}'"
