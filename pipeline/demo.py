"""latentmill demo: the whole loop on captioned shapes, on this machine.

Every step is a command that one can also run by hand. It is printed and run in its own process; steps that compute are
forks of a process that has imported PyTorch (distributed/forks.py). DEST/steps.json records the finished steps, so that
a second run of the demo continues where the first stopped, and ends at once when all steps are finished.
"""

from __future__ import annotations

import io
import json
import shlex
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

from pipeline import cli
from pipeline.config import DemoConfig
from pipeline.distributed import forks
from pipeline.distributed.ranks import run_command
from pipeline.errors import LatentmillError
from pipeline.log import show
from pipeline.report import page, run
from pipeline.storage.local import LocalStorage
from pipeline.verbs import VERBS

SHARD = 1000
"""Images per shard."""
PROMPTS = 8
"""Rows of the sampled grid."""
TARGETS = {"attribute_accuracy": 0.75, "fid_ratio": 3.0, "seconds": 600.0}
"""Targets of the demo on two CPU cores: at least, at most, at most."""
STOPPED = (75, 130, 143)
"""Exit statuses of a step that was interrupted rather than failed."""
STEPS = "steps.json"
"""File that records the finished steps."""


@dataclass(frozen=True)
class Step:
    """One command. heading: its purpose. product: a path that exists once the command has succeeded."""

    heading: str
    arguments: list[str]
    product: Path


class StepFailed(LatentmillError):
    """A step's command failed and has printed the reason. exit_code: of the command."""

    def __init__(self, command: str, status: int) -> None:
        outcome = "was stopped" if status in STOPPED else f"failed (exit status {status})"
        super().__init__(f"this step {outcome}; run the demo again to go on from here: {command}")
        self.exit_code = status


def main(config: DemoConfig) -> int:
    """Run the verb."""
    dest = Path(config.dest)
    storage = LocalStorage(dest)
    done = json.loads(storage.get(STEPS)) if storage.exists(STEPS) else []
    began, any_has_run = time.monotonic(), False
    for number, step in enumerate(data_steps(config, dest)):
        any_has_run = _run(storage, done, number, step, any_has_run)
    prompts = captions(dest / "data" / "shapes-val" / "00000.tar", PROMPTS)
    for number, step in enumerate(result_steps(dest, prompts, config.seed), start=len(data_steps(config, dest))):
        any_has_run = _run(storage, done, number, step, any_has_run)
    page.write([str(dest)], str(dest / "report.html"), TARGETS)
    show(summary(dest, sum(entry["seconds"] for entry in done), time.monotonic() - began))
    return 0


def data_steps(config: DemoConfig, dest: Path) -> list[Step]:
    """Steps that make shards, caches, the proof of the training cache and the reference, and the training."""
    data = dest / "data"
    sets = {"shapes": (config.images, "train", config.seed)}
    # Split "val" is drawn like "train", with captions that training never uses.
    sets["shapes-val"] = (max(64, config.images // 10), "val", config.seed + 1)
    sets["shapes-ref"] = (max(128, config.images // 5), "val", config.seed + 2)
    steps = []
    for name, (images, split, seed) in sets.items():
        arguments = ["synth", f"dest={data / name}", f"images={images}", f"split={split}", f"seed={seed}"]
        steps.append(Step(f"Draw {images:,} captioned pictures ({name})", arguments, data / name))
    caches = {"shapes": "cache", "shapes-val": "cache-val", "shapes-ref": "cache-ref"}
    sources = {cache: f"source={shards(data / name, sets[name][0])}" for name, cache in caches.items()}
    for name, cache in caches.items():
        arguments = ["encode", sources[cache], f"dest={data / cache}", "encoders=demo"]
        steps.append(Step(f"Encode them once: {name} -> {cache}", arguments, data / cache / "manifest.json"))
    proof, reference = data / "verify.html", data / "reference.safetensors"
    arguments = ["verify", f"dataset={data / 'cache'}", sources["cache"], f"report={proof}"]
    steps.append(Step("Prove the cache", arguments, proof))
    arguments = ["reference", f"dataset={data / 'cache-ref'}", sources["cache-ref"], f"dest={reference}"]
    steps.append(Step("Statistics of real pictures, for FID", arguments, reference))
    arguments = [
        *("train", f"experiment={config.recipe}", f"data.train={data / 'cache'}", f"data.val={data / 'cache-val'}"),
        *(f"eval.reference={reference}", f"run={dest}", f"launch.processes={config.processes}"),
        *(["precision=bf16"] if has_bfloat16() else []),
        *("deepspeed=zero2", f"seed={config.seed}", *([f"samples={config.samples}"] if config.samples else [])),
    ]
    steps.append(Step(f"Train on {config.processes} processes", arguments, dest / "config.yaml"))
    return steps


def result_steps(dest: Path, prompts: list[str], seed: int) -> list[Step]:
    """Steps that use the trained run."""
    picture, folder = dest / "samples.png", dest / "diffusers"
    sample = ["sample", f"run={dest}", *(f"prompt={prompt}" for prompt in prompts)]
    sample += ["n=4", "guidance=2", f"dest={picture}", f"seed={seed}"]
    return [
        Step("Sample captions that training never saw", sample, picture),
        Step(
            "Export for diffusers, and check that it predicts the same",
            ["export", f"run={dest}", f"dest={folder}", "format=diffusers", "check=true"],
            folder,
        ),
    ]


def has_bfloat16() -> bool:
    """Whether the processor has bfloat16 products, which halve the time of a step. Known only on Linux."""
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and bool({"avx512_bf16", "amx_bf16"} & set(cpu.read_text(encoding="utf-8").split()))


def shards(folder: Path, images: int) -> str:
    """The brace pattern of the shards that synth writes for this number of images."""
    last = (images - 1) // SHARD
    return str(folder / (f"{{00000..{last:05d}}}.tar" if last else "00000.tar"))


def captions(shard: Path, count: int) -> list[str]:
    """The first captions of a shard."""
    texts = []
    with tarfile.open(fileobj=io.BytesIO(shard.read_bytes())) as tar:
        for member in tar:
            if member.name.endswith(".txt") and (file := tar.extractfile(member)):
                texts.append(file.read().decode())
            if len(texts) == count:
                break
    return texts


def _run(storage: LocalStorage, done: list[dict], number: int, step: Step, any_has_run: bool) -> bool:
    """Run a step, unless an earlier run of the demo has done it and all steps before it. Returns whether any step has
    run now.

    done: the finished steps in order, which this function updates and stores in steps.json.
    """
    verb, *arguments = step.arguments
    command = f"latentmill {verb} {' '.join(map(_quoted, arguments))}"
    show(f"\n== {step.heading}\n   {command}")
    if not any_has_run and number < len(done) and done[number]["command"] == command and step.product.exists():
        show(f"   already done, in {done[number]['seconds']:.0f} s")
        return False
    del done[number:]
    began = time.monotonic()
    if verb in forks.HEAVY:
        status = forks.run_verb(cli.main, verb, arguments)
    else:
        forks.begin()  # in parallel with the first step: drawing pictures takes one core
        status = run_command([sys.executable, "-m", VERBS[verb][0], *arguments])
    if status:
        raise StepFailed(command, status)
    seconds = time.monotonic() - began
    done.append({"heading": step.heading, "command": command, "seconds": round(seconds, 2)})
    storage.put(STEPS, json.dumps(done, indent=1).encode())
    show(f"   {seconds:.0f} s")
    return True


def _quoted(argument: str) -> str:
    """An argument as typed in a shell: key='some text'."""
    key, _, value = argument.partition("=")
    return f"{key}={shlex.quote(value)}"


def summary(dest: Path, seconds: float, now: float) -> str:
    """The figures of the demo beside their targets."""
    last = run.load(str(dest)).last
    metrics = last.metrics if last else {}
    rows = []
    accuracy = metrics.get("attribute_accuracy")
    if accuracy is not None:
        rows.append(("attribute accuracy", f"{accuracy:.3f}", f">= {TARGETS['attribute_accuracy']:g}"))
    fid, floor = metrics.get("fid_democlip"), metrics.get("fid_democlip_floor_reconstruction")
    if fid is not None and floor:
        rows.append(("fid_democlip / its autoencoder floor", f"{fid / floor:.2f}", f"<= {TARGETS['fid_ratio']:g}"))
    if metrics.get("clip_score") is not None:
        rows.append(("CLIP score", f"{metrics['clip_score']:.1f}", ""))
    rows.append(("time of all steps", f"{seconds:.0f} s", f"<= {TARGETS['seconds']:.0f} s on two cores"))
    lines = [f"   {name:<38} {value:>10}   {target}" for name, value, target in rows]
    head = f"\n== Done ({now:.0f} s now). The page: {dest / 'report.html'}   the samples: {dest / 'samples.png'}"
    return "\n".join([head, *lines])


if __name__ == "__main__":
    from pipeline import cli

    raise SystemExit(cli.main(["demo", *sys.argv[1:]]))
