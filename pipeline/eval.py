"""latentmill eval: a checkpoint's FID, CLIP score and attribute accuracy, each with a card that says how it was made.

One evaluation per guidance scale. Results lie in RUN/evals/{n}-{sampler}-{steps}-g{guidance}-n{images}-s{seed}/, so the
same figures asked for again are made at the same place.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from pipeline.config import EvalRunConfig, SamplerConfig
from pipeline.data.manifest import load_manifest, require_match
from pipeline.errors import ConfigError
from pipeline.evaluation.evaluate import EvalResult, Evaluator, write
from pipeline.evaluation.features import load_features
from pipeline.evaluation.reference import load_reference
from pipeline.evaluation.trained import encode_captions, load_trained
from pipeline.evaluation.validation import load_validation
from pipeline.models.conditioning import TASKS
from pipeline.storage import open_storage
from pipeline.training.distributed import World, pick_device

GRID = 16  # images kept as a picture


def main(config: EvalRunConfig) -> int:
    """The verb."""
    results = evaluate_run(config)
    print(table(results))
    for result in results:
        print(result.card.line())
    return 0


def evaluate_run(config: EvalRunConfig) -> list[EvalResult]:
    """Evaluate and keep the results in the run directory; one for each guidance scale.

    Raises RunError, ContractMismatch for a dataset, reference or encoders that do not fit the run.
    """
    if config.images < 2 or not config.guidance:
        raise ConfigError("images must be 2 or more, and guidance at least one scale")
    device = pick_device(config.device)
    trained = load_trained(config.run, config.at, config.weights)
    run = trained.info.config
    val = config.data.val or run.data.val
    if not val:
        raise ConfigError(f"{config.run} has no data.val: give the dataset whose captions are sampled with data.val=")
    storage = open_storage(val)
    manifest = load_manifest(storage)
    require_match(trained.contract, manifest.contract, f"data.val={val}")
    first_stage, tower = trained.encoders(device, config.encoders)
    empty = encode_captions(tower, [""], trimmed=trained.contract.trimmed)[0].to(device)
    denoiser = trained.denoiser(empty, device)
    reference = config.reference or run.eval.reference
    seed = trained.contract.encoders["seed"]
    evaluator = Evaluator(
        validation=load_validation(storage, manifest, TASKS[run.task.name].members, max(config.images, GRID), tower),
        first_stage=first_stage,
        tower=tower,
        diffusion=run.diffusion,
        task=run.task.name,
        reference=load_reference(reference) if reference else None,
        features=load_features(run.eval.features, device, seed) if reference else None,
        grid=GRID,
        seed=config.seed,
        world=World(device=device),
    )
    sampler = SamplerConfig(sampler=config.sampler, steps=config.steps, batch=config.batch)
    results = []
    for guidance in config.guidance:
        used = replace(sampler, guidance=guidance)
        result = evaluator(denoiser, trained.n, images=config.images, sampler=used, weights=config.weights)
        write(trained.info.storage, result, folder_name(config, guidance))
        results.append(result)
    return results


def folder_name(config: EvalRunConfig, guidance: float) -> str:
    """What tells this evaluation from others of the same checkpoint."""
    raw = "-raw" if config.weights == "raw" else ""
    return f"{config.sampler}-{config.steps}-g{guidance:g}-n{config.images}-s{config.seed}{raw}"


def table(results: Sequence[EvalResult]) -> str:
    """The figures, a row for each guidance scale."""
    names = [
        name
        for name, value in results[0].metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in ("n", "seconds", "guidance")
    ]
    rows = [["guidance", *(f"{result.metrics['guidance']:g}" for result in results)]]
    rows += [[name, *(f"{result.metrics[name]:.4g}" for result in results)] for name in names]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


if __name__ == "__main__":
    from pipeline import cli

    raise SystemExit(cli.main(["eval", *sys.argv[1:]]))
