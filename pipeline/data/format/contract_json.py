"""A contract as JSON: what a manifest and a run hold, and how it is read again, of this format and the one before.

Format 2 (2026) had captions in every cache, moments alone, and no facts of conditions: these follow from its arrays. A
contract of JSON has either every field of format 3, or every field of format 2 and no other, so that what is written
again has the bytes that were read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator
from typing import Any, Literal

from pipeline.conditions.facts import (
    MOST_BOX_CLASSES,
    MOST_LABELS,
    BoxFacts,
    Conditions,
    LabelFacts,
    LowresFacts,
    MaskFacts,
)
from pipeline.data.format.bounds import MOST_ELEMENTS
from pipeline.data.format.contract import WHERE_NEEDED, Contract, Member, canonical_json, plain
from pipeline.data.format.members import ARRAYS, FOREIGN_FLOAT, arrays_of
from pipeline.errors import ConfigError, ParseError
from pipeline.parsing.typed import build

SINCE_3 = ("conditions", "colour", "columns")
"""Fields of a contract that format 2 does not have."""
TEXT_SINCE_3 = ("vocabulary", "start", "captions")
"""Fields of its text that format 2 does not have."""
NAMES = 2 << 20
"""Characters of all names of a condition's classes: a run.json has room for them."""
Format = Literal[2, 3]


def contract_to_json(contract: Contract, format: Format) -> dict[str, Any]:
    """The plain values of a contract in a manifest of this format."""
    value = plain(contract)
    if format == 2:
        assert contract.text is not None and contract.stored == "moments", "a contract that format 2 cannot hold"
        assert contract.text.captions == 1, "a contract that format 2 cannot hold"
        value = {name: item for name, item in value.items() if name not in SINCE_3}
        value["text"] = {name: item for name, item in value["text"].items() if name not in TEXT_SINCE_3}
    return value


def format_of(value: Any) -> Format:
    """The format of a contract's JSON: 3 where it has a field of format 3."""
    return 3 if isinstance(value, dict) and any(name in value for name in SINCE_3) else 2


def contract_digest(contract: Contract) -> str:
    """SHA-256 that identifies a contract. What format 3 brought is part of it only where format 2 could not say the
    same, and size and start token of a text tower's vocabulary never are: so a dataset that was begun before goes on.
    """
    said = {"conditions": plain(conditions_of_format_2(contract)), "colour": "as_stored", "columns": []}
    value = plain(contract)
    value = {name: item for name, item in value.items() if name not in said or item != said[name]}
    if value["text"] is not None:
        value["text"] = {  # keys and weights are there with several captions alone
            name: item
            for name, item in value["text"].items()
            if name not in TEXT_SINCE_3 or (name == "captions" and item > 1)
        }
    return hashlib.sha256(canonical_json(value)).hexdigest()


def contract_from_json(value: Any) -> Contract:
    """The contract of parsed JSON, of either format. Raises ParseError, which names the field."""
    known = {field.name for field in dataclasses.fields(Contract)} - {*SINCE_3, *WHERE_NEEDED}
    if missing := sorted(known - set(value if isinstance(value, dict) else ())):
        raise ParseError(f"it lacks {', '.join(missing)}, so it is no contract")
    format = format_of(value)
    contract = build(Contract, value)
    if format == 2:
        if contract.text is None or contract.stored != "moments":
            raise ParseError("it has no facts of conditions, as in format 2, where text and moments are wanted")
        contract = dataclasses.replace(contract, conditions=conditions_of_format_2(contract))
    if differing := sorted(_differing(contract_to_json(contract, format), value)):
        raise ParseError(f"fields are missing, or are not of its format {format}: {', '.join(differing[:5])}")
    check_facts(contract)
    check_sizes(contract)
    if format == 3:
        require_facts_of_members(contract)
    return contract


def _differing(wanted: Any, found: Any, place: str = "") -> Iterator[str]:
    """Places of the names that one of two plain values has and the other has not."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        for name in wanted.keys() ^ found.keys():
            yield f"{place}{name}"
        for name in wanted.keys() & found.keys():
            yield from _differing(wanted[name], found[name], f"{place}{name}.")
    elif isinstance(wanted, list) and isinstance(found, list):
        for number, pair in enumerate(zip(wanted, found, strict=False)):
            yield from _differing(*pair, f"{place}{number}.")


def require_readable(contract: Contract) -> None:
    """Raise ConfigError for a contract that `contract_from_json` would not read again."""
    try:
        contract_from_json(plain(contract))
    except ParseError as error:
        raise ConfigError(f"these settings and arrays make no dataset that can be read again: {error}") from None


def conditions_of_format_2(contract: Contract) -> Conditions:
    """What is known of the conditions of a cache of format 2: `encode` made each of them in one way."""
    names = {member.name: member for member in contract.members}
    boxes = names.get("cond.boxes")
    most = boxes.shape[0] if boxes and len(boxes.shape) == 2 else 0
    return Conditions(
        boxes=BoxFacts(count=MOST_BOX_CLASSES + 1, most=most) if most > 0 else None,
        labels=LabelFacts(count=MOST_LABELS, grid=contract.downsampling) if "cond.labels" in names else None,
        lowres=LowresFacts(factor=4, degradation="box") if "cond.lowres" in names else None,
        mask=MaskFacts(kinds=("rectangles",), packed=False) if {"cond.mask", "cond.masked"} <= set(names) else None,
    )


# --------------------------------------------------------------------------------------------------------------------
# What contradicts itself


def check_facts(contract: Contract) -> None:
    """Raise ParseError where facts contradict each other."""
    conditions = contract.conditions
    if (contract.text is None) != (contract.caption_key == ""):
        raise ParseError(
            f"caption_key={contract.caption_key!r}: a cache has captions and facts of their text, or neither of both"
        )
    if contract.text is None and contract.text_sha256:
        raise ParseError("text_sha256: a cache without captions has no text tower")
    check_captions(contract)
    if contract.text is None and contract.clip_sha256:
        raise ParseError("clip_sha256: a cache without captions has no scores of them")
    if contract.stored == "pixels" and (contract.latent_shape[0], contract.downsampling) != (3, 1):
        raise ParseError("stored=pixels: 3 channels and downsampling=1 are wanted, as of pixels")
    if contract.pixels != "array" and contract.stored != "pixels":
        raise ParseError(f"pixels={contract.pixels}: stored=pixels is wanted, and it is stored={contract.stored}")
    for name, facts in (("classes", conditions.classes), ("boxes", conditions.boxes), ("labels", conditions.labels)):
        if facts is not None and len(facts.names) not in (0, facts.count):
            raise ParseError(f"conditions.{name}: {len(facts.names)} names of {facts.count}")
        if facts is not None and sum(map(len, facts.names)) > NAMES:
            raise ParseError(f"conditions.{name}: names of more than {NAMES} characters")


def check_captions(contract: Contract) -> None:
    """Raise ParseError where the facts of several captions contradict each other."""
    text = contract.text
    if text is None:
        return
    if text.captions == 1 and (text.keys or text.weights):
        raise ParseError("text.keys and text.weights are of several captions, and text.captions=1")
    if text.captions > 1 and not (1 <= len(text.keys) <= text.captions and text.keys[0] == contract.caption_key):
        raise ParseError(f"text.captions={text.captions}: 1 to so many text.keys are wanted, first of them caption_key")
    if text.weights and (len(text.weights) != len(text.keys) or not any(text.weights)):
        raise ParseError("text.weights: one for each of text.keys is wanted, and one above 0")


def check_sizes(contract: Contract) -> None:
    """Raise ParseError where sizes contradict each other, or one is beyond what an array of a record can have."""
    (_, height, width), factor = contract.latent_shape, contract.downsampling
    members = {member.name: member for member in contract.members}
    if not -1e6 <= contract.pixel_range[0] < contract.pixel_range[1] <= 1e6:
        raise ParseError(f"pixel_range={contract.pixel_range} is not a range")
    if len(members) != len(contract.members):
        raise ParseError("members has an array twice")
    for shape in (contract.latent_shape, *(member.shape for member in contract.members)):
        if math.prod(max(side, 1) for side in shape) > MOST_ELEMENTS:
            raise ParseError(f"it names an array of shape {shape}, more than {MOST_ELEMENTS} elements")
    if abs(math.sqrt(height * width) * factor - contract.resolution) > factor:
        raise ParseError(
            f"latent_shape={contract.latent_shape} is not that of a crop of resolution={contract.resolution} pixels "
            f"with downsampling={factor}"
        )
    for wanted in arrays_of(contract):
        require_member(members.get(wanted.name), wanted)


def require_facts_of_members(contract: Contract) -> None:
    """Raise ParseError for an array that needs facts which the contract has not."""
    wanted = {member.name for member in arrays_of(contract)}
    for member in contract.members:
        if member.name in ARRAYS and member.name not in wanted:
            raise ParseError(f"members: {member.name} is there, and nothing in the contract says how it was made")


def require_member(found: Member | None, wanted: Member) -> None:
    """Raise ParseError unless an array is as wanted; other software may store float16 as float32."""
    if found is None or found.shape != wanted.shape:
        shape = found.shape if found else "nothing"
        raise ParseError(f"members: {wanted.name} of shape {wanted.shape} is wanted, not {shape}")
    kinds = ("float16", "float32") if wanted.name in FOREIGN_FLOAT else (wanted.dtype,)
    if found.dtype not in kinds:
        raise ParseError(f"members: {wanted.name} is {found.dtype}, not {' or '.join(kinds)}")
