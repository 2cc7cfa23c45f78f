"""Noise levels and kinds of prediction that files state, and what a run says of others than its own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from made.facts import Facts
from made.run import make_cache, make_run, train_config
from pipeline import export
from pipeline.config import DiffusionConfig, ExportConfig
from pipeline.diffusion.schedule import Schedule
from pipeline.errors import WeightsError
from pipeline.inference.trained import load_trained
from pipeline.interchange import unet as convert
from pipeline.interchange.noise_levels import Levels, levels_of, marks, of_file, of_scheduler
from pipeline.interchange.scheduler import SCHEDULERS, scheduler_config
from pipeline.models.denoiser import Denoiser
from pipeline.models.tasks.choose import make_task
from pipeline.models.weights import read_file
from pipeline.training import start

HERE = Path("scheduler_config.json")
LINEAR = DiffusionConfig(schedule="linear", beta_start=1e-4, beta_end=0.02)
ZERO_SNR = DiffusionConfig(prediction="v", zero_terminal_snr=True)
RUNS: dict[str, DiffusionConfig] = {
    "epsilon": DiffusionConfig(),
    "v": DiffusionConfig(prediction="v"),
    "linear": LINEAR,
    "cosine": DiffusionConfig(schedule="cosine"),
    "zero_snr": ZERO_SNR,
    "short": DiffusionConfig(timesteps=500),
    "flow": DiffusionConfig(prediction="flow", timesteps=400),
    "edm": DiffusionConfig(prediction="edm", sigma_data=0.7, timestep_density="log_normal"),
}
EXPORTED = [
    (name, sampler)
    for name, config in RUNS.items()
    for samplers in SCHEDULERS.values()
    for sampler, build in samplers.items()
    if (sampler, build) in SCHEDULERS[{"flow": "flow", "edm": "edm"}.get(config.prediction, "discrete")].items()
    and build(config)
]


@pytest.mark.parametrize(("name", "sampler"), EXPORTED)
def test_every_exported_scheduler_states_the_runs_prediction_and_levels(name: str, sampler: str) -> None:
    prediction, levels = of_scheduler(scheduler_config(RUNS[name], sampler), HERE)
    assert prediction == RUNS[name].prediction
    assert levels.settings and levels.differing(RUNS[name]) == ""
    for other in RUNS.values():
        if other.prediction == prediction and levels_of(other) != levels_of(RUNS[name]):
            assert levels.differing(other)


@pytest.mark.parametrize(
    ("facts", "prediction", "config", "words"),
    [
        ({"beta_schedule": "linear"}, "epsilon", DiffusionConfig(), "diffusion.schedule=linear"),
        ({"_class_name": "DDIMScheduler"}, "epsilon", LINEAR, ""),  # what is left out is the class's default
        ({"_class_name": "PNDMScheduler", "num_train_timesteps": 500}, "epsilon", LINEAR, "diffusion.timesteps=500"),
        ({"_class_name": "NoSuchScheduler"}, "epsilon", LINEAR, ""),
        ({"_class_name": "AutoencoderKL"}, "epsilon", LINEAR, ""),
        ({"beta_schedule": "sigmoid"}, "epsilon", LINEAR, "diffusion.schedule=sigmoid"),
        ({"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, "v", ZERO_SNR, ""),
        ({"rescale_betas_zero_snr": True}, "epsilon", LINEAR, "diffusion.zero_terminal_snr=True"),
        ({"beta_schedule": "squaredcos_cap_v2", "beta_end": 0.5}, "epsilon", RUNS["cosine"], ""),
        ({"trained_betas": [0.1, 0.2]}, "epsilon", LINEAR, "2 levels down to alpha_bar 0.72 (here 1,000"),
        ({"_class_name": "FlowMatchLCMScheduler", "num_train_timesteps": 400}, "flow", RUNS["flow"], ""),
        (
            {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"},
            "flow",
            RUNS["flow"],
            "1000",
        ),
        ({"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_data": 1.0}, "edm", RUNS["edm"], "sigma_data=1.0"),
        ({"prediction_type": "sample"}, "x0", LINEAR, ""),
        ({"prediction_type": "unheard of"}, "unheard of", LINEAR, ""),
    ],
)
def test_schedulers_are_read_as_diffusers_reads_them(
    facts: dict[str, Any], prediction: str, config: DiffusionConfig, words: str
) -> None:
    found, levels = of_scheduler(facts, HERE)
    differing = levels.differing(config)
    assert found == prediction
    assert words in differing and bool(words) == bool(differing), differing


@pytest.mark.parametrize(
    "facts",
    [
        {"beta_start": "x"},
        {"beta_end": -1},
        {"num_train_timesteps": 10**12},
        {"num_train_timesteps": 2.5},
        {"trained_betas": {"a": 1}},
        {"trained_betas": ["a"]},
        {"prediction_type": ["epsilon"]},
        {"_class_name": 3},
        {"rescale_betas_zero_snr": "true"},
    ],
)
def test_a_scheduler_of_wrong_values_is_refused_by_its_file_and_key(facts: dict[str, Any]) -> None:
    with pytest.raises(WeightsError, match=rf"scheduler_config\.json: {next(iter(facts))}"):
        of_scheduler(facts, HERE)


def table(config: DiffusionConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {"alphas_cumprod": Schedule(config).alpha_bar.to(dtype)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in RUNS if name not in ("flow", "edm")])
def test_tables_of_a_file_are_compared_whatever_their_precision(name: str, dtype: torch.dtype) -> None:
    levels = of_file(table(RUNS[name], dtype), {}, HERE)[1]
    assert levels.differing(RUNS[name]) == ""
    for other, config in RUNS.items():
        if config.prediction in ("epsilon", "v") and levels_of(config).settings != levels_of(RUNS[name]).settings:
            assert "levels down to alpha_bar" in levels.differing(config), other
    betas = 1 - Schedule(RUNS["epsilon"]).alpha_bar / torch.cat(
        [torch.ones(1, dtype=torch.float64), Schedule(RUNS["epsilon"]).alpha_bar[:-1]]
    )
    assert of_file({"betas": betas.to(dtype)}, {}, HERE)[1].differing(RUNS["epsilon"]) == ""


def test_comfyuis_marks_say_v_and_zero_terminal_snr() -> None:
    assert of_file({"v_pred": torch.zeros(0)}, {}, HERE)[0] == "v"
    assert of_file({}, {}, HERE) == (None, Levels(tolerance=0.0))
    marked = table(RUNS["v"]) | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}  # the table as it was before
    prediction, levels = of_file(marked, {}, HERE)
    assert prediction == "v" and levels.differing(ZERO_SNR) == ""
    assert levels.differing(RUNS["v"]) == "diffusion.zero_terminal_snr=True"
    with pytest.raises(WeightsError, match="says prediction=epsilon and holds v_pred"):
        of_file(marked, {"prediction": "epsilon"}, HERE)
    assert {name: list(marks(config)) for name, config in RUNS.items() if marks(config)} == {
        "v": ["v_pred"],
        "zero_snr": ["v_pred", "ztsnr"],
    }


@pytest.mark.parametrize(
    ("tensors", "facts", "words"),
    [
        ({"alphas_cumprod": torch.zeros(2, 2)}, {}, r"alphas_cumprod is no table"),
        ({"alphas_cumprod": torch.zeros(1).expand(10**9)}, {}, r"alphas_cumprod is no table"),
        ({"alphas_cumprod": torch.zeros(0)}, {}, r"alphas_cumprod is no table"),
        ({"alphas_cumprod": torch.ones(3, dtype=torch.int64)}, {}, r"alphas_cumprod is no table"),
        ({"betas": torch.full((3,), torch.nan)}, {}, "betas holds values that are not from 0 to 1"),
        ({"betas": torch.full((3,), 2.0)}, {}, "betas holds values that are not from 0 to 1"),
        ({}, {"prediction": ["v"]}, "the prediction in its metadata is a list"),
        ({}, {"diffusion": "v"}, "a group of keys is wanted"),
        ({}, {"diffusion": {"timesteps": "x"}}, "timesteps=x"),
    ],
)
def test_a_file_of_wrong_tables_or_facts_is_refused(
    tensors: dict[str, Tensor], facts: dict[str, Any], words: str
) -> None:
    with pytest.raises(WeightsError, match=words):
        of_file(tensors, facts, HERE)


# --------------------------------------------------------------------------------------------------------------------
# As a run begins


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache, a run of zero terminal SNR, and its exports."""
    folder = tmp_path_factory.mktemp("levels")
    make_cache(folder)
    config = ExportConfig(run=make_run(folder, diffusion=ZERO_SNR).run, dest=str(folder / "sd"), check=False)
    export.main(config)
    for name in ("model.safetensors", "model.ckpt"):
        export.main(replace(config, format="compvis", weights="raw", dest=str(folder / name)))
    state = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in state.items() if n.startswith("model.")} | table(ZERO_SNR), folder / "bare.safetensors")
    return folder


def begin(folder: Path, source: str, diffusion: DiffusionConfig, capsys: pytest.CaptureFixture[str]) -> str:
    config = replace(train_config(folder, diffusion=diffusion), init=str(folder / source))
    denoiser = Denoiser(config.model, make_task(config.task, config.model, Facts(), torch.zeros(32, 128)))
    capsys.readouterr()
    start.begin(config, denoiser, load_trained(str(folder / "run")).contract)
    return capsys.readouterr().err


@pytest.mark.parametrize("source", ["run", "sd", "model.safetensors", "model.ckpt"])
def test_other_noise_levels_are_warned_of_whatever_held_the_weights(
    folder: Path, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "warning" not in begin(folder, source, ZERO_SNR, capsys)
    told = begin(folder, source, DiffusionConfig(prediction="v", schedule="linear"), capsys)
    assert "was trained with diffusion.schedule=scaled_linear, diffusion.zero_terminal_snr=True" in told
    assert "which are other noise levels than this run's" in told


def test_a_file_with_nothing_but_tables_is_compared_by_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = begin(folder, "bare.safetensors", ZERO_SNR, capsys)
    assert "other noise levels" not in told and "does not say its kind of prediction and latent scale, " in told
    told = begin(folder, "bare.safetensors", DiffusionConfig(prediction="v"), capsys)
    assert "1,000 levels down to alpha_bar 0 (here 1,000 levels down to alpha_bar 0.00466)" in told
    with pytest.raises(WeightsError, match=r"noise levels of a discrete process, and diffusion\.prediction=flow has"):
        begin(folder, "bare.safetensors", RUNS["flow"], capsys)


def test_a_file_that_states_no_levels_is_said_to(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trained = load_trained(str(folder / "run"))
    unet = {name.removeprefix("unet."): t for name, t in trained.state.items() if name.startswith("unet.")}
    save_file(convert.to_compvis(unet, trained.info.config.model), tmp_path / "plain.safetensors")
    told = begin(folder, str(tmp_path / "plain.safetensors"), ZERO_SNR, capsys)
    assert "does not say its kind of prediction and latent scale and noise levels, so nothing proves" in told


def test_a_single_files_facts_tell_which_average_it_holds_and_the_process(folder: Path) -> None:
    for name in ("model.safetensors", "model.ckpt"):
        tensors, facts = read_file(folder / name)
        assert facts["weights"] == "raw"
        assert facts["diffusion"] == levels_of(ZERO_SNR).settings
        assert {"v_pred", "ztsnr"} <= tensors.keys() and tensors["ztsnr"].numel() == 0
    assert json.loads((folder / "sd" / "latentmill.json").read_text())["weights"] == "ema"


def test_the_average_that_was_asked_for_is_named_in_the_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").symlink_to(folder / "cache")
    run = make_run(tmp_path, kept={"power-0.1": 3.0}).run
    dest = tmp_path / "model.safetensors"
    export.main(ExportConfig(run=run, dest=str(dest), format="compvis", ema=0.1, check=False))
    assert read_file(dest)[1]["weights"] == "ema=0.1"
