"""The commands of the figures of guidance, in order. Every one can be run by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.compression.runner import Step
from benchmarks.compression.steps import Runs
from benchmarks.guidance.plan import Places, Plan

START_S = 12.0
"""Start of a command, and what an evaluation does besides drawing."""
JUDGED = 40.0
"""Pictures that are judged in a second."""
PASSES = {"": 300.0, "classifier": 200.0, "image": 60.0, "clip": 40.0}
"""Passes of the network over a picture in a second, by guide, of two cores of an AMD EPYC (Zen 4): guesses, by which
`--list` goes."""
CASES = ("plain", "again", "guide", "both")
"""How a half is kept: the model alone; begun again from its own result; led to the kept pixels; both. More steps were
tried by hand, and bring nothing."""
AGAIN, AGAIN_STRENGTH = 2, 0.5


@dataclass
class Figures:
    """Plan, places and what runs the steps. chosen: returns the weight of CLIP's guide, once those to choose from are
    measured."""

    plan: Plan
    places: Places
    runner: Runs
    chosen: Callable[[], float]

    def all(self) -> None:
        """Every step. What is only tried comes last, and is left out where the time is over."""
        for steps in (self.classifier(), self.image(), self.choice(), self.clip(), self.starts(), self.kept()):
            for step in steps:
                self.runner.step(step)

    def evaluation(
        self,
        heading: str,
        words: Sequence[str],
        *,
        images: int,
        seed: int,
        samplers: Sequence[str] = (),
        val: Path | None = None,
        guide: str = "",
        share: float = 1.0,
    ) -> Step:
        """latentmill eval of the model without conditioning. share: of the steps that are taken."""
        plan, places = self.plan, self.places
        names = samplers or (plan.sampler,)
        passes = len(names) * images * plan.steps * share
        return Step(
            f"{heading}, seed {seed}",
            (
                *("eval", f"run={places.run}", f"data.val={val or places.val}", f"reference={places.reference}"),
                *(f"images={images}", "guidance=1", f"sampler=[{','.join(names)}]", f"steps=[{plan.steps}]"),
                *(*words, f"seed={seed}"),
            ),
            places.run / "evals",
            START_S + passes / PASSES[guide] + len(names) * images / JUDGED,
        )

    def guided(self, guide: str, weight: float, **settings: object) -> Step:
        """An evaluation with one guide; weight 0 draws without it, and measures all the same."""
        words = [f"guide={guide}", f"guide.weight={weight:g}"]
        words += [f"guide.run={self.places.classifier}"] if guide == "classifier" else []
        heading = f"Guide {guide}, weight {weight:g}"
        return self.evaluation(heading, words, guide=guide if weight else "", **settings)  # type: ignore[arg-type]

    def classifier(self) -> Iterator[Step]:
        for seed in self.plan.seeds:
            for weight in (0.0, *self.plan.classifier):
                yield self.guided("classifier", weight, images=self.plan.images, seed=seed)

    def image(self) -> Iterator[Step]:
        plan = self.plan
        for seed in plan.seeds:
            yield self.guided("image", 0.0, images=plan.few, seed=seed, samplers=("ddim", plan.sampler))
            for weight in plan.image:
                yield self.guided("image", weight, images=plan.few, seed=seed, samplers=("ddim",))
            yield self.guided("image", plan.image[0], images=plan.few, seed=seed)

    def choice(self) -> Iterator[Step]:
        plan = self.plan
        for weight in plan.clip:
            yield self.guided("clip", weight, images=plan.few, seed=plan.choice_seed)

    def clip(self) -> Iterator[Step]:
        """With the weight that was chosen, on other captions with other noise."""
        for seed in self.plan.clip_seeds:
            for weight in (0.0, self.chosen()):
                yield self.guided("clip", weight, images=self.plan.images, seed=seed, val=self.places.others)

    def starts(self) -> Iterator[Step]:
        plan = self.plan
        for seed in plan.seeds:
            for strength in plan.strengths:
                yield self.evaluation(
                    f"Start from the records' pictures, strength {strength:g}",
                    [f"strength={strength:g}"],
                    images=plan.images,
                    seed=seed,
                    samplers=plan.samplers,
                    share=strength,
                )

    def kept(self) -> Iterator[Step]:
        plan = self.plan
        for seed in plan.seeds:
            words = ["keep=true"]
            yield self.evaluation("Keep what the records' masks leave", words, images=plan.images, seed=seed)
        for case in CASES:
            for seed in plan.seeds:
                yield self.half(case, seed)

    def half(self, case: str, seed: int) -> Step:
        """A half of the records' pictures is kept, and is measured in several ways."""
        plan, places = self.plan, self.places
        again, guide = case in ("again", "both"), case in ("guide", "both")
        words: tuple[str, ...] = (f"again={AGAIN}", f"strength={AGAIN_STRENGTH:g}") if again else ()
        words += (f"guide={plan.kept_guide:g}",) if guide else ()
        passes = plan.few * plan.steps * (1 + (AGAIN * AGAIN_STRENGTH if again else 0))
        return Step(
            f"Keep a half, {case}, seed {seed}",
            (
                *("benchmarks.guidance.kept", f"run={places.run}", f"val={places.val}", "mask=half"),
                *(f"images={plan.few}", f"sampler={plan.sampler}", f"steps={plan.steps}", *words),
                *(f"seed={seed}", f"dest={places.kept(case, seed)}"),
            ),
            places.kept(case, seed),
            START_S + passes / PASSES["image" if guide else ""] + plan.few / JUDGED,
            optional=case != "plain",
        )
