"""What was asked of guidance beside what was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from benchmarks.guidance import results
from benchmarks.guidance.plan import Places, Plan
from benchmarks.guidance.results import ATTRIBUTES, CLASS, CLASS_KEPT, LIKENESS, Measured, Value, together

RIGHT, LIKER, FIRST_KEPT, LAST_KEPT, KEPT_DB = 0.5, 5.0, 0.9, 0.15, 28.0
"""What was asked: share of right classes; dB nearer to the target; class kept at the least and at the most strength;
dB of the kept half."""


@dataclass(frozen=True)
class Verdict:
    """What was asked beside what was measured. met: None where it was not measured."""

    what: str
    asked: str
    measured: str
    met: bool | None

    @property
    def row(self) -> list[str]:
        return [self.what, self.asked, self.measured, {True: "yes", False: "**no**", None: ""}[self.met]]


class Read:
    """What was measured, by what images were given."""

    def __init__(self, plan: Plan, places: Places) -> None:
        self.plan, self._found = plan, results.read(places.run)
        self.weight = results.chosen_weight(plan, self._found)
        self.halves = results.kept(plan, places)

    def guided(self, guide: str, weight: float, sampler: str = "") -> list[Measured]:
        """Evaluations with a guide; weight 0: without it, of the same records and noise."""
        images = self.plan.few if guide == "image" else self.plan.images
        seeds = self.plan.clip_seeds if guide == "clip" else self.plan.seeds
        return self._of({f"guide.{guide}": weight}, sampler, images, seeds)

    def choice(self, weight: float) -> list[Measured]:
        """Evaluations from which CLIP's weight was chosen."""
        return self._of({"guide.clip": weight}, "", self.plan.few, (self.plan.choice_seed,))

    def starts(self, strength: float, sampler: str) -> list[Measured]:
        return self._of({"strength": strength}, sampler, self.plan.images, self.plan.seeds)

    def masks(self) -> list[Measured]:
        """Evaluations that kept what the records' masks leave."""
        return self._of({"keep": True}, "", self.plan.images, self.plan.seeds)

    def half(self, case: str, name: str) -> Value | None:
        """A figure of a kept half, over seeds."""
        rows = [row for row in self.halves[case] if row.get(name) is not None]
        values, errors = [row[name] for row in rows], [row.get(f"{name}_error") or 0.0 for row in rows]
        return results.mean(values, errors) if rows else None

    def _of(self, steering: dict[str, Any], sampler: str, images: int, seeds: Sequence[int]) -> list[Measured]:
        return results.of(self._found, steering, sampler or self.plan.sampler, images, seeds)


def verdicts(read: Read) -> list[Verdict]:
    """A row for each figure that was asked."""
    return [
        *_of_classes(read),
        _of_likeness(read),
        _of_captions(read),
        *(verdict for sampler in read.plan.samplers for verdict in _of_starts(read, sampler)),
        _of_half(read, "plain", "known half before pasting, pooled"),
        _of_half(read, "both", "the same, begun again from its own result and led to the kept pixels"),
    ]


def _of_classes(read: Read) -> list[Verdict]:
    most, least = read.plan.classifier[0], read.plan.classifier[-1]
    right, alone, away = (together(read.guided("classifier", weight), CLASS) for weight in (most, 0.0, least))
    return [
        Verdict(
            f"classifier, weight {most:g}: right classes",
            f"at least {RIGHT:g}",
            shown(right),
            _if(right, lambda value: value >= RIGHT),
        ),
        Verdict(
            f"classifier, weight {least:g}: right classes",
            f"at most those without a guide, {shown(alone)}",
            shown(away),
            None if alone is None else _if(away, lambda value: value <= alone.value),
        ),
    ]


def _of_likeness(read: Read) -> Verdict:
    """The best of the weights and samplers, against the model alone with the same sampler."""
    gains = dict[str, Value]()
    for sampler, weights in (("ddim", read.plan.image), (read.plan.sampler, read.plan.image[:1])):
        alone = together(read.guided("image", 0.0, sampler), LIKENESS)
        for weight in weights:
            guided = together(read.guided("image", weight, sampler), LIKENESS)
            if guided is not None and alone is not None:
                gains[f"weight {weight:g}, {sampler}"] = guided - alone
    asked = f"at least {LIKER:g} dB more than without a guide"
    if not gains:
        return Verdict("image: consistency with the target", asked, "", None)
    best = max(gains, key=lambda name: gains[name].value)
    gain = gains[best]
    return Verdict(f"image, {best}: consistency with the target", asked, f"{gain} dB more", gain.value >= LIKER)


def _of_captions(read: Read) -> Verdict:
    right, alone = (together(read.guided("clip", weight), ATTRIBUTES) for weight in (read.weight, 0.0))
    met = None if right is None or alone is None else right.low > alone.high
    asked = f"more than without a guide, {shown(alone)}, beyond the error bars"
    return Verdict(f"CLIP, weight {read.weight:g}: all attributes right", asked, shown(right), met)


def _of_starts(read: Read, sampler: str) -> list[Verdict]:
    strengths = read.plan.strengths
    kept = [together(read.starts(strength, sampler), CLASS_KEPT) for strength in strengths]
    known = [value.value for value in kept if value is not None]
    falls = len(known) == len(strengths) and all(a >= b for a, b in pairwise(known))
    words = f"img2img, {sampler}: class kept"
    return [
        Verdict(
            f"{words} at {strengths[0]:g}",
            f"at least {FIRST_KEPT:g}",
            shown(kept[0]),
            _if(kept[0], lambda value: value >= FIRST_KEPT),
        ),
        Verdict(
            f"{words} at {strengths[-1]:g}",
            f"at most {LAST_KEPT:g}, and falling on the way",
            shown(kept[-1]),
            _if(kept[-1], lambda value: falls and value <= LAST_KEPT),
        ),
    ]


def _of_half(read: Read, case: str, words: str) -> Verdict:
    half = read.half(case, "kept")
    return Verdict(words, f"at least {KEPT_DB:g} dB", shown(half), _if(half, lambda value: value >= KEPT_DB))


def shown(value: Value | None) -> str:
    """With its error bar and unit; "" for none."""
    return "" if value is None else str(value) if value.share else f"{value} dB"


def _if(value: Value | None, holds: Callable[[float], bool]) -> bool | None:
    return None if value is None else holds(value.value)
