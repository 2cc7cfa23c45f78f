"""Damage to files of our own formats, for fuzzers: bytes that are changed anywhere, and values of plain data."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st


def _nested(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**62, 2**63, -(2**63), 2**64, 10**30, 0.5, -1.5, 1e308, -1e308),
    *(float("nan"), float("inf"), "", "x", "0", "\x1b[31m\x00", "../../x", "/etc/passwd", "--help", "9" * 5000),
    *("\u00b2", "\u202e", "a" * 64, [], {}, [[]], [0], [-1], ["x"], {"x": 1}, {"": {}}, [2**62] * 3, list(range(1000))),
    *(_nested(70), {"a": _nested(10)}),
)
"""Values that no writer of ours gives."""


def _places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in plain data."""
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from _places(value, (*path, key))


@st.composite
def changed_trees(draw: st.DrawFn, tree: Any) -> Any:
    """Plain data in which up to three values are replaced, removed, or put in under names that nobody knows."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(_places(tree))))
        value = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
        if not path:
            if draw(st.booleans()):
                return value
            continue
        parent = tree
        for key in path[:-1]:
            parent = parent[key]
        what = draw(st.sampled_from(("replace", "remove", "add")))
        if what == "replace":
            parent[path[-1]] = value
        elif what == "remove":
            del parent[path[-1]]
        elif isinstance(parent, dict):
            parent[draw(st.sampled_from(("later", "", "\x1b", "__class__", "0")))] = value
        else:
            parent.append(value)
    return tree


@st.composite
def changed_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes of which some are changed, removed, doubled or put in, or the end is missing."""
    for _ in range(draw(st.integers(1, 4))):
        at, length = draw(st.integers(0, len(data))), draw(st.integers(0, 40))
        new = draw(
            st.binary(max_size=8)
            | st.sampled_from([b"[" * 5000, b'"', b"\\ud800", b"1e999", b"9" * 5000, b"&a ", b"!!x "])
        )
        data = data[:at] + draw(st.sampled_from((new, data[at : at + length] * 2, b""))) + data[at + length :]
    return data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data


def changed_json(tree: Any) -> st.SearchStrategy[bytes]:
    """JSON text of plain data, damaged as values or as bytes."""
    return changed_trees(tree).map(lambda changed: json.dumps(changed).encode()) | changed_bytes(
        json.dumps(tree).encode()
    )
