"""The lines with which encode refuses a destination. What they advise works: tests/preprocess/test_advice.py follows
each of them word for word."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.storage.base import Storage
from preprocess.units.inputs import Input
from preprocess.units.naming import option
from preprocess.units.state import State


def other_settings(storage: Storage, differences: Sequence[str]) -> str:
    """The contracts differ."""
    return f"{storage.url} was begun with other settings ({'; '.join(differences)}): use those, or choose another dest"


def not_begun_with(state: State, source: str, count: int) -> str:
    """Shards are named that an unfinished plan does not have."""
    return (
        f"{state.storage.url} was begun with {len(state.names)} input shards ({state.plan.sources()}) that are not the "
        f"{count} of source={source}: give the same ones, or choose another dest (shards can be appended once it is "
        "finished)"
    )


def other_source(state: State, source: str, count: int, missing: Sequence[int]) -> str:
    """Shards of the plan are not named. missing: their numbers."""
    names = [state.names[number] for number in missing]
    gone = "" if state.manifest else f" Those that cannot be had any more can be left out: {option('leave_out', names)}"
    return (
        f"{state.storage.url} was begun with {len(state.names)} input shards ({state.plan.sources()}), and source="
        f"{source} names {count}, without {names[0]}{_more(names)}: give all of them, or further ones alone.{gone}"
    )


def partial(state: State, source: str, missing: Sequence[int]) -> str:
    """Some shards of a finished dataset are named beside further ones."""
    names = [state.names[number] for number in missing]
    return (
        f"{state.storage.url} holds {len(state.names)} input shards ({state.plan.sources()}), and source={source} "
        f"names some of them with others, without {names[0]}{_more(names)}: give all of them with those that are to be "
        "appended, or these alone"
    )


def is_encoded(state: State, names: Sequence[str]) -> str:
    """Shards that are encoded are to be left out."""
    return (
        f"{option('leave_out', names)}: {state.storage.url} has encoded {'it' if len(names) == 1 else 'them'} already. "
        f"Run this once with {option('forget', names)}, which takes back what was made of it, then again without"
    )


def changed(state: State, inputs: Sequence[Input], pairs: Sequence[tuple[int, int]]) -> str:
    """Shards have been replaced since they were encoded. pairs: index of an input, and number of the unit."""
    shard, number = inputs[pairs[0][0]], pairs[0][1]
    known = state.known()[number]
    differs = (
        f"it has {shard.bytes:,} bytes, that one had {known.bytes:,}"
        if shard.bytes != known.bytes
        else "it has the same size, but another SHA-256"
    )
    names = sorted({state.names[unit] for _, unit in pairs})
    return (
        f"{shard.url} is another {state.names[number]} than the one that {state.storage.url} was made from"
        f"{_more(names, ', as are')}: {differs}. Put back the former one; or, to encode this one in its place, run "
        f"this once with {option('forget', names)}, then again without; or, if it is a further shard, give it another "
        "name and run this with that shard alone"
    )


def unfinished_append(state: State) -> str:
    """An append was begun and is not finished."""
    part = state.plan.parts[state.version]
    return (
        f"{state.storage.url} is finished as version {state.version}; an append of {len(state.pending)} shards "
        f"({part.source}) to it is not: run it again, or append others in its place"
    )


def replaced(state: State, count: int) -> str:
    """A proposed part gave way to another."""
    return (
        f"{state.storage.url}: an append of {len(state.pending)} shards ({state.plan.parts[-1].source}) was not "
        f"finished, and gives way to this one of {count}"
    )


def _more(names: Sequence[str], words: str = " and") -> str:
    return f"{words} {len(names) - 1} more" if len(names) > 1 else ""
