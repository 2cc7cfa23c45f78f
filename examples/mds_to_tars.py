"""Pictures of an MDS dataset (mosaicml-streaming) as WebDataset tars that `latentmill encode` takes.

    python examples/mds_to_tars.py 'mds/**/index.json' shards --image jpg --caption caption

    shards/00000.tar         of each shard one tar; of each sample KEY.jpg, KEY.txt and KEY.json
    KEY.json                 the numbers and texts of all other columns, to filter by (filters.keep)

Bytes of pictures are copied as they are, of columns encoded as bytes, jpeg or png. Shards are read strictly
(preprocess/adopting/mds.py): sizes, offsets, columns and hashes that the index states; those that were compressed are
decompressed beside it first. Columns of pickles are never opened. A sample without a picture gives a record without
one, which encode rejects and counts.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from pipeline.config import LimitsConfig
from pipeline.errors import LatentmillError
from pipeline.storage.patterns import expand
from preprocess.adopting.arrays import SCALARS, Foreign
from preprocess.adopting.mds import MdsFacts, MdsShard, read_mds_index

PICTURES = ("bytes", "jpeg", "png")
STARTS = {b"\xff\xd8": "jpg", b"\x89PNG": "png", b"RIFF": "webp"}


def check(facts: MdsFacts, image: str, caption: str) -> None:
    """Raises ValueError for columns that are not there, or hold something else."""
    encodings = dict(zip(facts.column_names, facts.column_encodings, strict=True))
    for name, wanted in ((image, PICTURES), (caption, ("str",))):
        if encodings.get(name) not in wanted:
            raise ValueError(
                f"{facts.raw_data.basename}: column {name!r} is {encodings.get(name, 'not there')}, and "
                f"{' or '.join(wanted)} is wanted (it has {', '.join(sorted(encodings))})"
            )


def members(found: Foreign, image: str, caption: str) -> Iterator[tuple[str, bytes]]:
    """The files (suffix, content) of a sample."""
    picture = bytes(found.files[image])
    if picture:
        yield next((suffix for start, suffix in STARTS.items() if picture.startswith(start)), "jpg"), picture
    yield "txt", bytes(found.files[caption])
    others: dict[str, object] = {}
    for name, encoding in found.encodings.items():
        data = bytes(found.files[name])
        if name in (image, caption) or not data:
            continue
        if encoding == "str":
            others[name] = data.decode("utf-8", "replace")
        elif encoding in SCALARS or encoding == "int":
            value = np.frombuffer(data, "<i8" if encoding == "int" else np.dtype(encoding).newbyteorder("<"))[0].item()
            others[name] = value if value == value and abs(value) != float("inf") else None
    yield "json", json.dumps(others, ensure_ascii=False, sort_keys=True).encode()


def write(shard: MdsShard, path: Path, image: str, caption: str) -> int:
    """Writes the tar of a shard, under its name only once it is whole. Returns how many samples."""
    part, count = path.with_suffix(".part"), 0
    with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
        for found in shard.records():
            if found.reason:
                raise ValueError(f"{path.name}, sample {found.key}: {found.detail}")
            for suffix, data in members(found, image, caption):
                info = tarfile.TarInfo(f"{found.key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            count += 1
    part.replace(path)
    return count


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Pictures of MDS shards to WebDataset tars.")
    parser.add_argument("source", help="the index.json of one dataset, or a pattern of several; local or s3://")
    parser.add_argument("dest", type=Path)
    parser.add_argument("--image", default="image", help="column of the pictures")
    parser.add_argument("--caption", default="caption", help="column of the captions")
    options = parser.parse_args(arguments)
    options.dest.mkdir(parents=True, exist_ok=True)
    tars = samples = 0
    try:
        for storage, key in expand(options.source):
            folder = key.rpartition("/")[0]
            for facts in read_mds_index(storage, key):
                check(facts, options.image, options.caption)
                place = f"{folder}/{facts.raw_data.basename}".lstrip("/")
                with MdsShard(storage, place, facts, LimitsConfig()) as shard:
                    samples += write(shard, options.dest / f"{tars:05d}.tar", options.image, options.caption)
                tars += 1
    except (LatentmillError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{options.dest}: {samples} samples in {tars} tars\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
