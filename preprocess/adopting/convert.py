"""One record of other software -> a record of a cache: arrays of the contract's shapes and dtypes, and what is said of
its caption. Floating-point arrays are rounded to float16, as `encode` stores them; a value beyond its range rejects the
record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.config import LimitsConfig
from pipeline.config.values.members import parse_place
from pipeline.data.format.bounds import MOST_SIDE
from pipeline.data.format.contract import Contract, Conversion
from pipeline.data.format.records import Record
from pipeline.errors import RecordRejected, ShardCorrupt
from pipeline.models.encoders.text import TextTower
from preprocess.adopting.arrays import Foreign, read_array, read_caption
from preprocess.adopting.values import check_values


@dataclass(frozen=True)
class Drawn:
    """A record as it is read, before the contract. arrays: by role; floating-point ones float32. caption: "" where none
    is read."""

    key: str
    arrays: dict[str, np.ndarray]
    caption: str


@dataclass(frozen=True)
class Converted:
    """A record for a cache. size: (width, height) of its crop in pixels. lowest: its smallest log-variance; infinite
    without any."""

    arrays: dict[str, np.ndarray]
    meta: dict[str, Any]
    size: tuple[int, int]
    lowest: float


def draw(found: Foreign, facts: Conversion, stored: str, caption_key: str, limits: LimitsConfig) -> Drawn:
    """Reads what a record holds. Raises RecordRejected."""
    if found.reason:
        raise RecordRejected(found.reason, found.detail)
    most = limits.member_bytes
    image = _axes(read_array(found, parse_place(facts.moments_member), most), 3)
    if facts.logvar_member:
        logvar = _axes(read_array(found, parse_place(facts.logvar_member), most), 3)
        if image.shape != logvar.shape:
            detail = f"{facts.moments_member} has shape {image.shape}, and {facts.logvar_member} {logvar.shape}"
            raise RecordRejected("member_mismatch", detail)
        image = np.concatenate([image, logvar])
    arrays = {stored: image}
    for role, place, axes in (
        ("text", facts.text_member, 2),
        ("cond.class", facts.class_member, 0),
        ("cond.boxes", facts.boxes_member, 2),
    ):
        if place:
            arrays[role] = _axes(read_array(found, parse_place(place), most), axes)
    caption = read_caption(found, caption_key, limits.caption_bytes) if caption_key else ""
    return Drawn(found.key, arrays, caption)


def _axes(array: np.ndarray, axes: int) -> np.ndarray:
    """The array without axes of length one at its front, where it has more than `axes`."""
    while array.ndim > axes and array.shape[0] == 1:
        array = array[0]
    return array


def fit(drawn: Drawn, contract: Contract, tower: TextTower | None) -> Converted:
    """The record as the contract has it. tower: makes token ids, where they are stored. Raises RecordRejected:
    member_mismatch, value_too_large."""
    facts = contract.converted
    assert facts is not None, "a contract of `index dest=`"
    channels, factor = contract.latent_shape[0], contract.downsampling
    image = drawn.arrays[contract.stored]
    wanted = 2 * channels if contract.stored == "moments" else channels
    if image.ndim != 3 or image.shape[0] != wanted or not all(1 <= s <= MOST_SIDE // factor for s in image.shape[1:]):
        raise _mismatch(facts.moments_member, image, f"({wanted}, h, w)")
    _require_floats(facts.moments_member, image)
    if facts.scaled:
        image = image / np.float32(contract.scale) + np.float32(contract.shift)
    arrays: dict[str, np.ndarray] = {contract.stored: half(facts.moments_member, image)}
    meta: dict[str, Any] = {"key": drawn.key, "caption": drawn.caption}
    if contract.text is not None and contract.text.storage == "tokens":
        assert tower is not None, "token ids without a text tower"
        ids, tokens = tower.ids(drawn.caption)
        arrays["tokens"] = np.array(ids, np.int32)
        meta |= {"tokens": min(tokens, len(ids)), "truncated": tokens > len(ids)}
    elif contract.text is not None:
        text, length = drawn.arrays["text"], (contract.text.length, contract.text.width)
        if text.shape != length:
            raise _mismatch(facts.text_member, text, str(length))
        _require_floats(facts.text_member, text)
        arrays["text"] = half(facts.text_member, text)
    if contract.conditions.classes is not None:
        label = drawn.arrays["cond.class"]
        if label.shape != () or label.dtype.kind not in "iu" or not -(2**31) <= int(label) < 2**31:
            raise _mismatch(facts.class_member, label, "() of integers")
        arrays["cond.class"] = label.astype(np.int32)
    if contract.conditions.boxes is not None:
        boxes = drawn.arrays["cond.boxes"]
        if boxes.shape != (contract.conditions.boxes.most, 5):
            raise _mismatch(facts.boxes_member, boxes, f"({contract.conditions.boxes.most}, 5)")
        _require_floats(facts.boxes_member, boxes)
        arrays["cond.boxes"] = half(facts.boxes_member, boxes)
    try:
        check_values(Record(drawn.key, arrays, {}), contract)
    except ShardCorrupt as error:
        raise RecordRejected("member_mismatch", str(error)) from None
    lowest = float(arrays["moments"][channels:].min()) if contract.stored == "moments" else np.inf
    return Converted(arrays, meta, (image.shape[2] * factor, image.shape[1] * factor), lowest)


def half(place: str, array: np.ndarray) -> np.ndarray:
    """The array in float16, rounded to nearest. Raises RecordRejected for NaN, infinity and what float16 cannot
    hold."""
    if not np.isfinite(array).all():
        raise RecordRejected("member_mismatch", f"{place} holds NaN or infinity")
    with np.errstate(over="ignore"):
        rounded = array.astype(np.float16)
    if not np.isfinite(rounded).all():
        raise RecordRejected("value_too_large", f"{place} holds {np.abs(array).max():.3g}, float16 holds up to 65504")
    return rounded


def _require_floats(place: str, array: np.ndarray) -> None:
    if array.dtype.kind != "f":
        raise RecordRejected("member_mismatch", f"{place} holds {array.dtype}, and floating-point numbers are wanted")


def _mismatch(place: str, array: np.ndarray, wanted: str) -> RecordRejected:
    return RecordRejected("member_mismatch", f"{place} is {array.dtype} {array.shape}, and {wanted} is wanted")
