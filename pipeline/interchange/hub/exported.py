"""The files of an export that a push takes, as they lie at its destination."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.config import ExportConfig, TextTask
from pipeline.errors import StorageError
from pipeline.inference.first_stage import TrainedAutoencoder
from pipeline.inference.trained import Trained
from pipeline.interchange.compvis import compvis_note
from pipeline.interchange.folder import LINE, README, SUMS, hash_file
from pipeline.interchange.hub.card import card
from pipeline.interchange.hub.client import Hub
from pipeline.interchange.hub.push import look, push
from pipeline.storage.base import Storage
from pipeline.storage.staging import staging_folder, writing
from pipeline.storage.urls import open_storage, split_url

PIECE_BYTES = 16 << 20
ONE_FILE = """`file` holds float32 tensors under the names of CompVis' releases. What these names cannot tell (the kind
of prediction, the noise levels, the latent scale, the architecture) stands under `latentmill` in its metadata, of a
.ckpt beside the state_dict.

`latentmill train init=FILE` begins a run with its weights.
"""
ONE_AUTOENCODER = """`file` holds float32 tensors under the names of CompVis' AutoencoderKL or VQModelInterface. The
architecture and the latent scale stand under `latentmill` in its metadata, of a .ckpt beside the state_dict.
"""
IN_DIFFUSERS = """
```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_single_file(file, config=folder, local_files_only=True)
```

`folder` holds the configurations of the same model, as `latentmill export format=diffusers` writes them.
"""


def look_hub(config: ExportConfig) -> Hub | None:
    """The repository of push=, after the hub was asked for it; None without push. Raises ConfigError, StorageError."""
    if not config.push:
        return None
    hub = Hub(config.push.removeprefix("hub:"), config.revision)
    look(hub, public=config.public)
    return hub


def push_export(config: ExportConfig, trained: Trained | TrainedAutoencoder, hub: Hub, checked: str = "") -> None:
    """Upload what lies at config.dest. checked: SHA-256 of the one file that was compared; a folder has its list.
    Raises StorageError, DestinationExists, ConfigError."""
    message = f"latentmill export: {trained.weights} weights at {trained.n:,} samples, format {config.format}"
    with staging_folder(_near(config)) as folder, _files(config, trained, folder, checked) as files:
        push(hub, files, message, public=config.public, folder=folder)


def _near(config: ExportConfig) -> Storage:
    return open_storage(split_url(config.dest)[0] if config.format == "compvis" else config.dest)


@contextmanager
def _files(
    config: ExportConfig, trained: Trained | TrainedAutoencoder, folder: Path, checked: str
) -> Iterator[dict[str, Path]]:
    """Path in the repository -> file here. folder: for those that lie on no disk."""
    storage = _near(config)
    if config.format == "compvis":
        key = split_url(config.dest)[1]
        with writing(folder / README):
            (folder / README).write_text(card(config, trained, _loading(trained)), encoding="utf-8")
        yield {key: _same(storage, key, folder, checked), README: folder / README}
        return
    files: dict[str, Path] = {}
    for line in storage.get(SUMS).decode("utf-8").splitlines():
        found = LINE.fullmatch(line)
        assert found is not None, "the export wrote it a moment ago"
        files[found[2]] = _same(storage, found[2], folder, found[1])
    if README not in files and storage.exists(README):  # the user's own
        files[README] = _local(storage, README, folder)
    yield files


def _same(storage: Storage, key: str, folder: Path, sha256: str) -> Path:
    """As _local. Raises StorageError for other bytes than those that were compared."""
    path = _local(storage, key, folder)
    if hash_file(path) != sha256:
        raise StorageError(
            f"{storage.locate(key)} is not what was exported and compared: nothing was pushed; export again"
        )
    return path


def _local(storage: Storage, key: str, folder: Path) -> Path:
    """An object as a file: itself on a local disk, else a copy in `folder`."""
    path = storage.local_path(key)
    if path is not None:
        return path
    copy = folder / key
    copy.parent.mkdir(parents=True, exist_ok=True)
    size = storage.stat(key).size
    with writing(copy), copy.open("wb") as file:
        for offset in range(0, size, PIECE_BYTES):
            file.write(storage.get_range(key, offset, min(PIECE_BYTES, size - offset)))
    return copy


def _loading(trained: Trained | TrainedAutoencoder) -> str:
    """How to load one file."""
    if isinstance(trained, TrainedAutoencoder):
        return ONE_AUTOENCODER
    config = trained.info.config
    note = compvis_note(config.diffusion).removeprefix("export: note: ")
    said = f"\n{note[:1].upper()}{note[1:]}.\n" if note else ""
    runs = isinstance(config.task, TextTask) and config.diffusion.prediction in ("epsilon", "v")
    return ONE_FILE + said + (IN_DIFFUSERS if runs else "")
