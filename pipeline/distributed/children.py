"""How this program starts others of its own: never from where the user stands, and never with a configuration that
others could read off the list of processes."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import OverrideError, ParseError
from pipeline.parsing.values import parse_json
from pipeline.verbs import HANDED_OVER

ROOT = Path(__file__).parents[2]
"""The folder that holds the packages pipeline and preprocess."""


def own_command(module: str, *words: str, python: str = "") -> list[str]:
    """The command that runs one of our modules. python: the interpreter; "" = this one.

    -P keeps the working directory out of the module search path: a pipeline/ or torch.py that lies there is the user's.
    """
    return [python or sys.executable, "-P", "-m", module, *words]


def own_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of such a command: this process's, and where this package was found by the working directory
    alone (a checkout that is not installed), its folder in PYTHONPATH."""
    found_here = not sys.flags.safe_path and (sys.path[0] or os.getcwd()) == str(ROOT)
    if not found_here or str(ROOT) in sys.path[1:]:
        return dict(environ)
    return dict(environ) | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), environ.get("PYTHONPATH", "")]))}


def verb_command(verb: str, words: Sequence[str]) -> tuple[list[str], bytes]:
    """The command that runs a verb, and what it is to find as standard input: its words."""
    return own_command("pipeline.cli", verb, HANDED_OVER), json.dumps(list(words)).encode()


@contextmanager
def safe_path() -> Iterator[None]:
    """Inside, interpreters that Python's own libraries start do not search the working directory either."""
    changed = own_environment() | {"PYTHONSAFEPATH": "1"}
    before = {name: os.environ.get(name) for name in ("PYTHONSAFEPATH", "PYTHONPATH")}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})


@contextmanager
def handed_over(data: bytes) -> Iterator[int]:
    """A descriptor of memory that holds `data`, as standard input of children, who read it by `take_over`.

    No other user can read it, no file is left behind whoever is killed, and any number of children may read it.
    """
    descriptor = os.memfd_create("latentmill-handed-over")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(data)
        yield descriptor
    finally:
        os.close(descriptor)


def take_over() -> bytes:
    """What the parent has handed over as standard input, which is empty from then on."""
    facts, data = os.fstat(0), b""
    if stat.S_ISFIFO(facts.st_mode):
        data = sys.stdin.buffer.read()
    while len(data) < facts.st_size and (part := os.pread(0, facts.st_size - len(data), len(data))):
        data += part
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return data


def words_taken_over() -> list[str]:
    """The words of a verb's command line that the parent has handed over. Raises OverrideError for anything else."""
    try:
        words = parse_json(take_over())
    except (ParseError, OSError):
        words = None
    if not (isinstance(words, list) and all(isinstance(word, str) for word in words)):
        raise OverrideError(f"{HANDED_OVER} is for what latentmill itself starts")
    return words
