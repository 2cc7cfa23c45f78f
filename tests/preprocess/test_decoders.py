"""preprocess/source/decoders.py, worker.py: whatever one sample does to the process that decodes it, the others come
out (docs/explained/promises.md, 4)."""

from __future__ import annotations

import dataclasses
import io
import os
import signal
import struct
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from made.encode import ENCODERS, config, png, write_tar
from made.hostile import encoded, photo
from made.places import REPOSITORY, TESTS
from pipeline.conditions.facts import Conditions, MaskFacts
from pipeline.conditions.mask import masks, unpack
from pipeline.config import LimitsConfig
from pipeline.errors import DataError, Interrupted
from pipeline.models.encoders.tokenizer import load_tokenizer
from preprocess.encode import main
from preprocess.source import decoders as module
from preprocess.source import worker
from preprocess.source.conditions import Holes
from preprocess.source.decoders import Decoders
from preprocess.source.recipe import Recipe, recipe_of
from preprocess.source.rejected import LONGEST, Rejected, rejected
from preprocess.source.sample import Prepared
from preprocess.source.shard import Sample

RECIPE = recipe_of(config("", ""))


def sample(key: str) -> Sample:
    return Sample(key, {"png": png(), "txt": b"a red square"})


def reasons(results: list[Prepared | Rejected]) -> list[str]:
    return [result.reason if isinstance(result, Rejected) else "" for result in results]


@pytest.fixture
def dying(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding workers that do what keys say (tests/ranks/dying_worker.py)."""
    monkeypatch.setattr(module, "WORKER", "ranks.dying_worker")
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.0)
    monkeypatch.setenv("PYTHONPATH", f"{TESTS}:{REPOSITORY}")


def run(keys: list[str], recipe: Recipe = RECIPE) -> list[Prepared | Rejected]:
    with Decoders(recipe, ENCODERS, 1, processes=True) as decoders:
        first = decoders.submit([sample(key) for key in keys], "a.tar").result()[0]
        again = decoders.submit([sample("after")], "a.tar").result()[0]
        assert [type(one) for one in again] == [Prepared]
    return first


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no room"),
        RecursionError("deep"),
        struct.error("unpack requires a buffer of 4 bytes"),
        OverflowError("int too large"),
        AssertionError("P"),
        ZeroDivisionError("0"),
        UnicodeError("\ud800"),
        RuntimeError("\x1b[31m" + "x" * 10_000),
        StopIteration(),
    ],
)
def test_whatever_one_sample_raises_is_its_rejection(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = worker.prepare

    def failing(one: Sample, recipe: Recipe, tokenize: object) -> Prepared:
        if one.key == "bad":
            raise error
        return prepare(one, recipe, tokenize)  # type: ignore[arg-type]

    monkeypatch.setattr(worker, "prepare", failing)
    results, _ = worker.prepare_all([sample("a"), sample("bad"), sample("b")], RECIPE, load_tokenizer(ENCODERS))
    assert reasons(results) == ["", "sample_failed", ""]
    assert isinstance(results[1], Rejected)
    assert results[1].message.startswith(type(error).__name__)
    assert len(results[1].message) <= LONGEST
    assert results[1].message.isprintable()


def test_what_is_said_of_a_rejection_depends_on_the_sample_alone() -> None:
    message = rejected("k", OSError(f"cannot identify image file {io.BytesIO()!r}")).message
    assert message == "OSError: cannot identify image file <_io.BytesIO object>"


def test_a_sample_that_ends_its_process_twice_is_rejected_and_the_others_come_out(dying: None) -> None:
    results = run(["a", f"signal {signal.SIGSEGV}", "b", f"signal {signal.SIGABRT}", "exit 3", "c"])
    assert reasons(results) == ["", "decoder_crashed", "", "decoder_crashed", "decoder_crashed", ""]
    told = [result.message for result in results if isinstance(result, Rejected)]
    assert told[0] == "the process that decoded it was killed by SIGSEGV, 2 times"
    assert told[2] == "the process that decoded it ended with status 3, 2 times"


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_a_process_that_dies_once_is_replaced_and_its_sample_tried_again(
    dying: None, number: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    key = f"once {number} {tmp_path / 'died'}"
    assert reasons(run(["a", key, "b"])) == ["", "", ""]
    assert (
        f"was killed by {signal.Signals(number).name} while it decoded sample {key} of a.tar" in capfd.readouterr().err
    )


def test_memory_that_runs_out_at_one_sample_again_and_again_is_told_with_its_name(dying: None) -> None:
    """The machine is the cause, so the sample is not rejected: its cache would depend on the machine."""
    with Decoders(RECIPE, ENCODERS, 1, processes=True) as decoders:
        future = decoders.submit([sample("a"), sample(f"signal {signal.SIGKILL}")], "s3://b/a.tar")
        with pytest.raises(
            DataError, match=r"SIGKILL 3 times while they decoded sample signal 9 of s3://b/a\.tar.*work"
        ):
            future.result()


def test_a_worker_that_dies_between_two_tasks_is_replaced() -> None:
    with Decoders(RECIPE, ENCODERS, 1, processes=True) as decoders:
        assert reasons(decoders.submit([sample("a")]).result()[0]) == [""]
        process = decoders._workers[0]._process
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert reasons(decoders.submit([sample("b"), sample("c")]).result()[0]) == ["", ""]


HOLES = [Holes(f"000000_{row:06d}", (64, 48)) for row in range(3)]
MASKED = dataclasses.replace(RECIPE, conditions=Conditions(mask=MaskFacts(kinds=("thin", "rectangles"), variants=2)))


@pytest.mark.parametrize("processes", [True, False])
def test_holes_are_drawn_by_workers_and_by_their_successors(processes: bool) -> None:
    with Decoders(MASKED, ENCODERS, 1, processes=processes) as decoders:
        if processes:
            decoders.submit([sample("a")]).result()
            process = decoders._workers[0]._process
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        drawn, seconds = decoders.draw(HOLES).result()
        assert reasons(decoders.submit([sample("b")]).result()[0]) == [""]
    assert seconds > 0
    assert MASKED.conditions.mask is not None
    for packed, wanted in zip(drawn, HOLES, strict=True):
        assert (unpack(packed, 64) == masks(wanted.key, (64, 48), MASKED.conditions.mask)).all()


@pytest.mark.parametrize("processes", [True, False])
def test_no_hole_is_drawn_once_the_stage_is_stopped(processes: bool) -> None:
    with Decoders(MASKED, ENCODERS, 1, processes=processes) as decoders:
        decoders.abort()
        with pytest.raises(Interrupted):
            decoders.draw(HOLES).result()


def test_workers_that_never_start_end_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WORKER", "made.places")  # which does nothing
    monkeypatch.setenv("PYTHONPATH", f"{TESTS}:{REPOSITORY}")
    told = pytest.raises(DataError, match="do not stay alive: one ended with status 0")
    with Decoders(RECIPE, ENCODERS, 1, processes=True) as decoders, told:
        decoders.submit([sample("a")]).result()
    told = pytest.raises(DataError, match="do not stay alive: one ended with status 0")
    with Decoders(MASKED, ENCODERS, 1, processes=True) as decoders, told:
        decoders.draw(HOLES).result()


def test_a_sample_that_takes_too_long_is_rejected_in_worker_processes(dying: None) -> None:
    """It is in C, say: nothing but the end of its process stops it."""
    recipe = dataclasses.replace(RECIPE, limits=LimitsConfig(seconds=0.5))
    results = run(["a", "sleep", "b"], recipe)
    assert reasons(results) == ["", "too_slow", ""]
    assert isinstance(results[1], Rejected)
    assert "limits.seconds=0.5" in results[1].message


def test_a_stage_that_is_asked_to_stop_does_not_wait_for_a_slow_sample(dying: None, tmp_path: Path) -> None:
    """16 of them in a task may take 16 minutes."""
    write_tar(tmp_path / "a.tar", [("sleep.png", png()), ("sleep.txt", b"words")])
    asked = list[float]()

    def stop() -> None:
        asked.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    at_work, take = threading.Timer(1.0, stop), Decoders.submit

    def submit(*arguments: Any) -> Any:
        at_work.start()
        return take(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoders, "submit", submit)
        with pytest.raises(Interrupted):
            main(config(str(tmp_path / "a.tar"), tmp_path / "c", decode_in="processes", workers=1))
    assert time.monotonic() - asked[0] < 5


def test_a_task_in_a_thread_ends_with_its_sample_when_it_is_asked_to() -> None:
    with Decoders(RECIPE, ENCODERS, 1, processes=False) as decoders:
        future = decoders.submit([sample(f"{i}") for i in range(5000)])
        decoders.abort()
        with pytest.raises(Interrupted):
            future.result(10)


def test_a_sample_that_took_too_long_is_rejected_in_threads() -> None:
    recipe = dataclasses.replace(RECIPE, limits=LimitsConfig(seconds=0.04))
    slow = Sample("slow", {"jpg": encoded(photo(2000, 1500), "JPEG", progressive=True), "txt": b"a large photograph"})
    with Decoders(recipe, ENCODERS, 1, processes=False) as decoders:
        assert reasons(decoders.submit([sample("a"), slow, sample("b")]).result()[0]) == ["", "too_slow", ""]


def test_a_sample_that_asks_for_more_memory_than_limits_explain_gets_none(dying: None) -> None:
    results = run(["a", "memory", "b"])
    assert reasons(results) == ["", "sample_failed", ""]


@pytest.mark.long
def test_the_memory_of_a_worker_is_bounded_by_the_limit_on_pixels() -> None:
    """The largest pictures of every kind, with a limit of 9 million pixels: 40 bytes a pixel at the most, beside what a
    worker takes for small ones."""
    side = 3000
    recipe = dataclasses.replace(RECIPE, limits=LimitsConfig(pixels=side * side))
    large = photo(side, side)
    clear = large.convert("RGBA")
    clear.putalpha(Image.new("L", large.size, 99))
    pictures = {
        "jpg": [
            encoded(large, "JPEG"),
            encoded(large, "JPEG", progressive=True, subsampling=0, quality=50),
            encoded(large.convert("CMYK"), "JPEG", progressive=True),
        ],
        "png": [encoded(clear, "PNG", compress_level=1), encoded(large.convert("P"), "PNG", compress_level=1)],
        "webp": [encoded(clear, "WEBP", quality=1, method=0)],
    }
    with Decoders(recipe, ENCODERS, 1, processes=True) as decoders:
        assert reasons(decoders.submit([sample("small")]).result()[0]) == [""]
        status = Path(f"/proc/{decoders._workers[0]._process.pid}/status")
        before = _peak_bytes(status)
        for suffix, files in pictures.items():
            for data in files:
                one = Sample("large", {suffix: data, "txt": b"words"})
                assert reasons(decoders.submit([one]).result()[0]) == [""], suffix
        after = _peak_bytes(status)
    assert after - before <= 40 * side * side


def _peak_bytes(status: Path) -> int:
    """The most memory that a process has had, from its /proc/PID/status."""
    return next(1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
