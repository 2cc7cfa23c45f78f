"""What a verb says when it refuses."""

from __future__ import annotations

import pytest

from pipeline import cli


def refusal(capsys: pytest.CaptureFixture[str], status: int, *words: str) -> str:
    """The one line that a `latentmill submit` ends with."""
    assert cli.main(["submit", *words]) == status
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said
