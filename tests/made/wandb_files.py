"""Reads the files of a wandb run without a network."""

from __future__ import annotations

import json
import time
from pathlib import Path


def offline_records(run: Path) -> list:
    """Every record of the newest offline wandb run. wandb's own process completes the file shortly after the end."""
    path = max(run.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    for _ in range(100):
        records = wandb_records(path)
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        time.sleep(0.1)
    raise AssertionError(f"{path} was never completed")


def wandb_records(path: Path) -> list:
    """The records of a .wandb file: LevelDB log blocks of 32 KiB after a 7-byte header."""
    from wandb.proto import wandb_internal_pb2

    data, place, content, records = path.read_bytes(), 7, b"", []
    assert data.startswith(b":W&B")
    while place + 7 <= len(data):
        if (left := 32_768 - place % 32_768) < 7:
            place += left
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        if place + 7 + size > len(data):
            break  # still being written
        content += data[place + 7 : place + 7 + size]
        if kind in (1, 4):  # a full record, or the last part of one
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(content)
            records.append(record)
            content = b""
        place += 7 + size
    return records


def history(records: list) -> list[dict]:
    rows = [record.history.item for record in records if record.WhichOneof("record_type") == "history"]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items} for items in rows]
