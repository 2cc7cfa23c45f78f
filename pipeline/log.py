"""The one logger, which writes to stderr with time and rank, and `show`, which writes results to stdout.

    log.info("...")       what happens; log.warning("...") what may be wrong; log.debug("...") for developers
    show("...")           a result of the verb

Both leave out secrets and escape control characters, whatever names, captions and messages of others hold.

LATENTMILL_LOG=debug, info (the default), warning or error sets the lowest level shown. The line with which a verb fails
is printed by distributed/exits.py, and progress bars by tracking/progress.py.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

from pipeline.parsing.text import safe

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class _Formatter(logging.Formatter):
    """`2026-11-29 15:07:12 [rank 1] warning: message`, with the rank if there are several, and the level if it is not
    info."""

    def format(self, record: logging.LogRecord) -> str:
        several = int(os.environ.get("WORLD_SIZE") or 1) > 1 and "RANK" in os.environ
        rank = f" [rank {os.environ['RANK']}]" if several else ""
        level = "" if record.levelno == logging.INFO else f" {record.levelname.lower()}:"
        return f"{self.formatTime(record, '%Y-%m-%d %H:%M:%S')}{rank}{level} {safe(record.getMessage())}"


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to sys.stderr as it is when a message is logged, not as it was when this module was imported."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def show(text: str = "", end: str = "\n") -> None:
    """Print a result of the verb on stdout, at once."""
    print(safe(text), end=end, flush=True)


def _make() -> logging.Logger:
    logger = logging.getLogger("latentmill")
    logger.propagate = False
    handler = _Stderr()
    handler.setFormatter(_Formatter())
    logger.handlers[:] = [handler]
    level = os.environ.get("LATENTMILL_LOG", "info").lower()
    logger.setLevel(LEVELS.get(level, logging.INFO))
    if level not in LEVELS:
        logger.warning("LATENTMILL_LOG=%s is none of %s; showing info", level, ", ".join(LEVELS))
    return logger


log = _make()
