"""examples/diffusers_unet.py: diffusers' UNet, trained by accelerate in a loop of its own on a cache of ours."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from made.cache import make_cache
from made.captioned import SEVERAL, make_captioned
from made.places import REPOSITORY
from pipeline.errors import ConfigError
from pipeline.models.encoders.torchvision_ops import declare_torchvision_ops
from servers.swift import free_ports

EXAMPLE = REPOSITORY / "examples" / "diffusers_unet.py"
LINES = 80


@pytest.fixture(scope="module")
def example() -> Any:
    declare_torchvision_ops()  # before the example imports diffusers
    from examples import diffusers_unet

    return diffusers_unet


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("diffusers") / "cache")
    make_cache(url, [20, 12], side=8)
    return url


def words(cache: str, out: Path, samples: int) -> list[str]:
    given = {"batch": 4, "samples": samples, "every": 7, "seed": 3}
    return [cache, str(out), *(f"--{name}={value}" for name, value in given.items()), "--channels", "8", "16"]


def newest(out: Path) -> int:
    return json.loads((out / "newest").read_text())["n"]


def digest(out: Path) -> str:
    return hashlib.sha256((out / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()


def test_a_run_that_stops_comes_to_the_end_of_one_that_does_not(example: Any, cache: str, tmp_path: Path) -> None:
    """It stops at 12 samples, and its newest state is of 8."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert example.main(words(cache, whole, 24)) == 0

    class Stopped(Exception):
        pass

    open_dataset, given_up = example.open_dataset, []

    class Ends:
        def __init__(self, *given: Any, **options: Any) -> None:
            self.real = open_dataset(*given, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

        def __iter__(self) -> Any:
            for batch in self.real:
                if int(batch["seen"]) > 12:
                    given_up.append(int(batch["seen"]))
                    raise Stopped
                yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "open_dataset", Ends)
        with pytest.raises(Stopped):
            example.main(words(cache, stopped, 24))
    assert (given_up, newest(stopped)) == ([16], 8)
    with pytest.raises(ConfigError, match="seed was 3 and is 4"):
        example.main([*words(cache, stopped, 24), "--seed=4"])
    assert example.main(words(cache, stopped, 24)) == 0
    assert newest(stopped) == 24
    assert digest(stopped) == digest(whole)


@pytest.mark.long
def test_two_ranks_of_accelerate_go_on_to_the_end_that_they_would_have_reached(cache: str, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    launch += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port"]
    for out, samples in ((tmp_path / "whole", 16), (tmp_path / "stopped", 8), (tmp_path / "stopped", 16)):
        command = [*launch, str(free_ports(1)[0]), "-m", "ranks.diffusers_unet", *words(cache, out, samples)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
    assert digest(tmp_path / "stopped") == digest(tmp_path / "whole")
    assert (tmp_path / "whole" / "16" / "random_states_1.pkl").is_file(), "accelerate has not seen two ranks"


def test_the_network_is_one_that_diffusers_loads(example: Any, cache: str, tmp_path: Path) -> None:
    assert example.main(words(cache, tmp_path, 8)) == 0
    unet = example.UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert (unet.config.in_channels, unet.config.cross_attention_dim, unet.config.sample_size) == (4, 8, 8)


def test_a_cache_of_token_ids_is_refused(example: Any, tmp_path: Path) -> None:
    make_captioned(str(tmp_path / "cache"), SEVERAL, [20])
    with pytest.raises(ConfigError, match=r"holds no text: .* encode it with captions and text_storage=full"):
        example.main(words(str(tmp_path / "cache"), tmp_path / "out", 8))


def test_it_is_as_short_as_it_says() -> None:
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= LINES
