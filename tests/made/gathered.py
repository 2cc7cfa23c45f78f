"""Folders and tables of captioned pictures, and tars of the same samples, for tests of what is gathered into units."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from made.encode import png, write_tar


def picture(number: int, size: tuple[int, int] = (64, 64)) -> bytes:
    """The PNG of a number."""
    return png(size, number)


def caption_of(number: int) -> str:
    return f"a large red circle {number}"


def write_folder(folder: Path, numbers: Iterable[int], under: str = "") -> Path:
    """NNNNN.png and NNNNN.txt of each number, in `folder` or a folder under it."""
    place = folder / under
    place.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (place / f"{number:05d}.png").write_bytes(picture(number))
        (place / f"{number:05d}.txt").write_text(caption_of(number))
    return folder


def tar_of(folder: Path, tar: Path) -> Path:
    """A tar of all files of a folder, sorted by their names."""
    tar.parent.mkdir(parents=True, exist_ok=True)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    write_tar(tar, [(path.relative_to(folder).as_posix(), path.read_bytes()) for path in paths])
    return tar


def identity(members: Sequence[tuple[str, bytes]]) -> tuple[str, int]:
    """The SHA-256 and the size of a unit of members (name, content), as docs/reference/dataset_format.md has them."""
    digest, size = hashlib.sha256(), 0
    for name, data in members:
        encoded = name.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded + len(data).to_bytes(8, "little") + data)
        size += len(encoded) + len(data)
    return digest.hexdigest(), size


def rows_of(numbers: Iterable[int]) -> list[dict[str, Any]]:
    """Rows as Hugging Face's datasets have them."""
    return [
        {"image": {"bytes": picture(number), "path": f"{number}.png"}, "text": caption_of(number), "score": number / 8}
        for number in numbers
    ]


def image_schema(pa: Any) -> Any:
    """Their schema."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.schema([("image", image), ("text", pa.string()), ("score", pa.float64())])


def write_parquet(path: Path, rows: list[dict[str, Any]], *, group: int = 4, sums: bool = False) -> Path:
    """A Parquet file of these rows in row groups of `group`. sums: whether pages have checksums."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, image_schema(pa))
    pq.write_table(table, path, row_group_size=group, write_page_checksum=sums)
    return path


def write_dataset(folder: Path, parts: Sequence[list[dict[str, Any]]], *, batch: int = 3) -> Path:
    """What `save_to_disk` of Hugging Face's datasets 4 writes: Arrow streams, their list and facts about them."""
    import pyarrow as pa

    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data-{i:05d}-of-{len(parts):05d}.arrow" for i in range(len(parts))]
    for name, rows in zip(names, parts):
        table = pa.Table.from_pylist(rows, image_schema(pa))
        with pa.OSFile(str(folder / name), "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
            writer.write_table(table, max_chunksize=batch)
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": "0123456789abcdef",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"citation": "", "description": "", "features": {}}))
    return folder
