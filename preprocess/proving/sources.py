"""Which source patterns of a manifest are followed without being asked to.

A manifest may be a stranger's. Its patterns are looked for below the current folder, or in the bucket that the dataset
itself lies in, and only where they name about as many shards as the dataset has.
"""

from __future__ import annotations

import math
import re

from pipeline.data.format.manifest import Manifest
from pipeline.errors import SourceError

FEW = 1000
"""Names that any pattern may stand for."""
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(-?\d{1,18})\.\.(-?\d{1,18})(?:\.\.-?\d{1,18})?")


def require_modest_sources(manifest: Manifest, dataset: str) -> None:
    """Raises SourceError, which asks for source=, where a pattern of the manifest leads elsewhere, or stands for far
    more names than the dataset has shards."""
    for pattern in manifest.sources:
        reason = _elsewhere(pattern, dataset)
        if not reason and names_of(pattern) > max(FEW, 4 * len(manifest.units)):
            reason = f"stands for far more than the {len(manifest.units)} shards of the dataset"
        if reason:
            raise SourceError(
                f"its manifest names {pattern[:200]}, which {reason}, so that it is not looked for unasked"
            )


def names_of(pattern: str) -> float:
    """About how many names the braces of a pattern stand for; infinity for nested braces."""
    count = 1.0
    for content in BRACES.findall(pattern):
        numbers = RANGE.fullmatch(content)
        count *= abs(int(numbers[2]) - int(numbers[1])) + 1 if numbers else content.count(",") + 1
    rest = BRACES.sub("", pattern)
    return math.inf if "{" in rest or "}" in rest else count


def _elsewhere(pattern: str, dataset: str) -> str:
    """Where a pattern leads that a manifest alone does not lead to; "" for nowhere else."""
    if "**" in pattern:
        return "walks whole folders"
    if "://" in pattern:
        bucket = re.match(r"s3://[^/{}*?\[\]]+/", pattern)
        same = bucket is not None and f"{dataset.rstrip('/')}/".startswith(bucket[0])
        return "" if same else "lies in another place than the dataset"
    leads_out = pattern.startswith(("/", "~")) or ".." in re.split(r"[/{},]", pattern)
    return "leads out of this folder" if leads_out else ""
