"""The message with which a verb refuses."""

from __future__ import annotations

import pytest

from pipeline import cli


def refusal(capsys: pytest.CaptureFixture[str], status: int, *words: str) -> str:
    """Runs `latentmill submit`, asserts its exit status, and returns its only line of stderr."""
    assert cli.main(["submit", *words]) == status
    message = capsys.readouterr().err
    assert message.count("\n") == 1, message
    return message
