"""Decodes JPEGs so that missing data are found.

libjpeg fills what is missing with grey, or leaves it blurred, and says so in warnings that Pillow drops. Here the
decoder gets everything but the end mark, then FILL, which is long enough for its read-ahead and too short for a picture
block. A decoder that wants more after that has not seen the whole picture.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from PIL import Image, ImageFile

from pipeline.errors import RecordRejected

START = b"\xff\xd8\xff"
END_MARK = b"\xff\xd9"
MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")  # any but those that stand inside a scan
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)  # other coders cannot be fed bit by bit
SCAN, SPACING, END, SECOND_START, TEMPORARY = 0xDA, 0xDD, 0xD9, 0xD8, 0x01
MOST_SCANS = 100  # encoders write 20 at most; each costs as much as a whole decoding
MOST_SEGMENTS = 10_000
SMALL = 262_144  # bytes of a file whose header takes no time, whatever it holds
MOST_GAP = 65_536  # bytes between two segments of the header
FILL = b"\xff\x00" * 8  # libjpeg reads up to 8 bytes ahead
SINGLE = b"\xff\x00"
SINGLES = 16  # further bytes that are fed one by one


class Segments(NamedTuple):
    """What the segments of a JPEG say. end: offset of its end mark, -1 without one. frame: the marker of its frame
    header, 0 without one. several: whether a decoder must read all scans before the first row. undone: whether it ends
    inside a refinement of averages, though other refinements are missing. restarts: restart marks that its last scan
    lacks."""

    end: int = -1
    frame: int = 0
    several: bool = False
    undone: bool = False
    restarts: int = 0


def refuse_header(data: bytes) -> None:
    """Raises RecordRejected, image_unreadable, for more segments, or more bytes between them, than a header has before
    its first scan. Pillow would read each of them in Python."""
    if len(data) <= SMALL:
        return
    position = 2
    for _ in range(MOST_SEGMENTS):
        match = MARKER.search(data, position, position + MOST_GAP)
        if match is None:
            if len(data) - position > MOST_GAP:
                break
            return
        if match[1][0] in (SCAN, END):
            return
        position = match.end()
        if match[1][0] not in (SECOND_START, TEMPORARY):
            position += int.from_bytes(data[position : position + 2], "big")
    raise RecordRejected("image_unreadable", "its header has too many segments, or too much between them")


def read_segments(data: bytes) -> Segments:
    """Reads the headers of a JPEG. Raises RecordRejected, image_too_large, for more than MOST_SCANS scans, and
    image_unreadable for more than MOST_SEGMENTS segments."""
    frame, header, spacing, position, end = 0, b"", 0, 2, -1
    scans: list[bytes] = []
    scan_start = 0
    for _ in range(MOST_SEGMENTS):
        match = MARKER.search(data, position)
        if match is None:
            break
        marker, position = match[1][0], match.end()
        if marker == END:
            end = match.start()
            break
        if marker in (SECOND_START, TEMPORARY):
            continue
        length = int.from_bytes(data[position : position + 2], "big")
        body = data[position + 2 : position + length] if length <= 1024 else b""
        position += length
        if marker in FRAMES:
            frame, header = marker, body
        elif marker == SPACING and len(body) == 2:
            spacing = int.from_bytes(body, "big")
        elif marker == SCAN:
            scans.append(body)
            scan_start = position
            if len(scans) > MOST_SCANS:
                raise RecordRejected("image_too_large", f"it has more than {MOST_SCANS} scans")
    else:
        raise RecordRejected("image_unreadable", f"it has more than {MOST_SEGMENTS} segments")
    if not scans or not scans[0] or len(header) < 6 + 3 * header[5]:
        return Segments(end, frame)
    several = frame == 0xC2 or scans[0][0] < header[5]
    missing = 0
    if spacing and end > 0:
        marks = sum(data.count(bytes((0xFF, 0xD0 + i)), scan_start, end) for i in range(8))
        missing = max(0, -(-_units(header, scans[-1]) // spacing) - 1 - marks)
    return Segments(end, frame, several, several and _undone(scans), missing)


def load_jpeg(image: ImageFile.ImageFile, data: bytes, segments: Segments) -> None:
    """Decodes an opened JPEG, as its `load` does. Raises RecordRejected, image_truncated, where data are missing, and
    what Pillow raises."""
    if segments.frame not in HUFFMAN_FRAMES or len(image.tile) != 1 or (segments.several and segments.end < 0):
        image.load()
        return
    if segments.restarts:
        raise RecordRejected("image_truncated", f"{segments.restarts} of its restart marks are missing")
    if segments.undone:
        raise RecordRejected("image_truncated", "it ends inside a scan")
    _, extents, _, arguments = image.tile[0]
    image.load_prepare()
    decoder = Image._getdecoder(image.mode, "jpeg", arguments, image.decoderconfig)
    try:
        decoder.setimage(image.im, extents)
        body = (data if segments.end < 0 else data[: segments.end].rstrip(b"\xff")) + FILL
        used, status = decoder.decode(body)
        if used >= 0 and segments.several:
            used, status = _feed_last_scan(decoder, body[used:])
        elif used >= 0:
            raise RecordRejected("image_truncated", "its data end before its last row")
    finally:
        decoder.cleanup()
    if used >= 0 or status < 0:
        raise OSError(f"the decoder ended with status {status}")
    image.tile = []


def _feed_last_scan(decoder: Image.core.ImagingDecoder | ImageFile.PyDecoder, rest: bytes) -> tuple[int, int]:
    """Ends a decoder that has read all scans and looks for the next marker. Such a one passes over whatever it is fed;
    one that is still inside its last scan leaves the bytes of a block that is not complete. Raises RecordRejected."""
    for _ in range(SINGLES):
        if rest:
            raise RecordRejected("image_truncated", "its data end inside its last scan")
        used, status = decoder.decode(SINGLE)
        if used < 0:
            return used, status
        rest = SINGLE[used:]
    used, status = decoder.decode(rest + END_MARK)
    return used, status


def _units(header: bytes, scan: bytes) -> int:
    """Number of the smallest units that a scan codes: blocks of 8 x 8 of one component, or groups of blocks of several.
    header, scan: the bodies of both headers."""
    height, width, count = int.from_bytes(header[1:3], "big"), int.from_bytes(header[3:5], "big"), header[5]
    samplings = {header[6 + 3 * i]: header[7 + 3 * i] for i in range(count)}
    across, down = max(s >> 4 for s in samplings.values()), max(s & 15 for s in samplings.values())
    if scan[:1] == b"\x01" and len(scan) > 1:  # of one component
        own = samplings.get(scan[1], 0x11)
        width, height = -(-width * (own >> 4) // max(1, across)), -(-height * (own & 15) // max(1, down))
        across = down = 1
    return math.ceil(width / (8 * max(1, across))) * math.ceil(height / (8 * max(1, down)))


def _undone(scans: list[bytes]) -> bool:
    """Whether the last scan refines averages, in which one bit a block shows no missing data, and bits of other
    coefficients are still to come. scans: their headers."""
    low_bits: dict[int, int] = {}  # of the coefficients beside the average, by component
    for scan in scans:
        count = scan[0] if scan else 0
        if len(scan) < 4 + 2 * count:
            return False
        first, bits = scan[1 + 2 * count], scan[3 + 2 * count]
        if first:
            low_bits |= {scan[1 + 2 * i]: bits & 15 for i in range(count)}
    return first == 0 and bits >> 4 > 0 and any(low_bits.values())
