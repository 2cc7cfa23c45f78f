"""From a verb and its command-line overrides to a checked, frozen configuration; and back to plain data and YAML.

Hydra composes the packaged conf directory. Values are then merged into the dataclasses of config/ by `from_dict`,
which takes nothing on trust: an unknown key, a wrong type or a choice that there is not is one line that says so.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pipeline.config import CONFIGS
from pipeline.configcheck import check
from pipeline.errors import ConfigError, OverrideError

T = TypeVar("T")

NAMES = ("data.mix", "mix", "size")  # lists of names, not of free text
OVERRIDE = re.compile(r"(?P<mark>~|\+\+|\+)?(?P<key>[A-Za-z_][\w./@-]*)=(?P<value>.*)", re.DOTALL)


def load(verb: str, overrides: Sequence[str] = ()) -> Any:
    """The checked configuration of a verb. Raises ConfigError (one line), OverrideError."""
    config: Any = from_dict(CONFIGS[verb], compose(verb, overrides))
    check(config)
    return config


# --------------------------------------------------------------------------------------------------------------------
# Composing


def conf_dir() -> Path:
    """The conf directory: inside the package when installed, beside it in a checkout."""
    inside = Path(__file__).parent / "conf"
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


def compose(verb: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The tree of plain values that Hydra composes from conf/ and the overrides."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    words = translate(verb, overrides)
    for word in words:
        _check_grammar(word)
    try:
        with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
            tree = hydra_compose(config_name=verb, overrides=[*search_path(), *words])
        plain = OmegaConf.to_container(tree, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise OverrideError(" ".join(str(error).split())) from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _check_grammar(word: str) -> None:
    """Raises OverrideError naming a word that Hydra cannot parse, or one that is a sweep."""
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
    """The override that makes Hydra look into the user's own folder too."""
    own = own_conf_dir()
    return [f"hydra.searchpath=[{quote(f'file://{own}')}]"] if own else []


def translate(verb: str, overrides: Sequence[str]) -> list[str]:
    """Overrides as Hydra's grammar wants them.

    Text and paths are quoted, so that braces, commas, apostrophes and `${` in them mean themselves. Values get Hydra's
    `++`, because YAML holds only what differs from the dataclasses; from_dict refuses keys that are not there. A
    repeated text list (`prompt=a prompt=b`) holds each value; lists of names may be written [a,b] too.
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
    """The names in [a,b], or the one name that a text is."""
    if not (text.startswith("[") and text.endswith("]")):
        return [text]
    return [name.strip().strip("'\"") for name in text[1:-1].split(",")] if text[1:-1].strip() else []


def quote(text: str) -> str:
    """`text` as a quoted string of Hydra's grammar that comes out of OmegaConf as it went in."""
    text = re.sub(
        r"(\\*)\$\{", r"\1\1\\${", text
    )  # OmegaConf: an odd number of backslashes before ${ takes it literally
    text = re.sub(r"(\\*)'", r"\1\1\\'", text)
    trailing = len(text) - len(text.rstrip("\\"))
    return f"'{text}{chr(92) * trailing}'"


# --------------------------------------------------------------------------------------------------------------------
# Merging


def from_dict(cls: type[T], tree: Mapping[str, Any], path: str = "") -> T:
    """An instance of a config dataclass from plain values. Strict: raises ConfigError with one line."""
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in tree:
        if key not in fields:
            known = [f"{path}{name}" for name, _ in flat_types(cls)]
            raise ConfigError(unknown_key(f"{path}{key}", known))
    values = {}
    for name, field in fields.items():
        if name in tree:
            values[name] = _convert(hints[name], tree[name], f"{path}{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{path}{name} is missing: give {path}{name}=...")
    return cls(**values)


def _convert(kind: Any, value: Any, where: str) -> Any:
    """`value` as `kind`, without guessing: 1e6 is an int where one is asked for, "3" is not."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        kinds = [kind for kind in arguments if kind is not type(None)]
        lists = [kind for kind in kinds if get_origin(kind) is tuple]
        return _convert(lists[0] if lists and isinstance(value, list | tuple) else kinds[0], value, where)
    if origin is Literal:
        if value in arguments and type(value) in {type(choice) for choice in arguments}:
            return value
        raise ConfigError(f"{where}={_show(value)}: there are {', '.join(map(str, arguments))}")
    if origin is tuple:
        return _convert_tuple(arguments, value, where)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}={_show(value)}: not a group of keys")
        return from_dict(kind, value, f"{where}.")
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and is_number and math.isfinite(value) and value == int(value):
        return int(value)
    if kind is float and is_number and math.isfinite(value):
        return float(value)
    if kind is str and isinstance(value, str):
        return value
    wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]
    raise ConfigError(f"{where}={_show(value)}: {wanted} is wanted")


def _convert_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    """A list as a tuple; one value alone is a list of one."""
    items = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if arguments[-1] is Ellipsis:
        return tuple(_convert(arguments[0], item, where) for item in items)
    if len(items) != len(arguments):
        raise ConfigError(f"{where}={_show(value)}: {len(arguments)} values are wanted, as [a,b]")
    return tuple(_convert(kind, item, where) for kind, item in zip(arguments, items))


def _show(value: Any) -> str:
    """A value as one types it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def flat_types(cls: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, type) of every field, groups themselves included."""
    for name, kind in get_type_hints(cls).items():
        yield f"{path}{name}", kind
        inner = next((kind for kind in (kind, *get_args(kind)) if dataclasses.is_dataclass(kind)), None)
        if inner is not None:
            yield from flat_types(inner, f"{path}{name}.")


def unknown_key(key: str, known: Sequence[str]) -> str:
    """The line that refuses a key, with the nearest that there is and its neighbours."""
    last = key.rpartition(".")[2]
    same = [name for name in known if name.rpartition(".")[2] == last]
    near = same or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    near = near or [name for name in known if difflib.get_close_matches(last, [name.rpartition(".")[2]], cutoff=0.7)]
    group = (near[0] if near else key).rpartition(".")[0]
    neighbours = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == group]
    if not neighbours:
        group, neighbours = "", [name for name in known if "." not in name]
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{key}: no such key{hint} (keys{f' of {group}' if group else ''}: {', '.join(dict.fromkeys(neighbours))})"


# --------------------------------------------------------------------------------------------------------------------
# Back to plain data


def to_dict(config: Any) -> dict[str, Any]:
    """Plain values, with lists for tuples: what from_dict takes and JSON and YAML hold."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, tuple | list) else value

    return plain(dataclasses.asdict(config))


def to_yaml(config: Any) -> str:
    """The whole configuration as YAML; `from_dict(cls, yaml.safe_load(text))` gives it back."""
    import yaml

    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=120)
