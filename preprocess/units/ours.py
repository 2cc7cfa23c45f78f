"""What encode may replace at its destination: what the plan there made, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pipeline.data.format.manifest import MANIFEST, UNCOND, VERSIONS
from pipeline.errors import DestinationExists, NotFound, ParseError, ShardCorrupt
from pipeline.parsing.tar import BLOCK, parse_header
from pipeline.parsing.values import parse_json
from pipeline.storage.base import ObjectInfo, Storage
from pipeline.storage.destination import require_free
from preprocess.encoding.claims import CLAIMS
from preprocess.encoding.plan import PARTS, PLAN, report_key
from preprocess.gathering.listing import LISTING
from preprocess.units.reports import read_report, unit_of

CARD = "card.html"


def would_write(key: str) -> bool:
    """Whether a dataset that is being made has an object of this key, which would replace another. A list of files lies
    under its own hash, so it replaces none."""
    folder = key.partition("/")[0]
    if LISTING.fullmatch(key):
        return False
    return (
        key in (MANIFEST, UNCOND, PLAN, CARD)
        or folder in ("units", VERSIONS, PARTS, CLAIMS)
        or unit_of(key) is not None
    )


def refuse_taken(storage: Storage, names: Sequence[str] = (), digest: str = "") -> None:
    """Raises DestinationExists when there is no plan, but something that a dataset would replace.

    digest: of the contract; units of these names whose reports hold it were made by the same plan, which got lost.
    Without it, reports are not read, and units that have one are let pass.
    """
    if storage.exists(PLAN):
        return
    taken = {info.key for info in storage.list() if would_write(info.key)}
    ours = {number for number in map(unit_of, taken) if number is not None and report_key(number) in taken}
    if digest:
        ours = {number for number in ours if number < len(names) and _made_under(storage, number, names, digest)}
    foreign = {key for key in taken if unit_of(key) not in ours}
    if foreign and not storage.exists(PLAN):  # else another worker has begun it at this moment
        require_free(storage, foreign.__contains__, "the dataset (another dest)")


def _made_under(storage: Storage, number: int, names: Sequence[str], digest: str) -> bool:
    try:
        return bool(read_report(storage, number, names[number]).facts["contract"] == digest)
    except (NotFound, DestinationExists):
        return False


def refuse_foreign(storage: Storage, listed: Sequence[ObjectInfo], numbers: Iterable[int]) -> None:
    """Raises DestinationExists when a tar or an index that encode would write for these units lies there already, and
    is not what an interrupted encode left of them. listed: objects of the storage."""
    wanted = set(numbers)
    for info in listed:
        number = unit_of(info.key)
        if number in wanted and not info.key.startswith("units/") and not _is_ours(storage, info, number):
            raise DestinationExists(
                f"{storage.locate(info.key)} would be written over, and this dataset has not made it: move it away and "
                "run this again, or choose another dest"
            )


def _is_ours(storage: Storage, info: ObjectInfo, number: int) -> bool:
    """Whether an object is a tar or an index such as encode writes for a unit: the name of a tar's first record tells.
    True for one that is gone."""
    try:
        if info.key.endswith(".tar"):
            header = parse_header(storage.get_range(info.key, 0, BLOCK)) if info.size >= BLOCK else None
            name = "" if header is None else header.name.decode("ascii", "replace")
            return name.startswith(f"{number:06d}_") and name.endswith(".json")
        index = parse_json(storage.get(info.key))
        return isinstance(index, dict) and {"format", "records", "samples", "sha256"} <= index.keys()
    except NotFound:
        return True
    except (ParseError, ShardCorrupt):
        return False
