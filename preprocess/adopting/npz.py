"""Reads the arrays of .npz files of other software: a zip archive of .npy files, as numpy.savez writes it.

Only what such files need is read: one archive without a comment, its entries stored or deflated. Sizes are checked
before anything is taken from them, and every array's checksum after. Nothing is unpickled.
Source: PKWARE, .ZIP File Format Specification (APPNOTE.TXT), sections 4.3.7, 4.3.12 and 4.3.16.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from pipeline.errors import ParseError

MOST_ARRAYS = 1024
END = struct.Struct("<4s4H2LH")
ENTRY = struct.Struct("<4s6H3L5H2L")
LOCAL = struct.Struct("<4s5H3L2H")
ENCRYPTED = 0x1 | 0x40 | 0x2000
STORED, DEFLATED = 0, 8
BEYOND = 0xFFFFFFFF
"""Stands for a number of more than 32 bits, which no array of a record has."""


@dataclass(frozen=True)
class Entry:
    """One array of an archive. packed, size: bytes in the archive, and of the .npy file. at: where its local header
    begins."""

    method: int
    crc: int
    packed: int
    size: int
    at: int


def npz_entries(data: memoryview) -> dict[str, Entry]:
    """The arrays of a .npz file by name, without ".npy". Raises ParseError for what numpy.savez does not write."""
    if len(data) < END.size or bytes(data[:2]) != b"PK":
        raise ParseError("it is not a .npz file")
    end = len(data) - END.size
    mark, disk, first_disk, here, count, size, start, comment = END.unpack_from(data, end)
    if mark != b"PK\5\6" or comment or disk or first_disk or here != count:
        raise ParseError("it is cut, or no .npz file that numpy writes")
    if count > MOST_ARRAYS or start + size != end:
        raise ParseError(f"its directory is damaged, or lists more than {MOST_ARRAYS} arrays")
    entries: dict[str, Entry] = {}
    at = start
    for _ in range(count):
        name, entry, at = _entry(data, at, end)
        if name in entries:
            raise ParseError(f"it holds {name[:60]!r} twice")
        entries[name] = entry
    if at != end:
        raise ParseError("its directory is damaged")
    return entries


def _entry(data: memoryview, at: int, end: int) -> tuple[str, Entry, int]:
    """(name of the array, entry, where the next begins) of the directory's entry at `at`. Raises ParseError."""
    if at + ENTRY.size > end:
        raise ParseError("its directory is damaged")
    mark, _, _, flags, method, _, _, crc, packed, size, length, extra, comment, disk, _, _, local = ENTRY.unpack_from(
        data, at
    )
    stop = at + ENTRY.size + length + extra + comment
    if mark != b"PK\1\2" or stop > end or disk:
        raise ParseError("its directory is damaged")
    try:
        name = bytes(data[at + ENTRY.size : at + ENTRY.size + length]).decode()
    except UnicodeDecodeError:
        raise ParseError("the name of an array is not UTF-8") from None
    if not name.endswith(".npy"):
        raise ParseError(f"it holds {name[:60]!r}, which is no array")
    if flags & ENCRYPTED or method not in (STORED, DEFLATED) or BEYOND in (packed, size, local):
        raise ParseError(f"{name[:60]!r} is encrypted, compressed in another way than by deflate, or of 4 GB")
    return name.removesuffix(".npy"), Entry(method, crc, packed, size, local), stop


def npz_member(data: memoryview, entry: Entry, most: int) -> memoryview:
    """The .npy file of an entry, at most `most` bytes. Raises ParseError."""
    if entry.size > most:
        raise ParseError(f"an array takes {entry.size} bytes, limits.member_bytes={most}")
    if entry.at + LOCAL.size > len(data):
        raise ParseError("an array lies outside of the file")
    mark, _, flags, method, _, _, _, _, _, length, extra = LOCAL.unpack_from(data, entry.at)
    start = entry.at + LOCAL.size + length + extra
    if mark != b"PK\3\4" or method != entry.method or flags & ENCRYPTED or start + entry.packed > len(data):
        raise ParseError("an array lies outside of the file, or is not what the directory says")
    packed = data[start : start + entry.packed]
    content = packed if entry.method == STORED else memoryview(_inflated(packed, entry.size))
    if len(content) != entry.size or zlib.crc32(content) != entry.crc:
        raise ParseError("an array is damaged: its size or checksum is not what the directory says")
    return content


def _inflated(packed: memoryview, size: int) -> bytes:
    """`size` deflated bytes. Raises ParseError when there are more or fewer."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = inflater.decompress(packed, size + 1)
    except zlib.error:
        raise ParseError("an array is damaged: it cannot be inflated") from None
    if not inflater.eof:
        raise ParseError("an array is damaged: it ends early, or is longer than the directory says")
    return content
