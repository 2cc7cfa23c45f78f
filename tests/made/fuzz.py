"""Mutations of whole files, and what a reader of them may do: give a value or raise an error of ours, soon and without
much memory."""

from __future__ import annotations

import copy
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import strategies as st

from pipeline.errors import LatentmillError

SECONDS, MEGABYTES = 2.0, 200.0
"""Most CPU time of one input, and most that the process may grow by."""
QUICK: dict[str, Any] = {"max_examples": 100, "deadline": None, "derandomize": True}
LONG: dict[str, Any] = {"max_examples": 4000, "deadline": None}
HOSTILE: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        -512,
        2**31,
        2**53,
        2**63,
        2**64 - 1,
        2**70,
        10**400,
        0.5,
        -0.0,
        1e308,
        float("nan"),
    ),
    *(float("inf"), "", "0", "x" * 300, "../../x.tar", "/x.tar", "a\0", "\x1b[31m", "\ud800", "a" * 64, "json:caption"),
    *([], {}, [[]], [None], [1, 2], [16, 16], [-1, -1], {"a": 1}, {"key": {"key": []}}, [[[[[[]]]]]]),
]


@contextmanager
def bounded() -> Iterator[None]:
    """Lets only our own errors pass, and holds time and memory."""
    begun, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = ""
    try:
        yield
    except LatentmillError as error:
        line = str(error).strip()
    assert "\n" not in line and len(line) < 4000
    assert time.process_time() - begun < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3 < MEGABYTES


@st.composite
def mutated_bytes(draw: st.DrawFn, whole: bytes) -> bytes:
    """`whole` with a few bytes changed, cut out, repeated or put in."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.sampled_from(["set", "cut", "end", "insert", "repeat", "digits"]))
        if kind == "set":
            data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
        elif kind == "cut":
            del data[at : at + draw(st.integers(1, 600))]
        elif kind == "end":
            del data[at:]
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=24))
        elif kind == "repeat":
            size = draw(st.integers(1, 600))
            data[at:at] = data[at : at + size]
        else:
            value = draw(
                st.sampled_from([b"-1", b"99999999999", b"1e999", b"\xff" * 8, b"0x10", b"[" * 2000, b"\0" * 12])
            )
            data[at : at + len(value)] = value
    return bytes(data)


@st.composite
def mutated_value(draw: st.DrawFn, whole: Any) -> Any:
    """A copy of plain data in which one to three places hold something else, or are missing, swapped or doubled."""
    value = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(value))
        if not places:
            return value
        holder, name = draw(st.sampled_from(places))
        kind = draw(st.sampled_from(["set", "set", "set", "delete", "near", "other", "more"]))
        if kind == "delete":
            del holder[name]
        elif kind == "near" and type(holder[name]) is int:
            holder[name] += draw(st.sampled_from([-1, 1, -512, 512, 1024, 10**6]))
        elif kind == "other":
            other, key = draw(st.sampled_from(places))
            if (isinstance(other, dict) and key in other) or (isinstance(other, list) and key < len(other)):
                holder[name] = copy.deepcopy(other[key])
        elif kind == "more" and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[name]))
        else:
            holder[name] = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything within plain data."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield value, name
        yield from _places(item)
