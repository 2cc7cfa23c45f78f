"""What to do about an input shard that cannot be read."""

from __future__ import annotations

import re
import shlex

UNPACK = {
    b"\x1f\x8b": "it is gzip-compressed: unpack it with gunzip",
    b"BZ": "it is bzip2-compressed: unpack it with bunzip2",
    b"\xfd7": "it is xz-compressed: unpack it with unxz",
    b"(\xb5": "it is zstd-compressed: unpack it with unzstd",
    b"PK": "it is a zip archive: unzip it, and pack the files with tar --sort=name",
}
"""What a file is that is no tar, and what to do with it, by its first two bytes."""
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
PAGE = re.compile(rb"\s*<(?:!doctype|html|\?xml)", re.IGNORECASE)
LINKS = {b"1": "a hard link", b"2": "a symbolic link"}
AGAIN = "Fetch it again"
PLAIN_NAME = re.compile(r"[\w./+@%~-]+")


def no_tar(start: bytes, whole: int) -> tuple[str, str]:
    """What a file is that does not begin like a tar, and what to do, "" when the first says it.

    start: its first bytes. whole: bytes that a tar must have at least.
    """
    if start.startswith(LFS_POINTER):
        return "it is a pointer of Git LFS", "Get the file itself with git lfs pull"
    if start[:2] in UNPACK:
        return UNPACK[start[:2]], ""
    if PAGE.match(start):
        return "it is a web page, not a tar", AGAIN
    if len(start) < whole:
        return f"it is cut in a header: it ends at byte {len(start)}", AGAIN
    return "it is not a tar", AGAIN


def no_file(kind: bytes) -> tuple[str, str]:
    """What else is to be said of a member that is no file, and what to do. kind: its type in the tar."""
    if kind in LINKS:
        return f" (it is {LINKS[kind]})", "Pack it again with tar --dereference --hard-dereference, which stores files"
    return "", "Pack it again with plain files alone"


def advice(first: str, name: str) -> str:
    """The end of a message. first: what helps, "" when that was said. name: of the shard in its plan, "" without
    one."""
    leave_out = f"leave it out: leave_out={argument(name)}" if name else "leave it out"
    return f"{first}, or {leave_out}" if first else f"Or {leave_out}"


def argument(name: str) -> str:
    """A name as the value of a key that takes a list of names, in a shell. Commas and quotes would part a list, so that
    other than plain names are no lists."""
    return f"[{name}]" if PLAIN_NAME.fullmatch(name) else shlex.quote(name)
