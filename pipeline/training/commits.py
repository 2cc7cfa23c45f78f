"""The commits of a run: one is taken up when training begins, and new ones are begun every so many samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.config import RunConfig
from pipeline.config.loading.merge import to_stored
from pipeline.config.loading.references import holds_reference
from pipeline.config.loading.stored import from_stored, is_same
from pipeline.distributed.world import World, shared
from pipeline.errors import RunError
from pipeline.runs import checkpoint
from pipeline.runs.checkpoint import Commit
from pipeline.runs.directory import differences, fixed_keys, last_sample
from pipeline.runs.profiles import kind_of
from pipeline.runs.retention import Retention
from pipeline.storage.base import Storage
from pipeline.training.engines.base import engine_name
from pipeline.training.recorder import Recorder
from pipeline.training.saver import Save, Saver, Stamp
from pipeline.training.schedule import due
from pipeline.training.state import TrainingState
from pipeline.training.watch.progress import ProgressWatch


class Commits:
    """Reads and writes the commits of one life of a run.

    manifests: digest of each dataset's manifest, by role; mixture: weights of the datasets, in integers, () of one
    dataset: a commit of other datasets is refused. fence: raises when this process may no longer commit.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        world: World,
        run: Storage,
        state: TrainingState,
        recorder: Recorder,
        watch: ProgressWatch,
        manifests: Mapping[str, str],
        mixture: Sequence[int] = (),
        fence: Callable[[], None] | None = None,
    ) -> None:
        self.config, self.world, self.run = config, world, run
        self.state, self.recorder, self.watch, self.fence = state, recorder, watch, fence
        self.manifests, self.mixture = manifests, mixture
        self.end = last_sample(config)
        self.saver = Saver(
            run,
            world,
            Stamp(engine_name(config.deepspeed), fixed_keys(config), manifests, state.engine.shapes, mixture),
            retention=Retention.of(config),
            background=config.checkpoint.background,
            fence=fence,
            before=[recorder.upload],
        )
        self.newest = -1
        """n of the newest commit that was begun, or taken up."""

    def resume(self) -> None:
        """Take up the newest good commit, if there is one. Collective. Raises RunError for a commit of other datasets
        or of another configuration."""
        commit = checkpoint.newest_good(self.run, self.world)
        if commit is None:
            return
        self._require_same_run(commit)
        headers = checkpoint.shared_headers(self.run, commit, self.world)
        self.state.load(checkpoint.Reader(self.run, commit, headers=headers), commit)
        self.newest = self.saver.committed = commit.n

    def _require_same_run(self, commit: Commit) -> None:
        """Raise RunError where a commit is of other datasets, or of a configuration that this one may not go on."""
        stored, current = ({**manifests, "val": ""} for manifests in (commit.manifests, self.manifests))
        if stored != current or commit.mixture != list(self.mixture):
            difference = "another dataset" if stored != current else "another mixture"
            raise shared(RunError(f"{self.run.url} was trained on {difference}; choose another run="))
        if isinstance(commit.config, str):
            return  # the digest that commits of earlier versions hold, which names no keys

        def same(key: str, old: Any, new: Any) -> bool:
            """Values of the environment were compared when the run was opened, with the digests of run.json."""
            return holds_reference(old) or is_same(self.config, None, key, old, new)

        committed = to_stored(from_stored(type(self.config), {"run": self.config.run, **commit.config}, {}))
        if changed := differences(committed, to_stored(self.config), same=same):
            raise shared(
                RunError(
                    f"{self.run.url}: the commit at {commit.n} samples is of another configuration: "
                    f"{'; '.join(changed)}; restore it, or choose another run="
                )
            )

    def save_if_due(self) -> None:
        """Begin a commit when one is due at this n. Collective."""
        if due(self.state.n, self.config.checkpoint.every, self.state.batch) or self.state.n == self.end:
            self.save()

    def save(self) -> None:
        """Begin to commit the state at n, with what is recorded up to it. Collective."""
        state = self.state
        with self.watch.paused():
            self.world.together(self._before_commit)
            saves = self.saver.begin(
                state.n,
                state.steps,
                state.fragments(),
                state.guard.state(),
                self._snapshots_due(),
                state.objective.state(),
            )
            self._note(saves)
            self.newest = state.n

    def _before_commit(self) -> None:
        if self.fence is not None:
            self.fence()
        self.recorder.commit(self.state.n)

    def _snapshots_due(self) -> list[str]:
        """Kinds of which a snapshot is kept with the commit at n: the first at or after a multiple of ema.snapshots."""
        every, previous = self.config.ema.snapshots, max(self.newest, 0)
        if not every or self.state.n // every == previous // every:
            return []
        return [kind_of(width) for width in self.config.ema.widths]

    @property
    def failed(self) -> bool:
        """Whether the commit on its way has failed on this rank: `settle` raises it, on every rank."""
        return self.saver.failed

    def note_finished(self) -> None:
        """Record the commit on its way, if it has ended."""
        self._note(self.saver.finished())

    def settle(self) -> None:
        """Wait until the commit on its way is there. Collective."""
        with self.watch.paused():
            self._note(self.saver.settle())
        self.watch.stop()

    def _note(self, saves: Sequence[Save]) -> None:
        for save in saves:
            self.recorder.saved(save)

    def newest_in_words(self) -> str:
        """Such as "last commit at 12800 samples", and that one is on its way, where it is."""
        self.note_finished()
        n = self.saver.committed
        words = f"last commit at {n} samples" if n >= 0 else "nothing committed yet"
        return words if self.newest <= n else f"{words}, one at {self.newest} samples on its way"
