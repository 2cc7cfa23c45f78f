"""What `latentmill index` says of a dataset that it made: counts, statistics, and what is unusual about the latents."""

from __future__ import annotations

import collections
import math

from pipeline.config import IndexConfig
from pipeline.data.format.contract import Contract
from pipeline.data.format.manifest import Manifest
from pipeline.errors import SourceError

KNOWN = {
    "Stable Diffusion 1 and 2": (0.18215, 0.0),
    "SDXL": (0.13025, 0.0),
    "Stable Diffusion 3": (1.5305, 0.0609),
    "FLUX.1": (0.3611, 0.1159),
}
"""Scale and shift of autoencoders whose latents are about."""
NEAR = 1.25
"""How far, as a factor, a deviation may be from 1 to be taken for that of a known autoencoder."""
KINDS = {"tar": "tars", "mds": "MDS shards", "npz": "groups of .npz", "safetensors": "groups of .safetensors"}


def refuse_rejects(rejected: collections.Counter[str], accepted: int, problem: str, config: IndexConfig) -> None:
    """Raises SourceError when more records cannot be used than max_rejects allows, or all. problem: the first."""
    count = rejected.total() + accepted
    if rejected.total() > config.max_rejects * count or rejected.total() == count:
        raise SourceError(
            f"{config.source}: {rejected.total()} of {count} records cannot be used "
            f"({', '.join(f'{number} {reason}' for reason, number in rejected.most_common())}; the first: "
            f"{problem or 'none'}), more than max_rejects={config.max_rejects:g} allows"
        )


def summary(url: str, manifest: Manifest, lowest: float) -> str:
    """The last lines that the verb prints. lowest: the smallest log-variance; infinite without any."""
    rejects = ", ".join(f"{count:,} {reason}" for reason, count in sorted(manifest.rejected.items())) or "none"
    size = sum(shard.bytes for shard in manifest.shards) / 1e6
    known = "" if manifest.contract.vae_sha256 else "; its encoders are unknown: evaluations will refuse it"
    mean, std, facts = manifest.statistics.mean, manifest.statistics.std, manifest.contract.converted
    converted = f", converted from {len(manifest.units)} {KINDS[facts.kind]}" if facts else ""
    lines = [
        f"index: {url} is a dataset: {manifest.samples:,} records (left out: {rejects}) in "
        f"{len(manifest.shards)} tars, {size:,.1f} MB{converted}, dataset {manifest.digest[:12]}{known}",
        "  latents have mean ± std "
        + ", ".join(f"{m:+.3f} ± {s:.3f}" for m, s in zip(mean, std, strict=True))
        + f" by channel, with scale={manifest.contract.scale:g} and shift={manifest.contract.shift:g}",
    ]
    lines += [f"  {hint}" for hint in unusual(manifest.contract, mean, std, lowest)]
    return "\n".join(lines)


def unusual(contract: Contract, mean: tuple[float, ...], std: tuple[float, ...], lowest: float) -> list[str]:
    """What is unusual about latents whose deviations should be near 1. mean, std: of scaled latents, by channel.
    lowest: the smallest log-variance; infinite without any."""
    hints = []
    deviation = max(sum(std) / len(std), 1e-9)
    if contract.stored != "pixels" and not 0.5 <= deviation <= 2:
        hints.append(f"their deviation is {deviation:.3g} and not about 1, {_reason(contract, mean, deviation)}")
    if 0 <= lowest < math.inf:
        hints.append("no log-variance is below 0, as if a variance or a standard deviation stood in its place")
    return hints


def _reason(contract: Contract, mean: tuple[float, ...], deviation: float) -> str:
    """Why scaled latents may have this deviation, and what to do."""
    scale, facts = contract.scale, contract.converted
    if facts is not None and facts.scaled and abs(math.log(deviation * scale)) < math.log(1.5):
        return "as of latents that were not scaled: then leave scaled= out"
    if abs(math.log(deviation / scale)) < math.log(1.5):
        advice = "give scale=1 shift=0"
        if contract.stored == "latents":
            advice += ", or convert them with dest= and scaled=true, which takes scale and shift off"
        return f"as of {contract.stored} that are scaled already: then {advice}"
    raw = deviation / scale
    near = [name for name, (known, _) in KNOWN.items() if 1 / NEAR < raw * known < NEAR]
    likely = f": unscaled latents of {' or '.join(near)} are like this" if near else f": scale={1 / raw:.3g} makes it 1"
    return f"look at scale= and shift={likely}"
