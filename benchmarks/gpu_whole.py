"""Training to its end, evaluation, sampling, export and encode on one NVIDIA GPU, in one command of at most eight
minutes, from a copy of the tree and nothing else:

    .venv/bin/python -m benchmarks.gpu_whole --fetch         # where there is a network: wheels, into .whl/ (14 MB)
    python3 -m benchmarks.gpu_whole [KEY=VALUE ...] [--write]

The second needs no network: PyTorch, torchvision, transformers and timm are there, and the wheels that lie in .whl/
are installed into a temporary folder. Its parts, the most important first:

life: the verbs, as a user types them. synth, encode, reference; train with ZeRO 2 in bf16, compiled, streaming from a
disk, with EMA, commits and evaluations; train with ZeRO 1 and 2 and deterministic=true, one of them killed (SIGKILL)
and started again, which must end equal to the bit; eval, sample, export.
waits: the trainer over the bare step, and what it costs that a step waits for the device (benchmarks/whole/waits.py).
encode: encode's stage over its bare encoders.

It ends with status 1 where a part fails or a check does not hold. One GPU is a world of one rank: NCCL runs, but
between nobody. Tests run all of it on a CPU.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from benchmarks.whole import packages

if TYPE_CHECKING:
    from benchmarks.whole.journal import Journal
    from benchmarks.whole.verbs import Verbs

PARTS = ("life", "waits", "encode")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every field but the name can be given as key=value."""

    name: str = "gpu-whole"
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu is for tests."""
    minutes: float = 8.0
    """Time limit for everything."""
    parts: str = "life,waits,encode"
    """What is done, in this order."""
    compile: Literal["inductor", "off"] = "inductor"
    """off leaves compiled sides out."""
    life_model: str = "small"
    """Model of the runs of part life, in conf/model."""
    life_images: int = 4096
    """Images of their cache."""
    life_batch: int = 64
    """Their global batch."""
    life_steps: int = 400
    """Their steps."""
    life_evaluated: int = 256
    """Images of an evaluation."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of these runs."""
    model: str = "sd2"
    """Model of part waits."""
    engine: Literal["deepspeed", "torch"] = "deepspeed"
    """Its engine; torch is for tests."""
    batch: int = 32
    """Its batch."""
    rounds: int = 3
    """Rounds of each side."""
    steps: int = 10
    """Steps of a side in a round."""
    samples: int = 1024
    """Of the cache of random latents that is streamed."""
    encode_preset: str = "sd1-256"
    """Preset of part encode (benchmarks/encoding/presets.py)."""
    encode_images: int = 2048
    """Images that its stage encodes in a round; the bare encoders encode half as many."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark. Returns exit status 1 without a GPU, where a part fails, and where a check does not hold."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_whole",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="keys: " + " ".join(f"{key.name}={key.default}" for key in fields(Settings) if key.name != "name"),
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--write", action="store_true", help="also write the tables to benchmarks/results/")
    parser.add_argument("--fetch", action="store_true", help="fetch the wheels of what such a machine lacks, and end")
    parser.add_argument("--python", default="3.12", help="version of Python for which they are fetched (3.12)")
    options = parser.parse_intermixed_args(list(sys.argv[1:] if arguments is None else arguments))
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="latentmill-whole-") as name:
        try:
            if options.fetch:
                wheels = packages.fetch(options.python)
                size = sum(wheel.stat().st_size for wheel in wheels) / 2**20
                print(f"{len(wheels)} wheels, {size:.1f} MiB, in {packages.FOLDER}/", file=sys.stderr)
                return 0
            installed = packages.install(Path(name) / "site")
        except packages.Unavailable as error:
            print(f"benchmarks.gpu_whole: {error}", file=sys.stderr)
            return 1
        return _checked(options.overrides, Path(name), began, installed, write=options.write)


def _checked(overrides: Sequence[str], folder: Path, began: float, installed: int, *, write: bool) -> int:
    """What follows once the packages are there, which the modules of ours import."""
    if missing := packages.missing():
        print(f"benchmarks.gpu_whole: {packages.advice(missing)}", file=sys.stderr)
        return 1
    from benchmarks.encoding.presets import changed
    from pipeline.distributed.exits import guarded

    command = " ".join(["python -m benchmarks.gpu_whole", *overrides])

    def act() -> int:
        settings = changed(Settings(), overrides)
        return run(settings, command, folder, began=began, installed=installed, write=write)

    return guarded("benchmarks.gpu_whole", act)


def run(settings: Settings, command: str, folder: Path, *, began: float, installed: int = 0, write: bool) -> int:
    """Do all parts, print and store. began: when the time began to run. installed: number of wheels. Raises ConfigError
    without the device, and for a part or preset that there is not."""
    import torch

    from benchmarks.encoding.presets import PRESETS
    from benchmarks.machine import device_slug, keep
    from benchmarks.whole.journal import Journal, say
    from benchmarks.whole.verbs import Verbs
    from pipeline.errors import ConfigError

    parts = settings.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        raise ConfigError(f"parts={settings.parts}: no part {unknown[0]}; there are {', '.join(PARTS)}")
    if settings.encode_preset not in PRESETS:
        raise ConfigError(f"encode_preset={settings.encode_preset}: there are {', '.join(PRESETS)}")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("PyTorch sees no CUDA device here: run it on a machine with an NVIDIA GPU")
    device = torch.device(settings.device)
    journal = Journal(60 * settings.minutes, began)
    with Verbs(folder) as verbs:

        def tell() -> int:
            text = report(settings, command, journal, installed)
            print(text, flush=True)
            if write:
                say(f"written to benchmarks/results/{keep(f'whole-{device_slug(device)}', text).name}")
            return 0 if journal.right else 1

        def cut_off() -> None:
            """End the process when time is over, since a slow compiler cannot be interrupted."""
            journal.left_out.append(f"{journal.doing}, and what comes after it: the time was over")
            journal.right = False
            status = 1
            try:
                verbs.kill()
                status = tell()
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                os._exit(status)

        deadline = threading.Timer(max(1.0, journal.seconds_left), cut_off)
        deadline.daemon = True
        deadline.start()
        try:
            for part in parts:
                work = {"life": life, "waits": waits, "encode": encode}[part]
                journal.attempt(f"part {part}", 0.0, partial(work, settings, folder, verbs, journal))
        finally:
            deadline.cancel()
        return tell()


def life(settings: Settings, folder: Path, verbs: Verbs, journal: Journal) -> None:
    """Part life."""
    from benchmarks.whole.life import Life, Sizes

    sizes = Sizes(
        images=settings.life_images,
        batch=settings.life_batch,
        steps=settings.life_steps,
        evaluated=settings.life_evaluated,
        device=settings.device,
        precision=settings.precision,
        model=settings.life_model,
        compiled=settings.compile != "off",
    )
    lived = Life(sizes, folder, verbs, journal)
    journal.attempt("a run from its cache to its export", 60.0, lived.live)


def waits(settings: Settings, folder: Path, verbs: Verbs, journal: Journal) -> None:
    """Part waits: as it is and, if the time allows, compiled."""
    from benchmarks.whole.waits import Plan, measure
    from pipeline.distributed import world as distributed

    plan = Plan(
        model=settings.model,
        batch=settings.batch,
        rounds=settings.rounds,
        steps=settings.steps,
        samples=settings.samples,
        compiled=False,
        engine=settings.engine,
    )
    world = distributed.start(settings.device, group=settings.engine == "deepspeed")
    try:
        journal.attempt(
            f"the trainer over the bare step, {plan.model}", 45.0, lambda: measure(plan, folder, world, journal)
        )
        if settings.compile != "off":
            compiled = replace(plan, compiled=True)
            journal.attempt(
                f"the same, compiled, {plan.model}", 120.0, lambda: measure(compiled, folder, world, journal)
            )
    finally:
        distributed.stop(world)


def encode(settings: Settings, folder: Path, verbs: Verbs, journal: Journal) -> None:
    """Part encode."""
    from benchmarks.encoding.presets import PRESETS
    from benchmarks.whole.encoding import measure

    base, images = PRESETS[settings.encode_preset], settings.encode_images
    preset = replace(
        base,
        device=settings.device,
        images=images,
        stage_images=images,
        limit_images=max(base.batch, images // 2),
        distinct=min(base.distinct, 128, images),
        shard=min(base.shard, images),
        rounds=2,
    )
    journal.attempt("encode's stage and its bare encoders", 60.0, lambda: measure(preset, folder, journal))


def report(settings: Settings, command: str, journal: Journal, installed: int) -> str:
    """The page, as Markdown."""
    import torch

    from benchmarks.machine import machine, table

    lines = [f"# The whole of it on one {'GPU' if settings.device == 'cuda' else 'CPU'}", "", f"- command: `{command}`"]
    lines += machine(torch.device(settings.device), torch.get_num_threads())
    if installed:
        lines.append(f"- {installed} wheels were brought along and installed; all else was there")
    for heading, words in list(journal.sections.items()):
        lines += ["", f"## {heading}", "", *words]
        if heading in journal.tables:
            head, rows = journal.tables[heading]
            lines += [*([""] if words else []), table(head, list(rows))]
    lines += ["", *(f"- left out: {reason}" for reason in journal.left_out)]
    lines.append(f"- all of it took {time.perf_counter() - journal.began:.0f} s")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
