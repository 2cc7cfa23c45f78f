"""All figures of the UNet on one NVIDIA GPU, in one command of at most eight minutes:

    .venv/bin/python -m benchmarks.gpu [KEY=VALUE ...] [--write]

First it checks bf16: outputs and gradients against fp32, with diffusers' errors beside them. Then it measures training
(forward, backward, clipping, fused AdamW on fp32 master weights; no EMA) at the best batch, found by doubling until
memory is out, and sampling; diffusers' UNet2DConditionModel beside ours with the same weights, both in bf16,
channels_last and with SDPA, not compiled and compiled. Rows are printed as they are measured, the most important first;
rows for which no time is left are named. MFU is the model's FLOPs (pipeline/planning/cost.py) over the rate of a large
matrix product on the same GPU.

The bar: 129 images/s per GPU for the SD2 UNet at 512x512 on H200s (eight of them, NVIDIA's logs of MLPerf v4.0). The
goal is 165.

Tests run all of it on a CPU with tiny networks.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Literal

from benchmarks.encoding.presets import changed
from pipeline.distributed.exits import guarded
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from benchmarks.network.gpu_parts import Side, Training
    from pipeline.config import ModelConfig

BAR, GOAL = 129.0, 165.0  # images/s, SD2 at 512 pixels, an H200
MOST_RATIO = 1.25  # of our bf16 errors to diffusers'
DOWNSAMPLING = 8  # pixels a latent
HEAD = ["what", "batch", "images/s", "MFU", "memory, GB", "modelled, GB", "first step, s"]
SAMPLING_HEAD = ["sampling", "batch", "seconds", "steps/s"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every field but the name can be given as key=value."""

    name: str = "gpu"
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu is for tests."""
    minutes: float = 8.0
    """Time limit for everything."""
    models: str = "sd2,sd1"
    """Names in conf/model, the most important first."""
    pixels: str = "512,256"
    """Sides of the images, the most important first."""
    tokens: int = 77
    """Length of a context."""
    batch: int = 8
    """Smallest batch that is tried."""
    most_batch: int = 1024
    """Largest batch that is tried."""
    compile: Literal["inductor", "eager", "off"] = "inductor"
    """Backend of torch.compile; eager compiles nothing, and is for tests."""
    compile_seconds: float = 120.0
    """Expected time of a compiled row, which is skipped when less time is left."""
    row_seconds: float = 30.0
    """Expected time of any other row."""
    seconds: float = 2.0
    """Shortest duration of a measurement."""
    steps: int = 50
    """Denoising steps of sampling."""
    matrix: int = 8192
    """Side of the matrices whose product gives the rate to which MFU relates."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark. Returns exit status 1 without a GPU or when bf16 errors are too large."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="keys: " + " ".join(f"{key.name}={key.default}" for key in fields(Settings) if key.name != "name"),
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--write", action="store_true", help="also write the tables to benchmarks/results/")
    options = parser.parse_intermixed_args(list(sys.argv[1:] if arguments is None else arguments))
    command = " ".join(["python -m benchmarks.gpu", *options.overrides])
    return guarded("benchmarks.gpu", lambda: run(changed(Settings(), options.overrides), command, write=options.write))


def run(settings: Settings, command: str, *, write: bool) -> int:
    """Measure, print and store. Raises ConfigError without the device, or for a model without context."""
    import torch

    from benchmarks.machine import device_slug, keep

    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "PyTorch sees no CUDA device here: run it on a machine with an NVIDIA GPU and a CUDA build of PyTorch "
            "(`python -m benchmarks.unet` measures CPUs)"
        )
    measurement = Measurement(settings, torch.device(settings.device))

    def tell() -> int:
        text = measurement.report(command)
        print(text, flush=True)
        if write:
            path = keep(f"unet-{device_slug(measurement.device)}", text)
            _say(f"written to benchmarks/results/{path.name}")
        return 0 if measurement.right else 1

    def cut_off() -> None:
        """End the process when time is over, since a slow compiler cannot be interrupted."""
        measurement.left_out.append(f"{measurement.doing}, and what comes after it: the time was over")
        os._exit(tell())

    deadline = threading.Timer(max(1.0, measurement.seconds_left()), cut_off)
    deadline.daemon = True
    deadline.start()
    try:
        measurement.all()
    finally:
        deadline.cancel()
    return tell()


@dataclass
class Measurement:
    """One run: its results so far, and the time that is left."""

    settings: Settings
    device: torch.device
    began: float = field(default_factory=time.perf_counter)
    doing: str = "start"
    right: bool = True
    rate: float = 0.0
    checks: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    sampling_rows: list[list[str]] = field(default_factory=list)
    speeds: dict[tuple[str, str], float] = field(default_factory=dict)  # (label, side) -> best images/s
    batches: dict[str, int] = field(default_factory=dict)  # label -> best batch of rows that were not compiled
    left_out: list[str] = field(default_factory=list)

    def all(self) -> None:
        """Measure everything in the order of importance."""
        import torch

        from benchmarks.network.gpu_parts import matmul_rate

        torch.backends.cudnn.benchmark = True
        settings = self.settings
        models = {name: self._model(name) for name in settings.models.split(",")}
        pixels = [int(side) for side in settings.pixels.split(",")]
        for name, config in models.items():
            self._row(f"correctness of {name}", settings.row_seconds, lambda n=name, c=config: self._correct(n, c))  # type: ignore[misc]
        self.rate = matmul_rate(settings.matrix, self.device, settings.seconds)
        _say(f"bf16 products of {settings.matrix} x {settings.matrix} matrices: {self.rate / 1e12:.4g} TFLOP/s")

        first = next(iter(models))
        compiled: bool = settings.compile != "off"
        self._train(first, models[first], pixels[0], compiled)
        self._sample(first, models[first], pixels[0])
        other_rows = [(name, side) for side in pixels for name in models if (name, side) != (first, pixels[0])]
        for name, side in other_rows:
            self._train(name, models[name], side, compiled=False)
        for name in list(models)[1:]:
            self._sample(name, models[name], pixels[0])
        if compiled:
            for name, side in other_rows:
                self._train(name, models[name], side, compiled=True, plain=False)

    @staticmethod
    def _model(name: str) -> ModelConfig:
        from benchmarks.network.gpu_parts import model_of

        config = model_of(name)
        if not config.context_width:
            raise ConfigError(f"models={name}: a model with a context is wanted")
        return config

    def seconds_left(self) -> float:
        return self.settings.minutes * 60 - (time.perf_counter() - self.began)

    def _row(self, label: str, needed: float, work: Callable[[], None]) -> None:
        """Measure a row if the time allows. A failure is reported, and the next row follows."""
        import torch

        from benchmarks.network.gpu_parts import free

        if self.seconds_left() < needed:
            self.left_out.append(f"{label}: {max(0, self.seconds_left()):.0f} s were left")
            _say(f"left out: {self.left_out[-1]}")
            return
        failure, self.doing = None, label
        try:
            work()
        except torch.OutOfMemoryError:
            failure = "out of memory"
        except Exception as error:  # a missing compiler, for example: the other rows are still useful
            failure = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if failure:
            self.left_out.append(f"{label}: failed ({failure[:200]})")
            _say(f"left out: {self.left_out[-1]}")
        free(self.device)

    # ----------------------------------------------------------------------------------------------------------------
    # Rows

    def _correct(self, name: str, config: ModelConfig) -> None:
        from benchmarks.network.gpu_parts import precision_errors

        side = int(self.settings.pixels.split(",")[-1]) // DOWNSAMPLING
        right, self.right = self.right, False  # until it is verified
        errors = precision_errors(config, side, self.settings.tokens, self.device)
        for comparison, error in errors.items():
            self.checks.append(
                f"- {name}, {comparison}: outputs {error.output:.2g}, gradients {error.gradient:.2g} (relative)"
            )
        ours, theirs = errors["ours, bf16 against fp32"], errors["diffusers, bf16 against fp32"]
        is_precise = ours.output <= MOST_RATIO * theirs.output and ours.gradient <= MOST_RATIO * theirs.gradient
        self.right = right and is_precise
        self.checks.append(
            f"- {name}: our bf16 errors are {ours.output / theirs.output:.2f} (outputs) and "
            f"{ours.gradient / theirs.gradient:.2f} (gradients) of diffusers' "
            f"(target <= {MOST_RATIO:g}: {'met' if is_precise else 'MISSED'})"
        )
        _say("\n".join(self.checks[-4:]))

    def _train(self, name: str, config: ModelConfig, pixels: int, compiled: bool, plain: bool = True) -> None:
        """Rows of training, ours and diffusers', not compiled (plain) and compiled."""
        settings = self.settings
        needed = settings.row_seconds * plain + settings.compile_seconds * (compiled and not plain)
        for kind in ("ours", "diffusers"):
            label = f"{name} {pixels} px, {kind}"

            def work(kind: str = kind, label: str = label) -> None:
                self._train_side(self._side(kind, config), label, name, pixels, compiled, plain)

            self._row(label if plain else f"{label}, compiled", needed, work)

    def _side(self, kind: str, config: ModelConfig) -> Side:
        from benchmarks.network.gpu_parts import Side, weights_of

        return Side("ours" if kind == "ours" else "diffusers", config, weights_of(config), self.device)

    def _train_side(self, side: Side, label: str, name: str, pixels: int, compiled: bool, plain: bool) -> None:
        from benchmarks.network.gpu_parts import Training

        training, key = Training(side), (f"{name} {pixels} px", side.kind)
        if plain:
            best, speed = self._best_batch(training, pixels)
            self._note(label, training, best, pixels, speed, key)
            self.batches[label] = best
        if compiled and self.settings.compile != "off":
            if label not in self.batches:
                raise ConfigError("its best batch was not found")
            if self.seconds_left() < self.settings.compile_seconds:
                self.left_out.append(f"{label}, compiled: {max(0, self.seconds_left()):.0f} s were left")
                _say(f"left out: {self.left_out[-1]}")
                return
            side.compile(self.settings.compile)
            batch = self.batches[label]
            speed = self._speed(training, batch, pixels)
            self._note(f"{label}, compiled", training, batch, pixels, speed, key)

    def _best_batch(self, training: Training, pixels: int) -> tuple[int, Speed]:
        """The batch with the most images/s, by doubling until memory is out. Raises OutOfMemoryError for the first
        batch."""
        import torch

        from benchmarks.network.gpu_parts import free

        speeds: dict[int, Speed] = {}
        for batch in _doublings(self.settings.batch, self.settings.most_batch):
            out_of_memory = False
            try:
                speeds[batch] = self._speed(training, batch, pixels)
            except torch.OutOfMemoryError:
                if not speeds:
                    raise
                out_of_memory = True
            training.side.module.zero_grad(set_to_none=True)
            if out_of_memory:
                free(self.device)
                _say(f"  batch {batch}: out of memory")
                break
            _say(f"  batch {batch}: {speeds[batch].images:.4g} images/s, {speeds[batch].gb:.3g} GB")
            if self.seconds_left() < self.settings.row_seconds / 2:
                _say(f"  batch {batch} is the last: {self.seconds_left():.0f} s are left")
                break
        best = max(speeds, key=lambda batch: speeds[batch].images)
        return best, speeds[best]

    def _speed(self, training: Training, batch: int, pixels: int) -> Speed:
        from benchmarks.network.gpu_parts import free, inputs_of, peak_gb, seconds_each, synchronize

        free(self.device)
        inputs = inputs_of(training.side.config, batch, pixels // DOWNSAMPLING, self.settings.tokens, self.device)
        began = time.perf_counter()
        training.step(inputs)
        synchronize(self.device)
        first = time.perf_counter() - began
        step_s = seconds_each(lambda: training.step(inputs), self.device, self.settings.seconds)
        return Speed(batch / step_s, peak_gb(self.device), first)

    def _note(
        self, label: str, training: Training, batch: int, pixels: int, speed: Speed, key: tuple[str, str]
    ) -> None:
        """Add a row to the table. Memory is modelled only for ours, since diffusers' UNet keeps other tensors."""
        from benchmarks.machine import figure
        from pipeline.planning.cost import unet_cost
        from pipeline.planning.memory import peak_bytes

        side = pixels // DOWNSAMPLING
        cost = unet_cost(training.side.config, batch, side, side, self.settings.tokens)
        mfu = sum(cost.training_flops().values()) / batch * speed.images / self.rate
        modelled = peak_bytes(cost, "bf16", stage=1, average=False) / 1e9 if training.side.kind == "ours" else None
        row = [label, str(batch), figure(speed.images), f"{100 * mfu:.3g}%", f"{speed.gb:.1f}"]
        row += ["" if modelled is None else f"{modelled:.1f}", f"{speed.first:.3g}"]
        self.rows.append(row)
        self.speeds[key] = max(self.speeds.get(key, 0.0), speed.images)
        _say(" | ".join(row))

    def _sample(self, name: str, config: ModelConfig, pixels: int) -> None:
        from benchmarks.network.gpu_parts import sampling_seconds

        settings = self.settings
        for kind in ("ours", "diffusers"):

            def work(kind: str = kind) -> None:
                side = self._side(kind, config)
                for batch in (1, 4):
                    seconds = sampling_seconds(
                        side, batch, pixels // DOWNSAMPLING, settings.tokens, settings.steps, self.device
                    )
                    row = [
                        f"{name} {pixels} px, {kind}",
                        str(batch),
                        f"{seconds:.3g}",
                        f"{settings.steps / seconds:.3g}",
                    ]
                    self.sampling_rows.append(row)
                    _say(" | ".join(["sampling", *row]))

            self._row(f"sampling of {name} at {pixels} px, {kind}", settings.row_seconds, work)

    # ----------------------------------------------------------------------------------------------------------------

    def report(self, command: str) -> str:
        """The tables, as Markdown."""
        from benchmarks.machine import figure, machine, table

        settings = self.settings
        lines = [f"# UNet, one {'GPU' if self.device.type == 'cuda' else 'CPU'}", "", f"- command: `{command}`"]
        import torch

        lines += machine(self.device, torch.get_num_threads())
        lines.append(f"- bf16 products of {settings.matrix} x {settings.matrix}: {figure(self.rate / 1e12)} TFLOP/s")
        lines.append(
            "- a training step: forward, backward, gradient norm and clipping, fused AdamW on fp32 master weights; "
            "bf16, channels_last, SDPA; one after the other in one process; no data loading, no EMA"
        )
        lines += [*self.checks, "", table(HEAD, self.rows), ""]
        if self.sampling_rows:
            lines += [f"DDIM, {settings.steps} steps with guidance, not compiled:", ""]
            lines += [table(SAMPLING_HEAD, self.sampling_rows), ""]
        lines += self._ratios()
        lines += [f"- left out: {reason}" for reason in self.left_out]
        lines.append(f"- all of it took {time.perf_counter() - self.began:.0f} s")
        return "\n".join(lines) + "\n"

    def _ratios(self) -> list[str]:
        from benchmarks.machine import figure

        lines = []
        for (label, kind), speed in self.speeds.items():
            if kind == "ours" and (theirs := self.speeds.get((label, "diffusers"))):
                lines.append(f"- {label}: the best of ours / the best of diffusers {speed / theirs:.2f}")
        speed = self.speeds.get(("sd2 512 px", "ours"), 0.0)
        reached = f"here {figure(speed)}" if speed else "not measured here"
        lines.append(
            f"- the bar, on an H200: sd2 at 512 px, {BAR:g} images/s a GPU (8 GPUs, NVIDIA's logs of MLPerf v4.0); "
            f"the goal is {GOAL:g}; {reached}"
        )
        return lines


@dataclass(frozen=True)
class Speed:
    """Speed of a batch: images/s, peak memory in GB, and seconds of the first step, which includes compilation."""

    images: float
    gb: float
    first: float


def _doublings(first: int, last: int) -> Iterator[int]:
    while first <= last:
        yield first
        first *= 2


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
