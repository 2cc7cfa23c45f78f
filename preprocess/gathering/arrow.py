"""Parquet files and Arrow files of Hugging Face's datasets, read with distrust by pyarrow: which column holds images,
and rows as plain values. The only module that imports pyarrow.

Whatever pyarrow raises becomes a SourceError or a ShardCorrupt in one line. Batches of Arrow files are validated before
a value is read, since their offsets may point anywhere; pages of Parquet are decoded, and checked by their checksums
where they have some.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.errors import ShardCorrupt, SourceError
from pipeline.parsing.text import one_line
from pipeline.storage.base import Storage

if TYPE_CHECKING:
    import pyarrow as pa

BATCH = 32  # rows that are decoded at a time
BUFFER = 1 << 20  # bytes of a read of Parquet
MOST_GROUP = 4 << 30
"""Bytes of a Parquet row group, uncompressed: all of it may be in memory."""
MOST_STRING, MOST_CONTAINER = 64 << 20, 10_000_000
"""Bytes of a text, and entries of a list, of Parquet's metadata."""
MAGIC = b"ARROW1"
IMAGE = "image"
BYTES, PATH = "bytes", "path"
"""Fields of an image of Hugging Face's datasets."""
MAPS = ("labels", "lr", "mask")
"""Columns whose images are the files KEY.labels.png, KEY.lr.png and KEY.mask.png."""
LONGEST = 300
UNREADABLE = object()
"""Stands for a row that holds a value that cannot be read."""


@dataclass(frozen=True)
class Columns:
    """Columns of a table. image: that of the images. maps: those of further images. others: those of other values."""

    image: str
    maps: tuple[str, ...]
    others: tuple[str, ...]

    @property
    def read(self) -> list[str]:
        return [self.image, *self.maps, *self.others]


def load_pyarrow(where: str) -> Any:
    """The package. Raises SourceError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise SourceError(
            f"{where} is read by pyarrow, which is not installed: pip install 'latentmill[tables]'"
        ) from None
    return pyarrow


class _File(io.RawIOBase):
    """An object of a store as a file that can be read anywhere."""

    def __init__(self, storage: Storage, key: str, size: int) -> None:
        self._storage, self._key, self._size, self._at = storage, key, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        view = view[: max(0, min(len(view), self._size - self._at))]
        if len(view):
            self._storage.read_into(self._key, self._at, view)
            self._at += len(view)
        return len(view)


@contextmanager
def _told(where: str, wrong: type[Exception]) -> Iterator[None]:
    """Errors of pyarrow as one of our own."""
    pyarrow = load_pyarrow(where)
    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
        raise wrong(f"{where} cannot be read: {one_line(str(error))[:LONGEST]}") from None


class ArrowTable:
    """A file of rows. rows: their number. columns: what is read of each.

    image_column: the column of the images; "" for the only one that can be it, or the one that is called image.
    """

    def __init__(self, storage: Storage, key: str, size: int, image_column: str = "") -> None:
        self.where = storage.locate(key)
        self._storage, self._key, self._size = storage, key, size
        self._pa = load_pyarrow(self.where)
        self.is_parquet = key.lower().endswith(".parquet")
        with _told(self.where, SourceError):
            if self.is_parquet:
                with self._parquet() as file:
                    schema, self.rows = file.schema_arrow, file.metadata.num_rows
            else:
                with self._batches() as (schema, batches):
                    self.rows = sum(batch.num_rows for batch in batches)
        if not 0 <= self.rows <= size:
            raise SourceError(f"{self.where} says that it has {self.rows:,} rows in {size:,} bytes: it is damaged")
        self.columns = self._columns(schema, image_column)

    def read(self, start: int, count: int) -> Iterator[Any]:
        """Yields the rows from `start` on: each a dictionary of plain values by column, images as bytes, or UNREADABLE.
        Raises ShardCorrupt for a file that is damaged or has become shorter."""
        done = 0
        with _told(self.where, ShardCorrupt):
            for first, batch in self._groups(start, count):
                skipped = max(0, start - first)
                batch = batch.slice(skipped, min(batch.num_rows - skipped, count - done))
                yield from self._values(batch)
                done += batch.num_rows
                if done == count:
                    break
        if done < count:
            raise ShardCorrupt(f"{self.where} ends at row {start + done:,}, {start + count:,} were there before")

    # The formats -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _parquet(self) -> Iterator[Any]:
        is_local = self._storage.local_path(self._key) is not None
        source = io.BufferedReader(_File(self._storage, self._key, self._size), BUFFER)
        file = self._pa.parquet.ParquetFile(
            self._pa.PythonFile(source, "r"),
            buffer_size=BUFFER if is_local else 0,
            pre_buffer=not is_local,
            thrift_string_size_limit=MOST_STRING,
            thrift_container_size_limit=MOST_CONTAINER,
            page_checksum_verification=True,
        )
        try:
            yield file
        finally:
            file.close()

    @contextmanager
    def _batches(self) -> Iterator[tuple[Any, Iterator[Any]]]:
        """The schema and all batches of an Arrow file, mapped into memory: a batch that is not looked at costs
        nothing."""
        path = self._storage.local_path(self._key)
        if path is None:
            raise SourceError(f"{self.where}: Arrow files are read from a disk: copy the dataset there, or use Parquet")
        pa = self._pa
        with pa.memory_map(str(path)) as mapped:
            is_file = mapped.read(len(MAGIC)) == MAGIC
            mapped.seek(0)
            if is_file:
                reader = pa.ipc.open_file(mapped)
                yield reader.schema, (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                reader = pa.ipc.open_stream(mapped)
                yield reader.schema, iter(reader)

    def _groups(self, start: int, count: int) -> Iterator[tuple[int, Any]]:
        """Batches with rows of a range, and the number of the first row of each."""
        if not self.is_parquet:
            with self._batches() as (_, batches):
                first = 0
                for batch in batches:
                    if start < first + batch.num_rows and first < start + count:
                        for at in range(0, batch.num_rows, BATCH):
                            if start < first + at + BATCH:
                                yield first + at, batch.slice(at, BATCH)
                    first += batch.num_rows
            return
        with self._parquet() as file:
            first = 0
            for number in range(file.metadata.num_row_groups):
                group = file.metadata.row_group(number)
                if start < first + group.num_rows and first < start + count:
                    if group.total_byte_size > MOST_GROUP:
                        raise ShardCorrupt(
                            f"{self.where}: row group {number} has {group.total_byte_size:,} bytes, {MOST_GROUP:,} at "
                            "most are read: write it with smaller row groups"
                        )
                    at = first
                    for batch in file.iter_batches(BATCH, [number], self.columns.read, use_threads=False):
                        if start < at + batch.num_rows:
                            yield at, batch
                        at += batch.num_rows
                first += group.num_rows

    # Columns and values ----------------------------------------------------------------------------------------------

    def _columns(self, schema: pa.Schema, asked: str) -> Columns:
        """Which columns are read. Raises SourceError where it cannot be told which holds the images."""
        if len(set(schema.names)) != len(schema.names):
            raise SourceError(f"{self.where}: two of its columns have one name")
        images = [field.name for field in schema if self._holds_images(field.type)]
        if asked:
            found = [name for name in images if name == asked]
        else:
            found = [name for name in images if name == IMAGE] or [name for name in images if name not in MAPS]
        if len(found) != 1:
            shown = one_line(", ".join(images or schema.names))[:LONGEST]
            what = f"no column {asked}" if asked else "several columns" if found else "no column"
            can = "those that can hold images are" if images else "its columns are"
            raise SourceError(
                f"{self.where}: {what} of encoded images (bytes, or Hugging Face's image) to take; {can} {shown}: give "
                "image_column=NAME"
            )
        maps = tuple(name for name in images if name in MAPS and name != found[0])
        others = tuple(name for name in schema.names if name not in images and not self._is_binary(schema.field(name)))
        return Columns(found[0], maps, others)

    def _holds_images(self, kind: pa.DataType) -> bool:
        types = self._pa.types
        if types.is_struct(kind):
            place = kind.get_field_index(BYTES)
            return place >= 0 and (types.is_binary(kind[place].type) or types.is_large_binary(kind[place].type))
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    def _is_binary(self, field: pa.Field) -> bool:
        types = self._pa.types
        return bool(types.is_binary(field.type) or types.is_large_binary(field.type) or types.is_struct(field.type))

    def _values(self, batch: pa.RecordBatch) -> Iterator[Any]:
        """The rows of a batch."""
        arrays = {name: array for name in self.columns.read if (array := self._array(batch, name)) is not None}
        texts = {name for name in arrays if self._is_text(batch.schema.field(name).type)}
        for row in range(batch.num_rows):
            try:
                values = {name: array[row].as_py() for name, array in arrays.items()}
                for name in texts:
                    values[name] = None if values[name] is None else values[name].decode()
                yield values
            except (ValueError, OverflowError, self._pa.ArrowException):  # such as a text that is not UTF-8
                yield UNREADABLE

    def _array(self, batch: pa.RecordBatch, name: str) -> pa.Array | None:
        """A column; texts as bytes, lest one that is not UTF-8 spoils the others; dates and numbers that JSON lacks as
        text; None for what cannot be shown."""
        pa, array = self._pa, batch.column(name)
        if self._is_text(array.type):
            array = array.view(pa.large_binary() if pa.types.is_large_string(array.type) else pa.binary())
        if not self.is_parquet:
            array.validate(full=True)
        if pa.types.is_temporal(array.type) or pa.types.is_decimal(array.type):
            try:
                return array.cast(pa.string())
            except pa.ArrowException:
                return None
        return array

    def _is_text(self, kind: pa.DataType) -> bool:
        return bool(self._pa.types.is_string(kind) or self._pa.types.is_large_string(kind))
