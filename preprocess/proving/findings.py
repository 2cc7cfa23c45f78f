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

    def add(self, check: str, result: str, *problems: str) -> None:
        """Records the outcome of one check."""
        self.checks.append((check, f"WRONG: {problems[0]}" if problems else result))
        self.problems += problems
