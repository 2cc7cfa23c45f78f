"""Strategies of hypothesis for damaged and hostile files: plain values, changed trees of JSON, changed bytes."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

NUMBERS = (0, -1, 1, 3.5, -0.0, 10**6, 2**31, 2**63 - 1, -(2**63), 10**30, 1e300)
TEXTS = ("", "x", "\x1b[31m", "../../x", "/etc/passwd", "hf-hub:evil/model", "0" * 64, "a" * 5000)
HOSTILE: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, *NUMBERS, *TEXTS, [], {}, [1] * 50, [[]], {"a": {"b": []}}]
)
VALUES = st.recursive(
    HOSTILE | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def changed_tree(draw: st.DrawFn, valid: Any) -> Any:
    """A valid tree with one to three changes: a value replaced, taken away, or added."""
    tree = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(tree))
        if not places:
            break
        table, key = draw(st.sampled_from(places))
        change = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
        if change == "replace":
            table[key] = copy.deepcopy(draw(VALUES))
        elif change == "remove":
            del table[key]
        elif isinstance(table, dict):
            table[draw(st.text(max_size=8))] = copy.deepcopy(draw(VALUES))
        else:
            table.append(copy.deepcopy(draw(VALUES)))
    return tree


def _places(tree: Any) -> Any:
    """(list or dictionary, index or key) of every value in the tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items):
        yield tree, key
        yield from _places(value)


@st.composite
def changed_bytes(draw: st.DrawFn, valid: bytes, window: int = 2**62) -> bytes:
    """Valid bytes of which some of the first `window` are replaced, cut out, repeated, or cut off."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(min(len(data), window) - 1, 0)))
        change = draw(st.sampled_from(["flip", "flip", "insert", "remove", "cut", "repeat"]))
        if change == "flip" and data:
            data[at] = draw(st.integers(0, 255))
        elif change == "insert":
            data[at:at] = draw(st.binary(max_size=9))
        elif change == "remove":
            del data[at : at + draw(st.integers(1, 9))]
        elif change == "cut":
            del data[at:]
        elif change == "repeat":
            data[at:at] = data[at : at + 16]
    return bytes(data)


def changed_json(valid: Any) -> st.SearchStrategy[bytes]:
    """The text of a changed tree, or changed text of the tree."""
    trees = changed_tree(valid).map(lambda tree: json.dumps(tree).encode())
    return st.one_of(trees, trees, trees, changed_bytes(json.dumps(valid).encode()))
