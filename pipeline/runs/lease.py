"""One lease per run says which process trains it now, so that no other process does (docs/explained/promises.md).

    lease/000001.json, lease/000002.json, ...        the newest says who holds the run, or how the last holder left it

A process takes a run by a conditional put of the next number. A store that supports conditional puts lets one process
win, however late a rival comes. On a store that may let several win, the process reads the lease again after a pause,
at every heartbeat and before every commit, and stops when it finds another process's lease. So a rank that still runs
on a lost node cannot commit.

A lease is dead when its Slurm job is dead. Without a job it is dead when its process on this machine is, or when it has
not been renewed for DEAD_SECONDS. A job that Slurm has requeued takes over its own lease. Imports no torch.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from types import TracebackType

from pipeline.errors import Interrupted, LatentmillError, NotFound, ParseError, RunError, RunTaken, StorageError
from pipeline.log import log
from pipeline.parsing.text import one_line
from pipeline.runs.holder import LEASE_BYTES, State, holder_bytes, parse_holder, start_ticks
from pipeline.runs.holder import Holder as Holder
from pipeline.runs.holder import this_process as this_process
from pipeline.runs.names import LEASES, lease_key, lease_of
from pipeline.runs.stored import read_bounded
from pipeline.scheduler import slurm
from pipeline.storage.base import Storage

BEAT_SECONDS = 30.0
"""Between renewals."""
DEAD_SECONDS = 600.0
"""A lease that was not renewed for this long is dead, where neither Slurm nor this machine's processes can tell."""
PAUSE_SECONDS = 1.0
"""Before a new lease is read again, on stores where two writers may both win."""
LOOK_SECONDS = 5.0
"""Between two looks at the lease of a process that may be dead."""
KEPT = 16
"""Former leases that are kept."""
FRUITLESS = 5
"""A job that has died this many times in a row, without giving back its lease and without a commit, may not start
again."""

ONCE = "one run is trained once at a time, or choose another run="
"""What is said to who may not take a run."""
LOOKS = 20
"""How often a lease that is listed may be gone when it is read."""

_released_tokens: set[str] = set()
"""Tokens of leases that this process has released, even where the store could not be told."""
_held: set[Lease] = set()
"""Leases that this process has taken, or is taking, and has not released."""


class Lease:
    """`with Lease.take(run) as lease:` holds the run, renews the lease in a thread, and records how the process ended.

    progress: returns the samples seen so far; the trainer sets it.
    """

    def __init__(self, run: Storage, key: str, holder: Holder) -> None:
        self._run, self._key, self.holder = run, key, holder
        self.progress: Callable[[], int] = lambda: holder.first
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="latentmill-lease", daemon=True)

    @classmethod
    def take(cls, run: Storage, me: Holder | None = None, first: int = 0) -> Lease:
        """Take the run's lease for `me` (default: this process), which begins at `first` committed samples.

        Raises RunTaken when another process holds the run, RunError when this job has died FRUITLESS times without a
        commit.
        """
        me = replace(me or this_process(), first=first, n=first)
        while True:
            number, former = newest(run)
            if former is not None and (claim := claim_of(former, me)):
                raise RunTaken(f"{run.url} is {claim}; {ONCE}")
            _refuse_fruitless(run, me, number)
            me = replace(me, life=(former.life if former else 0) + (me.state != "queued"))
            lease = cls(run, lease_key(number + 1), me)
            if me.state == "held":
                _held.add(lease)  # before it is stored: whoever ends this process meanwhile gives it back
            if run.put_if_absent(lease._key, holder_bytes(me)) or lease._is_stored():
                break
            _held.discard(lease)
        if run.local_path(lease._key) is None:
            time.sleep(PAUSE_SECONDS)
            lease.require_held()
        if number >= KEPT:
            with suppress(LatentmillError):
                run.delete(lease_key(number + 1 - KEPT))
        return lease

    def require_held(self) -> None:
        """Raises RunTaken when another process has taken the run since, RunError where its lease is gone, and
        StorageError."""
        _, holder = newest(self._run)
        if holder is None or holder.token != self.holder.token:
            what = f"is {in_words(holder)}" if holder else "has lost its lease"
            kind = RunTaken if holder else RunError
            raise kind(f"{self._run.url} {what}, and no longer this process's: nothing more is committed here")

    def release(self, state: State, message: str = "") -> None:
        """Record how the process ended. An error of the store is only logged: the lease will be found dead anyway."""
        _released_tokens.add(self.holder.token)
        _held.discard(self)
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        try:
            if self._is_stored():
                self._put(replace(self.holder, state=state, message=message))
        except LatentmillError as error:
            log.warning(f"the lease of {self._run.url} could not be released: {error}")

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.release("finished")
        else:
            message = one_line(str(error)) or type(error).__name__
            self.release("stopped" if isinstance(error, Interrupted) else "failed", message)

    def _renew(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            try:
                self.require_held()
                self._put(self.holder)
            except RunError as error:
                log.warning(error)
                os.kill(os.getpid(), signal.SIGTERM)  # the loop stops at the next step, and may not commit
                return
            except LatentmillError:
                continue  # the store does not answer: the next renewal may reach it

    def _put(self, holder: Holder) -> None:
        self._run.put(self._key, holder_bytes(replace(holder, beat=time.time(), n=self.progress())))

    def _is_stored(self) -> bool:
        """Whether the lease under this number is this process's: a put that was retried may find its own first try."""
        with suppress(NotFound):
            return _read(self._run, self._key).token == self.holder.token
        return False


# --------------------------------------------------------------------------------------------------------------------
# Looking at leases


def newest(run: Storage) -> tuple[int, Holder | None]:
    """(number, holder) of the newest lease; (0, None) where there has been none."""
    for _ in range(LOOKS):
        number = newest_number(run)
        if not number:
            return 0, None
        with suppress(NotFound):  # removed after it was listed
            return number, _read(run, lease_key(number))
    raise StorageError(f"{run.locate(lease_key(number))} is listed, and cannot be found when it is read")


def newest_number(run: Storage) -> int:
    """Number of the newest lease, whatever it holds; 0 where there has been none."""
    return max((number for info in run.list(LEASES) if (number := lease_of(info.key)) is not None), default=0)


def give_back(run: Storage) -> None:
    """Release the lease that this process still holds of a run, or was about to take, for a process that ends at once.
    An error of the store is only logged."""
    for lease in [lease for lease in _held if lease._run.url == run.url]:
        lease.release("stopped", "stopped before or after the training steps")


def require_free(run: Storage) -> None:
    """Raises RunTaken when a process other than this one holds the run."""
    _, holder = newest(run)
    if holder is not None and (claim := claim_of(holder, this_process())):
        raise RunTaken(f"{run.url} is {claim}; {ONCE}")


def outlast(run: Storage) -> None:
    """Wait while nobody can tell whether the process that holds the run is dead, which is on another machine and in no
    job of Slurm: until it is, or has renewed its lease.

    For the ranks of a launcher, whose machines come back sooner than a lease is dead. Nothing is taken here.
    """
    me, former = this_process(), newest(run)[1]
    if former is None or former.state != "held" or former.machine == me.machine or former.job or me.job:
        return
    end = time.monotonic() + DEAD_SECONDS
    if claim := claim_of(former, me):
        log.info(f"{run.url} is {claim}: waiting until it is dead, or says that it lives")
    while claim_of(former, me) and newest(run)[1] == former and time.monotonic() < end:
        time.sleep(LOOK_SECONDS)


def enqueue(run: Storage, job: str) -> None:
    """Record that a job in Slurm's queue will train the run, unless it already does. Raises RunTaken when another
    process holds the run, StorageError."""
    me = replace(this_process(), state="queued", job=job, cluster=slurm.cluster_name(), restart=0)
    if _is_of_same_job(newest(run)[1], me):
        return
    try:
        Lease.take(run, me)
    except RunError:
        if not _is_of_same_job(newest(run)[1], me):
            raise


def claim_of(holder: Holder, me: Holder) -> str:
    """Why `me` may not take the run that `holder` had last, such as "being trained by Slurm job 7 ..."; "" when `me`
    may take it."""
    same_job = _is_of_same_job(holder, me)
    if holder.state in ("finished", "failed") or holder.token in _released_tokens:
        return ""
    if same_job and (holder.state != "held" or holder.restart < me.restart):
        return ""
    if holder.job and not same_job:
        state = job_state(holder)
        if state is not None:
            return "" if state in ("", *slurm.ENDED) else f"{in_words(holder)}: Slurm says {state}"
    if holder.state != "held":
        return ""  # a job that does not run, and whose state Slurm cannot be asked for here
    if holder.machine == me.machine:
        alive = start_ticks(holder.pid) == holder.started != ""
        return in_words(holder) if alive else ""
    age = time.time() - holder.beat
    if age >= DEAD_SECONDS:
        return ""
    return f"{in_words(holder)}, last heard of {age:.0f} s ago (taken for dead after {DEAD_SECONDS:.0f} s)"


def _is_of_same_job(holder: Holder | None, me: Holder) -> bool:
    return holder is not None and bool(me.job) and (holder.job, holder.cluster) == (me.job, me.cluster)


def job_state(holder: Holder) -> str | None:
    """Slurm's word for the state of a lease's job; "" for a job that Slurm has forgotten, None where Slurm cannot be
    asked."""
    if not slurm.is_here() or (holder.cluster and holder.cluster != slurm.cluster_name()):
        return None
    return slurm.job_state(holder.job)


def in_words(holder: Holder) -> str:
    """What is said of a run with this holder after "is": "being trained by Slurm job 7 (restart 1), process 12 on n1,
    since ..."."""
    job = f"Slurm job {holder.job} (restart {holder.restart})" if holder.job else ""
    if holder.state == "queued":
        return f"waiting in the queue as {job}"
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(holder.began))
    who = ", ".join(filter(None, [job, f"process {holder.pid} on {holder.host}"]))
    return f"{'being trained by' if holder.state == 'held' else 'to be gone on with by'} {who}, since {since}"


def _refuse_fruitless(run: Storage, me: Holder, number: int) -> None:
    """Raises RunError when this job has died FRUITLESS times in a row without releasing its lease and without a
    commit. number: of the newest lease."""
    last_numbers = range(number, number - FRUITLESS, -1)
    if not me.job or me.state != "held" or last_numbers[-1] < 1:
        return
    for key in map(lease_key, last_numbers):
        try:
            holder = _read(run, key)
        except (StorageError, RunError):
            return
        if (holder.job, holder.state, holder.first) != (me.job, "held", me.first):
            return
    raise RunError(
        f"{run.url}: Slurm job {me.job} has died {FRUITLESS} times without a commit after {me.first} samples; see its "
        "log for why (out of memory?), then submit it again"
    )


def _read(run: Storage, key: str) -> Holder:
    """The holder that a lease names. Fields of later versions are passed over. Raises NotFound, and RunError for a
    damaged lease: nobody can tell then whether the run is being trained."""
    try:
        return parse_holder(read_bounded(run, key, LEASE_BYTES))
    except ParseError as error:
        raise RunError(
            f"{run.locate(key)} is no lease that can be read ({error}): see that no process trains the run, and delete "
            "that file"
        ) from error
