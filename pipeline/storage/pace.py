"""A least rate for answers over HTTP: a server that sends a byte now and then never runs into a timeout of silence."""

from __future__ import annotations

import io
import time
from typing import Any

SLOW_SECONDS = 60.0
"""An answer may take this long at any rate."""
LEAST_RATE = 1024.0
"""Bytes per second that an answer must reach on average once it has taken SLOW_SECONDS."""


class _PacedReader(io.RawIOBase):
    """The bytes of one answer. Time counts only while it waits for the server, not while its reader does other work."""

    def __init__(self, raw: Any) -> None:
        self._raw, self._seconds, self._bytes = raw, 0.0, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        began = time.monotonic()
        count = self._raw.readinto(buffer)
        self._seconds += time.monotonic() - began
        self._bytes += count or 0
        if self._seconds > SLOW_SECONDS and self._bytes < LEAST_RATE * self._seconds:
            raise TimeoutError(f"only {self._bytes} bytes came in {self._seconds:.0f} s")
        return count

    def fileno(self) -> int:
        return self._raw.fileno()

    def close(self) -> None:
        self._raw.close()
        super().close()


class _PacedSocket:
    """A socket whose answers are read through a _PacedReader; everything else is the socket's own."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket

    def makefile(self, mode: str = "r", buffering: int = -1, **options: Any) -> Any:
        if mode != "rb":
            return self._socket.makefile(mode, buffering, **options)
        reader = _PacedReader(self._socket.makefile("rb", buffering=0))
        return reader if buffering == 0 else io.BufferedReader(reader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)


def keep_pace(client: Any) -> None:
    """Make a boto3 client, which has sent nothing yet, give up answers that are slower than LEAST_RATE: they end in the
    read timeouts that it has for silence."""
    from botocore.awsrequest import (
        AWSHTTPConnection,
        AWSHTTPConnectionPool,
        AWSHTTPSConnection,
        AWSHTTPSConnectionPool,
    )

    class Connection(AWSHTTPConnection):  # type: ignore[misc]
        sock: Any

        def connect(self) -> None:
            super().connect()
            self.sock = _PacedSocket(self.sock)

    class SecureConnection(AWSHTTPSConnection):  # type: ignore[misc]
        sock: Any

        def connect(self) -> None:
            super().connect()
            self.sock = _PacedSocket(self.sock)

    class Pool(AWSHTTPConnectionPool):  # type: ignore[misc]
        ConnectionCls = Connection

    class SecurePool(AWSHTTPSConnectionPool):  # type: ignore[misc]
        ConnectionCls = SecureConnection

    session = client._endpoint.http_session
    session._pool_classes_by_scheme = {"http": Pool, "https": SecurePool}
    session._manager.pool_classes_by_scheme = session._pool_classes_by_scheme
