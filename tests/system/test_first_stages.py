"""Autoencoders on one and two ranks by the real launcher, DeepSpeed, commits and ledger (ranks/first_stage_runs.py).

Processes are started twice for each world; every test looks at what they left.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from made.first_stage_reference import batch_of, distance, objective_of, share_of, weights_of, written_out
from made.pixels import BATCH, make_pixels
from pipeline.distributed.world import World
from pipeline.errors import RunError
from pipeline.ledger import examine
from pipeline.models.first_stage.trainable import PARTS
from pipeline.runs.checkpoint import load_weights, read_commit
from pipeline.runs.directory import committed, load_any_run, load_autoencoder_run, load_run
from pipeline.storage.urls import open_storage
from ranks.faulty_run import rows, state
from ranks.first_stage_runs import ENGINES, LOST, STEPS, engine_config, gradient_config
from servers.warm_ranks import WarmRanks

pytestmark = pytest.mark.timeout(900)
END = 7 * BATCH
WORLDS = pytest.mark.parametrize("world", [1, 2])
RUNS = pytest.mark.parametrize(("world", "name"), [(world, name) for world in (1, 2) for name in ENGINES[world]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, warm_ranks: WarmRanks) -> Path:
    where = tmp_path_factory.mktemp("first-stages")
    make_pixels(where)
    for world in (1, 2):
        begun = warm_ranks.run("ranks.first_stage_runs", [str(where), "begin"], world)
        assert begun.returncode == 128 + signal.SIGKILL, begun.stderr[-4000:]
        for name, lost in LOST.items():
            assert committed(open_storage(str(where / f"disturbed{world}" / name)))[0] == lost - BATCH
        finished = warm_ranks.run("ranks.first_stage_runs", [str(where), "finish"], world)
        assert finished.returncode == 0, finished.stderr[-4000:]
    return where


@RUNS
@pytest.mark.parametrize("step", list(STEPS))
def test_every_engines_gradients_are_those_of_float64_to_rounding(
    folder: Path, world: int, name: str, step: str
) -> None:
    """With L1. Norms, lambda and figures too: of a step from the same weights, before anything can grow."""
    config = gradient_config(engine_config(folder, name, World()))
    prepared = objective_of(config).prepare(batch_of(STEPS[step], share_of(config, STEPS[step], World())))
    exact, margins = written_out(config, weights_of(config), prepared, BATCH // config.optim.micro_batch)
    assert margins.pixel > 1e-6 and margins.code > 1e-6, "at a jump float32 and float64 may differ by any amount"
    where = folder / f"gradients{world}" / name
    figures, norms = json.loads((where / f"{step}.json").read_bytes())
    assert figures == pytest.approx(exact.figures, rel=2e-6)
    assert norms == pytest.approx(exact.norms, rel=2e-6)
    far = distance(load_file(where / f"{step}.safetensors"), exact.gradients, PARTS)
    assert far.pop("tensor") < 2e-5
    assert max(far.values()) < 2e-6, far


@RUNS
def test_every_engine_and_world_trains_like_plain_pytorch(folder: Path, world: int, name: str) -> None:
    """kl-zero2-2 takes two micro-batches, each of which has a lambda of its own.

    Figures differ by 1.2e-6 at most, as those of a batch in another order in one process do. Weights differ by up to
    5e-5 in both cases: Adam divides a gradient that is a rounding by its own size. L1 alone would let a norm jump, see
    training/test_first_stage_gradients.py.
    """
    stage, _, *micro_batches = name.split("-")
    oracle = str(folder / "engines1" / "-".join([stage, "torch", *micro_batches]))
    mine = str(folder / f"engines{world}" / name)
    expected, found = rows(oracle), rows(mine)
    assert len(expected) == 8 and expected.keys() == found.keys()
    names = {"loss", "rec", "grad_norm", "grad_norm_discriminator", "discriminator", "gan", "lambda"}
    last = expected[8 * BATCH]
    assert names | ({"kl"} if stage == "kl" else {"quantisation", "codes_used", "perplexity"}) <= last.keys()
    for n, row in expected.items():
        for key in (names | {"kl", "quantisation", "codes_used", "codes_restarted"}) & row.keys():
            assert found[n][key] == pytest.approx(row[key], rel=5e-6, abs=1e-8), (n, key)
    if stage == "vq":
        assert sum(row["codes_restarted"] for row in expected.values()) > 0, "no code was restarted"
    for which in ("raw", "ema"):
        prefixes = ("model.",) if which == "ema" else ("",)
        one, other = (load_weights(open_storage(url), 0, which, prefixes)[1] for url in (oracle, mine))
        assert one.keys() == other.keys()
        for key, weight in one.items():
            assert (weight - other[key]).abs().max() < 1e-4, key


@WORLDS
@pytest.mark.parametrize("name", list(LOST))
def test_a_run_resumes_bit_equal_after_a_kill_across_the_discriminators_start_and_restarts(
    folder: Path, world: int, name: str
) -> None:
    """Of weights, moments and averages, of what the codebook's restarts remember, and of the ledger."""
    urls = [str(folder / f"{kind}{world}" / name) for kind in ("disturbed", "undisturbed")]
    assert state(urls[0])[0] == END
    assert state(urls[0]) == state(urls[1])
    objectives = [read_commit(open_storage(url), END).objective for url in urls]
    assert objectives[0] == objectives[1]
    assert bool(objectives[0]) == (name[:2] == "vq")
    both = [rows(url) for url in urls]
    for n in range(LOST[name], END + 1, BATCH):
        for key in {"loss", "lambda", "gan", "grad_norm", "weight_norm"} & both[1][n].keys():
            assert both[0][n][key] == both[1][n][key], (n, key)
    assert "lambda" in both[0][END]
    for url in urls:
        assert not examine(load_any_run(url), url)[1].problems


@WORLDS
def test_the_average_is_of_the_autoencoder_alone(folder: Path, world: int) -> None:
    run = open_storage(str(folder / f"undisturbed{world}" / "kl-start"))
    _, raw = load_weights(run, 0, "raw")
    _, ema = load_weights(run, 0, "ema", ("model.",))
    assert {name.partition(".")[0] for name in raw} == {"model", "discriminator"}
    assert ema.keys() == {name for name in raw if name.startswith("model.")}
    assert any((raw[name] - value).abs().max() > 1e-4 for name, value in ema.items())


def test_a_run_is_known_as_an_autoencoders(folder: Path) -> None:
    url = str(folder / "undisturbed1" / "kl-start")
    assert load_autoencoder_run(url).config.autoencoder.regularizer == "kl"
    with pytest.raises(RunError, match="is the run of an autoencoder"):
        load_run(url)
    assert (
        json.loads((folder / "undisturbed1" / "kl-start" / "run.json").read_bytes())["contract"]["stored"] == "pixels"
    )
