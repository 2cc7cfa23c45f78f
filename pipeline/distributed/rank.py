"""One rank of several: python -P -m pipeline.distributed.rank VERB, with its configuration as standard input."""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import sys
from collections.abc import Sequence

from pipeline.distributed.children import take_over
from pipeline.distributed.exits import guarded, leave
from pipeline.distributed.signals import stopping_at_once
from pipeline.errors import LatentmillError, ParseError
from pipeline.parsing.values import parse_json
from pipeline.verbs import VERBS

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int = 0, number: int = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when its parent ends, however that ends, so that no rank outlives its
    job.

    parent: the process that has started this one; raises LatentmillError where it has ended already. 0 = not known.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if parent and os.getppid() != parent:
        raise LatentmillError("the launcher of this rank has ended before the rank has begun")


def main(arguments: Sequence[str]) -> int:
    """Run one rank. arguments: VERB, for the list of processes to show. Returns the exit status."""
    die_with_parent()
    verb = next(iter(arguments), "")
    return guarded(verb, lambda: run(take_over()))


def run(order: bytes) -> int:
    """Run what run_ranks has handed over: verb, launcher, config. Raises what the verb raises, and LatentmillError
    where a launcher has died before it handed anything over."""
    from pipeline.config import CONFIGS
    from pipeline.config.loading.stored import unpack

    try:
        given = parse_json(order)
        verb, launcher, config = (given[name] for name in ("verb", "launcher", "config"))
        module, _ = VERBS[verb]
    except (ParseError, TypeError, KeyError):
        raise LatentmillError("this is started by launch.processes, which hands the configuration over") from None
    die_with_parent(launcher)
    with stopping_at_once(verb=verb):
        return importlib.import_module(module).main(unpack(CONFIGS[verb], config)) or 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
