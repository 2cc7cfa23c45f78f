"""Shards in img2dataset's layout for tests: one that img2dataset wrote, and a builder that writes the same bytes.

Seen in img2dataset 1.47.0 with webdataset 0.2.111 (docs/how_to/img2dataset.md; scripts/img2dataset_check.py runs it):

- `00000.tar`, `00000.parquet` and `00000_stats.json` side by side; the parquet also has the rows that failed.
- A sample's members stand in the order of their suffixes: `jpg json txt`, `json png txt`, `json txt webp`. Keys are
  digits, shard number first (5 digits, then as many as number_sample_per_shard needs), in the order in which downloads
  ended; rows that failed leave gaps.
- The tar is what webdataset.TarWriter streams: in front of every member a pax header that holds its mtime to the
  microsecond, names in ASCII, zeros up to a multiple of 10,240 bytes. A shard without a success is only those zeros.
- The json is indented by 4: the columns that save_additional_columns names, caption, url, then FACTS. A missing value
  is null or NaN. `exif` is JSON inside a string. compute_hash=None and extract_exif=False leave their keys out;
  disable_all_reencoding leaves width, height and the originals null. The txt of a null caption is empty.
"""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import webdataset

FACTS = ("key", "status", "error_message", "width", "height", "original_width", "original_height", "exif", "sha256")


class Row(NamedTuple):
    """One successful download: the bytes of the file as img2dataset stores them, and the columns that it carries
    over."""

    key: str
    image: bytes
    caption: str | None
    columns: dict[str, Any]
    facts: dict[str, Any]


def write_shard(path: Path, suffix: str, rows: list[Row]) -> None:
    """Writes a tar like img2dataset's WebDatasetSampleWriter, and the files beside it. suffix: jpg, png or webp."""
    with path.open("wb") as file:
        writer = webdataset.TarWriter(file)
        for row in rows:
            sample = {"__key__": row.key, suffix: row.image, "txt": row.caption if row.caption is not None else ""}
            url = row.facts["url"]
            facts = {name: value for name, value in row.facts.items() if name != "url"}
            meta = {**row.columns, "caption": row.caption, "url": url, "key": row.key, **facts}
            sample["json"] = json.dumps(meta, indent=4)
            writer.write(sample)
        writer.close()
    path.with_suffix(".parquet").write_bytes(b"PAR1")
    stats = {"count": len(rows) + 1, "successes": len(rows), "failed_to_download": 1, "failed_to_resize": 0}
    path.with_name(f"{path.stem}_stats.json").write_text(json.dumps(stats, indent=4))


def real_shard() -> bytes:
    """A tar of img2dataset 1.47.0: three rows of a parquet list (resize_mode=center_crop image_size=16), one of them
    missing on the server, one without a caption; one without a similarity and with punsafe NaN."""
    return zlib.decompress(base64.b64decode(REAL))


REAL = """
eNrtmn1sE2Ucx+/Wjo0iY10ZqBE8ygBB6J7nnnvbEhGYmzDJxjoQWWbger1bD7Zua69sSPgDVJgao6jzBWIMvuBLDBF1U5ZoQPA9MZsKwvgHfAHxr6Hg
W2Lmc7AO3ItOIq3a3+eSa/v7Pb3er3fPfX+9b335vvx5S9Tmhboa1CPMZQGdZ7hHhAi58NyOY8RjzHDNTAKIRS01Qj+eSU14mauzzDr9BiwXiIKMeVHy
SRLiBdnFAP9/+medb3VDzWX8DEEQhpv/mBcwg0WCMCZEIpjOf56XRIZDiZz/AbMmqFrqsOP+Kv8fpfdw7zEmu7RkUQnDsgzD0oXpPcoUMWNHu8a4MseO
cY3Jyho7zsPlenJyPDOumTyR883EyDdzzmxSWDqXSCXy7Dnzls8vWVzmr/Tzc6vUqiWrSiv85fZG2KysLI/bMz03d3q5OEcs/9v07mXcmUw2k+1gvUya
m3W42d4DzLV0P9PZc8TLYNMczvRRGZl0p+mAtmwmjXU40pyO9HSnk2Y30DzjdKfnTMHzR3kq1Axv43h+49YdmVMX7N6X6+/qySOByKbRrgkTr7zq6mnT
Z1w3c5YgSrJSUFh0U3HJzQsXlVYuXXbr8ttWVGlB3agJmaujVmxtU/O6O+686+7NW1ruufehhx9pffSxx5/Y9vQzzz638/kXXnzp1ddeb2t/4809He/s
P/Due+9/8OFHn372+cFDXxw+0n38y6++/ubEyW9PfXf6+x/OnP3xp59/+dWui2UcbJwh63LTutKcToczw66LTWuyB7id6VPwqJz5FRlqo8fLb8wcv2Dr
jt37Rk8l/p7cQKTLNSFPOD7ttF3aucpGVtimS6qsv7ALdXUzVzhYevAcbuZG5lRsQvfmPdv3LG0nt2e9PGl/XlGU7Zy85v63crxb8lZt+3jGzt1i6/rt
RZP8pLFibfvJ3iNwib6s+P4V/Z8wuP/jof9LSP+nDNn/CQgr0ACmVv8XrQ8npf9DMhEH9n8C9H+JYb2Lo3ijZp1Zq0ZMa523kAvHamtnn483xMJR1dBp
sEwt64upetQK6Zap0ajYFyurLFlOX3qXlS1edEvx4hXevrimNlhmfdhOVceQQNRza91eC8pFEcRVx4IKCdK1hhSuOsxVe62m+movV2uG9SgX314sUmtv
K2RZDYX5+ZiXfYguuJCeLwLJV+0fMfGha3S7Fm//CR6P0+NtxaJ2KhrTND0ajSf0SKQ+srKORtQa/Y9fQ5MZtEI0hKW+QEg3a0LWxZH6iFljhtXalfGx
AhqY6X8Tiaf0ZtOw92T9hv69C6n0EmzHBN0wiCTTCREURNEgPNGwoetYFzXFCCBdE3gFybqOVEkhWBY1WcdBpcBAkk6IIga9rg2g/6D/l6j/MiGg/yml
/1azlZz7P3T+SwP1n/Cg/wmhs6Pz7a4Wun6F63nqwRbOxdm6G5ddmB/w+x/0P/X0nyBeBv1PJf3nk+n/DNZ/evqB/icC8H/A/0mk/3NWOuretYoVj1Wf
OdExqbF975qWjtbWTyKzIlX1uRWH7ms7uGnX9U+Wj2s79NsDYP6kSv8H//9JWv835P9/CCYStH8p1v8lzf+RBAL+T5IYyv9BPoIH+T/Ih/AQBpA0yACq
XOYvHmz/XGSm/LmHE/BpvobwcC4On2gXhwzv4ggjcXGQLGiIKKqGRQGrhiEioqlY5mWa1xS1IChKQUPABpJEJSAoGhGIHMCCpBsFolRg4JG5OKD/oP//
qP7zCtz+STH9T6L/Q58P9H+wBPoPAAAAAAAAAAAAAAAAAAAAAAAAAAAAACPld1uV3Eo=
"""
