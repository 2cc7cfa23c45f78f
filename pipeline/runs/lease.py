"""One lease per run: who trains it now, so that nobody else does (docs/explained/promises.md).

    lease/000001.json, lease/000002.json, ...        the newest says who holds the run, or how the last one left it

Whoever takes a run puts the next number, if it is absent: on a store with conditional puts there is one winner however
late a rival is. On one that may have several, the bytes are looked at again after a pause, at every heartbeat and
before every commit, and whoever finds another's there stops. So a rank that a lost node still runs cannot commit.

A lease is dead when its Slurm job is; where there is no job, when its process on this machine is, or when it has not
been renewed for a while. A job that Slurm has put back into the queue takes over its own. Imports no torch.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Literal

from pipeline.errors import Interrupted, LatentmillError, NotFound, RunError, StorageError
from pipeline.log import log
from pipeline.scheduler import slurm
from pipeline.storage.base import Storage

FOLDER = "lease/"
BEAT_SECONDS = 30.0
"""Between renewals."""
DEAD_SECONDS = 600.0
"""A lease that nobody can ask about otherwise, and that was not renewed for so long, is dead."""
PAUSE_SECONDS = 1.0
"""Before bytes are looked at again, on stores where two writers may both win."""
KEPT = 16
"""Former leases that are kept."""
FRUITLESS = 5
"""Lives of a job that end without a word and without a commit, after which it stays down."""

State = Literal["queued", "held", "stopped", "finished", "failed"]
"""queued: submitted. held: training. stopped: with everything committed, to be gone on with. finished and failed."""

_given_back: set[str] = set()
"""Tokens of leases that this process has given back, whether or not the store could take note."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """What a lease says."""

    token: str
    """Of this process alone."""
    state: State = "held"
    job: str = ""
    """Slurm's number of the job; "" outside of Slurm."""
    cluster: str = ""
    """Slurm's name of the cluster."""
    restart: int = 0
    """How often Slurm has put the job back into the queue."""
    host: str = ""
    machine: str = ""
    """The machine's boot and process namespace: within one, process numbers can be compared."""
    pid: int = 0
    started: str = ""
    """When the process started, as the kernel counts: process numbers come again."""
    life: int = 0
    """How many processes have held the run, this one included."""
    began: float = 0.0
    """Unix time."""
    beat: float = 0.0
    """Unix time of the last renewal."""
    first: int = 0
    """Samples committed when it began."""
    n: int = 0
    """Samples seen at the last renewal."""
    message: str = ""
    """How it ended."""


def myself(environ: Mapping[str, str] = os.environ) -> Holder:
    """This process."""
    now = time.time()
    return Holder(
        token=secrets.token_hex(8),
        job=slurm.own_job(environ),
        cluster=environ.get("SLURM_CLUSTER_NAME", "") if slurm.own_job(environ) else "",
        restart=int(environ.get("SLURM_RESTART_COUNT") or 0),
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        started=_started(os.getpid()),
        began=now,
        beat=now,
    )


class Lease:
    """`with Lease.take(run) as lease:` holds the run, renews the lease in a thread of its own, and says how it ended.

    progress: samples seen now; to be set by who counts them.
    """

    def __init__(self, run: Storage, key: str, holder: Holder) -> None:
        self._run, self._key, self.holder = run, key, holder
        self.progress: Callable[[], int] = lambda: holder.first
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="latentmill-lease", daemon=True)

    @classmethod
    def take(cls, run: Storage, me: Holder | None = None, first: int = 0) -> Lease:
        """The run's lease for `me` (this process), which begins at `first` committed samples.

        Raises RunError when another holds the run, or when this job has come back for nothing FRUITLESS times.
        """
        me = replace(me or myself(), first=first, n=first)
        while True:
            number, before = newest(run)
            if before is not None and (why := claim_of(before, me)):
                raise RunError(f"{run.url} is {why}; one run is trained once at a time, or choose another run=")
            _refuse_fruitless(run, me, number)
            me = replace(me, life=(before.life if before else 0) + (me.state != "queued"))
            lease = cls(run, _key(number + 1), me)
            if run.put_if_absent(lease._key, _text(me)) or lease._is_mine():
                break
        if run.local_path(lease._key) is None:
            time.sleep(PAUSE_SECONDS)
            lease.require_mine()
        if number >= KEPT:
            with suppress(LatentmillError):
                run.delete(_key(number + 1 - KEPT))
        return lease

    def require_mine(self) -> None:
        """Raises RunError when another has taken the run since, StorageError."""
        _, holder = newest(self._run)
        if holder is None or holder.token != self.holder.token:
            by = f"is {described(holder)}" if holder else "has lost its lease"
            raise RunError(f"{self._run.url} {by}, and no longer this process's: nothing more is committed here")

    def release(self, state: State, message: str = "") -> None:
        """Say how it ended. An error of the store is a warning: the lease is found dead without it."""
        _given_back.add(self.holder.token)
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        try:
            if self._is_mine():
                self._put(replace(self.holder, state=state, message=message))
        except LatentmillError as error:
            log.warning(f"the lease of {self._run.url} was not given back: {error}")

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.release("finished")
        else:
            said = " ".join(str(error).split()) or type(error).__name__
            self.release("stopped" if isinstance(error, Interrupted) else "failed", said)

    def _renew(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            try:
                self.require_mine()
                self._put(self.holder)
            except RunError as error:
                log.warning(error)
                os.kill(os.getpid(), signal.SIGTERM)  # the loop stops at the next step, and may not commit
                return
            except LatentmillError:
                continue  # the store is away: the next renewal may reach it

    def _put(self, holder: Holder) -> None:
        self._run.put(self._key, _text(replace(holder, beat=time.time(), n=self.progress())))

    def _is_mine(self) -> bool:
        """Whether the bytes under our number are ours: a put that was retried may meet itself."""
        with suppress(NotFound):
            return _read(self._run, self._key).token == self.holder.token
        return False


# --------------------------------------------------------------------------------------------------------------------
# Looking at leases


def newest(run: Storage) -> tuple[int, Holder | None]:
    """(number, what it says) of the newest lease; (0, None) where there has been none."""
    while numbers := [int(name) for info in run.list(FOLDER) if (name := _name(info.key)).isdigit()]:
        with suppress(NotFound):  # swept between the two
            return max(numbers), _read(run, _key(max(numbers)))
    return 0, None


def require_free(run: Storage) -> None:
    """Raises RunError when another than this process holds the run."""
    _, holder = newest(run)
    if holder is not None and (why := claim_of(holder, myself())):
        raise RunError(f"{run.url} is {why}; one run is trained once at a time, or choose another run=")


def enqueue(run: Storage, job: str) -> None:
    """Note that a job in Slurm's queue is to train the run, unless it does so already. Raises RunError when another
    holds the run, StorageError."""
    me = replace(myself(), state="queued", job=job, cluster=slurm.cluster_name(), restart=0)
    if _is_of_same_job(newest(run)[1], me):
        return
    try:
        Lease.take(run, me)
    except RunError:
        if not _is_of_same_job(newest(run)[1], me):
            raise


def claim_of(holder: Holder, me: Holder) -> str:
    """Why a run is another's than mine now, such as "being trained by Slurm job 7 ..."; "" when I may take it."""
    same_job = _is_of_same_job(holder, me)
    if holder.state in ("finished", "failed") or holder.token in _given_back:
        return ""
    if same_job and (holder.state != "held" or holder.restart < me.restart):
        return ""
    if holder.job and not same_job:
        state = job_state(holder)
        if state is not None:
            return "" if state in ("", *slurm.ENDED) else f"{described(holder)}: Slurm says {state}"
    if holder.state != "held":
        return ""  # a job that nobody here can ask about, and that does not run
    if holder.machine == me.machine:
        alive = _started(holder.pid) == holder.started != ""
        return described(holder) if alive else ""
    age = time.time() - holder.beat
    if age >= DEAD_SECONDS:
        return ""
    return f"{described(holder)}, last heard of {age:.0f} s ago (taken for dead after {DEAD_SECONDS:.0f} s)"


def _is_of_same_job(holder: Holder | None, me: Holder) -> bool:
    return holder is not None and bool(me.job) and (holder.job, holder.cluster) == (me.job, me.cluster)


def job_state(holder: Holder) -> str | None:
    """Slurm's word for the state of a lease's job; "" for one that it has forgotten, None where it cannot be asked."""
    if not slurm.is_here() or (holder.cluster and holder.cluster != slurm.cluster_name()):
        return None
    return slurm.job_state(holder.job)


def described(holder: Holder) -> str:
    """Who a lease is of, after "is": "being trained by Slurm job 7 (restart 1), process 12 on n1, since ..."."""
    job = f"Slurm job {holder.job} (restart {holder.restart})" if holder.job else ""
    if holder.state == "queued":
        return f"waiting in the queue as {job}"
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(holder.began))
    who = ", ".join(filter(None, [job, f"process {holder.pid} on {holder.host}"]))
    return f"{'being trained by' if holder.state == 'held' else 'to be gone on with by'} {who}, since {since}"


def _refuse_fruitless(run: Storage, me: Holder, number: int) -> None:
    """Raises RunError when the last lives of this job have all ended without a word and without a commit."""
    last = range(number, number - FRUITLESS, -1)
    if not me.job or me.state != "held" or last[-1] < 1:
        return
    for key in map(_key, last):
        try:
            holder = _read(run, key)
        except StorageError:
            return
        if (holder.job, holder.state, holder.first) != (me.job, "held", me.first):
            return
    raise RunError(
        f"{run.url}: Slurm job {me.job} has died {FRUITLESS} times without a commit after {me.first} samples; see its "
        "log for why (out of memory?), then submit it again"
    )


def _read(run: Storage, key: str) -> Holder:
    return Holder(**json.loads(run.get(key)))


def _text(holder: Holder) -> bytes:
    return json.dumps(asdict(holder), indent=1).encode()


def _key(number: int) -> str:
    return f"{FOLDER}{number:06d}.json"


def _name(key: str) -> str:
    return key.removeprefix(FOLDER).removesuffix(".json")


def _machine() -> str:
    """This boot of this machine, and the process namespace in it; "" where Linux does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process of this machine started; "" when there is none, or only what its parent has not yet reaped."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
