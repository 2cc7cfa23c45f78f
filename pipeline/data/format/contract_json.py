"""A contract as JSON: what a manifest and a run hold, and how it is read again, of this format and the one before.

Format 2 (2026) had a text in every cache and no facts of conditions; these follow from its arrays.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import Any

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
from pipeline.data.format.contract import Contract, Member, TextFacts, canonical_json, plain
from pipeline.data.format.members import arrays_of
from pipeline.errors import ConfigError, ParseError
from pipeline.parsing.typed import build

SINCE_3 = ("conditions", "colour", "columns")
"""Fields of a contract that format 2 does not have."""
TEXT_SINCE_3 = ("vocabulary", "start", "captions")
"""Fields of its text that format 2 does not have."""


def contract_to_json(contract: Contract, format: int) -> dict[str, Any]:
    """The plain values of a contract in a manifest of this format."""
    value = plain(contract)
    if format == 2:
        value = {name: item for name, item in value.items() if name not in SINCE_3}
        value["text"] = {name: item for name, item in value["text"].items() if name not in TEXT_SINCE_3}
    return value


def contract_digest(contract: Contract) -> str:
    """SHA-256 that identifies a contract. A fact that a format brought changes it only where it is not the default, and
    what is known of a text tower besides its hash never does: so a dataset that was begun before goes on."""
    value, text = plain(contract), plain(contract)["text"]
    defaults = {"conditions": plain(Conditions()), "colour": "as_stored", "columns": []}
    value = {name: item for name, item in value.items() if name not in defaults or item != defaults[name]}
    if text is not None:
        value["text"] = {name: item for name, item in text.items() if name not in TEXT_SINCE_3}
    return hashlib.sha256(canonical_json(value)).hexdigest()


def contract_from_json(value: Any) -> Contract:
    """The contract of parsed JSON, of either format. Raises ParseError, which names the field."""
    known = {field.name for field in dataclasses.fields(Contract)} - set(SINCE_3)
    if missing := sorted(known - set(value if isinstance(value, dict) else ())):
        raise ParseError(f"it lacks {', '.join(missing)}, so it is no contract")
    contract = build(Contract, value)
    if contract.text is not None:
        known = {field.name for field in dataclasses.fields(TextFacts)} - set(TEXT_SINCE_3)
        if missing := sorted(known - set(value["text"])):
            raise ParseError(f"text lacks {', '.join(missing)}")
    if "conditions" not in value:
        contract = dataclasses.replace(contract, conditions=conditions_of_format_2(contract))
    check_sizes(contract)
    return contract


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
    return Conditions(
        boxes=BoxFacts(count=MOST_BOX_CLASSES + 1, most=boxes.shape[0]) if boxes and len(boxes.shape) == 2 else None,
        labels=LabelFacts(count=MOST_LABELS, grid=contract.downsampling) if "cond.labels" in names else None,
        lowres=LowresFacts(factor=4, degradation="box") if "cond.lowres" in names else None,
        mask=MaskFacts(kinds=("rectangles",), packed=False) if {"cond.mask", "cond.masked"} <= set(names) else None,
    )


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


def require_member(found: Member | None, wanted: Member) -> None:
    """Raise ParseError unless an array is as wanted; other software may store float16 as float32."""
    if found is None or found.shape != wanted.shape:
        shape = found.shape if found else "nothing"
        raise ParseError(f"members: {wanted.name} of shape {wanted.shape} is wanted, not {shape}")
    kinds = ("float16", "float32") if wanted.dtype == "float16" else (wanted.dtype,)
    if found.dtype not in kinds:
        raise ParseError(f"members: {wanted.name} is {found.dtype}, not {' or '.join(kinds)}")
