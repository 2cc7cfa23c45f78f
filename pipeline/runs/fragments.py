"""Fragments of parameters, and safetensors files of them. A file is written and hashed in one pass, as a whole and by
kind, so that the values of one kind can be read and proved without the others. Headers are believed only as far as they
agree with the file's size."""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor

from pipeline.config.values.bounds import Between
from pipeline.errors import CheckpointCorrupt, NotFound, ParseError
from pipeline.parsing.typed import build
from pipeline.parsing.values import parse_json
from pipeline.runs.names import checkpoint_folder
from pipeline.runs.stored import LARGEST, Digest
from pipeline.storage.base import Storage, local_errors

if TYPE_CHECKING:
    from pipeline.runs.checkpoint import Commit

PIECE = 16 * 1024 * 1024
"""Bytes written and hashed at once."""
CHUNK = 32 * 1024 * 1024
"""Bytes read and hashed at once."""
HEADER_BYTES = 1 << 26
"""Longest header: a fragment takes some hundred bytes of it."""
DIMENSIONS = 8
"""Most dimensions of a parameter."""
LABEL = re.compile(r"([^/]+)/(.+)@([0-9]{1,15})")
HEADER = ""
"""Takes the place of a kind where the section of a file that is its header is meant."""


@dataclass(frozen=True)
class Section:
    """Bytes of a file, from the end of the section before on: its header, or all its values of a kind."""

    kind: str
    bytes: Annotated[int, Between(0, 1 << 53)]
    sha256: Digest


@dataclass(frozen=True)
class Written:
    """A file that was written: its size in bytes, its SHA-256, and its sections in order."""

    bytes: int
    sha256: str
    sections: list[Section]


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> Written:
    """Write fp32 CPU tensors as a safetensors file. Those of one kind follow each other. Raises StorageError.

    The file is written and hashed in pieces straight from the tensors' memory, and other threads can run meanwhile.
    (The library's own writer holds Python's lock all the time, and a second copy of the state in memory.)
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32 and tensor.is_contiguous(), name
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [end, end := end + 4 * tensor.numel()],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    buffers = [(HEADER, memoryview(struct.pack("<Q", len(text)) + text))]
    buffers += [
        (name.partition("/")[0], tensor.numpy().view("u1").data) for name, tensor in tensors.items() if tensor.numel()
    ]
    digest, sections = hashlib.sha256(), list[Section]()
    with local_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb", buffering=0) as file:
            for kind, group in groupby(buffers, key=lambda pair: pair[0]):
                section_digest, size = hashlib.sha256(), 0
                for _, buffer in group:
                    size += len(buffer)
                    for start in range(0, len(buffer), PIECE):
                        piece = buffer[start : start + PIECE]
                        digest.update(piece)
                        section_digest.update(piece)
                        while piece:
                            piece = piece[file.write(piece) :]
                sections.append(Section(kind, size, section_digest.hexdigest()))
    assert are_sections(sections, 8 + len(text) + end), "the tensors of a kind do not follow each other"
    return Written(8 + len(text) + end, digest.hexdigest(), sections)


def are_sections(sections: Sequence[Section], size: int) -> bool:
    """Whether a file of `size` bytes can have these sections: first its header, then each kind once."""
    kinds = [section.kind for section in sections]
    whole = sum(section.bytes for section in sections) == size
    return whole and kinds[:1] == [HEADER] and len(set(kinds)) == len(kinds) and sections[0].bytes <= 8 + HEADER_BYTES


@dataclass(frozen=True)
class Fragment:
    """Contiguous elements of one flattened parameter.

    name: of the parameter. offset: of the first element. view: (length,) fp32, a view of the memory of the values.
    """

    name: str
    offset: int
    view: Tensor


@dataclass(frozen=True)
class Span:
    """Elements [start, stop) of a flattened parameter of a kind, stored from byte `begin` of a file on."""

    kind: str
    name: str
    start: int
    stop: int
    begin: int

    @property
    def end(self) -> int:
        """The byte after the last."""
        return self.begin + 4 * (self.stop - self.start)


@dataclass(frozen=True)
class _Entry:
    """What the header of a safetensors file says of a tensor."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def header_length(head: bytes, size: int) -> int:
    """Bytes of the header after the first 8 of a safetensors file of `size` bytes, which are given. Raises
    ParseError."""
    (length,) = struct.unpack("<Q", head)
    if length > min(size - 8, HEADER_BYTES):
        raise ParseError(f"its header is said to have {length} bytes, of a file of {size}")
    return int(length)


def parse_header(header: bytes, size: int) -> list[Span]:
    """The fragments in a file that `write_safetensors` wrote, from its header and its size in bytes. Raises ParseError
    for what does not lie in the file, or lies there twice."""
    tree = parse_json(header, HEADER_BYTES)
    if not isinstance(tree, dict):
        raise ParseError("its header is no group of keys")
    tree.pop("__metadata__", None)
    first, spans = 8 + len(header), []
    for label, value in tree.items():
        match = LABEL.fullmatch(label)
        entry = build(_Entry, value)
        begin, end = entry.data_offsets
        count = (end - begin) // 4
        if match is None or entry.dtype != "F32" or len(entry.shape) > DIMENSIONS:
            raise ParseError(f"its header names {label[:100]!r} of {entry.dtype[:10]!r}, which is no fragment")
        if not 0 <= begin <= end <= size - first or (end - begin) % 4 or count != math.prod(entry.shape):
            raise ParseError(f"its header says that {label[:100]!r} lies at bytes {begin} to {end}, which cannot be")
        start = int(match[3])
        if start + count > LARGEST:
            raise ParseError(f"its header says that {label[:100]!r} has more elements than a file")
        spans.append(Span(match[1], match[2], start, start + count, first + begin))
    by_place = sorted(spans, key=lambda span: span.begin)
    for before, after in pairwise(by_place):
        if after.begin < before.end:
            raise ParseError(f"its header lets {after.kind}/{after.name} lie in {before.kind}/{before.name}")
    return spans


class Reader:
    """Reads flat values of a checkpoint's parameters, by (kind, parameter, range), whichever files hold them.

    The values of one kind are contiguous in a file and are fetched together. Only the kind read last is cached.
    """

    def __init__(
        self,
        run: Storage,
        commit: Commit,
        *,
        proves: bool = False,
        headers: Mapping[str, Sequence[Span]] | None = None,
    ) -> None:
        """proves: False where every file of the commit has been verified. True where none has: then what is fetched is
        compared with the commit's hashes of sections, which it must have, before any of it is used, and what is not
        asked for is not fetched. headers: the fragments in each file, by key, where they were read before
        (`read_headers`). Raises CheckpointCorrupt for a file whose header is none of ours, or names values twice."""
        self._run = run
        self._spans: dict[tuple[str, str], list[tuple[Span, str]]] = {}  # and its file, by kind and parameter
        self._extents: dict[tuple[str, str], tuple[int, int]] = {}  # first byte and the one after the last, by kind
        self._digests: dict[tuple[str, str], str] = {}  # SHA-256 of these bytes, by kind and file; {} unless it proves
        self._cached_kind, self._cached_bytes = "", dict[str, bytearray]()  # by file
        for entry in commit.files:
            key, size = checkpoint_folder(commit.n) + entry["name"], entry["bytes"]
            if proves:
                self._expect(key, size, entry["sections"])
            spans = headers[key] if headers is not None else self._parsed(key, size)
            for span in spans:
                self._spans.setdefault((span.kind, span.name), []).append((span, key))
                low, high = self._extents.get((span.kind, key), (span.begin, span.end))
                if not proves:
                    self._extents[span.kind, key] = min(low, span.begin), max(high, span.end)
                elif (span.kind, key) not in self._extents or not low <= span.begin <= span.end <= high:
                    raise CheckpointCorrupt(
                        f"{run.locate(key)}: {span.name} ({span.kind}) lies where its commit has no hash of that kind"
                    )
        for (kind, name), found in self._spans.items():
            found.sort(key=lambda pair: pair[0].start)
            if any(after.start < before.stop for (before, _), (after, _) in pairwise(found)):
                raise CheckpointCorrupt(
                    f"{run.locate(checkpoint_folder(commit.n))}: values of {name} ({kind}) lie twice"
                )

    def kinds(self) -> set[str]:
        """The kinds of values that the checkpoint holds."""
        return {kind for kind, _ in self._spans}

    def has(self, kind: str, name: str) -> bool:
        """Whether the checkpoint holds values of a parameter of this kind."""
        return (kind, name) in self._spans

    def __call__(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a parameter's flattened values, fp32 (stop - start,). Raises CheckpointCorrupt."""
        values = torch.empty(stop - start)
        missing = stop - start
        for span, key in self._spans.get((kind, name), []):
            low, high = max(span.start, start), min(span.stop, stop)
            if low < high:
                offset = span.begin + 4 * (low - span.start) - self._extents[kind, key][0]
                values[low - start : high - start] = torch.frombuffer(
                    self._bytes(kind, key), dtype=torch.float32, count=high - low, offset=offset
                )
                missing -= high - low
        if missing:
            raise CheckpointCorrupt(
                f"{self._run.url}: {missing} of {stop - start} values of {name} ({kind}) are missing"
            )
        return values

    def _expect(self, key: str, size: int, sections: Sequence[Mapping[str, Any]]) -> None:
        """Note where the sections of a file lie, and their hashes. Raises CheckpointCorrupt where its size is another
        than `size`."""
        require_size(self._run, key, size)
        begin = 0
        for section in sections:
            end = begin + section["bytes"]
            self._extents[section["kind"], key] = begin, end
            self._digests[section["kind"], key] = section["sha256"]
            begin = end

    def _parsed(self, key: str, size: int) -> list[Span]:
        """The fragments in a file. Raises CheckpointCorrupt."""
        if (HEADER, key) not in self._digests:
            return read_header(self._run, key, size)
        try:
            return self._proved_header(key, size)
        except ParseError as error:
            raise unreadable(self._run, key, error) from error

    def _proved_header(self, key: str, size: int) -> list[Span]:
        """The same, where the commit has a hash of the header. Raises ParseError, CheckpointCorrupt."""
        data = bytes(self._fetch(HEADER, key))
        length = header_length(data[:8].ljust(8, b"\xff"), size)
        if 8 + length != len(data):
            raise ParseError(f"its header is said to have {length} bytes, and its commit has a hash of {len(data) - 8}")
        return parse_header(data[8:], size)

    def _bytes(self, kind: str, key: str) -> bytearray:
        """All bytes of a file that are of one kind."""
        if kind != self._cached_kind:
            self._cached_kind, self._cached_bytes = kind, {}
        if key not in self._cached_bytes:
            self._cached_bytes[key] = self._fetch(kind, key)
        return self._cached_bytes[key]

    def _fetch(self, kind: str, key: str) -> bytearray:
        """The bytes of a section, which are as they were committed. Raises CheckpointCorrupt where they are not."""
        low, high = self._extents[kind, key]
        data, digest, expected = bytearray(high - low), hashlib.sha256(), self._digests.get((kind, key))
        try:
            for offset in range(0, high - low, CHUNK):
                piece = memoryview(data)[offset : offset + CHUNK]
                self._run.read_into(key, low + offset, piece)
                if expected is not None:
                    digest.update(piece)
        except NotFound as error:
            raise CheckpointCorrupt(f"{self._run.locate(key)} is missing") from error
        if expected is not None and digest.hexdigest() != expected:
            what = "header" if kind == HEADER else f"values ({kind})"
            raise CheckpointCorrupt(f"{self._run.locate(key)}: the SHA-256 of its {what} does not match its commit")
        return data


def read_headers(run: Storage, n: int, files: Sequence[Mapping[str, Any]]) -> dict[str, list[Span]]:
    """The fragments in some files of the commit at n, by key. Raises CheckpointCorrupt."""
    keys = {checkpoint_folder(n) + entry["name"]: entry["bytes"] for entry in files}
    return {key: read_header(run, key, size) for key, size in keys.items()}


def read_header(run: Storage, key: str, size: int) -> list[Span]:
    """The fragments in a file of `size` bytes. Raises CheckpointCorrupt."""
    try:
        length = header_length(run.get_range(key, 0, min(size, 8)).ljust(8, b"\xff"), size)
        return parse_header(run.get_range(key, 8, length), size)
    except ParseError as error:
        raise unreadable(run, key, error) from error


def unreadable(run: Storage, key: str, error: ParseError) -> CheckpointCorrupt:
    """The error for a file whose header is none of ours."""
    return CheckpointCorrupt(f"{run.locate(key)}: {error}; restore it, or choose another run=")


def require_size(run: Storage, key: str, size: int) -> None:
    """Raise CheckpointCorrupt unless a file of a checkpoint exists in the size that its commit names."""
    try:
        found = run.stat(key).size
    except NotFound as error:
        raise CheckpointCorrupt(f"{run.locate(key)} is missing") from error
    if found != size:
        raise CheckpointCorrupt(f"{run.locate(key)} has {found} bytes instead of {size}")
