"""docs/coming_from/what_breaks_elsewhere.md: each of its commands prints what the page shows, and does the opposite of
the failure that it stands under.

The commands run in order, in one folder and in this process, but for the two ranks of `launch.processes=2`, which are
forks (servers/warm_ranks.py); `encode` decodes in threads. A test first runs what stands above its section, unless that
has been run.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from made.encode import files
from made.places import REPOSITORY
from made.transcript import Step, missing, steps_of
from pipeline import cli
from pipeline.data.format.manifest import load_manifest
from pipeline.distributed.signals import handled
from pipeline.ledger import examine
from pipeline.runs.checkpoint import load_weights
from pipeline.runs.directory import committed, load_any_run
from pipeline.runs.ledger import read_ledger
from pipeline.runs.proof import Proof
from pipeline.storage.urls import open_storage
from pipeline.training.trainer import Trainer
from preprocess.encoding.claims import Claims
from ranks import consumed_run
from servers.warm_ranks import WarmRanks

PAGE = REPOSITORY / "docs" / "coming_from" / "what_breaks_elsewhere.md"
SECTIONS = steps_of(PAGE, "tests/docs/test_what_breaks.py")
STOPPED_AT = {"encode": 1, "train": 64}
"""Where a verb is sent SIGTERM that the page stops: once this shard is done, in the step from this sample on."""
EPOCH = 32


@dataclass
class Said:
    """What became of a command. left: the files of its `dest`, each with its time of change and its bytes."""

    step: Step
    status: int
    text: str
    left: dict[str, tuple[int, bytes]]


class Story:
    """The commands of the page, run as far as they were asked for."""

    def __init__(self, folder: Path, ranks: WarmRanks) -> None:
        self.folder, self.ranks = folder, ranks
        self.said: dict[str, list[Said]] = {}

    def until(self, number: int, capsys: pytest.CaptureFixture[str]) -> list[Said]:
        """Run the sections down to a number that were not run yet, 0 being the beginning. Returns that one's."""
        for title in list(SECTIONS)[: number + 1]:
            if title not in self.said:
                self.said[title] = [self.run(step, capsys) for step in SECTIONS[title]]
        return self.said[list(SECTIONS)[number]]

    def run(self, step: Step, capsys: pytest.CaptureFixture[str]) -> Said:
        verb, *words = step.expanded()
        if verb == "encode":
            words.append("decode_in=threads")
        capsys.readouterr()
        if "launch.processes=2" in words:
            ended = self.ranks.run("pipeline.cli", [verb, *words], 2)
            status, text = ended.returncode, ended.stderr
        else:
            with stopped(verb) if step.stopped else nullcontext():
                status = cli.guarded(verb, lambda: cli.run(verb, words))
            said = capsys.readouterr()
            text = f"{said.err}\n{said.out}"
        dest = next((word.removeprefix("dest=") for word in words if word.startswith("dest=")), "")
        return Said(step, status, text, stamped(Path(dest)) if dest else {})


def stamped(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {name: ((folder / name).stat().st_mtime_ns, data) for name, data in files(folder).items()}


@contextmanager
def stopped(verb: str) -> Iterator[None]:
    """Inside, this process is sent SIGTERM where STOPPED_AT says."""
    step, release = Trainer._step, Claims.release

    def in_step(self: Trainer, batch: object) -> None:
        if self.n == STOPPED_AT["train"]:
            os.kill(os.getpid(), signal.SIGTERM)
        step(self, batch)  # type: ignore[arg-type]

    def after_shard(self: Claims, number: int | str) -> None:
        release(self, number)
        if number == STOPPED_AT["encode"]:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch, handled([signal.SIGTERM], lambda *_: None):
        patch.setattr(Trainer, "_step", in_step)
        patch.setattr(Claims, "release", after_shard)
        yield


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, warm_ranks: WarmRanks) -> Story:
    return Story(tmp_path_factory.mktemp("what-breaks"), warm_ranks)


@pytest.fixture
def tell(story: Story, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list]:
    """Run the page down to a section, and return what became of that section's commands, which printed what the page
    shows. The folder of the commands is the current one."""
    monkeypatch.chdir(story.folder)

    def until(number: int) -> list[Said]:
        said = story.until(number, capsys)
        for one in said:
            if os.environ.get("SHOW_WHAT_BREAKS"):
                with capsys.disabled():
                    print(f"\n    {one.step.command}\n{one.text}")
            assert one.status == one.step.status, f"{one.step.command}: {one.text}"
            assert not missing(one.step, one.text), f"{one.step.command} printed: {one.text}"
        return said

    return until


def weights(run: str, n: int, which: str = "raw") -> dict[str, Tensor]:
    return load_weights(open_storage(run), n, which)[1]


def farthest(some: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """The largest difference of two sets of weights, of the same names."""
    assert some.keys() == others.keys()
    return max(float((one - others[name]).abs().max()) for name, one in some.items())


def proof_of(run: str) -> Proof:
    return examine(load_any_run(run), run)[1]


def test_the_page_names_ten_failures_each_with_a_thread_and_commands() -> None:
    text = PAGE.read_text(encoding="utf-8")
    headings = re.findall(r"^## (\d+)\. (.+)$", text, re.MULTILINE)
    assert [int(number) for number, _ in headings] == list(range(1, 11))
    assert list(SECTIONS) == ["What breaks elsewhere", *(f"{number}. {title}" for number, title in headings)]
    table = dict(re.findall(r"^\| \[(\d+)\].* \| \[\S+?#\d+\]\((https://github\.com/\S+?)\) \|$", text, re.MULTILINE))
    for number, section in zip(range(1, 11), re.split(r"^## ", text, flags=re.MULTILINE)[1:], strict=True):
        assert re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+/issues/\d+", table[str(number)])
        owner, repository, _, issue = table[str(number)].split("/")[3:]
        assert f"({table[str(number)]})" in section
        assert f"{owner}/{repository}#{issue}" in section
        assert re.search(r"\n\nHere .*\]\(\.\./", section, re.DOTALL), "the mechanism, and the page that tells of it"


def test_every_command_says_what_it_prints() -> None:
    silent = [step.command for steps in SECTIONS.values() for step in steps if not any(step.printed)]
    assert silent == []


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("64 samples,\n  loss 0.12, in 9 s, of 0f1e2d3c4b5a\n and more\n to the end", ""),
        ("64 samples, loss 0.97, in 3 s, of 814e1be9811c to the end", ""),
        ("63 samples, loss 0.97, in 3 s, of 111111111111 to the end", "64 samples, loss ~, in ~ s, of ~"),
        ("64 samples, loss, in 3 s, of 111111111111 to the end", "64 samples, loss ~, in ~ s, of ~"),
        ("to the end: 64 samples, loss 0.97, in 3 s, of 111111111111", "to the end"),
    ],
)
def test_what_a_command_does_not_print_as_the_page_shows_is_found(said: str, found: str) -> None:
    step = Step(["ledger"], ["64 samples, loss 0.97,\nin 3 s, of 111111111111", "to the end"])
    assert missing(step, said) == found


def test_1_a_resume_in_the_middle_of_an_epoch_repeats_and_skips_nothing(tell: Callable) -> None:
    assert [said.status for said in tell(0)] == [0] * 4
    assert "each of the 64 samples was trained on once" in tell(1)[-1].text
    proof = proof_of("run")
    assert proof.problems == []
    changes = [after.first for before, after in itertools.pairwise(proof.spans) if after.world != before.world]
    assert changes and changes[0] % EPOCH, "a resume in the middle of an epoch"
    assert [(epoch.samples, epoch.used) for epoch in proof.epochs[:2]] == [(EPOCH, EPOCH)] * 2


def test_2_another_world_and_engine_goes_on_from_the_same_commit(tell: Callable) -> None:
    assert tell(2)
    assert [span.world for span in proof_of("run").spans if span.last <= 64] == [2, 2, 2, 1]
    away, moved = (farthest(weights("run", 64), weights(*other)) for other in (("alone", 64), ("run", 48)))
    assert away < moved / 100


def test_3_the_average_of_ranks_in_zero_3_is_whole_and_is_exported(tell: Callable) -> None:
    tell(3)
    average = weights("run", 48, "ema")
    away, lag = farthest(average, weights("alone", 48, "ema")), farthest(average, weights("run", 48))
    assert away < lag / 100
    exported = load_file("exported/unet/diffusion_pytorch_model.safetensors")
    stored = {name: float(tensor.double().sum()) for name, tensor in average.items() if name.startswith("unet.")}
    assert sum(tensor.numel() for tensor in exported.values()) == sum(
        tensor.numel() for name, tensor in average.items() if name in stored
    )
    assert sum(float(t.double().sum()) for t in exported.values()) == pytest.approx(sum(stored.values()), rel=1e-9)


def test_4_a_cache_of_another_text_encoder_is_refused_and_stays_as_it_is(tell: Callable, story: Story) -> None:
    (refused,) = tell(4)
    assert "encoders.text_layer: last, not penultimate" in refused.text
    begun = story.said["What breaks elsewhere"][1].left
    assert len(begun) > 5
    assert {name: refused.left[name] for name in begun} == begun


def test_5_a_scale_comes_with_its_autoencoder_or_is_measured(tell: Callable) -> None:
    tell(5)
    known, unknown, cache = (load_manifest(open_storage(name)) for name in ("known", "unknown", "cache"))
    assert known.contract.scale == cache.contract.scale
    assert unknown.contract.scale == 0.18215
    assert all(0.8 < std < 1.2 for std in (*known.statistics.std, *cache.statistics.std))
    assert all(std < 0.3 for std in unknown.statistics.std)


def test_6_a_figure_is_made_again_from_its_card(tell: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    tell(6)
    (card,) = Path("run/evals").glob("*/card.json")
    text = card.read_text(encoding="utf-8")
    forged = re.sub(r'("clip_score": -?)(\d)', lambda found: f"{found[1]}{(int(found[2]) + 1) % 10}", text)
    assert forged != text
    card.write_text(forged, encoding="utf-8")
    assert cli.main(["eval", "--from-card", str(card), "data.val=val"]) == 1
    assert "not reproduced: clip_score is" in capsys.readouterr().out
    card.write_text(text, encoding="utf-8")


def test_7_encoding_goes_on_behind_the_shards_that_are_done(tell: Callable) -> None:
    _, first, second = tell(7)
    done = {name: stamp for name, stamp in first.left.items() if name.startswith("units/") or name.endswith(".tar")}
    assert len([name for name in done if re.fullmatch(r"units/\d+\.json", name)]) == 2
    assert "manifest.json" not in first.left
    assert {name: second.left[name] for name in done} == done, "not made again"
    assert cli.main(["encode", "source=many/*.tar", "dest=undisturbed", "decode_in=threads"]) == 0
    assert files(Path("undisturbed")) == files(Path("resumed"))


def test_8_a_preempted_run_commits_where_it_is_and_ends_as_one_that_was_not(
    tell: Callable, story: Story, capsys: pytest.CaptureFixture[str]
) -> None:
    story.until(7, capsys)
    shutil.copytree("run", "twin")
    _, second = tell(8)
    assert [(line.first, line.last) for line in read_ledger(open_storage("run"))][-2:] == [(64, 72), (72, 80)]
    assert cli.main([word.replace("run=run", "run=twin") for word in second.step.words]) == 0
    assert committed(open_storage("twin"))[0] == committed(open_storage("run"))[0] == 80
    assert farthest(weights("twin", 80), weights("run", 80)) == 0


def test_9_ranks_without_a_shard_of_their_own_have_as_many_batches_as_their_peers(tell: Callable) -> None:
    tell(9)
    both = [line for line in read_ledger(open_storage("run")) if line.last <= 48]
    assert {rank: sum(line.samples for line in both if line.rank == rank) for rank in (0, 1)} == {0: 24, 1: 24}
    assert len(load_manifest(open_storage("cache")).shards) == 1
    seen: consumed_run.Seen = {}
    consumed_run.live(consumed_run.begin("eight", "cache"), 8, seen, steps=6)
    assert sorted(seen) == list(range(6 * consumed_run.BATCH)), "eight ranks, and the first epoch's end between"


def test_10_what_captions_take_is_said_before_and_is_what_is_written(tell: Callable) -> None:
    planned, _ = tell(10)
    assert planned.left == {}, "a dry run writes nothing"
    for storage, folder in (("full", "cache"), ("tokens", "small")):
        said = re.search(rf"{storage} +([\d,]+) +[\d.]+ kB", planned.text)
        assert said is not None
        written = sum(shard.bytes for shard in load_manifest(open_storage(folder)).shards)
        assert written == pytest.approx(int(said[1].replace(",", "")) * EPOCH, rel=0.01)
