"""Headers of tar archives that nobody vouches for: sizes are never negative and never beyond 2**53 bytes."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import ShardCorrupt

BLOCK = 512
"""Bytes of a tar block."""
LARGEST = 2**53
"""Largest size of a member in bytes, beyond that of any object in a store."""
OCTAL = frozenset(b"01234567")


@dataclass(frozen=True)
class Header:
    """The fields of a tar header that are read. size: bytes of the content, 0 to LARGEST. kind: b"0" for a file."""

    name: bytes
    size: int
    kind: bytes


def parse_header(block: bytes | memoryview) -> Header:
    """Parse one 512-byte tar header. Raises ShardCorrupt when its checksum or a number in it is wrong."""
    block = bytes(block)
    if len(block) != BLOCK:
        raise ShardCorrupt(f"a tar header has {len(block)} of {BLOCK} bytes")
    checksum = _octal(block[148:156])
    if checksum is None:
        raise ShardCorrupt("a tar header has no readable checksum")
    unsigned = sum(block) - sum(block[148:156]) + 8 * 0x20
    if checksum != unsigned and checksum != unsigned - 256 * _negative_bytes(block):
        raise ShardCorrupt("a tar header does not match its checksum")
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and (prefix := block[345:500].split(b"\0", 1)[0]):
        name = prefix + b"/" + name
    return Header(name, _size(block[124:136]), block[156:157].replace(b"\0", b"0"))


def pax_fields(data: bytes) -> dict[bytes, bytes]:
    """The fields of a pax header, stored as "length key=value\\n". Raises ShardCorrupt."""
    fields = {}
    while data:
        digits, _, rest = data.partition(b" ")
        if not digits.isdigit() or len(digits) > 6 or not len(digits) + 1 < int(digits) <= len(data):
            raise ShardCorrupt("a pax header is damaged")
        record, data = rest[: int(digits) - len(digits) - 1], data[int(digits) :]
        key, equals, value = record.removesuffix(b"\n").partition(b"=")
        if not equals or not record.endswith(b"\n") or key.startswith(b"GNU.sparse"):
            raise ShardCorrupt("a pax header is damaged, or describes a sparse file")
        fields[key] = value
    return fields


def pax_size(text: bytes) -> int:
    """The size in a pax header, in bytes. Raises ShardCorrupt."""
    if not text.isdigit() or len(text) > 20 or int(text) > LARGEST:
        raise ShardCorrupt("a pax header holds a size that is not a number of bytes")
    return int(text)


def _octal(field: bytes) -> int | None:
    """A number in octal digits, with blanks and zeros around it; None for anything else (a sign, an underscore)."""
    digits = field.strip(b" \0")
    return int(digits, 8) if digits and OCTAL.issuperset(digits) else None


def _size(field: bytes) -> int:
    """A size in octal, or in GNU's base 256 if the first bit is set. Raises ShardCorrupt."""
    if field[0] == 0x80:
        size: int | None = int.from_bytes(field[1:], "big")
    else:
        size = _octal(field) if field.strip(b" \0") else 0
    if size is None or size > LARGEST:
        raise ShardCorrupt("a tar header holds a size that is not a number of bytes")
    return size


def _negative_bytes(block: bytes) -> int:
    """Number of bytes outside the checksum field that old writers summed as negative."""
    return sum(byte > 127 for byte in block[:148]) + sum(byte > 127 for byte in block[156:])
