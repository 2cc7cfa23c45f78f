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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline import cli
from pipeline.config import DemoConfig
from pipeline.config.tasks.found import present
from pipeline.config.tasks.table import TASK_FACTS
from pipeline.distributed import forks
from pipeline.distributed.children import own_command
from pipeline.distributed.ranks import run_command
from pipeline.errors import ConfigError, LatentmillError
from pipeline.log import log, show
from pipeline.report import page, run
from pipeline.report.publish import require_page
from pipeline.storage.local import LocalStorage
from pipeline.verbs import VERBS

SHARD = 1000
"""Images per shard."""
PROMPTS = 8
"""Rows of the sampled grid, of captions."""
FILES = 4
"""Held-out samples whose boxes, maps or pictures are given to `sample`."""
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
    require_page(str(dest / "report.html"), page.MARK)  # before minutes of work
    notes = list[str]()
    done = [asdict(step) for step in run.read_steps(storage, notes)]
    for note in notes:
        log.warning(f"demo: {note}; every step is run anew")
    began, any_has_run = time.monotonic(), False
    tasks = tasks_of(config)
    runs = {task: dest if len(tasks) == 1 else dest / task for task in tasks}
    steps = data_steps(config, dest, tasks)
    for number, step in enumerate(steps):
        any_has_run = _run(storage, done, number, step, any_has_run)
    validation = dest / "data" / "shapes-val" / "00000.tar"
    number = len(steps)
    for task, folder in runs.items():
        given = [f"prompt={text}" for text in captions(validation, PROMPTS)]
        given = given if TASK_FACTS[task].config().takes_text else write_given(task, validation, folder / "given")
        for step in (train_step(config, task, dest, folder), *result_steps(task, folder, given, config.seed)):
            any_has_run = _run(storage, done, number, step, any_has_run)
            number += 1
    targets = TARGETS if len(tasks) == 1 else {}
    page.write([str(folder) for folder in runs.values()], str(dest / "report.html"), targets)
    seconds, now = sum(entry["seconds"] for entry in done), time.monotonic() - began
    show(f"\n== Done ({now:.0f} s now). The page: {dest / 'report.html'}")
    for task, folder in runs.items():
        show(summary(f"task={task}" if len(runs) > 1 else "", folder, targets))
    limit = f"<= {targets['seconds']:.0f} s on two cores" if targets else ""
    show(row("time of all steps", f"{seconds:.0f} s", limit))
    return 0


def tasks_of(config: DemoConfig) -> tuple[str, ...]:
    """The tasks that a configuration asks for. Raises ConfigError for one that there is not."""
    asked = (config.task,) if config.task else config.tasks
    tasks = tuple(TASK_FACTS) if asked == ("all",) else asked
    for task in tasks:
        if task not in TASK_FACTS:
            raise ConfigError(f"tasks={task}: no such task; there are {', '.join(TASK_FACTS)}, or all")
    if not tasks or len(set(tasks)) < len(tasks):
        raise ConfigError(f"tasks={list(tasks)}: give each task once, or all")
    if config.recipe and len(tasks) > 1:
        raise ConfigError(
            f"recipe={config.recipe} is of one task, and tasks={list(tasks)} are {len(tasks)}: leave it out"
        )
    return tasks


def data_steps(config: DemoConfig, dest: Path, tasks: Sequence[str]) -> list[Step]:
    """Steps that make shards, caches, the proof of the training cache and the reference."""
    data = dest / "data"
    conditions = list(dict.fromkeys(name for task in tasks for name in TASK_FACTS[task].config().conditions))
    sets = {"shapes": (config.images, "train", config.seed)}
    # Split "val" is drawn like "train", with captions that training never uses.
    sets["shapes-val"] = (max(64, config.images // 10), "val", config.seed + 1)
    sets["shapes-ref"] = (max(128, config.images // 5), "val", config.seed + 2)
    steps = []
    for name, (images, split, seed) in sets.items():
        arguments = ["synth", f"dest={data / name}", f"images={images}", f"split={split}", f"seed={seed}"]
        arguments += ["classes=true"] if conditions else []
        steps.append(Step(f"Draw {images:,} captioned pictures ({name})", arguments, data / name))
    caches = {"shapes": "cache", "shapes-val": "cache-val", "shapes-ref": "cache-ref"}
    sources = {cache: f"source={shards(data / name, sets[name][0])}" for name, cache in caches.items()}
    for name, cache in caches.items():
        arguments = ["encode", sources[cache], f"dest={data / cache}", "encoders=demo"]
        arguments += condition_keys(conditions, cache == "cache-val", data / name) if conditions else []
        steps.append(Step(f"Encode them once: {name} -> {cache}", arguments, data / cache / "manifest.json"))
    proof, reference = data / "verify.html", data / "reference.safetensors"
    arguments = ["verify", f"dataset={data / 'cache'}", sources["cache"], f"report={proof}"]
    steps.append(Step("Prove the cache", arguments, proof))
    arguments = ["reference", f"dataset={data / 'cache-ref'}", sources["cache-ref"], f"dest={reference}"]
    steps.append(Step("Statistics of real pictures, for FID", arguments, reference))
    return steps


def condition_keys(conditions: Sequence[str], held_out: bool, shapes: Path) -> list[str]:
    """Keys of encode that store conditions of captioned shapes. held_out: whether evaluations read the cache."""
    names = [*conditions, *(["pixels"] if held_out else [])]
    keys = {
        "class": [f"classes.names={shapes / 'classes.txt'}"],
        "boxes": [f"boxes.names={shapes / 'labels.txt'}", "boxes.most=6"],
        "labels": [f"labels.names={shapes / 'labels.txt'}"],
        "mask": ["mask.variants=4"],
    }
    return [f"conditions=[{','.join(names)}]", *(key for name in conditions for key in keys.get(name, ()))]


def train_step(config: DemoConfig, task: str, dest: Path, folder: Path) -> Step:
    """The step that trains a task's model in `folder`."""
    data, recipe = dest / "data", config.recipe or TASK_FACTS[task].recipe
    arguments = [
        *("train", f"experiment={recipe}", f"data.train={data / 'cache'}", f"data.val={data / 'cache-val'}"),
        *(f"eval.reference={data / 'reference.safetensors'}", f"run={folder}"),
        *(f"launch.processes={config.processes}", *(["precision=bf16"] if has_bfloat16() else [])),
        *("deepspeed=zero2", f"seed={config.seed}", *([f"samples={config.samples}"] if config.samples else [])),
    ]
    return Step(f"Train {task} on {config.processes} processes", arguments, folder / "config.yaml")


def result_steps(task: str, dest: Path, given: list[str], seed: int) -> list[Step]:
    """Steps that use a trained run. given: keys of sample that say what it is given."""
    picture, folder = dest / "samples.png", dest / "diffusers"
    guided = TASK_FACTS[task].config().drop > 0
    sample = ["sample", f"run={dest}", *given, "n=4", *(["guidance=2"] if guided else [])]
    sample += [f"dest={picture}", f"seed={seed}"]
    return [
        Step("Sample from what training never saw", sample, picture),
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
        status = run_command(own_command(VERBS[verb][0], *arguments))
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


def write_given(task: str, shard: Path, folder: Path) -> list[str]:
    """Keys of sample that give the model what the first held-out samples show, in files that are written to `folder`:
    what a user would give it."""
    import numpy as np
    from PIL import Image

    from pipeline.conditions.facts import LowresFacts, MaskFacts
    from pipeline.conditions.lowres import lowres
    from pipeline.conditions.mask import masks
    from pipeline.report.grid import png

    asks = TASK_FACTS[task].asks
    if "class" in asks:
        return ["class=[0,7,14,21]"]
    folder.mkdir(parents=True, exist_ok=True)
    keys: list[str] = []
    for number, sample in enumerate(first_samples(shard, FILES)):
        files: dict[str, bytes] = {}
        pixels = np.asarray(Image.open(io.BytesIO(sample["png"])).convert("RGB"))
        if "boxes" in asks:
            files["boxes"] = json.dumps(json.loads(sample["json"])["boxes"]).encode()
        if "labels" in asks:
            files["labels"] = sample["labels.png"]
        if "mask" in asks:
            size = pixels.shape[1], pixels.shape[0]
            hole = masks(f"demo {number}", size, MaskFacts(kinds=("rectangles",)))
            files |= {"image": sample["png"], "mask": png(Image.fromarray(255 * hole))}
        elif "image" in asks:
            small = lowres(pixels, LowresFacts(factor=4, degradation="bicubic"), "demo")
            files["image"] = png(Image.fromarray(small.transpose(1, 2, 0)))
        for key, data in files.items():
            path = folder / f"{number}.{key}.{'json' if key == 'boxes' else 'png'}"
            path.write_bytes(data)
            keys.append(f"{key}={path}")
    return keys


def first_samples(shard: Path, count: int) -> list[dict[str, bytes]]:
    """The files by suffix of the first samples of a shard."""
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(fileobj=io.BytesIO(shard.read_bytes())) as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            if key not in samples and len(samples) == count:
                break
            if (file := tar.extractfile(member)) is not None:
                samples.setdefault(key, {})[suffix] = file.read()
    return list(samples.values())


def summary(heading: str, folder: Path, targets: Mapping[str, float]) -> str:
    """The figures of a task's last evaluation, with their error bars, beside what they are meant to reach."""
    last = run.load(str(folder)).last
    metrics = last.metrics if last else {}
    rows = [f" {heading}".rstrip()] if heading else []
    for name, figure in present(metrics):
        bar = run.spread(metrics, name)
        beside = f" ({bar[0]:.{figure.digits}f} to {bar[1]:.{figure.digits}f})" if bar else ""
        wanted = f">= {targets[name]:g}" if name in targets else ""
        rows.append(row(figure.title, f"{metrics[name]:.{figure.digits}f}{beside}", wanted))
    fid, floor = metrics.get("fid_democlip"), metrics.get("fid_democlip_floor_reconstruction")
    if fid is not None and floor:
        wanted = f"<= {targets['fid_ratio']:g}" if targets else ""
        rows.append(row("fid_democlip / its autoencoder's floor", f"{fid / floor:.2f}", wanted))
    return "\n".join([*rows, row("samples", str(folder / "samples.png"), "")])


def row(name: str, value: str, wanted: str) -> str:
    """A line of the summary."""
    return f"   {name:<40} {value:<26} {wanted}".rstrip()


if __name__ == "__main__":
    from pipeline import cli

    raise SystemExit(cli.main(["demo", *sys.argv[1:]]))
