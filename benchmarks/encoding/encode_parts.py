"""The parts that `benchmarks.encode` measures, each over the same images, encoders, threads and sizes."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks.encoding import encode_script
from benchmarks.encoding.encode_verb import IdleEncoder, ReadyDecoders, StageRun, cpu_seconds, run_verb, scratch
from benchmarks.encoding.photos import caption, read_photos, write_photos
from benchmarks.encoding.pillow import Rate, all_cores, one_core
from benchmarks.encoding.presets import Preset
from pipeline.config import EncodeConfig, EncodersConfig, LaunchConfig
from pipeline.data.format.manifest import load_manifest
from pipeline.data.reading.shards import first_records
from pipeline.distributed.allocator import keep_memory
from pipeline.distributed.place import cores
from pipeline.distributed.world import pick_device
from pipeline.models.encoders.autoencoder import load_autoencoder
from pipeline.models.encoders.first_stage import KLStage
from pipeline.models.encoders.text import TextTower, load_text
from pipeline.models.encoders.tokenizer import find_tower, load_tokenizer, merges_of
from pipeline.storage.local import LocalStorage
from pipeline.storage.urls import open_storage
from preprocess import encode
from preprocess.encoding.encoder import Batch, Encoder, Item, to_unit_range
from preprocess.encoding.plan import Unit
from preprocess.source.recipe import recipe_of
from preprocess.source.sample import Prepared
from preprocess.source.shard import Sample, SourceShard
from preprocess.source.worker import CHUNK, Prepares, prepare_all

READY = 4  # batches whose tensors lie ready on the device for the bare models
DECODED = 256  # images that decoding alone is measured on, at most
TASKS = 8  # that each decoding worker gets at least


class Parts:
    """What a preset names, made once, and a method for each thing that is measured, which gives images/s.

    folder: a scratch folder of this object's own.
    """

    def __init__(self, preset: Preset, folder: Path) -> None:
        self.preset, self.folder = preset, folder
        self.device = pick_device(preset.device)
        self.threads, self.workers = preset.threads or cores(), preset.workers or cores()
        torch.set_num_threads(self.threads)
        if self.device.type == "cpu":
            keep_memory()  # as the verb does; of no use to it alone, for all sides run in this process
        self.paths = write_photos(
            Path(preset.folder).expanduser() if preset.folder else folder / "source",
            width=preset.width,
            height=preset.height,
            distinct=preset.distinct,
            images=preset.images,
            shard=preset.shard,
        )
        self.recipe = recipe_of(self.config(folder / "none", preset.images))
        stage = load_autoencoder(preset.encoders, self.device)
        assert isinstance(stage, KLStage), "presets are of autoencoders with moments"
        self.first_stage = stage
        self.tower: TextTower = load_text(preset.encoders, self.device)
        self.encoder = Encoder(self.first_stage, self.tower, preset.batch)

    def tars(self, images: int) -> list[Path]:
        """The first whole tars that hold so many images, or all there are."""
        return self.paths[: -(-images // self.preset.shard)]

    def config(self, dest: Path, images: int) -> EncodeConfig:
        """What the verb is given."""
        preset, last = self.preset, len(self.tars(images)) - 1
        return EncodeConfig(
            source=str(self.paths[0].parent / f"{{00000..{last:05d}}}.tar"),
            dest=str(dest),
            encoders=preset.encoders,
            resolution=(preset.resolution,),
            batch=preset.batch,
            workers=self.workers,
            max_rejects=0.0,
            launch=LaunchConfig(threads=self.threads),
            device=preset.device,
        )

    # The limit -------------------------------------------------------------------------------------------------------

    @cached_property
    def batches(self) -> list[Batch]:
        """The stage's first batches, `limit_images` in all."""
        batches: list[Batch] = []
        tokenizer = load_tokenizer(self.preset.encoders)
        for number, path in enumerate(self.paths):
            unit = Unit(number, LocalStorage(path.parent), path.name, path.name, path.stat().st_size)
            with SourceShard(unit.storage, unit.key, self.recipe.limits) as shard:
                samples = list(shard.samples())
            for start in range(0, len(samples), self.preset.batch):
                if sum(len(batch.items) for batch in batches) >= self.preset.limit_images:
                    return batches
                results, _ = prepare_all(samples[start : start + self.preset.batch], self.recipe, tokenizer)
                prepared = [sample for sample in results if isinstance(sample, Prepared)]
                assert len(prepared) == len(results), f"the source is not whole: {results}"
                items = [Item(start + i, sample, 0, sample.pictures[0]) for i, sample in enumerate(prepared)]
                batches.append(Batch(unit, 0, 0, items, 0))
        return batches

    def limit(self) -> float:
        """Both encoders over batches in memory, as the stage calls them: uint8 pixels and ids in, arrays out."""
        self._as_the_stage()
        started = time.perf_counter()
        for batch in self.batches:
            self.encoder.encode(batch)
        return sum(len(batch.items) for batch in self.batches) / (time.perf_counter() - started)

    @cached_property
    def _ready(self) -> list[tuple[Tensor, Tensor]]:
        """Images (B, 3, H, W) and ids (B, L) on the device."""
        return [
            (
                to_unit_range(torch.from_numpy(np.stack([item.picture.pixels for item in batch.items]))).to(
                    self.device
                ),
                torch.tensor([item.sample.ids for item in batch.items]).to(self.device),
            )
            for batch in self.batches[:READY]
        ]

    def models(self) -> float:
        """Images/s of both models over tensors on the device, without conversions or copies."""
        self._as_the_stage()
        ready, images = self._ready, 0
        self._finish()
        started = time.perf_counter()
        for i in range(len(self.batches)):
            x, ids = ready[i % len(ready)]
            self.first_stage.encode(x)
            self.tower.encode(ids)
            images += len(x)
        self._finish()
        return images / (time.perf_counter() - started)

    def _as_the_stage(self) -> None:
        """Configure PyTorch as the verb does, and warm up."""
        if self.device.type == "cuda":
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        torch.set_num_threads(self.threads)
        self.encoder.encode(self.batches[0])

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    # The stage and the script ----------------------------------------------------------------------------------------

    def stage(self, dest: Path) -> StageRun:
        """The verb, in this process, into a fresh folder."""
        return run_verb(self.config(dest, self.preset.stage_images))

    def idle_stage(self) -> StageRun:
        """The verb with encoders that return zeros, so that only reading, decoding and writing remain."""
        loaded: dict[str, Any] = {"load_autoencoder": lambda *_: self.first_stage, "load_text": lambda *_: self.tower}
        loaded |= {"Encoder": IdleEncoder, "Decoders": ReadyDecoders}
        with mock.patch.multiple(encode, **loaded), scratch(self.folder / "idle") as dest:
            return run_verb(self.config(dest, self.preset.images))

    def script(self, dest: Path, workers: int = 0) -> float:
        """benchmarks/encoding/encode_script.py over whole tars; with `workers` processes over so many times more."""
        if self.device.type == "cuda":
            torch.backends.cudnn.deterministic = False  # as PyTorch comes
        torch.set_num_threads(self.threads)
        tars = self.tars(self.preset.script_images * max(1, workers))
        tokenizer = script_tokenizer(self.preset.encoders)
        dest.mkdir()
        started = time.perf_counter()
        count = encode_script.encode_shards(
            self.first_stage.model,
            self.tower.model,
            tokenizer,
            [str(path) for path in tars],
            dest,
            resolution=self.preset.resolution,
            batch=self.preset.batch,
            shard=self.preset.shard,
            device=self.device,
            workers=min(workers, len(tars)),
        )
        return count / (time.perf_counter() - started)

    # Decoding --------------------------------------------------------------------------------------------------------

    @cached_property
    def jpegs(self) -> list[bytes]:
        """The images for the measurement of decoding."""
        return read_photos(self.paths, min(self.preset.distinct, DECODED))

    def pillow(self) -> Rate:
        """Pillow alone, in one thread."""
        return one_core(self.jpegs, self.preset.resolution)

    def pillow_on_all_cores(self) -> Rate:
        """Pillow alone, in a process for each core."""
        return all_cores(self.jpegs, self.preset.resolution, cores())

    def decoders(self) -> Rate:
        """The stage's decoding workers, fed with samples in memory, including the work of their owner."""
        count = max(len(self.jpegs), TASKS * CHUNK * self.workers)
        samples = [
            Sample(f"{i:06d}", {"jpg": data, "txt": caption(i).encode()})
            for i, data in enumerate(itertools.islice(itertools.cycle(self.jpegs), count))
        ]
        chunks = [samples[i : i + CHUNK] for i in range(0, len(samples), CHUNK)]
        with ReadyDecoders(self.recipe, self.preset.encoders, self.workers, processes=True) as decoders:
            started, cpu = time.perf_counter(), cpu_seconds()
            pending: deque[Future[Prepares]] = deque()
            for chunk in chunks:
                pending.append(decoders.submit(chunk))
                if len(pending) > self.workers:
                    pending.popleft().result()
            for future in pending:
                future.result()
            return Rate(len(samples), time.perf_counter() - started, cpu_seconds() - cpu, cores())

    # Whether it is the same work -------------------------------------------------------------------------------------

    def difference(self, stage: Path, script: Path) -> float:
        """Largest relative difference (RMS over RMS) of moments and text states between the stage's records and the
        script's, record by record."""
        script_records = read_script(script)
        worst = 0.0
        storage = open_storage(str(stage))
        for record in first_records(storage, load_manifest(storage), len(script_records)):
            for name, script_array in script_records.pop(record.meta["key"]).items():
                stage_array, script_array = record.members[name].astype(np.float64), script_array.astype(np.float64)
                worst = max(worst, float(np.linalg.norm(stage_array - script_array) / np.linalg.norm(script_array)))
        assert not script_records, "the script has written samples that the stage has not"
        return worst


def script_tokenizer(encoders: EncodersConfig) -> Callable[[list[str]], Tensor]:
    """open_clip's own tokenizer for these encoders."""
    from pipeline.models.encoders.packages import open_clip

    merges = merges_of(find_tower(encoders)[1])
    return open_clip.SimpleTokenizer(bpe_path=str(merges), context_length=encoders.text_length)


def read_script(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """What the script wrote: key -> name -> array."""
    import webdataset as wds

    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    return {
        sample["__key__"]: {"moments": sample["moments.npy"], "text": sample["text.npy"]}
        for sample in wds.WebDataset(urls, shardshuffle=False).decode()
    }
