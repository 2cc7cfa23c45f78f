"""The loaders that the stream is measured against in Python environments of their own, and how they get its samples."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.streaming.latents import Latents
from pipeline.storage.base import Storage
from pipeline.storage.urls import open_storage


@dataclass(frozen=True)
class Peer:
    """A loader. name: of the side, and of the key that names the Python that has it. package: as it is installed.
    is_copying: whether it keeps copies on a disk of what it reads from a bucket. tries: of a read from a bucket.
    is_told: whether its reading side is told dtypes and shapes."""

    name: str
    package: str
    is_copying: bool = True
    tries: int = 1
    is_told: bool = False

    def command(self, python: str, order: dict[str, Any]) -> list[str]:
        """The command that does what an order says."""
        return [python, "-m", f"benchmarks.streaming.{self.name}_side", json.dumps(order)]


PEERS = (
    # From a bucket a worker sometimes reads a file that another is still fetching, and ends.
    Peer("mosaic", "mosaicml-streaming", tries=3),
    Peer("litdata", "litdata"),
    Peer("datasets", "datasets", is_copying=False, is_told=True),
)


def peer_sides(
    preset: Latents,
    pythons: dict[str, str],
    folder: Path,
    tars: Sequence[str],
    bucket: str | None,
    warm: Callable[[int], int],
    run: Callable[[list[str]], str],
    say: Callable[[str], None],
) -> dict[str, Callable[[int, int], list[str]]]:
    """Side -> function (workers, samples) -> command, of each peer that has a Python; what it reads is made unless it
    exists.

    pythons: of environments, by name of a peer; "" for none. folder: of the forms on disk, whose names begin with the
    preset's. tars: the samples. bucket: URL of the place for forms in a bucket; None on disk. warm: samples before the
    clock starts, of so many. run: runs a command. say: tells progress.
    """
    sides: dict[str, Callable[[int, int], list[str]]] = {}
    for peer in PEERS:
        python = pythons[peer.name]
        if not python:
            continue
        form = folder / f"{preset.name}-{preset.samples}-{peer.name}"
        if not form.exists():
            say(f"the same in the format of {peer.package}: {preset.name}")
            part = form.with_name(f"{form.name}-part")
            shutil.rmtree(part, ignore_errors=True)
            run(peer.command(python, {"do": "write", "tars": list(tars), "dest": str(part)}))
            part.rename(form)
        remote = None
        if bucket is not None:
            remote = f"{bucket}/{preset.name}-{peer.name}"
            say(f"uploading {preset.name} of {peer.package}")
            _upload(form, open_storage(remote))
        sides[peer.name] = _side(peer, python, form, remote, folder, preset, warm)
    return sides


def _side(
    peer: Peer,
    python: str,
    form: Path,
    remote: str | None,
    folder: Path,
    preset: Latents,
    warm: Callable[[int], int],
) -> Callable[[int, int], list[str]]:
    def command(workers: int, count: int) -> list[str]:
        at = tempfile.mkdtemp(dir=folder) if remote and peer.is_copying else str(form)
        order: dict[str, Any] = {"do": "read", "local": at, "remote": remote, "workers": workers}
        order |= {"warm": warm(count), "count": count}
        if peer.is_told:
            order["members"] = {name: [dtype, shape] for name, (shape, dtype) in preset.members.items()}
        return peer.command(python, order)

    return command


def _upload(form: Path, dest: Storage) -> None:
    for file in sorted(path for path in form.rglob("*") if path.is_file()):
        dest.put(file.relative_to(form).as_posix(), file.read_bytes())


def versions(pythons: dict[str, str], run: Callable[[list[str]], str]) -> list[str]:
    """A line about the versions of the peers that have a Python, if any has."""
    of = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"
    found = [f"{p.package} {run([pythons[p.name], '-c', of, p.package])}" for p in PEERS if pythons[p.name]]
    return [f"- in environments of their own: {', '.join(found)}"] if found else []
