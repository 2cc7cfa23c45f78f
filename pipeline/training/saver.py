"""Commits that are written while training goes on.

`Saver.begin` copies this rank's state at n, which is all that training waits for. A thread writes the copy beside its
place, hashes it on the way, publishes it, reads it back, and leaves its hash in the run directory. Rank 0's thread
waits there for the hashes of all ranks, writes commit.json, and removes the checkpoints that are not to be kept. So
ranks meet through the storage and through no collective, and what is committed has been read back by who wrote it.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import MappingProxyType, TracebackType
from typing import Any

import torch
from torch import Tensor

from pipeline.distributed.world import World, is_shared
from pipeline.runs.checkpoint import Commit, seal, verify_file
from pipeline.runs.directory import AVERAGES, COMMIT, checkpoint_folder
from pipeline.runs.fragments import Fragment, write_safetensors
from pipeline.runs.retention import Retention, retain
from pipeline.storage.base import Storage

LOOK_SECONDS = (0.01, 1.0)
"""Between looks for the other ranks' files: at first, and at most."""
MEET_SECONDS = 1.0
"""Ranks that wait for a commit ask each other so often whether one has failed."""
Fragments = Mapping[str, Sequence[Fragment]]
"""This rank's share of the state, by kind."""


@dataclass(frozen=True)
class Stamp:
    """What a run's commits say of it beside n."""

    stage: str
    """Engine and ZeRO stage."""
    config: Mapping[str, Any]
    """Of the configuration, what may not change within a run."""
    manifests: Mapping[str, str]
    """Digest of each dataset's manifest, by role."""
    shapes: Mapping[str, Sequence[int]]
    """Shape of every parameter."""
    mixture: Sequence[int] = ()
    """Weights of the datasets, in integers; () of one."""


@dataclass
class Save:
    """One checkpoint on its way. over: set when this rank has nothing more to do with it."""

    n: int
    steps: int
    tensors: dict[str, Tensor]
    guard: Mapping[str, Any] = field(default_factory=dict)
    kept: Sequence[str] = ()
    """Kinds of which a snapshot goes into averages/ too."""
    copy_s: float = 0.0
    """What the copy took, seconds."""
    wait_s: float = 0.0
    """What training waited for it beside the copy."""
    write_s: float = 0.0
    """From its beginning until this rank has nothing more to do with it."""
    bytes: int = 0
    """Of this rank's file."""
    error: BaseException | None = None
    over: threading.Event = field(default_factory=threading.Event)


class Saver:
    """Writes the commits of one life of a run, one at a time.

    background: whether training goes on meanwhile; else nothing is copied that lies on the CPU. fence: raises when this
    process may no longer commit. before: what each rank brings into the run directory ahead of a commit, in the
    thread. life: the name of this life of the run; by default one that rank 0 draws. Collective to make. As a context
    manager it waits, on leaving in good order or with an error that all ranks share, for the save that is on its way.
    """

    def __init__(
        self,
        run: Storage,
        world: World,
        stamp: Stamp,
        *,
        retention: Retention | None = None,
        background: bool = True,
        fence: Callable[[], None] | None = None,
        before: Sequence[Callable[[], None]] = (),
        life: str = "",
    ) -> None:
        self.run, self.world, self.stamp = run, world, stamp
        self.retention, self.background, self.fence, self.before = retention, background, fence, before
        self.life = life or world.first(secrets.token_hex(4))
        self.committed = -1
        """n of the newest commit of this run that this rank knows of."""
        self.last: Save | None = None
        """The newest that was begun here and has ended well."""
        self._save: Save | None = None
        self._buffers: dict[str, Tensor] = {}
        self._left = threading.Event()

    def begin(
        self,
        n: int,
        steps: int,
        fragments: Fragments,
        guard: Mapping[str, Any] = MappingProxyType({}),
        kept: Sequence[str] = (),
    ) -> list[Save]:
        """Start to commit the state at n, after `steps` optimizer steps; the commits that have ended since the last
        call are returned. Collective: waits for the save before, and raises on every rank what failed there."""
        done = self.settle()
        began = time.perf_counter()
        save = self._save = Save(n, steps, self._snapshot(fragments), guard, kept)
        save.copy_s = time.perf_counter() - began
        threading.Thread(target=self._work, args=(save,), name=f"save-{n}", daemon=True).start()
        if not self.background:
            done += self.settle()
        return done

    @property
    def failed(self) -> bool:
        """Whether the save on its way has failed on this rank: `settle` then raises, on every rank."""
        return self._save is not None and self._save.error is not None

    def finished(self) -> list[Save]:
        """The save that has ended well since the last look, on this rank (on rank 0: is committed)."""
        save = self._save
        if save is None or not save.over.is_set() or save.error is not None:
            return []
        self._save, self.last, self.committed = None, save, save.n
        return [save]

    def settle(self) -> list[Save]:
        """Wait until what was begun is committed. Collective: any rank's failure is raised on all."""
        began = time.perf_counter()
        while True:
            save = self._save
            waits = save is not None and not save.over.wait(MEET_SECONDS)
            error = save.error if save is not None else None
            waiting, failures = self.world.sum([waits, error is not None])
            if failures:
                self._left.set()
                self.world.raise_together(error)
            if not waiting:
                break
        done = self.finished()
        for save in done:
            save.wait_s += time.perf_counter() - began
        return done

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        in_order = error is None or is_shared(error)
        if in_order and self._save is not None and not self._left.is_set():
            self._save.over.wait()
        self._left.set()

    # ----------------------------------------------------------------------------------------------------------------

    def _snapshot(self, fragments: Fragments) -> dict[str, Tensor]:
        """The fragments as they are now, in memory of the CPU that is the same at every save."""
        tensors = {}
        for kind, many in fragments.items():
            for fragment in many:
                name, view = f"{kind}/{fragment.name}@{fragment.offset}", fragment.view.detach()
                if self.background or view.device.type != "cpu":
                    if name not in self._buffers or self._buffers[name].shape != view.shape:
                        pinned = view.device.type == "cuda"
                        self._buffers[name] = torch.empty(view.shape, dtype=torch.float32, pin_memory=pinned)
                    view = self._buffers[name].copy_(view, non_blocking=True)
                tensors[name] = view.contiguous()
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        return tensors

    def _work(self, save: Save) -> None:
        """A thread: this rank's part of a save, and rank 0's commit of the whole."""
        began = time.perf_counter()
        try:
            self._write_part(save)
            if self.world.rank == 0:
                self._commit(save)
        except BaseException as error:
            save.error = error
        finally:
            save.write_s = time.perf_counter() - began
            save.over.set()

    def _write_part(self, save: Save) -> None:
        for bring in self.before:
            bring()
        for storage, tensors in self._parcels(save):
            save.bytes = self._write_file(storage, save.n, tensors)

    def _parcels(self, save: Save) -> list[tuple[Storage, dict[str, Tensor]]]:
        """Where a save goes, and what of it: a snapshot of averages first, so that a commit has the one that is its."""
        kept = {name: tensor for name, tensor in save.tensors.items() if name.partition("/")[0] in save.kept}
        snapshot = [(self.run.child(AVERAGES), kept)] if save.kept else []
        return [*snapshot, (self.run, save.tensors)]

    def _write_file(self, storage: Storage, n: int, tensors: Mapping[str, Tensor]) -> int:
        """This rank's file of a checkpoint, and then its hash; its size."""
        base = checkpoint_folder(n)
        name = f"rank{self.world.rank:05d}-{self.life}"
        path = storage.staging_path()
        try:
            size, digest = write_safetensors(path, tensors)
            storage.put_file(f"{base}{name}.safetensors", path)
        finally:
            with suppress(OSError):
                path.unlink(missing_ok=True)
        facts = {"name": f"{name}.safetensors", "bytes": size, "sha256": digest}
        verify_file(storage, n, facts)
        storage.put(f"{base}{name}.json", json.dumps(facts).encode())
        return size

    def _commit(self, save: Save) -> None:
        """Rank 0: commit when all ranks' files are in, then sweep. Without an error where the run was left before."""
        base = checkpoint_folder(save.n)
        for storage, _ in self._parcels(save):
            if self.fence is not None:
                self.fence()
            if storage.exists(base + COMMIT):
                storage.delete(base + COMMIT)  # a damaged one that was passed over at resume
            files = self._await_parts(storage, base)
            if files is None:
                return
            self._put_commit(storage, save, files)
        if self.retention is not None:
            if self.fence is not None:
                self.fence()
            retain(self.run, self.retention)

    def _put_commit(self, storage: Storage, save: Save, files: list[dict[str, Any]]) -> None:
        stamp = self.stamp
        commit = Commit(
            n=save.n,
            steps=save.steps,
            world=self.world.size,
            stage=stamp.stage,
            config=dict(stamp.config),
            manifests=dict(stamp.manifests),
            mixture=list(stamp.mixture),
            shapes={name: list(shape) for name, shape in stamp.shapes.items()},
            guard=dict(save.guard),
            files=files,
        )
        if self.fence is not None:
            self.fence()
        storage.put(checkpoint_folder(save.n) + COMMIT, seal(commit))

    def _await_parts(self, storage: Storage, base: str) -> list[dict[str, Any]] | None:
        """What all ranks say of their files, in their order; None when the run is left before all have come."""
        keys = [f"{base}rank{rank:05d}-{self.life}.json" for rank in range(self.world.size)]
        pause, most = LOOK_SECONDS
        while not set(keys) <= {info.key for info in storage.list(base)}:
            if self._left.wait(pause):
                return None
            pause = min(1.5 * pause, most)
        return [json.loads(storage.get(key)) for key in keys]


def save_now(
    run: Storage,
    world: World,
    fragments: Fragments,
    *,
    n: int,
    steps: int,
    stamp: Stamp,
    retention: Retention | None = None,
    life: str = "",
) -> None:
    """Write and commit a checkpoint, and wait for it. Collective; if any rank fails, all raise."""
    with Saver(run, world, stamp, retention=retention, background=False, life=life) as saver:
        saver.begin(n, steps, fragments)
