"""An HTTP proxy in front of an S3 server, in a thread of the test's process, which injects faults by rule.

Requests are passed on byte for byte (S3's signatures cover the Host header), each over its own connection to the
server. Bodies are held in memory. A rule counts its faults, so that a test can assert that its fault really happened.
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

    slow_down: answers 503 in S3's words without asking the server.
    reset:     resets the connection before the server is asked or, with `at`, in the middle of the response body.
    lose:      lets the server execute the request, then resets the connection instead of answering.
    cut:       ends the response body after `at` bytes and closes the connection in order.
    stall:     is silent for `seconds`, before the server is asked or, with `at`, in the middle of the response body.
    flip:      flips a bit of byte `at` of the body: of the request for a PUT, otherwise of the response.
    """

    kind: Kind
    method: str = ""
    """Only requests with this method."""
    key: str = ""
    """Only requests whose path or query contains this."""
    times: int | None = None
    """At most this many faults."""
    every: int = 1
    """Only every n-th of the matching requests."""
    after: str = ""
    """A pattern: faults begin after a request whose "METHOD target" matches it; that request is served."""
    until: str = ""
    """A pattern: faults end with a request whose "METHOD target" matches it; that request is served."""
    lasts: float = float("inf")
    """Seconds after the first fault during which further faults may happen."""
    probability: float = 1.0
    """Share of the remaining requests, drawn with `seed`."""
    seed: int = 0
    at: int | None = None
    """Bytes of the body before the fault; in a shorter body the fault is at its last byte."""
    seconds: float = 0.0
    injected: int = 0
    """Number of faults that have happened."""
    _matched: int = 0
    _awaits: bool = field(init=False)
    _ends: float = float("inf")
    _random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._awaits = bool(self.after)

    def strikes(self, method: str, target: str) -> bool:
        """Whether the fault happens to this request; counts it."""
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
        """The byte of `body` at which the fault happens."""
        return max(min(self.at or 0, len(body) - 1), 0)


class FaultProxy:
    """`with FaultProxy(url) as proxy:` serves on `proxy.url`. The first rule that applies, in order of addition, is
    used."""

    def __init__(self, backend: str) -> None:
        parts = urlsplit(backend)
        self.backend = (parts.hostname or "", parts.port or 80)
        self.requests: list[str] = []
        """ "METHOD target" of all requests in order."""
        self.stopping = threading.Event()
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def add(self, fault: Fault) -> Fault:
        """Apply a rule from now on. Returns the rule, whose `injected` counts its faults."""
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """Remove all rules and all recorded requests."""
        with self._lock:
            self._faults.clear()
            self.requests.clear()

    def fault(self, method: str, target: str) -> Fault | None:
        """Record a request. Returns the rule that applies to it, if any."""
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
        """Wake the threads that wait for another request on their connections."""
        for connection in list(self.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def handle_error(self, *_: object) -> None:
        """Print nothing: clients may disconnect at any time."""


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
        """Print nothing to stderr."""

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
        """Send a response, framed like the server's (chunked or with a length), up to the place of the fault."""
        if fault is not None and not body:
            fault.injected, fault = fault.injected - 1, None  # nothing to damage
        header_names = {name.lower() for name, _ in headers}
        if not header_names & {"content-length", "transfer-encoding"}:
            headers = [*headers, ("Content-Length", str(len(body)))]
        lines = [f"HTTP/1.1 {status} {reason}"]
        lines += [f"{name}: {value}" for name, value in headers if name.lower() != "connection"]
        head = "\r\n".join([*lines, "", ""]).encode("latin-1")
        prefix, suffix = b"", b""
        if "transfer-encoding" in header_names:
            prefix, suffix = (b"%x\r\n" % len(body), b"\r\n0\r\n\r\n") if body else (b"", b"0\r\n\r\n")
        if self.command == "HEAD":
            prefix, body, suffix = b"", b"", b""
        if fault is None:
            self.connection.sendall(head + prefix + body + suffix)
        elif fault.kind == "flip":
            self.connection.sendall(head + prefix + _flipped(body, fault.place(body)) + suffix)
        else:
            self.connection.sendall(head + prefix + body[: fault.place(body)])
            self.close_connection = True
            if fault.kind == "reset":
                self.server.proxy.stopping.wait(0.02)  # an immediate reset could overtake the data
                self._reset()
            elif fault.kind == "stall":
                self._stall(fault)

    def _reset(self) -> None:
        self.close_connection = True
        self.server.connections.discard(self.connection)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())  # close() would wait for the files made from the socket

    def _stall(self, fault: Fault) -> None:
        self.close_connection = True
        self.server.proxy.stopping.wait(fault.seconds)


def _flipped(body: bytes, place: int) -> bytes:
    return body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :] if body else body
