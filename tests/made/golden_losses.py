"""50 training steps whose losses are stored in golden_losses.json, so that no change of the arithmetic goes unnoticed.

    PYTHONPATH=. python tests/made/golden_losses.py            # compares with the file, by threads and memory format
    PYTHONPATH=. python tests/made/golden_losses.py --write    # rewrites the file: only with a reason in the commit

Weights, data, noise, timesteps and dropped contexts are functions of seeds. Trains with PyTorch's AdamW in fp32.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from made.facts import Facts
from pipeline import philox
from pipeline.config import DiffusionConfig, ModelConfig, TextTask
from pipeline.diffusion.objective import Objective, training_randomness
from pipeline.models.denoiser import Denoiser
from pipeline.models.tasks.choose import make_task

FILE = Path(__file__).with_suffix(".json")
STEPS = 50
BATCH = 4
RECORDS = 64  # in the dataset
TOKENS = 7
SEED = 11
TINY = ModelConfig(name="tiny", blocks=1, norm_groups=8)  # conf/model/tiny.yaml
SD1 = ModelConfig(  # conf/model/sd1.yaml, a tenth as wide
    name="sd1", channels=32, multipliers=(1, 2, 4, 4), blocks=2, attention=(1, 2, 4), heads=8, context_width=48
)
MODELS = {"tiny": (TINY, 8), "sd1": (SD1, 16)}
"""Models by name, each with the side of its latents."""


def losses(
    model: ModelConfig,
    side: int,
    diffusion: DiffusionConfig | None = None,
    *,
    steps: int = STEPS,
    channels_last: bool = False,
    denoiser: Denoiser | None = None,
) -> list[float]:
    """The loss of each of `steps` steps. denoiser: trained instead of the one that the configuration describes."""
    diffusion = diffusion or DiffusionConfig()
    denoiser = denoiser or make_denoiser(model, side)
    if channels_last:
        denoiser = denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=5e-4, weight_decay=0.01)
    objective = Objective(diffusion)
    step_losses = []
    for step in range(steps):
        numbers = torch.arange(BATCH) + step * BATCH
        draws = training_randomness(SEED, numbers, (4, side, side), diffusion, 0.1)
        latents, inputs = records(numbers % RECORDS, model, side)
        latents = latents + 0.1 * draws.posterior
        loss = objective.loss(
            lambda x, t, inputs=inputs, draws=draws: denoiser(x, t, inputs, draws.drop),  # type: ignore[misc]
            latents,
            draws.noise,
            draws.timestep,
        ).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step_losses.append(loss.item())
    return step_losses


def make_denoiser(model: ModelConfig, side: int) -> Denoiser:
    """A UNet with the text task, with weights drawn from SEED."""
    empty = philox.normal(SEED, 103, torch.zeros(1, dtype=torch.int64), (TOKENS, model.context_width))[0]
    denoiser = Denoiser(model, make_task(TextTask(), model, Facts(latent_shape=(4, side, side)), empty))
    denoiser.reset_parameters(SEED)
    return denoiser


def records(numbers_B: Tensor, model: ModelConfig, side: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Latents (B, 4, side, side) that differ in colour and have some detail, and texts that state the colour."""
    colour = philox.normal(SEED, 100, numbers_B, (4, 1, 1))
    detail = philox.normal(SEED, 101, numbers_B, (4, side, side))
    words = philox.normal(SEED, 102, numbers_B, (TOKENS, model.context_width))
    words[:, 0, :4] = 3 * colour[:, :, 0, 0]
    return 0.8 * colour + 0.3 * detail, {"text": words}


def held() -> dict[str, list[float]]:
    """The losses in the file, by model."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def furthest(actual: list[float], expected: list[float]) -> float:
    """The largest relative difference between two losses of the same step."""
    return max(abs(a / b - 1) for a, b in zip(actual, expected, strict=True))


def main(arguments: list[str]) -> int:
    torch.set_num_threads(1)
    if arguments == ["--write"]:
        losses_by_model = {name: losses(model, side) for name, (model, side) in MODELS.items()}
        lines = [
            f'  "{name}": {json.dumps([round(loss, 8) for loss in model_losses])}'
            for name, model_losses in losses_by_model.items()
        ]
        FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        print(f"written: {FILE.name}")
        return 0
    for name, (model, side) in MODELS.items():
        for threads in (1, 2):
            for channels_last in (False, True):
                torch.set_num_threads(threads)
                difference = furthest(losses(model, side, channels_last=channels_last), held()[name])
                shape = "channels_last" if channels_last else "contiguous"
                print(f"{name:5} {threads} threads, {shape:13}: differs by {difference:.1e} at most", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
