"""Checks what filters that compare have found: near-duplicates again from their hashes, and hashes and scores of a few
samples again from the source."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pipeline.data.format.contract import Contract
from pipeline.data.format.manifest import Manifest
from pipeline.data.format.records import npy_bytes
from pipeline.errors import LatentmillError, NotFound, ShardCorrupt
from pipeline.models.encoders.text import TextTower
from pipeline.storage.base import Storage
from preprocess.encoding.plan import hashes_key, read_plan
from preprocess.filters.clip import CLOSE, ClipFilter, require_transform
from preprocess.filters.excluded import find_excluded, hashes_of
from preprocess.proving.findings import Findings
from preprocess.proving.originals import Original
from preprocess.source.recipe import Recipe, recipe_of_contract
from preprocess.units.reports import read_reports


def check_near_duplicates(storage: Storage, manifest: Manifest, findings: Findings) -> None:
    """Finds the excluded records again, where near-duplicates are among them, and compares."""
    if not recipe_of_contract(manifest.contract).filters.near_duplicates:
        return
    problems, count = list[str](), 0
    try:
        plan = read_plan(storage)
        names = [unit.source for unit in manifest.units]
        reports = read_reports(storage, range(len(names)), names)
        if plan is None or len(reports) < len(names):
            raise NotFound(f"{storage.url} lacks its plan or a report, by which near-duplicates are found")
        found = find_excluded(storage, plan.until(manifest.version), [reports[number] for number in range(len(names))])
        count = found.near
        digest = hashlib.sha256(npy_bytes(found.pairs)).hexdigest() if len(found.pairs) else ""
        if digest != manifest.excluded_sha256:
            problems.append(f"{storage.url}: other records are near-duplicates than the manifest excludes")
    except LatentmillError as error:
        problems.append(str(error))
    findings.add("near-duplicates", f"{count:,} records, found again", *problems)


def with_whole(recipe: Recipe, contract: Contract, tower: TextTower | None) -> Recipe:
    """The recipe with the picture that scores are of, where there are scores."""
    if not contract.clip_sha256 or tower is None:
        return recipe
    size = tower.image_size[::-1]
    require_transform(tower, size)
    return replace(recipe, whole=size)


def held_looks(storage: Storage, manifest: Manifest, unit: int) -> np.ndarray | None:
    """The perceptual hashes (N, 8) uint8 of a unit's accepted samples; None where there are none that can be read,
    which is found by `check_near_duplicates`."""
    filters = recipe_of_contract(manifest.contract).filters
    if not filters.near_duplicates:
        return None
    try:
        return hashes_of(storage.get(hashes_key(unit)), filters).looks
    except (NotFound, ShardCorrupt):
        return None


def other_looks(originals: Sequence[Original], held: np.ndarray | None, variants: int) -> list[str]:
    """A line for each record whose perceptual hash is not that of its source. held: of its unit."""
    problems = []
    for original in originals if held is not None else ():
        sample = int(original.record.key.rpartition("_")[2]) // variants
        if held is None or sample >= len(held) or held[sample].tobytes() != original.picture.looks:
            problems.append(f"the perceptual hash of {original.record.key} is not that of its source's picture")
    return problems


def unlike(originals: Sequence[Original], contract: Contract, tower: TextTower | None) -> list[str]:
    """A line for each record whose picture and caption are less similar than the filter lets pass."""
    if not contract.clip_sha256 or tower is None:
        return []
    least = recipe_of_contract(contract).filters.clip_score
    scores = ClipFilter(tower, least, len(originals)).scores([original.sample for original in originals])
    return [
        f"{original.record.key}: its CLIP score is {score:.2f}, below filters.clip_score={least:g}"
        for original, score in zip(originals, scores, strict=True)
        if not score >= least - CLOSE
    ]


def add_filters(
    findings: Findings, contract: Contract, tower: TextTower | None, looks: list[str], scores: list[str]
) -> None:
    """Records the outcome. looks, scores: what the two functions above gave for all originals."""
    filters = recipe_of_contract(contract).filters
    if filters.near_duplicates:
        findings.add("perceptual hashes", "made again, equal to the bit", *looks)
    if contract.clip_sha256:
        other = tower is None or tower.image_sha256 != contract.clip_sha256
        problem = "the CLIP that is loaded has another image tower than the contract's" if other else ""
        findings.add(
            "clip scores", f"{filters.clip_score:g} and more, computed again", *([problem] if other else []), *scores
        )
