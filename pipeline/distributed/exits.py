"""How a latentmill process ends: with one line on stderr and an exit status."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from pipeline.distributed import endings
from pipeline.distributed.signals import INTERRUPTED_BY_KEYBOARD
from pipeline.errors import LatentmillError
from pipeline.log import has_ranks, line_start, rank_label
from pipeline.parsing.text import one_line, safe

NO_ROOM = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG))
"""Errors of a disk that is full, or may not be written to."""


def leave(status: int) -> NoReturn:
    """End this process with an exit status.

    In a world of several ranks the interpreter's clean-up is skipped: gloo's threads, left over from collectives, can
    abort it and turn a finished job into a failed one.
    """
    endings.end(status)
    if has_ranks():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    raise SystemExit(status)


def guarded(verb: str, action: Callable[[], int]) -> int:
    """The exit status of `action()`. A LatentmillError becomes one line on stderr; other errors keep their traceback.

    LATENTMILL_DEBUG in the environment prints the traceback of the former too. What runs the launcher of this rank is
    told that it has begun, and how it has ended.
    """
    endings.begin()
    status = endings.UNEXPECTED
    try:
        status = _caught(verb, action)
    finally:
        endings.end(status)
    return status


def _caught(verb: str, action: Callable[[], int]) -> int:
    """As `guarded`."""
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = lambda _, error, __: _print_traceback(error)
    try:
        return action()
    except LatentmillError as error:
        if os.environ.get("LATENTMILL_DEBUG"):
            _print_traceback(error)
        return _fail(verb, str(error) or type(error).__name__, error.exit_code)
    except (MemoryError, RecursionError) as error:
        if os.environ.get("LATENTMILL_DEBUG"):
            _print_traceback(error)
        what = "memory ran out" if isinstance(error, MemoryError) else "what was read nests too deep"
        return _fail(verb, f"{what} ({_place(error)}); LATENTMILL_DEBUG=1 shows where", 1)
    except BrokenPipeError:  # `latentmill train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        name = error.filename or "a file in the temporary folder (TMPDIR)"
        return _fail(verb, f"cannot write {name}: {error.strerror}. Make room there and run this again", 1)
    except KeyboardInterrupt:
        return _fail(verb, "stopped by Ctrl-C", INTERRUPTED_BY_KEYBOARD)


def _print_traceback(error: BaseException) -> None:
    """The traceback as Python prints it, but for secrets: messages of others hold what they were given."""
    print(safe("".join(traceback.format_exception(error))), end="", file=sys.stderr, flush=True)


def _place(error: BaseException) -> str:
    """File and line of our own code that was running when `error` was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/pipeline/" in frame.filename or "/preprocess/" in frame.filename]
    own = own or frames[-1:]
    return f"{own[-1].filename.rpartition('/')[2]}:{own[-1].lineno}" if own else "unknown place"


def _fail(verb: str, message: str, status: int) -> int:
    """Print one line on stderr, with the rank where there are several. Returns the status."""
    line = f"latentmill{' ' + verb if verb else ''}{rank_label()}: {one_line(message)}"
    print(f"{line_start(sys.stderr)}{line}", file=sys.stderr, flush=True)
    return status
