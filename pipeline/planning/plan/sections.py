"""A plan: sections of figures, the choices of ZeRO stage and micro-batch, and how both are stored as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.parsing.redaction import redact_values
from pipeline.planning.plan.choices import Choice, Scale
from pipeline.planning.plan.figures import FORMAT, Figure, value_words


@dataclass(frozen=True)
class Section:
    """Figures of one thing that is paid for, and sentences about them."""

    name: str
    """encode, training, storage, evaluations or whole."""
    figures: tuple[Figure, ...]
    notes: tuple[str, ...] = ()

    def figure(self, name: str) -> Figure | None:
        """The figure of this name; None where the section has none."""
        return next((figure for figure in self.figures if figure.name == name), None)


@dataclass(frozen=True)
class Plan:
    """What a command line's run will take."""

    title: str
    """What is planned, in one line."""
    sections: tuple[Section, ...]
    choices: tuple[Choice, ...] = ()
    """Every ZeRO stage with every micro-batch that divides a rank's share."""
    chosen: Choice | None = None
    """Which of them the figures are of."""
    recommended: Choice | None = None
    """The fastest that fits; None where none fits, or nothing says how much memory there is."""
    why: str = ""
    """Why that one, in one sentence."""
    scales: tuple[Scale, ...] = ()
    """The same run on other numbers of nodes."""

    def section(self, name: str) -> Section | None:
        """The section of this name; None where the plan has none."""
        return next((section for section in self.sections if section.name == name), None)

    def value(self, section: str, figure: str) -> float | None:
        """A figure's value; None where the plan does not have it."""
        found = self.section(section)
        one = found.figure(figure) if found else None
        return one.value if one else None

    def line(self) -> str:
        """Hours, GPU-hours and price of training in one line; "" where nothing says how fast the machine is."""
        hours, gpu_hours = self.value("whole", "hours"), self.value("whole", "device-hours")
        if hours is None or gpu_hours is None:
            return ""
        price = self.value("whole", "price")
        paid = f", {price:,.0f} at the given price" if price is not None else ""
        return f"{value_words(hours, '')} hours, {value_words(gpu_hours, '')} device-hours{paid}"

    def plain(self) -> dict[str, Any]:
        """The plan as JSON holds it."""
        return {
            "format": FORMAT,
            "title": self.title,
            "sections": {
                section.name: {"figures": [asdict(figure) for figure in section.figures], "notes": list(section.notes)}
                for section in self.sections
            },
            "choices": [asdict(choice) for choice in self.choices],
            "chosen": asdict(self.chosen) if self.chosen else None,
            "recommended": asdict(self.recommended) if self.recommended else None,
            "why": self.why,
            "scales": [asdict(scale) for scale in self.scales],
        }

    def json(self) -> bytes:
        """The plan as the bytes of plan.json: without secrets, and without values of the environment."""
        plain = redact_values(self.plain())
        return json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"
