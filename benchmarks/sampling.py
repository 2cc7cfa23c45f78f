"""How fast images are sampled, against diffusers' StableDiffusionPipeline with the same weights, and the bare network.

.venv/bin/python -m benchmarks.sampling [KEY=VALUE ...] [--write]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.encoding.presets import changed
from benchmarks.machine import device_slug, figure, keep, machine, median, spread, table, verdict
from benchmarks.unet import model_of
from pipeline.conditions.facts import Conditions
from pipeline.config import DiffusionConfig, SamplerConfig, TextTask
from pipeline.config.loading.load import load
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.guidance import Guidance
from pipeline.diffusion.levels import levels_for
from pipeline.diffusion.sampling import initial_noise
from pipeline.distributed.allocator import keep_memory
from pipeline.distributed.exits import guarded
from pipeline.distributed.place import cores
from pipeline.errors import ConfigError, DataError
from pipeline.inference.packed import pack
from pipeline.inference.pictures import conditionings, draw
from pipeline.interchange import unet as convert
from pipeline.interchange.scheduler import scheduler_config
from pipeline.models.denoiser import Denoiser
from pipeline.models.encoders.autoencoder import load_autoencoder
from pipeline.models.encoders.first_stage import KLStage
from pipeline.models.encoders.torchvision_ops import declare_torchvision_ops
from pipeline.models.tasks.text import Text

EPILOG = """\
keys: cases=tiny,sd1 rounds=3 sampler=dpmpp_2m guidance=3 steps=0 batch=0 (0 = the case's own) threads=0 (all cores)

ours: what `latentmill sample` and evaluations run on each batch, from text states to uint8 pictures. diffusers: its
pipeline, given the same text states and noise, to float pictures. bare: the same network's passes and one decoding
pass, with nothing between them. Rounds take turns in one process.
"""
TARGETS = {"diffusers": 1.3, "bare": 0.95}
SAME = 2  # levels of 255 that the sides' pictures may differ by
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
"""Stable Diffusion's autoencoder, as diffusers builds it."""


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    cases: str = "tiny,sd1"
    rounds: int = 3
    sampler: str = "dpmpp_2m"
    guidance: float = 3.0
    steps: int = 0
    batch: int = 0
    threads: int = 0


@dataclass(frozen=True)
class Case:
    """A model and a batch of pictures. side: of the square latent. tokens: of the context. shipped: whether the
    autoencoder is the demo's; otherwise it is Stable Diffusion's with random weights."""

    model: str
    batch: int
    side: int
    tokens: int
    steps: int
    shipped: bool


CASES = {
    "tiny": Case("tiny", 64, 8, 32, 20, True),
    "sd1": Case("sd1", 1, 32, 77, 4, False),
}


@dataclass
class Parts:
    """Components of all sides."""

    case: Case
    diffusion: DiffusionConfig
    sampler: SamplerConfig
    denoiser: Denoiser
    first_stage: KLStage
    text_BLD: Tensor
    empty_LD: Tensor
    noise: Tensor
    shape: tuple[int, int, int]


@dataclass
class Timings:
    """Seconds of a batch by side and round."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def ratio(self, peer: str) -> float:
        """Our images/s over the peer's: the median over rounds, in which both took turns."""
        return median(
            [
                peer_seconds / our_seconds
                for peer_seconds, our_seconds in zip(self.seconds[peer], self.seconds["ours"], strict=True)
            ]
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sampling",
        description="How fast images are sampled, against diffusers' pipeline and the bare network.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG,
    )
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--write", action="store_true", help="also write the tables to benchmarks/results/")
    options = parser.parse_intermixed_args(list(sys.argv[1:] if arguments is None else arguments))
    command = " ".join(["python -m benchmarks.sampling", *options.overrides])
    return guarded("benchmarks.sampling", lambda: run(changed(Plan(), options.overrides), command, write=options.write))


def run(plan: Plan, command: str, *, write: bool) -> int:
    """Measure and print. Raises ConfigError, and DataError when the sides draw different pictures."""
    threads = plan.threads or cores()
    torch.set_num_threads(threads)
    keep_memory()
    parts = ["\n".join([f"# {command}", "", *machine(torch.device("cpu"), threads)])]
    for name, case in cases(plan).items():
        parts.append(report(name, case, plan, measure(build(case, plan), plan.rounds)))
        print(parts[-1], file=sys.stderr, flush=True)
    text = "\n\n".join(parts) + "\n"
    print(text)
    if write:
        names = plan.cases.replace(",", "-")
        path = keep(f"sampling-{names}-{device_slug(torch.device('cpu'))}", text)
        print(f"written to benchmarks/results/{path.name}", file=sys.stderr)
    return 0


def cases(plan: Plan) -> dict[str, Case]:
    """The chosen cases by name. Raises ConfigError."""
    if plan.sampler == "heun":  # the bare side has one pass per level
        raise ConfigError("sampler=heun predicts twice a step; choose another, such as dpmpp_2m")
    chosen = {}
    for name in plan.cases.split(","):
        if name not in CASES:
            raise ConfigError(f"cases={plan.cases}: no case {name}; choose of {', '.join(CASES)}")
        case = CASES[name]
        chosen[name] = replace(case, steps=plan.steps or case.steps, batch=plan.batch or case.batch)
    return chosen


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a text task asks of a cache, without a cache."""

    latent_shape: tuple[int, int, int]
    downsampling: int = 8
    scale: float = 1.0
    shift: float = 0.0
    conditions: Conditions = field(default_factory=Conditions)
    text: None = None
    trimmed: bool = False


def build(case: Case, plan: Plan) -> Parts:
    """Seeded weights, text states and noise. Weights that start at zero are random too, so that pictures differ."""
    config, latent = model_of(case.model), (4, case.side, case.side)
    generator = torch.Generator().manual_seed(1)
    shape = (case.batch + 1, case.tokens, config.context_width)
    *text, empty = torch.randn(shape, generator=generator)
    denoiser = Denoiser(config, Text(TextTask(), config, Facts(latent_shape=latent), empty))
    denoiser.reset_parameters(0)
    for parameter in denoiser.parameters():
        if not parameter.data.any():
            parameter.data.uniform_(-0.02, 0.02, generator=generator)
    denoiser.eval().requires_grad_(False)
    noise = initial_noise(0, torch.arange(case.batch), latent)
    sampler = load("train", ["data.train=none", "run=none", f"eval.sampler.sampler={plan.sampler}"]).eval.sampler
    sampler = replace(sampler, steps=case.steps, guidance=plan.guidance, batch=case.batch)
    diffusion, stage = DiffusionConfig(prediction="v"), autoencoder(case)
    return Parts(case, diffusion, sampler, denoiser, stage, torch.stack(text), empty, noise, latent)


def autoencoder(case: Case) -> KLStage:
    if case.shipped:
        stage = load_autoencoder(load("encode", ["encoders=demo", "source=none", "dest=none"]).encoders)
        assert isinstance(stage, KLStage)
        return stage
    declare_torchvision_ops()
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return KLStage(AutoencoderKL(**VAE), torch.float32, torch.device("cpu"))


def ours(parts: Parts) -> Callable[[], np.ndarray]:
    """(B, H, W, 3) uint8."""

    def side() -> np.ndarray:
        conditioning, null = conditionings(parts.denoiser, {"text": parts.text_BLD}, parts.sampler)
        numbers = list(range(parts.case.batch))
        device = torch.device("cpu")
        stage, diffusion = parts.first_stage, parts.diffusion
        return draw(
            parts.denoiser, stage, diffusion, parts.sampler, conditioning, numbers, 0, parts.shape, device, null
        )[0]

    return side


def diffusers_pipeline(parts: Parts) -> Callable[[], np.ndarray]:
    """(B, H, W, 3) float32, 0 to 1."""
    declare_torchvision_ops()
    import diffusers

    config = parts.denoiser.unet.config
    unet: Any = diffusers.UNet2DConditionModel(**convert.diffusers_config(config, parts.case.side))
    unet.load_state_dict(convert.to_diffusers(parts.denoiser.unet.state_dict(), config), assign=True)
    exported = scheduler_config(parts.diffusion, parts.sampler.sampler)
    pipeline: Any = diffusers.StableDiffusionPipeline(
        vae=parts.first_stage.model,
        text_encoder=None,
        tokenizer=None,
        unet=unet.eval(),
        scheduler=getattr(diffusers, exported["_class_name"]).from_config(exported),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)

    def side() -> np.ndarray:
        return pipeline(
            prompt_embeds=parts.text_BLD,
            negative_prompt_embeds=parts.empty_LD.expand_as(parts.text_BLD),
            latents=parts.noise.clone(),
            num_inference_steps=parts.sampler.steps,
            guidance_scale=parts.sampler.guidance,
            output_type="np",
        ).images

    return side


def bare(parts: Parts) -> Callable[[], None]:
    """The same number of network passes and rows, with the context projected once, and one pass of the decoder."""
    levels = levels_for(parts.diffusion, parts.sampler.sampler, parts.sampler.steps)[:-1]
    task = parts.denoiser.task
    null = task(task.null({"text": parts.text_BLD}))
    guidance = Guidance.from_config(parts.sampler)
    stage = parts.first_stage

    def side() -> None:
        conditioning = task({"text": parts.text_BLD})
        guided: Conditioning = replace(conditioning.cat(null), context_cache={})
        rows = torch.cat([parts.noise, parts.noise])
        with torch.inference_mode():
            for level in levels:
                assert guidance.applies(level)
                parts.denoiser(rows, torch.full((len(rows),), level.timestep), guided)
            stage.model.decode(parts.noise / stage.scale)

    return side


SIDES: dict[str, Callable[[Parts], Callable[[], Any]]] = {"ours": ours, "diffusers": diffusers_pipeline, "bare": bare}


def measure(parts: Parts, rounds: int) -> Timings:
    """Rounds in which the sides take turns, after one batch of each that is not timed."""
    sides = {name: make(parts) for name, make in SIDES.items()}
    pack(parts.denoiser.unet)  # as `sample` and `eval` do; diffusers' network has its own modules
    first = {name: side() for name, side in sides.items()}
    check_same(first["ours"], first["diffusers"])
    timings = Timings({name: [] for name in sides})
    for _ in range(rounds):
        for name, side in sides.items():
            began = time.perf_counter()
            side()
            timings.seconds[name].append(time.perf_counter() - began)
    return timings


def check_same(our_pictures: np.ndarray, their_pictures: np.ndarray) -> None:
    """Raise DataError unless the pictures are the same and not uniform."""
    difference = np.abs(our_pictures.astype(float) - 255 * their_pictures.astype(float)).max()
    if not difference <= SAME:
        raise DataError(f"diffusers' pipeline draws something else: {difference:.1f} levels of 255")
    if np.ptp(our_pictures) < 32:
        raise DataError("the pictures show nothing, so their agreement says nothing")


def report(name: str, case: Case, plan: Plan, timings: Timings) -> str:
    """A table and the verdicts on its targets."""
    rows = []
    for side, seconds in timings.seconds.items():
        rates = [case.batch / batch_seconds for batch_seconds in seconds]
        ratio = "" if side == "ours" else f"{timings.ratio(side):.2f}"
        rows.append([side, figure(median(rates)), spread(rates), f"{1e3 * median(seconds) / case.steps:.1f}", ratio])
    head = (f"{name}: {plan.sampler}", "images/s", "rounds", "ms a step", "ours is so many times this")
    lines = [
        f"## {name}: {case.steps} steps of {plan.sampler}, guidance {plan.guidance:g}, batch {case.batch}, "
        f"latents {case.side}x{case.side} ({8 * case.side} pixels), {plan.rounds} rounds",
        "",
        table(head, rows),
        "",
        *(f"- against {peer}: {verdict(timings.ratio(peer), target)}" for peer, target in TARGETS.items()),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
