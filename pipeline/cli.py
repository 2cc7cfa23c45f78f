"""The command line: it runs a verb and turns its end into an exit status.

    latentmill VERB KEY=VALUE ...        (also python -m MODULE KEY=VALUE ...)

Exit status: 0 done; 1 an error, reported in one line; 2 an unknown verb or an argument that cannot be parsed; 75
stopped with everything committed, so that the same command continues; 130 Ctrl-C. LATENTMILL_DEBUG=1 shows tracebacks.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NoReturn

from pipeline.distributed.exits import _fail, guarded, leave
from pipeline.distributed.signals import stopping_at_once
from pipeline.log import show
from pipeline.verbs import ENVIRONMENT, HANDED_OVER, STOPS, TAKES_PATHS, TAKES_WORDS, VERBS

SWEEP = "pipeline.jobs.sweep"
"""Module of `-m`, as a name like those of the verbs: the command line imports a module only when it runs it."""
LOCAL_RANK = ("--local_rank", "--local-rank")
"""A word that deepspeed's launcher and torch.distributed.launch give each rank, beside the environment."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        show(usage())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        from importlib.metadata import version

        show(f"latentmill {version('latentmill')}")
        return 0
    verb, *rest = arguments
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(VERBS)}"
        return _fail("", f"{verb}: no such verb; {hint}", 2)
    with stopping_at_once(verb=verb) if verb in STOPS else nullcontext():
        return guarded(verb, lambda: run(verb, rest))


def entry() -> NoReturn:
    """The console script."""
    leave(main())


def run(verb: str, arguments: list[str]) -> int:
    """Load the verb's configuration and run its module; returns the exit status. Raises what the verb raises."""
    if arguments == [HANDED_OVER]:
        from pipeline.distributed.children import words_taken_over

        arguments = words_taken_over()
    if any(word.startswith(LOCAL_RANK) for word in arguments):
        from pipeline.distributed.place import take_local_rank

        arguments = take_local_rank(arguments)
    wants_help = "-h" in arguments or "--help" in arguments
    for name, value in ENVIRONMENT.get(verb, {}).items():
        os.environ.setdefault(name, value)
    if verb in TAKES_PATHS:
        if wants_help:
            show(f"{VERBS[verb][1]}\n\n{TAKES_PATHS[verb]}")
            return 0
        return importlib.import_module(VERBS[verb][0]).main(arguments) or 0
    if wants_help:
        from pipeline.config.loading.help import verb_help

        show(verb_help(verb))
        return 0
    if verb in TAKES_WORDS:
        return importlib.import_module(VERBS[verb][0]).main(arguments) or 0
    if "-m" in arguments or "--multirun" in arguments:
        return importlib.import_module(SWEEP).sweep(
            verb, [word for word in arguments if word not in ("-m", "--multirun")]
        )
    from pipeline.config.loading.load import load

    config = load(verb, _flags(arguments))
    return importlib.import_module(VERBS[verb][0]).main(config) or 0


def _flags(arguments: list[str]) -> list[str]:
    """The arguments, with `--from-card FILE` written out as from_card=FILE."""
    words = iter(arguments)
    return [f"from_card={next(words, '')}" if word == "--from-card" else word for word in words]


def usage() -> str:
    """The text that `latentmill --help` prints."""
    verbs = [f"  {verb:<11} {text}" for verb, (_, text) in VERBS.items()]
    return "\n".join(
        [
            "latentmill: from image-text shards to a proved latent dataset to a trained latent diffusion model",
            "",
            "usage: latentmill VERB KEY=VALUE ...",
            "",
            *verbs,
            "",
            "latentmill VERB --help lists the verb's keys. Paths are local, s3://, gs:// or az://. -m sweeps.",
        ]
    )


if __name__ == "__main__":
    entry()
