"""The findings of a verification."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Findings:
    """checks: (name, result) of each check. problems: everything that is wrong."""

    checks: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    poor: str = ""
    """How badly the encoders reconstruct the images: the cache is as promised, yet not good. "" when it is good."""

    remedies: list[str] = field(default_factory=list)
    """What to do about the problems, in order, each once."""

    def remedy(self, text: str) -> None:
        """Says what to do about a problem."""
        if text not in self.remedies:
            self.remedies.append(text)

    def add(self, check: str, result: str, *problems: str) -> None:
        """Records the outcome of one check."""
        self.checks.append((check, f"WRONG: {problems[0]}" if problems else result))
        self.problems += problems
