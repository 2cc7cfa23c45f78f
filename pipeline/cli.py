"""The command line: the table of verbs, and how each ends.

    latentmill VERB KEY=VALUE ...        (also python -m MODULE KEY=VALUE ...)

Exit status: 0 done; 1 an error, said in one line; 2 an unknown verb or an argument that cannot be parsed; 75 stopped
with everything committed, so that the same command goes on; 130 Ctrl-C. LATENTMILL_DEBUG=1 shows tracebacks.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from pipeline.errors import LatentmillError

VERBS = {
    "synth": ("preprocess.synthetic", "write captioned-shapes shards in img2dataset's layout"),
    "encode": ("preprocess.encode", "image-text shards to a cached latent dataset"),
    "index": ("preprocess.index", "tars of latents made elsewhere to a dataset, where they lie"),
    "verify": ("preprocess.verify", "prove a cache: hashes, counts, statistics, decode and compare"),
    "reference": ("preprocess.reference", "feature statistics of real images, for FID"),
    "train": ("pipeline.train", "train a latent diffusion model on a cache"),
    "eval": ("pipeline.eval", "a checkpoint's FID, CLIP score and attribute accuracy"),
    "sample": ("pipeline.sample", "images from a checkpoint"),
    "export": ("pipeline.export", "weights that other software loads"),
    "fetch": ("pipeline.fetch", "encoders into a folder or bucket, for nodes without internet"),
    "status": ("pipeline.status", "what runs are doing: state, samples, images/s, last commit, restarts, loss"),
    "data": ("pipeline.preview", "what ranks and nodes would read: batches, bytes, bandwidth, memory"),
    "ledger": ("pipeline.ledger", "prove that a run trained on every sample once"),
    "report": ("pipeline.report.page", "one HTML page about one run or several"),
    "demo": ("pipeline.demo", "the whole loop on captioned shapes, on this machine"),
    "submit": ("pipeline.submit", "verbs as jobs of Slurm: latentmill submit train KEY=VALUE ..."),
}
"""verb: (module with main(config), what it does)."""

TAKES_PATHS = {
    "ledger": "usage: latentmill ledger RUN [RUN ...] [dataset=URL]",
    "status": "usage: latentmill status RUN [RUN ...], or a folder of runs",
    "report": "usage: latentmill report RUN [RUN ...] dest=report.html",
}
"""Verbs that only read runs and take paths: main(arguments)."""

TAKES_A_VERB = ("submit",)
"""Verbs whose first argument is another verb: main(arguments)."""

ENVIRONMENT = {"encode": {"OMP_WAIT_POLICY": "passive"}}
"""What a verb wants set before PyTorch is imported, unless the user has set it. encode: its decoding workers need the
cores for which OpenMP's threads would wait spinning."""

INTERRUPTED_BY_KEYBOARD = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"latentmill {version('latentmill')}")
        return 0
    verb, *rest = arguments
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(VERBS)}"
        return _fail("", f"{verb}: no such verb; {hint}", 2)
    return guarded(verb, lambda: run(verb, rest))


def entry() -> NoReturn:
    """The console script."""
    leave(main())


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


def run(verb: str, arguments: list[str]) -> int:
    """Load the verb's configuration and run its module. Raises what the verb raises."""
    wants_help = "-h" in arguments or "--help" in arguments
    for name, value in ENVIRONMENT.get(verb, {}).items():
        os.environ.setdefault(name, value)
    if verb in TAKES_PATHS:
        if wants_help:
            print(f"{VERBS[verb][1]}\n\n{TAKES_PATHS[verb]}")
            return 0
        return importlib.import_module(VERBS[verb][0]).main(arguments) or 0
    if wants_help:
        from pipeline.confighelp import verb_help

        print(verb_help(verb))
        return 0
    if verb in TAKES_A_VERB:
        return importlib.import_module(VERBS[verb][0]).main(arguments) or 0
    if "-m" in arguments or "--multirun" in arguments:
        from pipeline.sweep import sweep

        return sweep(verb, [word for word in arguments if word not in ("-m", "--multirun")])
    from pipeline.configload import load

    config = load(verb, _flags(arguments))
    return importlib.import_module(VERBS[verb][0]).main(config) or 0


def _flags(arguments: list[str]) -> list[str]:
    """`--from-card FILE` as from_card=FILE, which it is short for."""
    words = iter(arguments)
    return [f"from_card={next(words, '')}" if word == "--from-card" else word for word in words]


def usage() -> str:
    """What `latentmill --help` prints."""
    verbs = [f"  {verb:<10} {text}" for verb, (_, text) in VERBS.items()]
    return "\n".join(
        [
            "latentmill: from image-text shards to a proved latent dataset to a trained latent diffusion model",
            "",
            "usage: latentmill VERB KEY=VALUE ...",
            "",
            *verbs,
            "",
            "latentmill VERB --help lists the verb's keys. Paths are local or s3:// everywhere. -m sweeps.",
        ]
    )


def _fail(verb: str, message: str, status: int) -> int:
    """One line on stderr, with the rank where there are several."""
    rank = (
        f" [rank {os.environ['RANK']}]" if int(os.environ.get("WORLD_SIZE") or 1) > 1 and "RANK" in os.environ else ""
    )
    print(f"latentmill{' ' + verb if verb else ''}{rank}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    entry()
