"""How a process of ours ends: one line and a status."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from pipeline.errors import LatentmillError

INTERRUPTED_BY_KEYBOARD = 130


def leave(status: int) -> NoReturn:
    """End this process.

    A rank of several ends without the interpreter's own clean-up: threads of gloo that a collective has left can abort
    it, and make a failure of a job that is done.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    raise SystemExit(status)


def guarded(verb: str, action: Callable[[], int]) -> int:
    """The exit status of `action`: errors raised on purpose become one line, anything else keeps its traceback."""
    try:
        return action()
    except LatentmillError as error:
        if os.environ.get("LATENTMILL_DEBUG"):
            traceback.print_exc()
        return _fail(verb, str(error) or type(error).__name__, error.exit_code)
    except KeyboardInterrupt:
        return _fail(verb, "stopped by Ctrl-C", INTERRUPTED_BY_KEYBOARD)
    except BrokenPipeError:  # `latentmill train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _fail(verb: str, message: str, status: int) -> int:
    """One line on stderr, with the rank where there are several."""
    rank = (
        f" [rank {os.environ['RANK']}]" if int(os.environ.get("WORLD_SIZE") or 1) > 1 and "RANK" in os.environ else ""
    )
    print(f"latentmill{' ' + verb if verb else ''}{rank}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return status
