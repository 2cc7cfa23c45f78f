"""A terminal for tests: commands that run in one, and what then stands on it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
import threading
import unicodedata
from collections.abc import Callable, Mapping, Sequence

CONTROL = re.compile(rb"\x1b\[(\??)([0-9;]*)([A-Za-z])|\x1b.?")


class Screen:
    """What bytes put onto a terminal of so many columns, of which no line scrolls away. Knows the controls that are
    used here: \\r, \\n, \\b, cursor up, erase the line's and the screen's rest, and wrapping off and on."""

    def __init__(self, columns: int = 80) -> None:
        self.columns = columns
        self.rows: list[list[str]] = [[]]
        self.row = self.column = 0
        self.wraps = True
        self.unknown: list[bytes] = []
        """Escape sequences that it does not know."""

    def feed(self, data: bytes) -> Screen:
        at = 0
        while at < len(data):
            if match := CONTROL.match(data, at):
                self._control(match)
                at = match.end()
                continue
            end = data.find(b"\x1b", at)
            end = len(data) if end < 0 else end
            for character in data[at:end].decode("utf-8", "replace"):
                self._put(character)
            at = end
        return self

    def lines(self) -> list[str]:
        """The lines that are not empty, from top to bottom."""
        return [line for row in self.rows if (line := "".join(row).rstrip())]

    def _put(self, character: str) -> None:
        if character == "\r":
            self.column = 0
        elif character == "\n":
            self._down()
        elif character == "\b":
            self.column = max(0, self.column - 1)
        elif character >= " ":
            width = 2 if unicodedata.east_asian_width(character) in "WF" else 1
            if self.column + width > self.columns:
                if not self.wraps:
                    self.column = self.columns - width
                else:
                    self._down()
                    self.column = 0
            row = self.rows[self.row]
            row.extend(" " * (self.column + width - len(row)))
            row[self.column : self.column + width] = [character, *[""] * (width - 1)]
            self.column += width

    def _down(self) -> None:
        self.row += 1
        if self.row == len(self.rows):
            self.rows.append([])

    def _control(self, match: re.Match[bytes]) -> None:
        private, number, final = match.groups()
        if final == b"A":
            self.row = max(0, self.row - int(number or 1))
        elif final == b"K" and number in (b"", b"0"):
            del self.rows[self.row][self.column :]
        elif final == b"J" and number in (b"", b"0"):
            del self.rows[self.row][self.column :]
            del self.rows[self.row + 1 :]
        elif private and number == b"7":
            self.wraps = final == b"h"
        elif final != b"m":
            self.unknown.append(match[0])


def in_terminal(
    command: Sequence[str],
    columns: int = 80,
    rows: int = 24,
    environment: Mapping[str, str] | None = None,
    heard: Callable[[bytes, subprocess.Popen[bytes]], object] = lambda data, process: None,
    seconds: float = 60.0,
) -> tuple[int, bytes]:
    """Run a command with a terminal as its standard input, output and error. Returns its exit status and what it wrote.

    heard: called with each piece of it. seconds: time after which it is killed.
    """
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    said = b""
    try:
        with subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env=dict(environment or os.environ),
        ) as process:
            os.close(slave)
            limit = threading.Timer(seconds, process.kill)
            limit.start()
            while True:
                try:
                    data = os.read(master, 65536)
                except OSError:  # nobody has the terminal open any more
                    break
                if not data:
                    break
                said += data
                heard(data, process)
            limit.cancel()
        return process.returncode, said
    finally:
        os.close(master)
