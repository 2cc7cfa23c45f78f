"""What a verification finds."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Findings:
    """What was checked (name, result) and what is wrong."""

    checks: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    poor: str = ""
    """What is as promised, and yet not good: how badly the encoders reconstruct the images."""

    def add(self, check: str, result: str, *problems: str) -> None:
        """One check's outcome."""
        self.checks.append((check, f"WRONG: {problems[0]}" if problems else result))
        self.problems += problems
