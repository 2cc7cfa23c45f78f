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


def has_ranks() -> bool:
    """Whether the environment says that this process is one of several ranks. Never raises: whether it makes sense is
    looked at where ranks start (distributed/place.py)."""
    size = os.environ.get("WORLD_SIZE", "").strip()
    return size.isascii() and size.isdecimal() and len(size) < 9 and int(size) > 1


def rank_label() -> str:
    """` [rank 1]` where this process is one of several ranks, or ""."""
    rank = os.environ.get("RANK", "").strip()
    return f" [rank {rank}]" if has_ranks() and rank.isascii() and rank.isdecimal() and len(rank) < 9 else ""


class _Formatter(logging.Formatter):
    """`2026-11-29 15:07:12 [rank 1] warning: message`, with the rank if there are several, and the level if it is not
    info."""

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f" {record.levelname.lower()}:"
        return f"{self.formatTime(record, '%Y-%m-%d %H:%M:%S')}{rank_label()}{level} {safe(record.getMessage())}"


def redraws(stream: TextIO) -> bool:
    """Whether a stream is a terminal on which a line can be drawn over."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def line_start(stream: TextIO) -> str:
    """What a line begins with: on a terminal, where a progress bar of this process or of another rank may stand, the
    line that is begun there is erased. The bar is drawn anew below."""
    return "\r\x1b[K" if redraws(stream) else ""


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to sys.stderr as it is when a message is logged, not as it was when this module was imported; a line at
    once, so that ranks do not write into each other's."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        try:
            self.stream.write(f"{line_start(self.stream)}{self.format(record)}\n")
            self.flush()
        except Exception:
            self.handleError(record)


def show(text: str = "", end: str = "\n") -> None:
    """Print a result of the verb on stdout, at once."""
    print(f"{line_start(sys.stdout)}{safe(text)}", end=end, flush=True)


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
