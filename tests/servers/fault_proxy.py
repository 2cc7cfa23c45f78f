"""An HTTP proxy in front of an S3 server, in a thread of the test's own process, that injects faults by rule.

Requests go on byte for byte (S3's signatures cover the Host header), one connection to the server each. Bodies are held
in memory. A rule counts what it did, so that a test can claim that its fault really happened.
"""

from __future__ import annotations

import http.client
import http.server
import os
import random
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal
from urllib.parse import urlsplit

SLOW_DOWN = b"""<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message><RequestId>fault</RequestId></Error>"""

Kind = Literal["slow_down", "reset", "lose", "cut", "stall", "flip"]


@dataclass(kw_only=True)
class Fault:
    """One rule: what happens to which requests.

    slow_down: 503 in S3's words; the server is not asked.
    reset:     the connection is reset, before the server is asked or, with `at`, in the middle of the answer's body.
    lose:      the server does what it is asked; the connection is reset instead of its answer.
    cut:       the answer's body ends after `at` bytes, with an orderly end of the connection.
    stall:     silence for `seconds`, before the server is asked or, with `at`, in the middle of the answer's body.
    flip:      a bit of byte `at` of the body is turned: of the request's where it is a PUT, else of the answer's.
    """

    kind: Kind
    method: str = ""
    """Only requests with this method."""
    key: str = ""
    """Only requests with this in their path or query."""
    times: int | None = None
    """At most so many faults."""
    every: int = 1
    """Every n-th of the requests that match."""
    after: str = ""
    """A pattern: only once a request has come whose "METHOD target" it is found in; that one is served."""
    until: str = ""
    """A pattern: no more once a request has come that it is found in; that one is served."""
    lasts: float = float("inf")
    """Seconds from the first fault on; none later."""
    probability: float = 1.0
    """Of those, a share drawn with `seed`."""
    seed: int = 0
    at: int | None = None
    """Bytes of the body before the fault; in a shorter body, its last byte."""
    seconds: float = 0.0
    injected: int = 0
    """Faults that happened."""
    _matched: int = 0
    _awaits: bool = field(init=False)
    _ends: float = float("inf")
    _random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._awaits = bool(self.after)

    def strikes(self, method: str, target: str) -> bool:
        """Whether this request is one of those; counts it."""
        if self._awaits:
            self._awaits = not re.search(self.after, f"{method} {target}")
            return False
        if self.until and re.search(self.until, f"{method} {target}"):
            self._ends = 0.0
        if (self.method and method != self.method) or self.key not in target:
            return False
        self._matched += 1
        if self._matched % self.every or (self.times is not None and self.injected >= self.times):
            return False
        if self._random.random() >= self.probability or time.monotonic() > self._ends:
            return False
        if not self.injected:
            self._ends = time.monotonic() + self.lasts
        self.injected += 1
        return True

    def place(self, body: bytes) -> int:
        """The byte of `body` at which it happens."""
        return max(min(self.at or 0, len(body) - 1), 0)


class FaultProxy:
    """`with FaultProxy(url) as proxy:` serves on `proxy.url`. Rules are asked in the order in which they were added."""

    def __init__(self, backend: str) -> None:
        parts = urlsplit(backend)
        self.backend = (parts.hostname or "", parts.port or 80)
        self.requests: list[str] = []
        """ "METHOD target" of everything that came, in order."""
        self.stopping = threading.Event()
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def add(self, fault: Fault) -> Fault:
        """From now on; returns the rule, whose `injected` counts."""
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """No more faults, and no requests noted."""
        with self._lock:
            self._faults.clear()
            self.requests.clear()

    def fault(self, method: str, target: str) -> Fault | None:
        """What happens to this request."""
        with self._lock:
            self.requests.append(f"{method} {target}")
            return next((fault for fault in self._faults if fault.strikes(method, target)), None)

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._thread.join()
        self._server.close_connections()
        self._server.server_close()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = False
    request_queue_size = 128

    def __init__(self, proxy: FaultProxy) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.proxy = proxy
        self.connections: set[socket.socket] = set()

    def close_connections(self) -> None:
        """Wake the threads that wait for another request."""
        for connection in list(self.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def handle_error(self, *_: object) -> None:
        """A client that went away is nothing to tell."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server
    connection: socket.socket

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""

    def _serve(self) -> None:
        fault = self.server.proxy.fault(self.command, self.path)
        kind = fault.kind if fault else None
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if fault and fault.at is None and kind == "reset":
            return self._reset()
        if fault and fault.at is None and kind == "stall":
            return self._stall(fault)
        if kind == "slow_down":
            return self._answer(503, "Slow Down", [("Content-Type", "application/xml")], SLOW_DOWN, None)
        if fault and kind == "flip" and self.command == "PUT":
            body, fault = _flipped(body, fault.place(body)), None
        connection = http.client.HTTPConnection(*self.server.proxy.backend, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect"):
                    connection.putheader(name, value)
            connection.endheaders(body or None)
            answer = connection.getresponse()
            status, reason, headers, data = answer.status, answer.reason, answer.getheaders(), answer.read()
        finally:
            connection.close()
        if kind == "lose":
            return self._reset()
        return self._answer(status, reason, headers, data, fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

    def _answer(
        self, status: int, reason: str, headers: list[tuple[str, str]], body: bytes, fault: Fault | None
    ) -> None:
        """Send an answer, framed as the server framed it (chunked or with a length), up to where the fault lies."""
        if fault is not None and not body:
            fault.injected, fault = fault.injected - 1, None  # nothing to damage
        named = {name.lower() for name, _ in headers}
        if not named & {"content-length", "transfer-encoding"}:
            headers = [*headers, ("Content-Length", str(len(body)))]
        lines = [f"HTTP/1.1 {status} {reason}"]
        lines += [f"{name}: {value}" for name, value in headers if name.lower() != "connection"]
        head = "\r\n".join([*lines, "", ""]).encode("latin-1")
        before, after = b"", b""
        if "transfer-encoding" in named:
            before, after = (b"%x\r\n" % len(body), b"\r\n0\r\n\r\n") if body else (b"", b"0\r\n\r\n")
        if self.command == "HEAD":
            before, body, after = b"", b"", b""
        if fault is None:
            self.connection.sendall(head + before + body + after)
        elif fault.kind == "flip":
            self.connection.sendall(head + before + _flipped(body, fault.place(body)) + after)
        else:
            self.connection.sendall(head + before + body[: fault.place(body)])
            self.close_connection = True
            if fault.kind == "reset":
                self.server.proxy.stopping.wait(0.02)  # a reset at once could overtake what was sent
                self._reset()
            elif fault.kind == "stall":
                self._stall(fault)

    def _reset(self) -> None:
        self.close_connection = True
        self.server.connections.discard(self.connection)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())  # close() would wait for the files that were made of the socket

    def _stall(self, fault: Fault) -> None:
        self.close_connection = True
        self.server.proxy.stopping.wait(fault.seconds)


def _flipped(body: bytes, place: int) -> bytes:
    return body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :] if body else body
