"""latentmill fetch: encoders once into a folder or bucket, for nodes without internet.

    latentmill fetch encoders=sd1 dest=s3://bucket/encoders/sd1
    latentmill encode encoders=sd1 encoders.weights=s3://bucket/encoders/sd1 ...

Whatever they were before, they become safetensors in float32 with a configuration beside them, are loaded again from
there and compared: same hash of the weights, same output to the bit. models/encoders/fetched.py has the layout.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config import EncodersConfig, FetchConfig
from pipeline.errors import DestinationExists, NotFound, WeightsError
from pipeline.models.encoders.autoencoder import FirstStage, load_autoencoder, save_autoencoder
from pipeline.models.encoders.fetched import FIELDS, FORMAT, MANIFEST, Part, chunks, names, read_manifest
from pipeline.models.encoders.text import TextTower, load_text, save_text
from pipeline.models.encoders.tokenizer import find_tower, merges_of
from pipeline.storage.base import Storage
from pipeline.storage.urls import open_storage

PROBE = "a large red circle left of a small blue square"


def main(config: FetchConfig) -> int:
    """The verb. Raises DestinationExists, WeightsError, StorageError."""
    storage = open_storage(config.dest)
    manifest = begin(storage, config.encoders)
    writers: dict[Part, Callable[[EncodersConfig, Path], dict[str, Any]]] = {"vae": write_vae, "text": write_text}
    for part, write in writers.items():
        spoilt = spoilt_files(storage, manifest[part]["files"]) if part in manifest else set()
        if part in manifest and not spoilt and not is_local(config.encoders, part):
            tell(part, manifest[part], "is there already")
            continue
        print(f"fetch: {part}: {names(config.encoders, part)[part]} from {source(config.encoders, part)}", flush=True)
        with tempfile.TemporaryDirectory(prefix="latentmill-fetch-") as folder:
            name, where = names(config.encoders, part)[part], source(config.encoders, part)
            section = {"name": name, "source": where} | write(config.encoders, Path(folder))
            section["files"] = {f"{part}/{path.name}": _facts(path) for path in sorted(Path(folder).iterdir())}
            there = manifest.get(part, {"files": {}})
            hashes = [name for name in section if name.endswith("_sha256")]
            if part in manifest and any(there.get(name) != section[name] for name in hashes):
                raise DestinationExists(
                    f"{storage.url} holds other weights than {section['name']} has now: choose another dest"
                )
            news = [key for key, facts in section["files"].items() if there["files"].get(key) != facts or key in spoilt]
            for key in news:
                storage.put(key, (Path(folder) / Path(key).name).read_bytes())
        if news:
            manifest[part] = section
            storage.put(MANIFEST, _json(manifest))
        tell(part, manifest[part], f"{len(news)} files written" if news else "is there already")
    print(f"fetch: where there is no internet: encoders={config.encoders.name} encoders.weights={config.dest}")
    return 0


def begin(storage: Storage, encoders: EncodersConfig) -> dict[str, Any]:
    """The destination's manifest as far as it has come, a new one where there is nothing yet. Raises DestinationExists
    when it holds other encoders, or anything else."""
    asked = {field: value for part in FIELDS for field, value in names(encoders, part).items()}
    fresh = {"format": FORMAT, "name": encoders.name, "names": asked}
    try:
        storage.stat(MANIFEST)
    except NotFound:
        if storage.list():
            raise DestinationExists(f"{storage.url} holds something else already: choose an empty dest") from None
        storage.put_if_absent(MANIFEST, _json(fresh))
    manifest = read_manifest(storage)
    if not any(part in manifest for part in FIELDS):  # a fetch that failed before it had anything
        manifest = fresh
        storage.put(MANIFEST, _json(fresh))
    differing = [f"{name}={manifest['names'][name]}" for name in asked if manifest["names"][name] != asked[name]]
    if differing:
        raise DestinationExists(f"{storage.url} holds other encoders ({', '.join(differing)}): choose another dest")
    return manifest


def spoilt_files(storage: Storage, files: dict[str, dict[str, Any]]) -> set[str]:
    """Those that are missing or whose bytes are not what the manifest says. Reads them all."""

    def whole(key: str) -> bool:
        try:
            return all(True for _ in chunks(storage, key, files[key]))
        except WeightsError:
            return False

    return {key for key in files if not whole(key)}


def is_local(encoders: EncodersConfig, part: Part) -> bool:
    """Whether the part comes from this machine, where its name does not say which weights it has."""
    if encoders.weights or encoders.seed >= 0:
        return True
    sources = [encoders.vae] if part == "vae" else [encoders.text, encoders.text_pretrained]
    return any(source == "demo" or (source and Path(source).expanduser().exists()) for source in sources)


def source(encoders: EncodersConfig, part: Part) -> str:
    """Where the part comes from, in words without a path."""
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
    """Writes the autoencoder's files; returns what the manifest says of it."""
    stage = load_autoencoder(replace(encoders, vae_dtype="float32"))
    save_autoencoder(stage, folder)
    section: dict[str, Any] = {
        "architecture": type(stage.model).__name__,
        "latent_channels": stage.latent_channels,
        "downsampling": stage.downsampling,
        "scale": stage.scale,
        "shift": stage.shift,
        "vae_sha256": stage.weights_sha256,
    }
    expected = probe_vae(stage)
    del stage  # two large ones need not be in memory at once
    again = load_autoencoder(EncodersConfig(vae=str(folder)))
    _agree("autoencoder", section["vae_sha256"], again.weights_sha256, torch.equal(expected, probe_vae(again)))
    return section


def write_text(encoders: EncodersConfig, folder: Path) -> dict[str, Any]:
    """Writes the text tower's files, the image tower's among them; returns what the manifest says of it."""
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
    again = load_text(replace(encoders, text=str(folder), text_pretrained="", seed=-1, weights=""))
    _agree("image tower", section["image_sha256"], again.image_sha256)
    _agree("text tower", section["text_sha256"], again.weights_sha256, torch.equal(expected, probe_text(again)))
    return section


def probe_vae(stage: FirstStage) -> Tensor:
    """Moments of a fixed picture of 8 latents a side, then its decoded mean, in one row."""
    ramp = torch.linspace(-1, 1, 8 * stage.downsampling)
    rows, columns = torch.meshgrid(ramp, ramp, indexing="ij")
    moments = stage.encode_moments(torch.stack([rows, columns, rows * columns])[None])
    return torch.cat([moments.flatten(), stage.decode(moments[:, : stage.latent_channels]).flatten()])


def probe_text(tower: TextTower) -> Tensor:
    """States and embedding of a fixed caption and of the empty one, and the embedding of a grey picture, in one row."""
    ids = tower.tokenize([PROBE, ""])
    outputs = (tower.encode(ids), tower.pooled(ids), tower.encode_image(torch.zeros(1, 3, 64, 64)))
    return torch.cat([output.flatten() for output in outputs])


def tell(part: str, section: dict[str, Any], what: str) -> None:
    """One line about a part that is in place."""
    megabytes = sum(facts["size"] for facts in section["files"].values()) / 1e6
    print(f"fetch: {part}: {section['name']} ({megabytes:,.1f} MB, weights {section[f'{part}_sha256'][:12]}): {what}")


def _agree(part: str, first: str, again: str, same_output: bool = True) -> None:
    """Raises WeightsError unless what was saved loads as what it was."""
    if first != again or not same_output:
        raise WeightsError(f"the {part}, saved and loaded again, is not the same; nothing was written")


def _facts(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _json(manifest: dict[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode()
