"""Writes commits in the background while training continues.

Training waits only for `Saver.begin`, which copies this rank's state at n. A thread then writes the copy to a staging
file, hashing it meanwhile, as a whole and by kind, publishes the file, reads it back, and stores its hashes in the run
directory. Rank 0's thread waits there for the hashes of all ranks, writes commit.json, and removes the checkpoints that
are not kept. So the ranks meet through the storage and not through collectives, and every committed file was read back
by the rank that wrote it.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from types import MappingProxyType, TracebackType
from typing import Any

import torch
from torch import Tensor

from pipeline.distributed.world import World, is_shared
from pipeline.runs.checkpoint import Commit, seal, verify_file
from pipeline.runs.fragments import Fragment, write_safetensors
from pipeline.runs.names import AVERAGES, COMMIT, checkpoint_folder
from pipeline.runs.retention import Retention, retain
from pipeline.storage.base import Storage

POLL_SECONDS = (0.01, 1.0)
"""Pause between two checks for the other ranks' files: the first, and the longest."""
MEET_SECONDS = 1.0
"""Interval at which ranks that wait for a commit tell each other whether one has failed."""
TOGETHER = 32
"""Hashes of ranks that rank 0 asks for at a time: one by one, those of thousands take longer than a grace period."""
Fragments = Mapping[str, Sequence[Fragment]]
"""This rank's share of the state, by kind."""


@dataclass(frozen=True)
class Stamp:
    """The facts that all commits of a run share."""

    stage: str
    """Engine and ZeRO stage."""
    config: Mapping[str, Any]
    """The configuration keys that may not change within a run."""
    manifests: Mapping[str, str]
    """Digest of each dataset's manifest, by role."""
    shapes: Mapping[str, Sequence[int]]
    """Shape of every parameter."""
    mixture: Sequence[int] = ()
    """Weights of the datasets, in integers; () for a single dataset."""


@dataclass
class Save:
    """One checkpoint that is being saved. ended: set when this rank has done its part, or failed."""

    n: int
    steps: int
    tensors: dict[str, Tensor]
    guard: Mapping[str, Any] = field(default_factory=dict)
    kept: Sequence[str] = ()
    """Kinds of averages of which a snapshot goes into averages/ too."""
    objective: Mapping[str, Any] = field(default_factory=dict)
    copy_s: float = 0.0
    """Seconds that the copy took."""
    wait_s: float = 0.0
    """Seconds that training waited for this save, beside the copy."""
    write_s: float = 0.0
    """Seconds from the thread's start until this rank had done its part."""
    bytes: int = 0
    """Size of this rank's file."""
    error: BaseException | None = None
    ended: threading.Event = field(default_factory=threading.Event)


class Saver:
    """Writes the commits of one life of a run, one at a time.

    background: whether training continues during a save; else tensors on the CPU are not copied. fence: raises when
    this process may no longer commit. before: called on each rank in the thread, ahead of a commit, to upload other
    files. life: the name of this life of the run; by default rank 0 draws one. The constructor is collective. The
    context manager waits for the save in progress when it is left without an error, or with one that all ranks share.
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
        self.last_save: Save | None = None
        """The newest save that was begun here and has ended without an error."""
        self._save: Save | None = None
        self._buffers: dict[str, Tensor] = {}
        self._abandoned = threading.Event()  # set when this saver is left

    def begin(
        self,
        n: int,
        steps: int,
        fragments: Fragments,
        guard: Mapping[str, Any] = MappingProxyType({}),
        kept: Sequence[str] = (),
        objective: Mapping[str, Any] = MappingProxyType({}),
    ) -> list[Save]:
        """Start to commit the state at n, after `steps` optimizer steps. Returns the saves that have ended since the
        last call. Collective: waits for the previous save, and raises its failure on every rank.

        guard: state of the guard. kept: kinds of averages of which a snapshot is stored too. objective: its state.
        """
        ended = self.settle()
        began = time.perf_counter()
        save = self._save = Save(n, steps, self._snapshot(fragments), guard, kept, objective)
        save.copy_s = time.perf_counter() - began
        threading.Thread(target=self._work, args=(save,), name=f"save-{n}", daemon=True).start()
        if not self.background:
            ended += self.settle()
        return ended

    @property
    def failed(self) -> bool:
        """Whether the save in progress has failed on this rank. `settle` then raises on every rank."""
        return self._save is not None and self._save.error is not None

    def finished(self) -> list[Save]:
        """The save that has ended without an error since the last call, on this rank (on rank 0: is committed)."""
        save = self._save
        if save is None or not save.ended.is_set() or save.error is not None:
            return []
        self._save, self.last_save, self.committed = None, save, save.n
        return [save]

    def settle(self) -> list[Save]:
        """Wait until the save in progress is committed. Collective: any rank's failure is raised on all."""
        began = time.perf_counter()
        while True:
            save = self._save
            waits = save is not None and not save.ended.wait(MEET_SECONDS)
            error = save.error if save is not None else None
            waiting_ranks, failed_ranks = self.world.counted([waits, error is not None])
            if failed_ranks:
                self._abandoned.set()
                self.world.raise_together(error)
            if not waiting_ranks:
                break
        ended = self.finished()
        for save in ended:
            save.wait_s += time.perf_counter() - began
        return ended

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        all_ranks_leave = error is None or is_shared(error)
        if all_ranks_leave and self._save is not None and not self._abandoned.is_set():
            self._save.ended.wait()
        self._abandoned.set()

    # ----------------------------------------------------------------------------------------------------------------

    def _snapshot(self, fragments: Fragments) -> dict[str, Tensor]:
        """A copy of the fragments in CPU memory that every save reuses."""
        tensors = {}
        for kind, kind_fragments in fragments.items():
            for fragment in kind_fragments:
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
        """The thread: writes this rank's part of a save, and commits it on rank 0."""
        began = time.perf_counter()
        try:
            self._write_part(save)
            if self.world.rank == 0:
                self._commit(save)
        except BaseException as error:
            save.error = error
        finally:
            save.write_s = time.perf_counter() - began
            save.ended.set()

    def _write_part(self, save: Save) -> None:
        for action in self.before:
            action()
        for storage, tensors in self._destinations(save):
            save.bytes = self._write_file(storage, save.n, tensors)

    def _destinations(self, save: Save) -> list[tuple[Storage, dict[str, Tensor]]]:
        """Where each part of a save is stored. The snapshot of averages comes first, so that it is there whenever the
        commit that belongs to it is."""
        kept = {name: tensor for name, tensor in save.tensors.items() if name.partition("/")[0] in save.kept}
        snapshot = [(self.run.child(AVERAGES), kept)] if save.kept else []
        return [*snapshot, (self.run, save.tensors)]

    def _write_file(self, storage: Storage, n: int, tensors: Mapping[str, Tensor]) -> int:
        """Store this rank's file of a checkpoint, and then its hash. Returns its size in bytes."""
        base = checkpoint_folder(n)
        name = f"rank{self.world.rank:05d}-{self.life}"
        path = storage.staging_path()
        try:
            written = write_safetensors(path, tensors)
            storage.put_file(f"{base}{name}.safetensors", path)
        finally:
            with suppress(OSError):
                path.unlink(missing_ok=True)
        facts = {"name": f"{name}.safetensors", **asdict(written)}
        verify_file(storage, n, facts)
        storage.put(f"{base}{name}.json", json.dumps(facts).encode())
        return written.bytes

    def _commit(self, save: Save) -> None:
        """On rank 0: commit when all ranks' files are there, then remove old checkpoints. Returns without a commit when
        the saver is left before that."""
        base = checkpoint_folder(save.n)
        for storage, _ in self._destinations(save):
            if self.fence is not None:
                self.fence()
            if storage.exists(base + COMMIT):
                storage.delete(base + COMMIT)  # a damaged one, which the resume did not take
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
            objective=dict(save.objective),
            files=files,
        )
        if self.fence is not None:
            self.fence()
        storage.put(checkpoint_folder(save.n) + COMMIT, seal(commit))

    def _await_parts(self, storage: Storage, base: str) -> list[dict[str, Any]] | None:
        """The name, size and hashes of every rank's file, in the order of ranks; None when the saver is left before all
        are there."""
        keys = [f"{base}rank{rank:05d}-{self.life}.json" for rank in range(self.world.size)]
        pause, longest_pause = POLL_SECONDS
        while not set(keys) <= {info.key for info in storage.list(base)}:
            if self._abandoned.wait(pause):
                return None
            pause = min(1.5 * pause, longest_pause)
        with ThreadPoolExecutor(TOGETHER, "latentmill-commit") as pool:
            return [json.loads(data) for data in pool.map(storage.get, keys)]
