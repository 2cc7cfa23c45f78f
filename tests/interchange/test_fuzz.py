"""Any bytes in place of others' weights and configurations: WeightsError or a result, no other exception, bounded."""

from __future__ import annotations

import io
import json
import tempfile
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from made.fuzzed_json import VALUES, changed_bytes, changed_json, changed_tree
from pipeline.config import DiffusionConfig, ModelConfig
from pipeline.config.loading.merge import to_dict
from pipeline.errors import DestinationExists, ParseError, WeightsError
from pipeline.inference.picture_file import is_ours
from pipeline.interchange import pretrained
from pipeline.interchange import unet as convert
from pipeline.interchange.folder import FILES, MARKER, SUMS, Destination
from pipeline.interchange.noise_levels import levels_of, of_file, of_scheduler
from pipeline.interchange.readme import is_readme
from pipeline.interchange.scheduler import scheduler_config
from pipeline.interchange.single import is_export
from pipeline.models.encoders.torchvision_ops import declare_torchvision_ops
from pipeline.models.weights import read_file
from pipeline.parsing.values import parse_json
from pipeline.storage.local import LocalStorage

MODEL = ModelConfig(name="small", channels=16, multipliers=(1, 2), blocks=1, attention=(1,), heads=2, norm_groups=8)
FACTS = {
    "version": "1",
    "n": 128,
    "weights": "ema",
    "prediction": "v",
    "diffusion": levels_of(DiffusionConfig()).settings,
    "scale": 0.9,
    "shift": 0.0,
    "model": to_dict(MODEL),
}
TENSORS = {
    "model.diffusion_model.out.2.bias": torch.zeros(4),
    "scale_factor": torch.ones(()),
    "betas": torch.ones(3) / 9,
}
SAFETENSORS = save(TENSORS, metadata={"latentmill": json.dumps(FACTS)})
PICKLE = io.BytesIO()
torch.save({"state_dict": TENSORS, "latentmill": json.dumps(FACTS)}, PICKLE)
VAE = {"scaling_factor": 0.2, "shift_factor": 0.1}
INDEX = {"metadata": {"total_size": 3}, "weight_map": {"conv_in.weight": "a.safetensors", "x": "b.safetensors"}}
MOST_BYTES = 100 << 20


def held(action: Callable[[], Any]) -> None:
    """Runs it; WeightsError with a bounded message is the only exception; memory stays bounded."""
    message = "none"
    tracemalloc.start()
    try:
        action()
    except WeightsError as error:
        message = str(error)
    finally:
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert message and len(message) < 100_000  # what is shown of it is cut and escaped (distributed/exits.py)
    assert most < MOST_BYTES


def of_bytes(suffix: str) -> Callable[[bytes], None]:
    def read(data: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"model{suffix}")
            path.write_bytes(data)
            held(lambda: read_file(path))
            held(lambda: of_file(*read_file(path), path))
            is_export(LocalStorage(folder), path.name)

    return read


def of_configuration(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        path.write_bytes(data)
        held(lambda: of_scheduler(pretrained._json(path), path)[1].differing(DiffusionConfig()))
        held(lambda: pretrained._typed(pretrained._Vae, pretrained._json(path), path))
        held(lambda: pretrained._typed(pretrained._Text, pretrained._json(path), path))


def of_unet(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        path.write_bytes(data)
        held(lambda: pretrained.require_same_class(str(path), pretrained._json(path), MODEL))


def of_index(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "diffusion_pytorch_model.safetensors.index.json").write_bytes(data)
        Path(folder, "a.safetensors").write_bytes(SAFETENSORS)
        held(lambda: pretrained._weights_of(Path(folder)))


def of_facts(facts: Any) -> None:
    """What a single file may state: anything that JSON can hold."""
    path = Path("model.safetensors")
    try:
        facts = parse_json(json.dumps(facts))
    except ParseError:
        return
    if not isinstance(facts, dict):
        return
    held(lambda: of_file({}, facts, path)[1].differing(DiffusionConfig()))
    held(lambda: pretrained._typed(pretrained._Facts, facts, path))
    model = facts.get("model")
    if isinstance(model, dict):
        held(lambda: pretrained.require_same_architecture("there", pretrained._model(path, model), MODEL))


def of_list(data: bytes) -> None:
    """SHA256SUMS and the facts of an exported folder."""
    with tempfile.TemporaryDirectory() as folder:
        storage = LocalStorage(folder)
        Path(folder, SUMS).write_bytes(data)
        Path(folder, MARKER).write_bytes(data if data[:1] == b"{" else b'{"contract": 0, "weights": 0, "n": 0}')
        with suppress(DestinationExists):
            assert set(Destination(storage).ours) <= FILES


def of_picture(data: bytes) -> None:
    assert is_ours(data, 6, (250, 250, 248)) is False


SUMS_TEXT = "".join(f"{'0' * 64}  {key}\n" for key in sorted(FILES)).encode()
PNG = bytes.fromhex("89504e470d0a1a0a0000000d49484452000000010000000108020000009077") + b"IDAT" * 9
READERS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], None], int]] = {
    "safetensors": (changed_bytes(SAFETENSORS), of_bytes(".safetensors"), 60),
    "pickle": (changed_bytes(PICKLE.getvalue(), 1500), of_bytes(".ckpt"), 60),
    "scheduler": (changed_json(scheduler_config(DiffusionConfig())), of_configuration, 80),
    "vae": (changed_json(VAE), of_configuration, 60),
    "unet": (changed_json(convert.diffusers_config(MODEL)), of_unet, 50),
    "index": (changed_json(INDEX), of_index, 60),
    "facts": (changed_tree(FACTS), of_facts, 120),
    "any facts": (VALUES, of_facts, 60),
    "list": (changed_bytes(SUMS_TEXT) | changed_json({"contract": {}, "weights": "ema", "n": 1}), of_list, 40),
    "picture": (changed_bytes(PNG), of_picture, 40),
}
"""Reader -> what it is given, the property, and how many examples `make test` tries."""


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """What is measured is not an import."""
    declare_torchvision_ops()
    import diffusers

    _ = diffusers.UNet2DConditionModel, diffusers.DDIMScheduler


@pytest.mark.parametrize("reader", READERS)
def test_no_bytes_of_strangers_end_in_anything_but_our_error(reader: str) -> None:
    given_values, check, examples = READERS[reader]
    _run(given_values, check, examples)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("reader", READERS)
def test_no_bytes_of_strangers_end_in_anything_but_our_error_at_length(reader: str) -> None:
    given_values, check, _ = READERS[reader]
    _run(given_values, check, 1500, derandomize=False)


def _run(
    values: st.SearchStrategy[Any], check: Callable[[Any], None], examples: int, *, derandomize: bool = True
) -> None:
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=derandomize,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(values)
    def holds(value: Any) -> None:
        check(value)

    holds()


def test_texts_that_are_no_readme_of_ours_are_told() -> None:
    for text in (
        "",
        "Exported by latentmill",
        "Exported by latentmill 1 from ema weights at ,,, samples seen.\n",
        "\0",
    ):
        assert not is_readme(text)
