"""What every test shares: a quiet environment, the skip rule of CI, and servers over loopback."""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from servers.browser import Browser
    from servers.fault_proxy import FaultProxy
    from servers.google import Google
    from servers.slurm import Slurm
    from servers.warm_ranks import WarmRanks

# Before anything imports it: a process that runs hundreds of tests must give freed memory back.
from pipeline.distributed import allocator

allocator.keep_memory = lambda: False

# Before torch and OpenMP are imported anywhere. Tests run beside each other's subprocesses on few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("LATENTMILL_DEBUG", None)
# A shell starts what is in its background deaf to Ctrl-C, and so would be all that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# What tests start finds `made`, `ranks` and `servers`, and the checkout before what is installed.
TESTS = Path(__file__).resolve().parent
os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS)])

_numbers = itertools.count()
_peaks: list[float] = []
SEVERAL_PROCESSES = (
    *("system/", "verbs/test_demo.py", "verbs/test_train_init.py", "evaluation/test_beside.py"),
    *("planning/test_memory.py", "docs/test_what_breaks.py"),
)
"""Files whose tests start ranks, jobs or verbs of their own, for minutes in all."""
GOAL_GB, MOST_GB = 3.0, 4.0
"""What pytest's workers are to take together, what they start aside, and the most that their peaks, which need not come
at one time, may add up to."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What one worker runs by itself comes first, then the files that take longest, so that workers end together.
    tests/durations.json says which they are."""
    known = TESTS / "durations.json"
    seconds = json.loads(known.read_text(encoding="utf-8"))["seconds"] if known.exists() else {}

    def rank(item: pytest.Item) -> tuple[bool, float]:
        file = item.path.relative_to(TESTS).as_posix() if item.path.is_relative_to(TESTS) else item.path.name
        return not file.startswith(SEVERAL_PROCESSES), -seconds.get(file, 1.0)

    items.sort(key=rank)


def pytest_collection_finish() -> None:
    """Tests and modules live as long as the process. Garbage is collected by whatever trains, and need not be looked
    for among them each time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Extensions complain of objects that outlive the interpreter."""
    gc.unfreeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The tests of a file stay on one worker, and so do all that start several processes: two of them side by side
    would want twice the cores that there are."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0].removeprefix("tests/")
            return "several processes" if file.startswith(SEVERAL_PROCESSES) else file

    return Scheduling(config, log)


@pytest.fixture(autouse=True, scope="module")
def _memory() -> Iterator[None]:
    """What a file of tests has freed goes back to the system, and in a large process also what circles hold."""
    yield
    if int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize() > 0.8e9:
        gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker says what its process took at most; who started the workers holds the sum to MOST_GB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["peak_gb"] = peak
    elif _peaks:
        each = " + ".join(f"{peak:.2f}" for peak in _peaks)
        print(f"\nmemory of the workers, at most: {each} GB (together {GOAL_GB:g} GB is the goal)")
        if sum(_peaks) > MOST_GB:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker has ended."""
    _peaks.append(getattr(node, "workeroutput", {}).get("peak_gb", 0.0))


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """A verb sets the number of PyTorch's threads for its process; the next test has the usual one."""
    yield
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def _short_plans(request: pytest.FixtureRequest) -> None:
    """Streams plan as far ahead as tests need; those of tests/data as the product does."""
    if "pipeline.data.reading.stream" in sys.modules:
        from made.plans import plan_as_the_product, plan_shortly

        plan_as_the_product() if request.path.parent == TESTS / "data" else plan_shortly()


@pytest.fixture(autouse=True)
def _environment_references() -> Iterator[None]:
    """What a test's configuration took from the environment is not hidden from the next test's messages."""
    yield
    if redaction := sys.modules.get("pipeline.parsing.redaction"):
        redaction._references.clear()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """In CI a skipped test is a failure, whatever it lacks, unless it is marked `gpu`."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if (
        report.skipped
        and os.environ.get("CI") == "true"
        and "gpu" not in item.keywords
        and not hasattr(report, "wasxfail")
    ):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, where everything must run: {reason}"


@pytest.fixture
def _aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """An AWS environment of this test's own, and a fresh S3 client in it."""
    from pipeline.storage import s3 as module

    for name in [name for name in os.environ if name.startswith(("AWS_", "GS_", "AZ_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    module._clients.clear()
    yield monkeypatch
    module._clients.clear()


@pytest.fixture(scope="session")
def swift_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A real S3 server for the session: environment variables that reach it."""
    from servers.swift import Swift

    with Swift(tmp_path_factory.mktemp("swift")) as server:
        yield server.environment


@pytest.fixture(scope="session")
def swift_client(swift_server: dict[str, str]) -> Any:
    """The S3 client that tests share: making one takes half a second."""
    return _make_client(swift_server)


def _make_client(environment: dict[str, str]) -> Any:
    """An S3 client for a server, with the time limits that `pipeline.storage.s3` has now."""
    from pipeline.storage import s3 as module

    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        module._clients.clear()
        return module.s3_client()


@pytest.fixture(scope="session")
def warm_ranks() -> Iterator[WarmRanks]:
    """Runs jobs of several ranks that need not import PyTorch again."""
    from servers.warm_ranks import WarmRanks

    with WarmRanks() as server:
        yield server


@pytest.fixture(scope="session")
def slurm_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A real Slurm of two nodes. Where there can be none the tests that need it are skipped, and in CI fail."""
    from servers.slurm import Slurm

    if missing := Slurm.missing():
        pytest.skip(f"SUBMIT IS NOT TESTED ON THIS MACHINE: {missing}")
    with Slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def slurm(slurm_cluster: Slurm, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    """The session's Slurm, which this process's environment leads to."""
    for name, value in slurm_cluster.environment.items():
        monkeypatch.setenv(name, value)
    return slurm_cluster


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A headless Chromium. Where there is none the tests that need it are skipped, and in CI fail."""
    from servers.browser import Browser

    if missing := Browser.missing():
        pytest.skip(f"PAGES ARE NOT OPENED ON THIS MACHINE: {missing}")
    with Browser() as opened:
        yield opened


@pytest.fixture
def s3(
    swift_server: dict[str, str], swift_client: Any, _aws: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> str:
    """The URL of an empty bucket of this test's own on a real S3 server (OpenStack Swift over loopback)."""
    from pipeline.storage import s3 as module

    for name, value in swift_server.items():
        _aws.setenv(name, value)
    module._clients[os.getpid(), "s3"] = swift_client
    _aws.setattr("pipeline.runs.lease.PAUSE_SECONDS", 0.05)  # nobody else takes the runs of a test
    bucket = f"{re.sub(r'[^a-z0-9]+', '-', request.node.name.lower()).strip('-')[:40]}-{next(_numbers)}"
    swift_client.create_bucket(Bucket=bucket)
    return f"s3://{bucket}"


@pytest.fixture(scope="session")
def google(swift_server: dict[str, str]) -> Iterator[Google]:
    """A stand-in for Google's store, in front of the session's S3 server."""
    from servers.google import Google

    key = swift_server["AWS_ACCESS_KEY_ID"], swift_server["AWS_SECRET_ACCESS_KEY"]
    with Google(swift_server["AWS_ENDPOINT_URL_S3"], key) as started:
        yield started


@pytest.fixture(scope="session")
def google_client(google: Google) -> Any:
    """The client of gs:// that tests share."""
    from pipeline.storage import s3 as module
    from pipeline.storage.stores import STORES

    with pytest.MonkeyPatch.context() as patch:
        for name, value in google.environment.items():
            patch.setenv(name, value)
        module._clients.pop((os.getpid(), "gs"), None)
        return module.s3_client(STORES["gs"])


@pytest.fixture
def gs(s3: str, google: Google, google_client: Any, _aws: pytest.MonkeyPatch) -> str:
    """The bucket of `s3` as gs://, through a stand-in for Google's store."""
    from pipeline.storage import s3 as module

    for name, value in google.environment.items():
        _aws.setenv(name, value)
    module._clients[os.getpid(), "gs"] = google_client
    return s3.replace("s3://", "gs://")


@pytest.fixture(scope="session")
def fault_proxy(swift_server: dict[str, str]) -> Iterator[FaultProxy]:
    """What `faults` clears and lends to each test."""
    from servers.fault_proxy import FaultProxy

    with FaultProxy(swift_server["AWS_ENDPOINT_URL_S3"]) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def new_fault_client(swift_server: dict[str, str], fault_proxy: FaultProxy) -> Callable[[], Any]:
    """Makes an S3 client that reaches the server through the proxy, with the time limits of the moment."""
    return lambda: _make_client({**swift_server, "AWS_ENDPOINT_URL_S3": fault_proxy.url})


@pytest.fixture(scope="session")
def fault_client(new_fault_client: Callable[[], Any]) -> Any:
    """The S3 client that tests with `faults` share."""
    return new_fault_client()


@pytest.fixture
def faults(s3: str, fault_proxy: FaultProxy, fault_client: Any, _aws: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """The server of `s3`, from here on behind a proxy that injects the faults that the test adds."""
    from pipeline.storage import s3 as module

    _aws.setenv("AWS_ENDPOINT_URL_S3", fault_proxy.url)
    module._clients[os.getpid(), "s3"] = fault_client
    fault_proxy.clear()
    yield fault_proxy
    fault_proxy.clear()
