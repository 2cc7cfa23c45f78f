"""Damage that is done to files: the same list for each file of ours, by its format."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Change = Callable[[bytes], bytes]
ESCAPES = "\x1b[31mred\x1b]0;title\x07"


def _mapped(data: bytes, change: Callable[[Any], Any]) -> bytes:
    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: walk(item) for key, item in value.items()}
        return [walk(item) for item in value] if isinstance(value, list) else change(value)

    return json.dumps(walk(json.loads(data))).encode()


def _without_lists(data: bytes) -> bytes:
    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: walk(item) for key, item in value.items()}
        return [] if isinstance(value, list) else value

    return json.dumps(walk(json.loads(data))).encode()


JSON_DAMAGE: dict[str, Change] = {
    "empty": lambda data: b"",
    "cut in half": lambda data: data[: len(data) // 2],
    "garbage": lambda data: bytes(range(256)) * 4,
    "null": lambda data: b"null",
    "a list": lambda data: b"[1, 2, 3]",
    "an empty group": lambda data: b"{}",
    "a number": lambda data: b"7",
    "200,000 nested lists": lambda data: b"[" * 200_000,
    "200,000 nested groups": lambda data: b'{"a":' * 200_000,
    "NaN": lambda data: b'{"a": NaN}',
    "an integer of 5,000 digits": lambda data: b'{"a": ' + b"9" * 5000 + b"}",
    "not UTF-8": lambda data: data.replace(b'"', b'\xff"', 1),
    "half a surrogate pair": lambda data: data.replace(b'"', b'"\\ud800', 1),
    "every text a number": lambda data: _mapped(data, lambda v: 5 if isinstance(v, str) else v),
    "every number a text": lambda data: _mapped(data, lambda v: "x" if type(v) in (int, float) else v),
    "every number negative": lambda data: _mapped(data, lambda v: -abs(v) - 1 if type(v) in (int, float) else v),
    "every number 2**62": lambda data: _mapped(data, lambda v: 2**62 if type(v) is int else v),
    "every text with escapes": lambda data: _mapped(data, lambda v: ESCAPES + v if isinstance(v, str) else v),
    "every value null": lambda data: _mapped(data, lambda v: None),
    "every list empty": _without_lists,
}
YAML_DAMAGE: dict[str, Change] = {
    "empty": lambda data: b"",
    "cut in half": lambda data: data[: len(data) // 2],
    "garbage": lambda data: bytes(range(256)) * 4,
    "a command as a tag": lambda data: b"seed: !!python/object/apply:os.system ['touch owned']",
    "a billion laughs": lambda data: (
        b"a: &a [x,x,x,x,x,x,x,x,x]\n"
        + b"".join(b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 9)) for i in range(9))
    ),
    "100,000 nested lists": lambda data: b"seed: " + b"[" * 100_000,
    "a tab and a NUL": lambda data: b"seed:\t\0",
    "a key of a newer version": lambda data: data + b"newer_key: 5\n",
    "samples of 400 digits": lambda data: data.replace(b"samples: 32", b"samples: " + b"9" * 400),
    "a list": lambda data: b"- 1\n- 2\n",
    "negative samples": lambda data: data.replace(b"samples: 32", b"samples: -5"),
    "a network of terabytes": lambda data: data.replace(b"channels: 32", b"channels: 1000000000"),
    "a batch of 0": lambda data: data.replace(b"batch: 16", b"batch: 0"),
}
LINES_DAMAGE: dict[str, Change] = {
    name: lambda data, change=change: data + change(data.splitlines()[-1] if data else b"{}") + b"\n"  # type: ignore[misc]
    for name, change in JSON_DAMAGE.items()
}


def replaced(file: str, change: Change) -> Callable[[Path], None]:
    """A change of one file of the copy, which becomes a new file."""

    def apply(folder: Path) -> None:
        path = folder / file
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(change(data))

    return apply


def in_place_of(file: str, what: str) -> Callable[[Path], None]:
    """Something that is no file in place of a file: a folder, a pipe, a link to nothing, to a device or to itself."""

    def apply(folder: Path) -> None:
        path = folder / file
        path.unlink()
        if what == "a folder":
            path.mkdir()
        elif what == "a pipe":
            os.mkfifo(path)
        else:
            path.symlink_to(
                {"a link to nothing": "/nonexistent", "an endless device": "/dev/zero"}.get(what, path.name)
            )

    return apply


NO_FILES = ("a folder", "a pipe", "a link to nothing", "an endless device", "a link to itself")


def edited(file: str, *path: Any, value: Any) -> Callable[[Path], None]:
    """One value of a JSON file is another; `path` leads to it."""

    def change(data: bytes) -> bytes:
        tree = json.loads(data)
        inner = tree
        for step in path[:-1]:
            inner = inner[step]
        inner[path[-1]] = value
        return json.dumps(tree, sort_keys=True, separators=(",", ":")).encode() + b"\n"

    return replaced(file, change)
