"""Begins a destination, goes on with it, or appends shards to it; and takes an append back that came to nothing.

Workers that append agree on the numbers of the new units by a part of the plan, `plans/00000N.json`. Until a manifest
holds it, a part is a proposal: one that nobody works on may be replaced by another, and what was encoded for it is then
deleted. Workers show that they live by claims (claims.py), so that none is replaced under their hands; whoever
publishes a unit of a proposal looks first whether it still stands.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from pipeline.data.format.contract import Contract
from pipeline.data.format.contract_json import contract_digest
from pipeline.data.format.manifest import VERSIONS
from pipeline.errors import DestinationExists, NotFound, StorageError
from pipeline.log import log
from pipeline.storage.base import ObjectInfo, Storage
from preprocess.encoding.claims import Claims
from preprocess.encoding.plan import PLAN, Part, Plan, name_units, part_bytes, part_key, plan_bytes
from preprocess.gathering.listing import listing_key
from preprocess.units import refusals
from preprocess.units.call import Call
from preprocess.units.inputs import Input
from preprocess.units.matching import Matching
from preprocess.units.naming import resolve
from preprocess.units.ours import refuse_foreign, refuse_taken
from preprocess.units.reports import Report, files_of
from preprocess.units.state import State, is_unchanged, look

REPLACING = "replace"  # claim of the worker that replaces a proposed part


@dataclass
class Agreement:
    """What this worker does at one destination.

    plan: as far as it is to be finished. units: number of each unit that the call gives, by index of its input.
    left_out: numbers of those that are to be left out. proposal: key and bytes of the part that is appended, if one is.
    reports, listed: what was found there. inputs: what the indices are of.
    """

    storage: Storage
    plan: Plan
    units: dict[int, int]
    left_out: set[int]
    proposal: tuple[str, bytes] | None = None
    reports: dict[int, Report] = field(default_factory=dict)
    listed: list[ObjectInfo] = field(default_factory=list)
    inputs: list[Input] = field(default_factory=list)

    def require(self) -> None:
        """Raises DestinationExists when another worker has replaced the part that is appended."""
        if self.proposal is None:
            return
        key, data = self.proposal
        if not _holds(self.storage, key, data):
            raise DestinationExists(
                f"{self.storage.locate(key)}: another worker has taken back this append in the meantime: run this again"
            )


def agree(storage: Storage, contract: Contract, call: Call, claims: Claims) -> Agreement:
    """Finds what is to be done at a destination, and begins or extends its plan. Raises DestinationExists, SourceError
    and ConfigError, with what to do, and leaves nothing behind then."""
    state = look(storage)
    if state is None:
        call.settle(None)
        names = name_units([shard.url for shard in call.inputs])
        left_out = set(resolve("leave_out", call.leave_out, names))
        refuse_taken(storage, names, contract_digest(contract))
        part = call.part(names, storage, dict(zip(names, call.inputs, strict=True)))
        if storage.put_if_absent(PLAN, plan_bytes(contract, part)):
            units = dict(enumerate(range(len(names))))
            return Agreement(storage, Plan(contract, (part,)), units, left_out, inputs=call.inputs)
        state = look(storage)
        assert state is not None, "a plan is never deleted"
        drop_listing(storage, part, state.plan)
    differences = state.plan.contract.differences(contract)
    if differences:
        raise DestinationExists(refusals.other_settings(storage, differences))
    while True:
        call.settle(state)
        choice = _choose(state, call, claims)
        if choice is not None:
            choice.reports, choice.listed, choice.inputs = state.reports, state.listed, call.inputs
            return choice
        state = look(storage)
        assert state is not None, "a plan is never deleted"


def _choose(state: State, call: Call, claims: Claims) -> Agreement | None:
    """One attempt to agree on a destination that was begun. None: others have changed it in the meantime."""
    matching = state.match(call.inputs, call.hashes)
    if matching.changed:
        raise DestinationExists(refusals.changed(state, call.inputs, matching.changed))
    further = call.names(matching.further, state.names)
    asked = resolve("leave_out", call.leave_out, [*state.names, *further])
    left_out = {number for number in asked if number < len(state.names)}
    _refuse_encoded(state, left_out)
    out = state.left_out | left_out
    given = set(matching.units.values())
    if state.manifest is None:
        _refuse_other(state, call, matching, given | out)
        return Agreement(state.storage, state.plan, matching.units, left_out)
    mended = {n for n in state.passed_over - out if n in given or n in state.encoded}
    base_given, base_missing = given & set(state.base), set(state.base) - given - out - state.passed_over
    if not (matching.further or mended or given & set(state.pending) or left_out & set(state.pending)):
        last = set(state.base[len(state.base) - len(state.plan.parts[state.version - 1].names) :])
        if base_missing and not last <= given | out | state.passed_over:
            raise DestinationExists(refusals.other_source(state, call.source, len(call.inputs), sorted(base_missing)))
        if state.pending:
            log.info(f"encode: {refusals.unfinished_append(state)}")
        return Agreement(state.storage, state.plan.until(state.version), matching.units, left_out)
    if base_given - mended and base_missing:
        raise DestinationExists(refusals.partial(state, call.source, sorted(base_missing)))
    return _append(state, call, claims, matching, further, left_out)


def _refuse_encoded(state: State, left_out: set[int]) -> None:
    """Raises DestinationExists when a unit that is to be left out is encoded."""
    in_manifest = set(state.base) - state.passed_over
    encoded = sorted(number for number in left_out if number in state.encoded or number in in_manifest)
    if encoded:
        raise DestinationExists(refusals.is_encoded(state, [state.names[number] for number in encoded]))


def _refuse_other(state: State, call: Call, matching: Matching, covered: set[int]) -> None:
    """Raises DestinationExists unless an unfinished plan is given whole, but for what is done, or its last part is."""
    if matching.further:
        raise DestinationExists(refusals.not_begun_with(state, call.source, len(call.inputs)))
    missing = set(range(len(state.names))) - covered
    last = set(range(len(state.names))[-len(state.plan.parts[-1].names) :])
    if missing - state.encoded and not last <= covered:
        not_done = sorted(missing - state.encoded)
        raise DestinationExists(refusals.other_source(state, call.source, len(call.inputs), not_done))


# --------------------------------------------------------------------------------------------------------------------
# Appends


def _append(
    state: State, call: Call, claims: Claims, matching: Matching, further: list[str], left_out: set[int]
) -> Agreement | None:
    """Proposes a part, joins in the one that is proposed, or replaces it. None: others were faster."""
    storage, number, place = state.storage, state.version + 1, _place(call)
    if len(state.plan.parts) < number:
        refuse_foreign(storage, state.listed, range(len(state.names), len(state.names) + len(further)))
        inputs = {name: call.inputs[i] for i, name in zip(matching.further, further, strict=True)}
        part = call.part(further, storage, inputs)
        data = part_bytes(part)
        claims.join(_digest(data), place)
        key = part_key(number)
        if is_unchanged(state) and (storage.put_if_absent(key, data) or _holds(storage, key, data)):
            call.part(further, storage, inputs)  # its list, should one who took back the same part have deleted it
            return _agreed(state, part, matching, further, call)
        claims.leave(_digest(data), place)
        return None
    given = set(matching.units.values())
    data = part_bytes(state.plan.parts[-1])
    open_units = set(state.pending) - given - left_out - state.left_out - state.encoded
    differs = bool(matching.further or open_units)
    if len(state.plan.parts) > number and differs:
        raise DestinationExists(refusals.partial(state, call.source, sorted(open_units)))
    is_busy = claims.others_append(_digest(data), but=place)
    if not is_busy and differs:
        if not claims.others_append(_digest(data)):
            with claims.alone(REPLACING):
                if not is_unchanged(state) or claims.others(_digest(data)):
                    return None
                return _replace(state, call, claims, matching, left_out)
        is_busy = not given & set(state.pending)
        log.info(
            f"encode: others append {len(state.pending)} shards to {storage.url}: helping them with what is theirs"
        )
    if is_busy:
        raise DestinationExists(
            f"{storage.url}: others append other shards to it at this moment ({part_key(number)}): run this again later"
        )
    claims.join(_digest(data), place)
    if not is_unchanged(state):  # others may have replaced it before they could see this worker
        claims.leave(_digest(data), place)
        return None
    return Agreement(storage, state.plan, matching.units, left_out, (part_key(number), data))


def _holds(storage: Storage, key: str, data: bytes) -> bool:
    """Whether an object has these bytes."""
    try:
        return storage.get(key) == data
    except NotFound:
        return False


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _place(call: Call) -> str:
    """A digest of the folders that a call's shards lie in, equal for all workers of one call."""
    folders = sorted({shard.url.rpartition("/")[0] for shard in call.inputs})
    return _digest("\n".join(folders).encode("utf-8", "surrogateescape"))


def _agreed(state: State, part: Part, matching: Matching, further: Sequence[str], call: Call) -> Agreement:
    """The agreement on a part that follows what the manifest holds."""
    base = state.plan.until(state.version)
    plan = base.with_part(part)
    numbers = {name: number for number, name in enumerate(plan.names)}
    units = {i: numbers[state.names[n]] for i, n in matching.units.items() if state.names[n] in numbers}
    units |= {i: numbers[name] for i, name in zip(matching.further, further, strict=True)}
    left_out = set(resolve("leave_out", call.leave_out, plan.names))
    return Agreement(state.storage, plan, units, left_out, (part_key(state.version + 1), part_bytes(part)))


def _replace(state: State, call: Call, claims: Claims, matching: Matching, left_out: set[int]) -> Agreement:
    """Puts another part in the place of one that nobody works on. What was encoded for it stays where its unit keeps
    its number."""
    storage, first = state.storage, len(state.base)
    wanted = set(matching.units.values()) | left_out
    kept = [state.names[number] for number in state.pending if number in wanted]
    further = call.names(matching.further, [*state.names[:first], *kept])
    inputs = {state.names[number]: call.inputs[i] for i, number in matching.units.items()}
    inputs |= {name: call.inputs[i] for i, name in zip(matching.further, further)}
    part = call.part([*kept, *further], storage, inputs)
    moved = [n for n in state.pending if n - first >= len(kept) or kept[n - first] != state.names[n]]
    others = range(len(state.names), first + len(part.names))
    refuse_foreign(storage, state.listed, [*moved, *others])
    claims.join(_digest(part_bytes(part)), _place(call))
    for key in (*_copy(state), *files_of(storage, moved)):
        storage.delete(key)
    for number in moved:
        state.reports.pop(number, None)
    storage.put(part_key(state.version + 1), part_bytes(part))
    drop_listing(storage, state.plan.parts[-1], state.plan.until(state.version).with_part(part))
    log.info(f"encode: {refusals.replaced(state, len(part.names))}")
    return _agreed(state, part, matching, further, call)


def _copy(state: State) -> list[str]:
    """Keys of the copy of a manifest that a worker wrote for a proposed part before it was killed."""
    copy = f"{VERSIONS}/{state.version + 1:06d}"
    return [info.key for info in state.listed if info.key in (f"{copy}.json", f"{copy}.excluded.npy")]


def withdraw(agreement: Agreement, claims: Claims) -> None:
    """Takes a proposed part back after an error, so that nothing is left of it: when none of its shards is encoded, and
    no other worker appends. Errors of the store are passed over, lest they hide the one that ended the work."""
    if agreement.proposal is None:
        return
    key, data = agreement.proposal
    with suppress(StorageError, DestinationExists):
        if claims.others():
            return
        with claims.alone(REPLACING):
            state = look(agreement.storage)
            if state is None or claims.others() or not _holds(agreement.storage, key, data):
                return
            news = set(state.pending) | state.passed_over
            if news & state.encoded or part_key(state.version + 1) != key:
                return
            for file in (*_copy(state), *files_of(agreement.storage, state.pending)):
                agreement.storage.delete(file)
            agreement.storage.delete(key)
            drop_listing(agreement.storage, state.plan.parts[-1], state.plan.until(state.version))


def drop_listing(storage: Storage, part: Part, plan: Plan) -> None:
    """Deletes the list of the files of a part that is none of the plan, unless a part of that has the same."""
    if part.listing and all(other.listing != part.listing for other in plan.parts):
        storage.delete(listing_key(part.listing))
