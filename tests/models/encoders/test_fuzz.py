"""Any bytes in place of encoders' files: WeightsError or encoders, no other exception, bounded, and no hub is asked."""

from __future__ import annotations

import gzip
import json
import resource
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from made.encoders import fetch
from made.fuzzed_json import changed_bytes, changed_json
from pipeline.config import EncodersConfig
from pipeline.errors import ConfigError, WeightsError
from pipeline.models.encoders.autoencoder import DEMO as DEMO_VAE
from pipeline.models.encoders.autoencoder import load_autoencoder
from pipeline.models.encoders.fetched import read_manifest
from pipeline.models.encoders.text import load_text
from pipeline.models.encoders.tokenizer import DEMO as DEMO_TEXT
from pipeline.models.encoders.tokenizer import load_tokenizer
from pipeline.storage.local import LocalStorage

MERGES = gzip.decompress((DEMO_TEXT / "bpe.txt.gz").read_bytes())
TOWER = json.loads((DEMO_TEXT / "open_clip_config.json").read_text())
VAE = json.loads((DEMO_VAE / "config.json").read_text())
HEADER = 3000
"""Bytes of a weights file that are changed."""


@pytest.fixture(scope="module", autouse=True)
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The manifest of fetched encoders; the packages are in memory before memory is measured."""
    return fetch(EncodersConfig(text_pad=636), tmp_path_factory.mktemp("fuzz") / "e")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def held(action: Callable[[], Any]) -> None:
    message, before = "none", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        action()
    except (WeightsError, ConfigError) as error:
        message = str(error)
    assert message and len(message) < 100_000  # what is shown of it is cut and escaped (distributed/exits.py)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def in_folder(source: Path, name: str, load: Callable[[str], Any]) -> Callable[[bytes], None]:
    """Loads the demo's folder with other bytes in one of its files."""

    def check(data: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for file in source.iterdir():
                Path(folder, file.name).symlink_to(file)
            Path(folder, name).unlink()
            Path(folder, name).write_bytes(data)
            held(lambda: load(folder))

    return check


def vae(folder: str) -> None:
    load_autoencoder(EncodersConfig(vae=folder))


def vae_file(folder: str) -> None:
    load_autoencoder(EncodersConfig(vae=f"{folder}/diffusion_pytorch_model.safetensors"))


def text(folder: str) -> None:
    load_text(EncodersConfig(text=folder, text_pad=636))


def tokens(folder: str) -> None:
    load_tokenizer(EncodersConfig(text=folder, text_pad=636)).ids("a large red circle")


def of_manifest(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "encoders.json").write_bytes(data)
        held(lambda: read_manifest(LocalStorage(folder)))


VAE_WEIGHTS, TEXT_WEIGHTS = "diffusion_pytorch_model.safetensors", "open_clip_model.safetensors"
READERS: dict[str, tuple[st.SearchStrategy[bytes], Callable[[bytes], None], int]] = {
    "vae": (changed_json(VAE), in_folder(DEMO_VAE, "config.json", vae), 25),
    "vae weights": (
        changed_bytes((DEMO_VAE / VAE_WEIGHTS).read_bytes(), HEADER),
        in_folder(DEMO_VAE, VAE_WEIGHTS, vae_file),
        10,
    ),
    "tower": (changed_json(TOWER), in_folder(DEMO_TEXT, "open_clip_config.json", text), 25),
    "tower weights": (
        changed_bytes((DEMO_TEXT / TEXT_WEIGHTS).read_bytes(), HEADER),
        in_folder(DEMO_TEXT, TEXT_WEIGHTS, text),
        10,
    ),
    "merges": (changed_bytes(MERGES).map(gzip.compress), in_folder(DEMO_TEXT, "bpe.txt.gz", tokens), 40),
    "packed merges": (changed_bytes(gzip.compress(MERGES)), in_folder(DEMO_TEXT, "bpe.txt.gz", tokens), 40),
}


@pytest.mark.parametrize("reader", READERS)
def test_no_bytes_of_strangers_end_in_anything_but_our_error(reader: str) -> None:
    _run(*READERS[reader])


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("reader", READERS)
def test_no_bytes_of_strangers_end_in_anything_but_our_error_at_length(reader: str) -> None:
    values, check, examples = READERS[reader]
    _run(values, check, 20 * examples, derandomize=False)


def test_no_manifest_of_strangers_ends_in_anything_but_our_error(manifest: Any) -> None:
    _run(changed_json(manifest), of_manifest, 80)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_no_manifest_of_strangers_ends_in_anything_but_our_error_at_length(manifest: Any) -> None:
    _run(changed_json(manifest), of_manifest, 1500, derandomize=False)


def _run(
    values: st.SearchStrategy[bytes], check: Callable[[bytes], None], examples: int, *, derandomize: bool = True
) -> None:
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=derandomize,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(values)
    def holds(value: bytes) -> None:
        check(value)

    holds()
