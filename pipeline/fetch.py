"""latentmill fetch: download encoders once into a folder or bucket, for nodes without internet.

    latentmill fetch encoders=sd1 dest=s3://bucket/encoders/sd1
    latentmill encode encoders=sd1 encoders.weights=s3://bucket/encoders/sd1 ...

Whatever their format was, the encoders are written as safetensors in float32 with a configuration beside them. They
are then loaded from there and compared: the hash of the weights and the outputs must be equal to the bit.
models/encoders/fetched.py describes the layout. PyTorch, diffusers and open_clip are imported only where a part is
written, so that a fetch that finds everything in place ends at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import EncodersConfig, FetchConfig
from pipeline.errors import DestinationExists, NotFound, WeightsError
from pipeline.log import show
from pipeline.models.encoders.fetched import FIELDS, FILES, FORMAT, MANIFEST, Part, chunks, names, read_manifest
from pipeline.models.encoders.tokenizer import find_tower, merges_of
from pipeline.storage.base import Storage
from pipeline.storage.staging import (
    is_empty,
    obey_umask,
    require_folder,
    require_place,
    require_writable,
    staging_folder,
)
from pipeline.storage.urls import open_storage

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.models.encoders.first_stage import FirstStage
    from pipeline.models.encoders.text import TextTower

PROBE = "a large red circle left of a small blue square"
"""Caption on which a text tower is compared with its copy."""


def main(config: FetchConfig) -> int:
    """The verb. Raises DestinationExists, WeightsError, StorageError."""
    storage = open_storage(config.dest)
    manifest = begin(storage, config.encoders)
    writers: dict[Part, Callable[[EncodersConfig, Path], dict[str, Any]]] = {"vae": write_vae, "text": write_text}
    for part, write in writers.items():
        damaged = damaged_files(storage, manifest[part]["files"]) if part in manifest else set()
        if part in manifest and not damaged and not is_local(config.encoders, part):
            report(part, manifest[part], "is there already")
            continue
        name, origin = names(config.encoders, part)[part], source(config.encoders, part)
        show(f"fetch: {part}: {name} from {origin}")
        with staging_folder(storage) as folder:
            section = {"name": name, "source": origin} | write(config.encoders, folder)
            obey_umask(folder)
            section["files"] = {f"{part}/{path.name}": _facts(path) for path in sorted(folder.iterdir())}
            stored = manifest.get(part, {"files": {}})
            hashes = [key for key in section if key.endswith("_sha256")]
            if part in manifest and any(stored.get(key) != section[key] for key in hashes):
                raise DestinationExists(
                    f"{storage.url} holds other weights than {section['name']} has now: choose another dest"
                )
            files = section["files"]
            new_keys = [key for key in files if stored["files"].get(key) != files[key] or key in damaged]
            refuse_others_files(storage, {key: files[key] for key in new_keys if key not in stored["files"]})
            for key in new_keys:
                storage.put_file(key, folder / Path(key).name)
        if new_keys:
            manifest[part] = section
            storage.put(MANIFEST, _json(manifest))
        report(part, manifest[part], f"{len(new_keys)} files written" if new_keys else "is there already")
    show(f"fetch: where there is no internet: encoders={config.encoders.name} encoders.weights={config.dest}")
    return 0


def begin(storage: Storage, encoders: EncodersConfig) -> dict[str, Any]:
    """The destination's manifest with the parts that it has so far, or a new one where the destination is empty. Raises
    DestinationExists when it contains other encoders, or anything else."""
    require_folder(storage)
    requested = {field: value for part in FIELDS for field, value in names(encoders, part).items()}
    fresh = {"format": FORMAT, "name": encoders.name, "names": requested}
    try:
        storage.stat(MANIFEST)
    except NotFound:
        if not is_empty(storage):
            raise DestinationExists(f"{storage.url} holds something else already: choose an empty dest") from None
        storage.put_if_absent(MANIFEST, _json(fresh))
    for key in (MANIFEST, *FILES["vae"], *FILES["text"]):
        require_place(storage, key)
    require_writable(storage)
    manifest = read_manifest(storage)
    if not any(part in manifest for part in FIELDS):  # an earlier fetch failed before it had written a part
        manifest = fresh
        storage.put(MANIFEST, _json(fresh))
    stored = manifest["names"]
    differing = [f"{name}={stored[name]}" for name in requested if stored[name] != requested[name]]
    if differing:
        raise DestinationExists(f"{storage.url} holds other encoders ({', '.join(differing)}): choose another dest")
    return manifest


def damaged_files(storage: Storage, files: dict[str, dict[str, Any]]) -> set[str]:
    """The files that are missing or whose bytes differ from the manifest. Reads all of them."""

    def is_intact(key: str) -> bool:
        try:
            return all(True for _ in chunks(storage, key, files[key]))
        except WeightsError:
            return False

    return {key for key in files if not is_intact(key)}


def refuse_others_files(storage: Storage, files: dict[str, dict[str, Any]]) -> None:
    """Raise DestinationExists where a file that no manifest lists lies at a key that would be written, unless it has
    the same bytes, as a fetch that was killed leaves it."""
    for key in sorted(damaged_files(storage, files)):
        if storage.exists(key):
            raise DestinationExists(
                f"{storage.locate(key)} exists and no fetch wrote it: move it away, or choose another dest"
            )


def is_local(encoders: EncodersConfig, part: Part) -> bool:
    """Whether the part comes from this machine, so that its name does not identify its weights."""
    if encoders.weights or encoders.seed >= 0:
        return True
    sources = [encoders.vae] if part == "vae" else [encoders.text, encoders.text_pretrained]
    return any(source == "demo" or (source and Path(source).expanduser().exists()) for source in sources)


def source(encoders: EncodersConfig, part: Part) -> str:
    """Where the part comes from, in words and without a path."""
    if encoders.seed >= 0:
        return f"random weights of seed {encoders.seed}"
    if encoders.weights:
        return "an earlier fetch"
    if getattr(encoders, part) == "demo":
        return "latentmill itself"
    if is_local(encoders, part):
        return "this machine"
    return "the Hugging Face hub" if part == "vae" else f"open_clip's {encoders.text_pretrained}"


def write_vae(encoders: EncodersConfig, folder: Path) -> dict[str, Any]:
    """Write the autoencoder's files; returns its section of the manifest. Raises WeightsError."""
    import torch

    from pipeline.models.encoders.autoencoder import load_autoencoder, load_network, save_autoencoder

    stage = load_network(replace(encoders, vae_dtype="float32"))
    save_autoencoder(stage, folder)
    section: dict[str, Any] = {
        "architecture": stage.architecture,
        "latent_channels": stage.latent_channels,
        "downsampling": stage.downsampling,
        "scale": stage.scale,
        "shift": stage.shift,
        "vae_sha256": stage.weights_sha256,
    }
    expected = probe_vae(stage)
    del stage  # two large networks need not be in memory at once
    loaded = load_autoencoder(EncodersConfig(vae=str(folder)))
    _require_equal(
        "autoencoder", section["vae_sha256"], loaded.weights_sha256, torch.equal(expected, probe_vae(loaded))
    )
    return section


def write_text(encoders: EncodersConfig, folder: Path) -> dict[str, Any]:
    """Write the files of the text tower and of the image tower; returns their section of the manifest. Raises
    WeightsError."""
    import torch

    from pipeline.models.encoders.text import load_text, save_text

    tower = load_text(encoders)
    save_text(tower, folder, merges_of(find_tower(encoders)[1]))
    section: dict[str, Any] = {
        "pretrained": names(encoders, "text")["text_pretrained"],
        "model_cfg": tower.architecture,
        "layer": tower.layer,
        "pad": tower.pad,
        "length": tower.length,
        "eot": tower.eot,
        "text_sha256": tower.weights_sha256,
        "image_sha256": tower.image_sha256,
    }
    expected = probe_text(tower)
    del tower
    loaded = load_text(replace(encoders, text=str(folder), text_pretrained="", seed=-1, weights=""))
    _require_equal("image tower", section["image_sha256"], loaded.image_sha256)
    _require_equal(
        "text tower", section["text_sha256"], loaded.weights_sha256, torch.equal(expected, probe_text(loaded))
    )
    return section


def probe_vae(stage: FirstStage) -> Tensor:
    """What is stored of a fixed picture, 8 latents a side, and what is decoded from its mean, in one flat tensor."""
    import torch

    ramp = torch.linspace(-1, 1, 8 * stage.downsampling)
    rows, columns = torch.meshgrid(ramp, ramp, indexing="ij")
    stored = stage.encode(torch.stack([rows, columns, rows * columns])[None])
    return torch.cat([stored.flatten(), stage.decode(stored[:, : stage.latent_channels]).flatten()])


def probe_text(tower: TextTower) -> Tensor:
    """Text states and embeddings of a fixed and an empty caption, and the embedding of a grey picture, in one flat
    tensor."""
    import torch

    ids = tower.tokenize([PROBE, ""])
    outputs = (tower.encode(ids), tower.pooled(ids), tower.encode_image(torch.zeros(1, 3, 64, 64)))
    return torch.cat([output.flatten() for output in outputs])


def report(part: str, section: dict[str, Any], outcome: str) -> None:
    """Print one line about a part that is in place."""
    megabytes = sum(facts["size"] for facts in section["files"].values()) / 1e6
    show(f"fetch: {part}: {section['name']} ({megabytes:,.1f} MB, weights {section[f'{part}_sha256'][:12]}): {outcome}")


def _require_equal(part: str, saved_hash: str, loaded_hash: str, same_output: bool = True) -> None:
    """Raise WeightsError unless a network that was saved loads as the same network."""
    if saved_hash != loaded_hash or not same_output:
        raise WeightsError(f"the {part}, saved and loaded again, is not the same; nothing was written")


def _facts(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _json(manifest: dict[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode()
