"""metadata.jsonl and metadata.csv, as Hugging Face's imagefolder has them: a row for each image, whose `file_name` is
relative to the folder of the metadata. A row stands for the .json member of its image.

A row of jsonl is taken as it is; one of csv becomes a JSON object of texts, in which an empty cell is null. A file that
cannot be read as a whole is refused, since it cannot be said whose rows it lacks.
"""

from __future__ import annotations

import csv
import io
import posixpath
from collections.abc import Iterator

from pipeline.data.format.contract import canonical_json
from pipeline.errors import RecordRejected, SourceError
from preprocess.source.columns import read_columns

NAMES = ("metadata.csv", "metadata.jsonl")
FILE_NAME = "file_name"
MOST_BYTES = 1 << 30
"""Bytes of a metadata file."""
AGAIN = "mend the file"


def rows(where: str, name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    """(path of the image in the source, bytes of its JSON object) of each row.

    where: path or URL of the file, for messages. name: its path in the source. Raises SourceError, with the line.
    """
    folder, last = posixpath.split(name)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"{where}, byte {error.start}: it is not UTF-8: {AGAIN}") from None
    found = _csv(where, text) if last == "metadata.csv" else _jsonl(where, text)
    for line, file_name, row in found:
        parts = file_name.split("/")
        is_text = file_name == file_name.encode("utf-8", "replace").decode()
        if "\\" in file_name or "\0" in file_name or ".." in parts or "" in parts or not is_text:
            raise SourceError(
                f"{where}, line {line}: file_name={file_name[:100]!r} is absolute, empty, no Unicode text or leads out "
                f"of its folder: {AGAIN}"
            )
        yield posixpath.join(folder, *(part for part in parts if part != ".")), row


def _jsonl(where: str, text: str) -> Iterator[tuple[int, str, bytes]]:
    """Line, file name and bytes of each row that is not blank."""
    for number, line in enumerate(text.split("\n"), 1):
        row = line.strip().encode()
        if not row:
            continue
        try:
            columns = read_columns(row)
        except RecordRejected as error:
            raise SourceError(f"{where}, line {number}: {error}: {AGAIN}") from None
        yield number, _file_name(where, number, columns.get(FILE_NAME)), row


def _csv(where: str, text: str) -> Iterator[tuple[int, str, bytes]]:
    """Line, file name and JSON object of each row that is not blank."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        if FILE_NAME not in header or len(set(header)) != len(header):
            raise SourceError(f"{where}: its first line names no column {FILE_NAME}, or one twice: {AGAIN}")
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise SourceError(
                    f"{where}, line {reader.line_num}: {len(cells)} cells, and {len(header)} are named in the first "
                    f"line: {AGAIN}"
                )
            columns = {name: cell or None for name, cell in zip(header, cells, strict=True)}
            file_name = _file_name(where, reader.line_num, columns[FILE_NAME])
            yield reader.line_num, file_name, canonical_json(columns)
    except csv.Error as error:
        raise SourceError(f"{where}, line {reader.line_num}: {error}: {AGAIN}") from None


def _file_name(where: str, line: int, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise SourceError(f"{where}, line {line}: it has no {FILE_NAME}: {AGAIN}")
    return value
