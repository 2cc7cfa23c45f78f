"""`latentmill VERB --help`, written from the dataclasses of config/ and their docstrings."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from functools import cache
from itertools import pairwise
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pipeline import config as c
from pipeline.config.loading.folders import groups
from pipeline.config.loading.merge import kinds_of
from pipeline.config.values.bounds import bounds_of
from pipeline.config.values.keys import key_of

WIDTH = 110
USAGE = {
    "submit": "latentmill submit VERB [--dry-run] [cluster=NAME] [nodes=N] KEY=VALUE ... [then VERB KEY=VALUE ...]",
    "plan": "latentmill plan [experiment=NAME] [images=N] [cluster=NAME] [nodes=N] KEY=VALUE ... [encode.KEY=...]",
}
"""Verbs whose arguments are not just KEY=VALUE."""


def verb_help(verb: str) -> str:
    """The help of a verb: its groups, and every key with its default, its choices or bounds, and its purpose."""
    cls = c.CONFIGS[verb]
    usage = USAGE.get(verb, f"latentmill {verb} KEY=VALUE ...")
    lines = [*textwrap.wrap(" ".join((cls.__doc__ or "").split()), WIDTH), "", f"usage: {usage}", ""]
    choices = {name: names for name, names in groups(verb).items() if names}
    if choices:
        lines += ["Groups (each sets several keys at once; a key that is given as well wins):"]
        lines += [line for name, names in choices.items() for line in _group(name, names)] + [""]
    lines += ["Keys:", *_keys(cls, "")]
    if issubclass(cls, c.RunConfig):
        lines += [
            "",
            *textwrap.wrap(
                f"-m runs a sweep: latentmill {verb} -m optim.lr=1e-4,2e-4 ... runs one job per value, and with "
                "cluster=NAME the jobs run side by side on Slurm (--no-wait: without waiting for them; --dry-run: only "
                "their scripts).",
                WIDTH,
            ),
        ]
    return "\n".join(lines)


def _group(name: str, names: list[str]) -> list[str]:
    return _listed(f"{name}={{{', '.join(names)}}}")


def _listed(spaced: str) -> list[str]:
    """A name and its choices, wrapped to as many lines as they need. Lines are broken at ", " alone."""
    lines = textwrap.wrap(spaced, WIDTH, initial_indent="  ", subsequent_indent=" " * 6, break_on_hyphens=False)
    return [line.replace(", ", ",") for line in lines]


def _keys(cls: type, path: str) -> list[str]:
    """Two lines or more per field, groups after the verb's own fields."""
    docs, hints, with_bounds = field_docs(cls), get_type_hints(cls), get_type_hints(cls, include_extras=True)
    plain, nested = [], []
    for field in dataclasses.fields(cls):
        kind = next((k for k in (hints[field.name], *get_args(hints[field.name])) if dataclasses.is_dataclass(k)), None)
        doc = docs.get(field.name, "")
        if isinstance(kind, type):
            for name, one in kinds_of(kind).items():
                chosen, about = f" ({path}{field.name}={name})" if name else "", one.__doc__ if name else doc
                nested += ["", f"  {path}{field.name}.*{chosen}: {about}", *_keys(one, f"{path}{field.name}.")]
        else:
            key = f"{path}{key_of(field.name)}={_default(field)}{_choices(hints[field.name])}".replace(",", ", ")
            plain += _listed(f"{key}{_bounds(with_bounds[field.name])}")
            plain += textwrap.wrap(doc, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return plain + nested


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return "...  (must be given)"
    value = field.default
    if isinstance(value, tuple):
        return "[" + ",".join(map(str, value)) + "]"
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)


def _choices(kind: Any) -> str:
    """The choices of a Literal, which may be the type of a list's elements."""
    literal = next((k for k in (kind, *get_args(kind)) if get_origin(k) is Literal), None)
    return (
        f"  {{{','.join(map(str, get_args(literal)))}}}" if literal is not None and len(get_args(literal)) > 1 else ""
    )


def _bounds(kind: Any) -> str:
    """The bounds that a type declares, such as "  (>= 1)" for a number and "  (each >= 1)" for a list."""
    shown = [f"each {bound}" if of_list else str(bound) for bound, of_list in bounds_of(kind)]
    return f"  ({' or '.join(shown)})" if shown else ""


@cache
def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a config dataclass, on one line; a field that it inherits has the one of its
    base. Empty where there is no source code."""
    inherited = {
        name: doc for base in cls.__bases__ if dataclasses.is_dataclass(base) for name, doc in field_docs(base).items()
    }
    try:
        source = inspect.getsource(cls)
    except OSError:
        return inherited
    tree = ast.parse(source)
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls.__name__)
    docs = dict(inherited)
    for statement, following in pairwise(body):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            docs[statement.target.id] = " ".join(str(following.value.value).split())
    return docs
