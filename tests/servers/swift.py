"""OpenStack Swift with its S3 interface: a real, eventually consistent object store from PyPI that needs no root.

It keeps one replica in one folder. The account, container and object servers and the proxy are one process each.
"""

from __future__ import annotations

import getpass
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import TracebackType

ACCESS_KEY, SECRET_KEY = "testkey", "testsecret"
START_SECONDS = 180.0  # takes a few seconds on an idle machine
BACKENDS = ("account", "container", "object")

SWIFT_CONF = """
[swift-hash]
swift_hash_path_prefix = pre
swift_hash_path_suffix = suf
[storage-policy:0]
name = default
default = yes
policy_type = replication
[swift-constraints]
max_header_size = 16384
"""

COMMON = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = {workers}
user = {user}
swift_dir = {folder}
devices = {folder}/disk
mount_check = false
recon_cache_path = {folder}/cache
fallocate_reserve = 0
log_level = WARNING
log_address = /dev/null
db_preallocation = off
"""

BACKEND = """
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
"""

FILTERS = {
    "catch_errors": "",
    "gatekeeper": "",
    "healthcheck": "",
    "cache": "memcache_servers = 127.0.0.1:{unused}",
    "listing_formats": "",
    "bulk": "",
    "s3api": "s3_acl = false\nlocation = us-east-1\nallow_multipart_uploads = true\nmin_segment_size = 5242880",
    "tempauth": f"user_test_{ACCESS_KEY} = {SECRET_KEY} .admin",
    "copy": "",
    "slo": "rate_limit_under_size = 0",
    "dlo": "",
    "versioned_writes": "allow_versioned_writes = true\nallow_object_versioning = true",
    "symlink": "",
}
EGG_NAMES = {"cache": "memcache"}

RINGS = """
import sys
from swift.common.ring import RingBuilder
for kind, port in (word.split(":") for word in sys.argv[2:]):
    address = {"ip": "127.0.0.1", "port": int(port)}
    address |= {f"replication_{name}": value for name, value in address.items()}
    builder = RingBuilder(part_power=4, replicas=1, min_part_hours=0)
    builder.add_dev({"region": 1, "zone": 1, "device": "sda", "weight": 1.0, "meta": "", **address})
    builder.rebalance()
    builder.get_ring().save(f"{sys.argv[1]}/{kind}.ring.gz")
"""

# Swift reads /etc/swift/swift.conf unless another path is set before its servers are imported.
RUNNER = """
import importlib, sys
import swift.common.utils as utils
kind, conf, utils.SWIFT_CONF_FILE = sys.argv[1:4]
sys.argv = [f"swift-{kind}-server", conf]
sys.exit(importlib.import_module("swift." + {"object": "obj"}.get(kind, kind) + ".server").main())
"""


class Swift:
    """`with Swift(folder) as server:` runs it. `server.environment` holds the variables with which boto3 reaches it.

    memcached: whether the proxy keeps what it knows of accounts and containers in memcached, which is then started with
    it, as every Swift that is deployed does; without one it asks their servers again for each request.
    """

    def __init__(self, folder: Path, *, memcached: bool = False) -> None:
        self.folder, self.memcached = folder, memcached
        self.ports = dict(zip((*BACKENDS, "proxy", "unused"), free_ports(len(BACKENDS) + 2)))
        self.processes: list[subprocess.Popen[bytes]] = []
        self.environment = {
            "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{self.ports['proxy']}",
            "AWS_ACCESS_KEY_ID": f"test:{ACCESS_KEY}",
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def __enter__(self) -> Swift:
        for name in ("disk/sda", "cache", "log"):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "swift.conf").write_text(SWIFT_CONF)
        self._build_rings()
        for kind in BACKENDS:
            self._write_conf(kind, BACKEND.format(kind=kind))
        self._write_conf("proxy", self._proxy())
        try:
            if self.memcached:
                port = str(self.ports["unused"])
                command = ["memcached", "-l", "127.0.0.1", "-p", port, "-U", "0", "-u", getpass.getuser()]
                self.processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL))
            for kind in (*BACKENDS, "proxy"):
                self._start(kind)
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End every server."""
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes.clear()

    def _build_rings(self) -> None:
        """Build a partition table per server, each with the only disk."""
        ports = [f"{kind}:{self.ports[kind]}" for kind in BACKENDS]
        command = [sys.executable, "-W", "ignore", "-c", RINGS, str(self.folder), *ports]
        done = subprocess.run(command, capture_output=True, check=False, text=True)
        if done.returncode:
            raise RuntimeError(f"building Swift's rings failed: {done.stderr}")

    def _write_conf(self, kind: str, rest: str) -> None:
        values = {"port": self.ports[kind], "workers": 0, "user": getpass.getuser(), "folder": self.folder}
        (self.folder / f"{kind}.conf").write_text(COMMON.format(**values) + rest)

    def _proxy(self) -> str:
        """The configuration of the proxy and its filters."""
        parts = [f"\n[pipeline:main]\npipeline = {' '.join(FILTERS)} proxy-server"]
        parts.append("[app:proxy-server]\nuse = egg:swift#proxy\naccount_autocreate = true")
        for name, settings in FILTERS.items():
            parts.append(
                f"[filter:{name}]\nuse = egg:swift#{EGG_NAMES.get(name, name)}\n{settings.format(**self.ports)}"
            )
        return "\n".join(parts) + "\n"

    def _start(self, kind: str) -> None:
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            RUNNER,
            kind,
            f"{self.folder}/{kind}.conf",
            f"{self.folder}/swift.conf",
        ]
        with (self.folder / "log" / f"{kind}.log").open("wb") as log:
            self.processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log))

    def _wait(self) -> None:
        """Wait until every server listens and the proxy reports that it is healthy."""
        deadline = time.monotonic() + START_SECONDS
        health_urls = [f"http://127.0.0.1:{self.ports['proxy']}/healthcheck"]
        waiting_backends = list(BACKENDS)
        while health_urls or waiting_backends:
            if time.monotonic() > deadline or any(process.poll() is not None for process in self.processes):
                logs = {path.name: path.read_text()[-2000:] for path in (self.folder / "log").iterdir()}
                raise RuntimeError(f"Swift did not start within {START_SECONDS:.0f} s: {logs}")
            time.sleep(0.05)
            waiting_backends = [kind for kind in waiting_backends if not _listens(self.ports[kind])]
            try:
                with urllib.request.urlopen(health_urls[0], timeout=5):
                    health_urls = []
            except (OSError, IndexError):
                pass


def free_ports(count: int) -> list[int]:
    """`count` different unused ports of the loopback interface."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
