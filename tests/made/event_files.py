"""Reads event files as TensorBoard's two loaders do, and says what they should find in them."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.tracking.drawn import drawn

Points = Counter[tuple[str, int, float]]
"""How often each (name, n, value) is there; values in fp32, as TensorBoard keeps them."""


def accumulated(run: Path) -> Any:
    """TensorBoard's EventAccumulator of a run, which has read everything and thinned out nothing."""
    from tensorboard.backend.event_processing import event_accumulator

    guidance = dict.fromkeys(event_accumulator.DEFAULT_SIZE_GUIDANCE, 0)
    found = event_accumulator.EventAccumulator(str(run / "tensorboard"), size_guidance=guidance)
    return found.Reload()


def points(run: Path) -> Points:
    """The scalars that TensorBoard shows of a run."""
    found = accumulated(run)
    return Counter((tag, one.step, one.value) for tag in found.Tags()["scalars"] for one in found.Scalars(tag))


def served(run: Path, whole: Callable[[Points], bool], seconds: float = 30.0) -> Points:
    """The scalars that TensorBoard's fast loader, which its command starts by default, shows of a run when it has read
    the whole of it."""
    import grpc
    import tensorboard_data_server
    from tensorboard.context import RequestContext
    from tensorboard.data import grpc_provider

    limit = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "port"
        words = [f"--logdir={run}", "--reload=once", "--samples-per-plugin=scalars=all", "--port=0"]
        command = [tensorboard_data_server.server_binary(), *words, f"--port-file={file}", "--die-after-stdin"]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as server:
            while not file.exists() or not file.read_text().endswith("\n"):
                assert server.poll() is None and time.monotonic() < limit
                time.sleep(0.01)
            address = f"localhost:{int(file.read_text())}"
            with grpc.secure_channel(address, grpc.local_channel_credentials()) as channel:
                provider = grpc_provider.GrpcDataProvider(address, grpc_provider.make_stub(channel))
                shown = Points()
                while not whole(shown) and time.monotonic() < limit:
                    time.sleep(0.01)
                    runs = provider.read_scalars(
                        RequestContext(), experiment_id="", plugin_name="scalars", downsample=1_000_000
                    )
                    tags = [(tag, found) for names in runs.values() for tag, found in names.items()]
                    shown = Points((tag, one.step, one.value) for tag, found in tags for one in found)
    return shown


def points_of(rows: Iterable[Mapping[str, Any]]) -> Points:
    """The scalars that rows of metrics.jsonl hold."""
    return Counter((name, row["n"], float(np.float32(value))) for row in rows for name, value in drawn(row).items())
