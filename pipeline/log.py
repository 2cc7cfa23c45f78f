"""The one logger. Results go to stdout; everything else that is said goes here: to stderr, with time and rank.

    log.info("...")       what happens; log.warning("...") what may not be meant; log.debug("...") what developers ask

LATENTMILL_LOG=debug, info (the default), warning or error chooses what is shown. The line that a verb fails with is
distributed/exits.py's, and progress bars are tracking/progress.py's.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class _Formatter(logging.Formatter):
    """`2026-11-29 15:07:12 [rank 1] warning: message`; the rank where there are several, the level where it is not
    info."""

    def format(self, record: logging.LogRecord) -> str:
        several = int(os.environ.get("WORLD_SIZE") or 1) > 1 and "RANK" in os.environ
        rank = f" [rank {os.environ['RANK']}]" if several else ""
        level = "" if record.levelno == logging.INFO else f" {record.levelname.lower()}:"
        return f"{self.formatTime(record, '%Y-%m-%d %H:%M:%S')}{rank}{level} {record.getMessage()}"


class _Stderr(logging.StreamHandler[TextIO]):
    """To sys.stderr as it is when something is said, not as it was when this module was imported."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _make() -> logging.Logger:
    logger = logging.getLogger("latentmill")
    logger.propagate = False
    handler = _Stderr()
    handler.setFormatter(_Formatter())
    logger.handlers[:] = [handler]
    chosen = os.environ.get("LATENTMILL_LOG", "info").lower()
    logger.setLevel(LEVELS.get(chosen, logging.INFO))
    if chosen not in LEVELS:
        logger.warning("LATENTMILL_LOG=%s: there are %s; showing info", chosen, ", ".join(LEVELS))
    return logger


log = _make()
