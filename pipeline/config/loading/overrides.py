"""Translation of KEY=VALUE words into Hydra's grammar."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import islice, product
from math import prod
from typing import TYPE_CHECKING, Any

from pipeline.config import CONFIGS
from pipeline.config.loading.folders import groups, own_conf_dir
from pipeline.config.loading.merge import flat_types, unknown_key
from pipeline.config.loading.references import LITERAL, OPENING, Lacking, holds_reference, resolve
from pipeline.config.loading.sweeps import swept_texts
from pipeline.errors import ConfigError, OverrideError

if TYPE_CHECKING:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Override

NAMES = (
    *("data.mix", "data.columns", "columns", "mix", "size", "leave_out", "forget", "caption_key"),
    *("class", "boxes", "labels", "image", "mask", "guide.target", "features", "scores", "datasets"),
)
"""Lists of names rather than of free text: they may be written [a,b]."""

SEVERAL = ("guide",)
"""Groups of which several files may be chosen, as [a,b]."""

WORDS, LONGEST = 1000, 65536
"""Most words of a command line, and most characters of one."""
LONGEST_PARSED, PARSED = 2048, 16384
"""Most characters of a word that is no text, and of all such words: Hydra's parser takes a second for 4,000."""
JOBS = 1000
"""Most jobs of a sweep."""
SHOWN = 200
"""Characters of a wrong word that a message shows."""
OVERRIDE = re.compile(r"(?P<mark>~|\+\+|\+)?(?P<key>[A-Za-z_][\w./@-]*)=(?P<value>.*)", re.DOTALL)


def parse(word: str) -> Override:
    """A word of Hydra's grammar, parsed. Raises OverrideError for one that cannot be parsed, or is a sweep."""
    from hydra.errors import OverrideParseException

    shown = word.removeprefix("++")[:SHOWN]
    try:
        (override,) = _parser().parse_overrides([word])
        is_sweep = override.is_sweep_override()
    except OverrideParseException as error:
        reason = " ".join(str(error).split(" See https")[0].split("\n")[0].split())[: 2 * SHOWN]
        raise OverrideError(f"{shown}: cannot be parsed: {reason}") from error
    except Exception as error:  # its parser has bounds of its own, and no common base of errors
        raise OverrideError(f"{shown}: cannot be parsed ({type(error).__name__})") from error
    if is_sweep:
        raise OverrideError(f"{shown}: several values are a sweep, which wants -m; a list is written [a,b]")
    return override


@cache
def _parser() -> OverridesParser:
    """Hydra's parser, which keeps nothing of what it has parsed."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create()


def expand(words: Sequence[str]) -> tuple[set[str], list[list[str]]]:
    """(the keys and groups of which a sweep takes several values, the words of each of its jobs), as Hydra's basic
    sweeper expands them. Raises OverrideError for a word that Hydra cannot parse, and for more than JOBS jobs."""
    swept = set[str]()
    values: dict[str, list[str]] = {}  # of a key that is given twice, the last word counts
    for word in words:
        try:
            (override,) = _parser().parse_overrides([word])
            key = override.get_key_element()
            if not override.is_sweep_override():
                values[key] = [override.get_value_element_as_str()]
                continue
            swept.add(override.key_or_group)
            values[key] = list(islice(override.sweep_string_iterator(), JOBS + 1))
        except Exception as error:  # as in parse
            reason = " ".join(str(error).split(" See https")[0].split("\n")[0].split())[: 2 * SHOWN]
            raise OverrideError(f"{word.removeprefix('++')[:SHOWN]}: cannot be parsed: {reason}") from error
        if prod(len(several) or 1 for several in values.values()) > JOBS:
            raise OverrideError(f"{override.key_or_group}: a sweep of more than {JOBS} jobs; give fewer values")
    taken = [[f"{key}={value}" for value in several] for key, several in values.items()]
    return swept, [list(combination) for combination in product(*taken)]


def search_path() -> list[str]:
    """The override that makes Hydra search the user's own folder too; empty where there is none."""
    folder = own_conf_dir()
    return [f"hydra.searchpath=[{quote(f'file://{folder}')}]"] if folder else []


def translate(verb: str, overrides: Sequence[str], *, sweep: bool = False) -> list[str]:
    """Overrides in Hydra's grammar.

    Text and paths are quoted, so that braces, commas, apostrophes and `${` in them are taken literally. Keys get
    Hydra's `++`, which adds a key that the YAML lacks, because YAML holds only what differs from the dataclasses. A
    list of texts is given by repeating its key (`prompt=a prompt=b`); a list of names may be written [a,b] too.
    sweep: texts may be several, as sweeps.py reads them. Raises OverrideError for a word that is not KEY=VALUE, is too
    long or one too many, ConfigError for an unknown key or an unknown choice of a group.
    """
    if len(overrides) > WORDS:
        raise OverrideError(f"{len(overrides)} arguments were given; {WORDS} at most are taken")
    choices, kinds = groups(verb), dict(flat_types(CONFIGS[verb]))
    words: list[str] = []
    lists: dict[str, list[str]] = {}
    parsed = 0
    for override in overrides:
        match = OVERRIDE.fullmatch(override)
        if not match:
            raise OverrideError(f"{override[:SHOWN]!r} is not KEY=VALUE")
        mark, key, value = match["mark"] or "", match["key"], match["value"]
        if key.split(".")[0].split("/")[0] == "hydra":
            raise ConfigError(f"{key[:SHOWN]}: settings of Hydra are not taken here; cluster=NAME says how jobs run")
        if key not in kinds and key not in choices:
            raise ConfigError(unknown_key(key, [*kinds, *choices]))
        if len(override) > LONGEST:
            raise OverrideError(f"{key[:SHOWN]}: its value has {len(value)} characters; {LONGEST} at most are taken")
        is_text = kinds.get(key) is str or kinds.get(key) == tuple[str, ...]
        if not is_text and len(override) > LONGEST_PARSED:
            raise OverrideError(f"{key[:SHOWN]}: its value has {len(value)} characters; {LONGEST_PARSED} are taken")
        parsed += 0 if is_text else len(override)
        if parsed > PARSED:
            raise OverrideError(f"numbers and choices of more than {PARSED} characters in all were given")
        several = swept_texts(value) if sweep and is_text and key not in LITERAL else None
        if mark == "~" and key not in choices:
            raise ConfigError(f"~{key}: only a group can be left out, which are {', '.join(choices) or 'none here'}")
        if key in choices:
            words.append(f"{mark if mark == '~' else ''}{key}={_choice(key, value, choices[key], sweep)}")
        elif several is not None and kinds[key] is str:
            words.append(f"++{key}={','.join(map(quote, several))}")
        elif several is not None:
            words.append(f"++{key}={','.join(_list(listed(text)) for text in several)}")
        elif kinds.get(key) is str or (not sweep and _is_reference(value)):
            words.append(f"++{key}={quote(value)}")
        elif kinds.get(key) == tuple[str, ...]:
            lists.setdefault(key, []).extend(listed(value) if key in NAMES else [value])
        elif sweep and holds_reference(value):
            pieces = swept_texts(value) or [value]
            words.append(f"++{key}={','.join(quote(piece) if _is_reference(piece) else piece for piece in pieces)}")
        else:
            words.append(f"++{key}={value}")
    words += [f"++{key}={_list(values)}" for key, values in lists.items()]
    return words


def _list(texts: Sequence[str]) -> str:
    return f"[{','.join(map(quote, texts))}]"


def _is_reference(value: str) -> bool:
    """Whether a value is text with references to the environment, and with no other ${...}, which Hydra resolves."""
    return value.count("${") == len(OPENING.findall(value)) > 0 and not value.startswith("[")


def _choice(group: str, value: str, choices: Sequence[str], sweep: bool = False) -> str:
    """The choice of a group, which may be a reference to the environment, or in a sweep several choices. Raises
    ConfigError for one that there is not."""
    if sweep and "(" not in value.removeprefix("choice("):
        return ",".join(_choice(group, text, choices) for text in swept_texts(value) or [value])
    chosen: str | None = value
    if group in SEVERAL and value.startswith("["):
        return f"[{','.join(_choice(group, name, choices) for name in listed(value))}]"
    if holds_reference(value):
        resolved = resolve(value, os.environ, group)
        if isinstance(resolved, Lacking):
            raise ConfigError(f"{group}={value}: {resolved.why}")
        chosen = resolved.text
    elif re.search(r"[,(]", value):  # a sweep, for -m
        return value
    if chosen is None or chosen not in [*choices, "null"]:
        raise ConfigError(f"{group}={value[:SHOWN]}: no such {group}; there are {', '.join(choices)}")
    return chosen


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


def typed_words(word: str, kinds: Mapping[str, Any]) -> list[str]:
    """A word of Hydra's grammar as a user would type it for one run: texts without quotes, and a list of texts as one
    word for each. kinds: type of each key."""
    key, _, value = word.partition("=")
    if not value.startswith(("'", "[")) or (value.startswith("[") and kinds.get(key) != tuple[str, ...]):
        return [word]
    (override,) = _parser().parse_overrides([word])
    texts: Any = override.value()
    if isinstance(texts, str):
        return [f"{key}={_unescaped(texts)}"]
    plain = [getattr(text, "text", text) for text in texts]
    return [f"{key}={_unescaped(text)}" for text in plain] or [word]


def _unescaped(text: str) -> str:
    """What `quote` has escaped for OmegaConf, as it was."""
    return re.sub(r"(\\+)\$\{", lambda match: "\\" * (len(match[1]) // 2) + "${", text)
