"""`init=`: a run that begins with the weights of another run, of a diffusers folder or of a CompVis file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from made.facts import Facts
from made.run import make_cache, make_run, train_config
from pipeline import export, train
from pipeline.config import (
    DataConfig,
    DeepSpeedConfig,
    DiffusionConfig,
    EvalConfig,
    ExportConfig,
    LaunchConfig,
    OptimConfig,
    TrainConfig,
)
from pipeline.config.check.verbs import check
from pipeline.config.loading.stored import pack
from pipeline.data.format.contract_json import contract_from_json
from pipeline.diffusion.conditioning import Conditioning
from pipeline.errors import ConfigError, RunError, WeightsError
from pipeline.inference.trained import load_trained
from pipeline.models.denoiser import Denoiser
from pipeline.models.tasks.choose import make_task
from pipeline.models.tasks.text import Text
from pipeline.models.weights import weights_hash
from pipeline.runs.checkpoint import load_weights
from pipeline.runs.directory import load_run
from pipeline.storage.urls import open_storage
from pipeline.training import start
from pipeline.training.start import begin
from servers.warm_ranks import WarmRanks

STILL = OptimConfig(lr=1e-12, weight_decay=0.0, batch=8, warmup=0)  # a step that leaves weights where they are
ALIKE = ("run", "diffusers", "model.safetensors", "model.ckpt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache; a run with a commit; the same EMA weights as a diffusers folder and as CompVis files."""
    folder = tmp_path_factory.mktemp("init")
    make_cache(folder)
    config = ExportConfig(run=make_run(folder).run, dest=str(folder / "diffusers"))
    export.main(config)
    for name in ("model.safetensors", "model.ckpt"):
        export.main(replace(config, format="compvis", dest=str(folder / name)))
    return folder


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> TrainConfig:
    """A run that takes one step and begins with the other's weights."""
    return replace(
        train_config(folder),
        run=str(tmp_path / "begun"),
        data=DataConfig(train=str(folder / "cache")),
        eval=EvalConfig(),
        optim=STILL,
        deepspeed=DeepSpeedConfig(engine="torch"),
        init=str(folder / "run"),
        samples=8,
        device="cpu",
        launch=LaunchConfig(threads=1),
    )


def begun(config: TrainConfig, folder: Path, **contract: Any) -> tuple[Denoiser, dict[str, Any]]:
    """A denoiser of this configuration after `begin`, and what was recorded."""
    theirs = replace(load_trained(str(folder / "run")).contract, **contract)
    denoiser = Denoiser(config.model, make_task(config.task, config.model, Facts(), torch.zeros(32, 128)))
    denoiser.reset_parameters(0)
    return denoiser, begin(config, denoiser, theirs)


def refusal(config: TrainConfig, folder: Path, **contract: Any) -> str:
    with pytest.raises(WeightsError) as caught:
        begun(config, folder, **contract)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def close(mine: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return mine.keys() == other.keys() and all(
        torch.allclose(mine[name], other[name], rtol=0, atol=1e-9) for name in mine
    )


# --------------------------------------------------------------------------------------------------------------------
# What is taken


@pytest.mark.parametrize("source", ALIKE)
def test_a_run_begins_with_weights_and_average_and_records_where_from(
    config: TrainConfig, folder: Path, source: str, capsys: pytest.CaptureFixture
) -> None:
    config = replace(config, init=str(folder / source))
    assert train.main(config) == 0
    _, expected = load_weights(open_storage(str(folder / "run")))
    for which in ("raw", "ema"):
        n, weights = load_weights(open_storage(config.run), which=which)
        assert n == 8 and close(weights, expected)
    unet = {name.removeprefix("unet."): tensor for name, tensor in expected.items()}
    record = load_run(config.run).facts["init"]
    assert record["sha256"] == weights_hash(unet.items())  # one hash, whatever held the weights
    assert record["from"] == config.init and record["kind"] == source.replace("model.safetensors", "compvis").replace(
        "model.ckpt", "compvis"
    )
    assert f"begins with the weights of {config.init}" in capsys.readouterr().err
    if source == "run":
        assert (record["weights"], record["n"]) == ("ema", 128)


def test_raw_weights_are_taken_when_asked_for(config: TrainConfig, folder: Path) -> None:
    denoiser, record = begun(replace(config, init_weights="raw"), folder)
    expected = load_weights(open_storage(str(folder / "run")), which="raw")[1]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in denoiser.state_dict().items())
    assert record["weights"] == "raw"


def test_a_run_in_a_bucket_is_taken(config: TrainConfig, folder: Path, s3: str) -> None:
    for info in open_storage(str(folder / "run")).list():
        open_storage(f"{s3}/run").put(info.key, open_storage(str(folder / "run")).get(info.key))
    assert begun(replace(config, init=f"{s3}/run"), folder)[1]["n"] == 128
    assert "no run is there" in refusal(replace(config, init=f"{s3}/else"), folder)


def test_every_rank_begins_with_the_same_weights_in_bfloat16(
    config: TrainConfig, folder: Path, warm_ranks: WarmRanks
) -> None:
    config = replace(config, deepspeed=DeepSpeedConfig(stage=2), precision="bf16")
    ended = warm_ranks.run("ranks.trained", [pack(config)], 2)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert close(
        load_weights(open_storage(config.run), which="raw")[1], load_weights(open_storage(str(folder / "run")))[1]
    )


def test_another_size_of_latents_goes_on_from_a_run(folder: Path, config: TrainConfig, tmp_path: Path) -> None:
    """A run at 64 pixels goes on at 128."""
    make_cache(tmp_path, images=8, resolution=(128,))
    larger = replace(config, data=DataConfig(train=str(tmp_path / "cache")))
    assert train.main(larger) == 0
    assert contract_from_json(load_run(larger.run).contract).latent_shape == (4, 16, 16)
    assert close(load_weights(open_storage(larger.run))[1], load_weights(open_storage(str(folder / "run")))[1])


class Masked(Text):
    """A task that concatenates one channel."""

    def __init__(self, *facts: Any) -> None:
        super().__init__(*facts)
        self.extra_channels = 1


def test_new_input_channels_are_zero_and_said(config: TrainConfig, folder: Path, capsys: pytest.CaptureFixture) -> None:
    denoiser = Denoiser(config.model, Masked(config.task, config.model, Facts(), torch.zeros(32, 128)))
    denoiser.reset_parameters(0)
    contract = load_trained(str(folder / "run")).contract
    records = [begin(replace(config, init=str(folder / source)), denoiser, contract) for source in ALIKE]
    assert [record["new_input_channels"] for record in records] == [1] * 4
    assert len({record["sha256"] for record in records}) == 1
    assert "1 input channels after the first 4 are new, and start at zero" in capsys.readouterr().err
    assert not denoiser.unet.conv_in.weight[:, 4].any()
    x, t = torch.randn(2, 5, 8, 8), torch.tensor([1, 900])
    given = Conditioning(context=torch.randn(2, 32, 128))
    narrow, _ = begun(config, folder)
    with torch.no_grad():
        expected = narrow(x[:, :4], t, given)
        torch.testing.assert_close(denoiser.unet(x, t, given.context), expected, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------------------------
# A resume


def test_a_resume_takes_its_own_checkpoint_though_the_source_is_gone(
    config: TrainConfig, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(folder / "run", tmp_path / "source")
    config = replace(config, init=str(tmp_path / "source"), optim=replace(STILL, lr=1e-3))
    train.main(config)
    record = load_run(config.run).facts["init"]
    shutil.rmtree(tmp_path / "source")
    capsys.readouterr()
    assert train.main(replace(config, samples=16)) == 0
    assert "begins with" not in capsys.readouterr().err
    assert load_run(config.run).facts["init"] == record
    straight = replace(config, run=str(tmp_path / "straight"), init=str(folder / "run"), samples=16)
    train.main(straight)
    mine, other = (load_weights(open_storage(one.run), which="raw")[1] for one in (config, straight))
    assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_a_resume_with_another_init_is_refused(config: TrainConfig, folder: Path) -> None:
    train.main(config)
    for change, named in (
        ({"init": ""}, r"init was .*/run and is"),
        ({"init": str(folder / "diffusers")}, r"init was .*/run and is .*/diffusers"),
        ({"init_weights": "raw"}, "init_weights was ema and is raw"),
    ):
        with pytest.raises(RunError, match=named):
            train.main(replace(config, samples=16, **change))  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("source", ALIKE)
def test_another_kind_of_prediction_is_refused(config: TrainConfig, folder: Path, source: str) -> None:
    config = replace(config, init=str(folder / source), diffusion=DiffusionConfig(prediction="v"))
    assert "predicts epsilon, and diffusion.prediction=v: set diffusion.prediction=epsilon" in refusal(config, folder)


@pytest.mark.parametrize("source", ALIKE)
def test_another_scale_of_latents_is_refused(config: TrainConfig, folder: Path, source: str) -> None:
    config = replace(config, init=str(folder / source))
    line = refusal(config, folder, scale=0.5)
    assert "latents of scale 0.93531 and shift 0, and" in line and "holds latents of scale 0.5" in line
    assert "shift 0.1" in refusal(config, folder, shift=0.1)


@pytest.mark.parametrize("source", ALIKE)
def test_another_architecture_is_refused(config: TrainConfig, folder: Path, source: str) -> None:
    config = replace(config, init=str(folder / source))
    assert "another architecture" in refusal(replace(config, model=replace(config.model, blocks=2)), folder)
    line = refusal(replace(config, model=replace(config.model, heads=4)), folder)  # the same keys and shapes
    assert "4] there" not in line and "4] here" in line


def test_a_wider_input_than_this_runs_is_refused(config: TrainConfig, folder: Path, tmp_path: Path) -> None:
    state = load_trained(str(folder / "run")).state
    name = "unet.conv_in.weight"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "load_weights", lambda *a: (128, {**state, name: torch.zeros(32, 9, 3, 3)}))
        assert "reads 9 channels, and this run 4" in refusal(config, folder)


def test_what_is_not_there_is_told_apart(config: TrainConfig, folder: Path, tmp_path: Path) -> None:
    assert "not fetched: download it" in refusal(replace(config, init="stabilityai/stable-diffusion-2"), folder)
    (tmp_path / "empty").mkdir()
    assert "is none of these" in refusal(replace(config, init=str(tmp_path / "empty")), folder)
    with pytest.raises(ConfigError, match="is the run itself"):
        check(replace(config, init=f"{config.run}/"))


def test_a_refusal_comes_before_anything_is_written(config: TrainConfig, folder: Path) -> None:
    with pytest.raises(WeightsError, match=r"diffusion\.prediction"):
        train.main(replace(config, diffusion=DiffusionConfig(prediction="v")))
    assert not open_storage(config.run).exists("run.json") and not open_storage(config.run).exists("config.yaml")


def test_other_encoders_and_what_is_not_known_are_warned_of(
    config: TrainConfig, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    begun(config, folder)
    assert "warning" not in capsys.readouterr().err
    begun(config, folder, text_sha256="f" * 64)
    assert "trained on a cache of another text tower" in capsys.readouterr().err
    begun(config, folder, vae_sha256="f" * 64)
    assert "another autoencoder" in capsys.readouterr().err
    begun(replace(config, diffusion=DiffusionConfig(schedule="cosine")), folder)
    assert "trained with diffusion.schedule=scaled_linear, which are other noise levels" in capsys.readouterr().err

    begun(replace(config, init=str(folder / "diffusers")), folder)
    assert "warning" not in capsys.readouterr().err
    shutil.copytree(folder / "diffusers", tmp_path / "sd")
    facts = json.loads((tmp_path / "sd" / "text_encoder" / "config.json").read_text())
    (tmp_path / "sd" / "text_encoder" / "config.json").write_text(json.dumps(facts | {"hidden_size": 64}))
    begun(replace(config, init=str(tmp_path / "sd")), folder)
    assert "states of width 64" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "sd" / "scheduler")
    shutil.rmtree(tmp_path / "sd" / "vae")
    begun(replace(config, init=str(tmp_path / "sd")), folder)
    assert "does not say its kind of prediction and latent scale" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["run", "model.safetensors"])
def test_weights_that_are_not_finite_are_refused_in_a_line_that_names_the_tensor(
    config: TrainConfig, folder: Path, tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would only be found at the first step, which blames its samples."""
    if source == "run":
        n, state = load_weights(open_storage(str(folder / "run")))
        state["unet.conv_in.weight"][0, 0, 0, 0] = torch.nan
        monkeypatch.setattr(start, "load_weights", lambda *_: (n, state))
    else:
        tensors = load_file(folder / source)
        tensors["model.diffusion_model.input_blocks.0.0.weight"][0, 0, 0, 0] = torch.inf
        save_file(tensors, tmp_path / source, {"format": "pt"})
        config = replace(config, init=str(tmp_path / source))
    line = refusal(config, folder)
    assert config.init in line
    assert "NaN or inf" in line
