"""One rank of several: python -m pipeline.distributed.rank VERB CONFIG."""

from __future__ import annotations

import ctypes
import importlib
import signal
import sys
from collections.abc import Sequence

from pipeline.config import CONFIGS
from pipeline.config.loading.stored import unpack
from pipeline.distributed.exits import guarded, leave
from pipeline.verbs import VERBS

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this rank when its launcher ends, however it ends, so that no rank outlives its job."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main(arguments: Sequence[str]) -> int:
    """Run one rank. arguments: VERB and its configuration, packed. Returns the exit status."""
    die_with_parent()
    verb, text = arguments
    module, _ = VERBS[verb]
    return guarded(verb, lambda: importlib.import_module(module).main(unpack(CONFIGS[verb], text)) or 0)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
