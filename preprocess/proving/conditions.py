"""Makes the conditions of a few records again, from their source, and compares."""

from __future__ import annotations

import numpy as np
import torch

from pipeline.conditions.mask import hide
from pipeline.data.format.contract import Contract
from pipeline.models.encoders.first_stage import FirstStage
from preprocess.proving.findings import Findings
from preprocess.proving.originals import Original, by_size

MASKED = "cond.masked"
LATENT_TOLERANCE = 0.05  # root mean square, of scaled latents, whose values are about 1


def exact(contract: Contract) -> list[str]:
    """Names of the arrays that are made again to the bit."""
    first = {"moments", "latents", "text", "tokens", "captions", MASKED}
    first |= {"pixels"} if contract.stored == "pixels" else set()
    return [member.name for member in contract.members if member.name not in first]


def other_conditions(originals: list[Original], contract: Contract) -> list[str]:
    """A line for each array of a record that is not what its source gives."""
    problems, names = [], exact(contract)
    for original in originals if names else ():
        fresh, _ = original.arrays(contract)
        for name in names:
            if not np.array_equal(fresh[name], original.record.members[name]):
                problems.append(f"{name} of {original.record.key} is not what its source gives")
    return problems


def masked_differences(stage: FirstStage, originals: list[Original], contract: Contract) -> list[float]:
    """Root mean square difference between each cached latent of a crop with a hole and that of the source's, both
    scaled: of every variant."""
    facts, differences = contract.conditions.mask, list[float]()
    if facts is None:
        return differences
    for group in by_size(originals):
        every = [original.arrays(contract)[1] for original in group]
        for k in range(facts.variants):
            hidden = [
                hide(original.picture.pixels, masks[k], facts.hole)
                for original, masks in zip(group, every, strict=True)
                if masks is not None
            ]
            images = torch.from_numpy(np.stack(hidden)).permute(0, 3, 1, 2).contiguous()
            means = stage.mean(images).cpu().numpy()
            for original, mean in zip(group, means, strict=True):
                cached = original.record.members[MASKED].astype(np.float32).reshape(-1, *mean.shape)[k]
                differences.append(float(np.sqrt(np.square((mean - cached) * stage.scale).mean())))
    return differences


def add_conditions(findings: Findings, contract: Contract, other: list[str], masked: list[float]) -> None:
    """Records the outcome. other, masked: what the two functions above gave for all originals."""
    names = exact(contract)
    if names:
        findings.add("conditions", f"made again, equal to the bit: {', '.join(names)}", *other)
    if contract.conditions.mask is not None:
        worst = max(masked, default=0.0)
        problem = f"{MASKED} differs by up to {worst:.3g} (rms) from the latent of its source with the hole filled"
        far = [problem] if not worst <= LATENT_TOLERANCE else []
        findings.add(MASKED, f"encoded again within {worst:.2g}", *far)
