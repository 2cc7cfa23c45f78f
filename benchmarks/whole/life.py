"""A run from its cache to its export, each step the verb that a user types; one that is killed, and its resume."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.whole.journal import Journal
from benchmarks.whole.verbs import Begun, Verbs
from pipeline.errors import DataError

SECTION = "A run from its cache to its export"
HEAD = ("verb", "seconds, start included", "what it says")
LIKE = ("n", "loss", "lr", "grad_norm")
"""Figures of a row that are equal in equal runs."""
COMMITS = 4  # of the runs that are compared
MOST_DRIFT = 0.05  # of a loss between ZeRO stages in bf16, relative


@dataclass(frozen=True)
class Sizes:
    """images: in the training cache. batch, steps: of every run. evaluated: images of an evaluation. device, precision,
    model, compiled: as the keys of train."""

    images: int
    batch: int
    steps: int
    evaluated: int
    device: str
    precision: str
    model: str
    compiled: bool

    @property
    def samples(self) -> int:
        return self.batch * self.steps

    @property
    def every(self) -> int:
        """Samples between commits."""
        return self.batch * max(1, self.steps // COMMITS)


class Life:
    """The runs, in a folder of their own."""

    def __init__(self, sizes: Sizes, folder: Path, verbs: Verbs, journal: Journal) -> None:
        self.sizes, self.folder, self.verbs, self.journal = sizes, folder, verbs, journal
        self.whole: Begun | None = None
        self.reference = str(folder / "reference.safetensors")

    def live(self) -> None:
        """All of it. What fails is noted, and what does not need it follows. Raises DataError where there is nothing to
        train on."""
        self._make_data()
        self._begin_training()
        self.journal.attempt("statistics for a run of ZeRO 2", 0.0, self._begin_whole)
        self.journal.attempt("a run of ZeRO 2 through its end", 0.0, self._finish_whole)
        self.journal.attempt("runs that are to be equal", 0.0, self._compare)
        self.journal.attempt("what is made of the run", 0.0, self._use)

    def place(self, name: str) -> str:
        return str(self.folder / name)

    # Data ------------------------------------------------------------------------------------------------------------

    def _make_data(self) -> None:
        """Captioned shapes, and their caches: one to train on, one that is held out."""
        held_out = max(64, self.sizes.evaluated)
        splits = (("train", self.sizes.images, "1"), ("val", held_out, "2"))
        self.verbs.run(
            *(
                ("synth", f"dest={self.place(f'shapes-{split}')}", f"images={images}", f"split={split}", f"seed={seed}")
                for split, images, seed in splits
            )
        )
        encoded = self.verbs.run(*(self._encode(split) for split, _, _ in splits))
        self._row(encoded[0], f"{self.sizes.images:,} images; another {held_out} beside it")

    def _encode(self, split: str) -> list[str]:
        shapes = sorted((self.folder / f"shapes-{split}").glob("*.tar"))
        last = f"{{00000..{len(shapes) - 1:05d}}}.tar" if len(shapes) > 1 else "00000.tar"
        source = f"source={self.place(f'shapes-{split}')}/{last}"
        dest, device = f"dest={self.place(f'cache-{split}')}", f"device={self.sizes.device}"
        return ["encode", source, dest, "encoders=demo", device]

    # Training --------------------------------------------------------------------------------------------------------

    def _begin_training(self) -> None:
        """Side by side: a run of ZeRO 2 through its end, and of ZeRO 1 and 2 with deterministic kernels, one of which
        is killed after its first commit and started again."""
        shapes = f"source={sorted((self.folder / 'shapes-val').glob('*.tar'))[0]}"
        self.statistics = self.verbs.begin(
            "reference", f"dataset={self.place('cache-val')}", shapes, f"dest={self.reference}"
        )
        self.undisturbed = self._begin("undisturbed", stage=1)
        self.second_stage = self._begin("zero2", stage=2)
        self.killed = self._begin("killed", stage=1)
        self.struck = self.verbs.strike(self.killed, lambda: bool(commits(self.place("killed"))))
        self.struck_at = next(iter(commits(self.place("killed"))), 0)
        self.resumed = self._begin("killed", stage=1)

    def _finish_whole(self) -> None:
        whole = self._begun_whole()
        self.verbs.finish(whole)
        self._row(whole, self._told_of_whole())
        if self.sizes.device == "cuda":
            version = nccl(whole.said)
            told = f"gradients went through NCCL ({version or 'no version was said'})"
            self.journal.check(SECTION, told, bool(version))

    def _compare(self) -> None:
        """What must be equal, and how near ZeRO 1 and 2 are. Raises DataError for a run that has failed."""
        check, steps = self.journal.check, f"deterministic kernels, {self.sizes.steps} steps"
        self.verbs.finish(self.undisturbed, self.resumed)
        self._row(self.undisturbed, f"ZeRO 1, {steps}")
        self._row(self.killed, f"killed at a commit ({self.struck_at:,} samples)")
        self._row(self.resumed, "the same command again")
        check(SECTION, "a run was killed on its way", self.struck and 0 < self.struck_at < self.sizes.samples)
        difference = unlike(self.place("undisturbed"), self.place("killed"), self.sizes.samples)
        check(SECTION, "it was resumed and ends as an undisturbed one, to the bit", not difference, difference)
        self.verbs.finish(self.second_stage)
        self._row(self.second_stage, f"ZeRO 2, {steps}")
        drift = apart(self.place("undisturbed"), self.place("zero2"))
        near = f"losses of ZeRO 1 and 2 agree to {MOST_DRIFT:.0%} (relative)"
        check(SECTION, near, drift <= MOST_DRIFT, f"{drift:.2%}")
        self.journal.note(SECTION, f"- largest difference of a loss between ZeRO 1 and 2: {drift:.3g} (relative)")

    def _common(self, name: str, stage: int) -> list[str]:
        sizes = self.sizes
        return [
            *(f"model={sizes.model}", "diffusion=v", f"run={self.place(name)}", "tracking.wandb=off"),
            *(f"data.train={self.place('cache-train')}", f"optim.batch={sizes.batch}", f"samples={sizes.samples}"),
            *(f"deepspeed=zero{stage}", f"precision={sizes.precision}", f"device={sizes.device}"),
            *("optim.lr=1e-3", f"optim.warmup={sizes.samples // 4}", f"checkpoint.every={sizes.every}"),
            *(["launch.threads=1"] if sizes.device == "cpu" else []),  # several runs share the cores of a test
        ]

    def _begin(self, name: str, stage: int) -> Begun:
        """A run with deterministic kernels and a row for each step, without evaluations."""
        words = ["deterministic=true", f"tracking.every={self.sizes.batch}", f"ema.half_life={self.sizes.every}"]
        return self.verbs.begin("train", *self._common(name, stage), *words)

    def _begin_whole(self) -> None:
        """The run whose evaluations need statistics, once they are there."""
        self.verbs.finish(self.statistics)
        self._row(self.statistics, "statistics of the held-out images")
        words = [f"data.val={self.place('cache-val')}", f"eval.reference={self.reference}", "eval.every=0"]
        words += [f"eval.images={self.sizes.evaluated}", f"eval.final_images={self.sizes.evaluated}"]
        words += ["eval.loss_images=64", f"eval.loss_every={self.sizes.every}"]
        words += [f"compile={str(self.sizes.compiled).lower()}"]
        self.whole = self.verbs.begin("train", *self._common("whole", stage=2), *words)

    def _begun_whole(self) -> Begun:
        """That run. Raises DataError where it has not begun."""
        if self.whole is None:
            raise DataError("that run did not begin, for want of statistics")
        return self.whole

    def _told_of_whole(self) -> str:
        """What the run's rows say: speed, memory, commits, figures."""
        rows = rows_of(self.place("whole"))
        last = {kind: [row for row in rows if row["kind"] == kind][-1:] for kind in ("train", "checkpoint", "eval")}
        assert commits(self.place("whole"))[0] == self.sizes.samples, "train has ended with status 0"
        told = [f"ZeRO 2, {self.sizes.precision}{', compiled' if self.sizes.compiled else ''}"]
        for row in last["train"]:
            told.append(f"{row['images_per_s']:.3g} images/s at the end, {row['memory_gb']:.2g} GB")
        for row in last["checkpoint"]:
            told.append(f"a commit of {row['bytes'] / 1e6:.3g} MB held it up {1e3 * row['stall_s']:.0f} ms")
        for row in last["eval"]:
            told += [f"{name} {row[name]:.4g}" for name in ("fid_democlip", "clip_score") if name in row]
        return ", ".join(told)

    # What is made of it ----------------------------------------------------------------------------------------------

    def _use(self) -> None:
        """Evaluation, sampling and export of the run, side by side."""
        self._begun_whole()
        run, picture, folder = f"run={self.place('whole')}", self.place("samples.png"), self.place("diffusers")
        device, images = f"device={self.sizes.device}", max(2, self.sizes.evaluated // 2)
        evaluated, sampled, exported = self.verbs.run(
            ("eval", run, f"images={images}", "steps=[10]", device),
            ("sample", run, "prompt=a red circle", "n=4", f"dest={picture}", device),
            ("export", run, f"dest={folder}", "check=true"),
        )
        for begun in (evaluated, sampled, exported):
            self._row(begun, begun.said.strip().splitlines()[-1].replace(str(self.folder), "..")[:90])
        self.journal.check(SECTION, "there is a picture", Path(picture).stat().st_size > 0)
        files = ("model_index.json", "unet/config.json")
        there = [(Path(folder) / name).is_file() for name in files]
        self.journal.check(SECTION, "there is a folder for diffusers, which predicts the same", all(there))

    def _row(self, begun: Begun, words: str) -> None:
        self.journal.row(SECTION, HEAD, (begun.words[0], f"{begun.seconds:.1f}", words))


# ---------------------------------------------------------------------------------------------------------------------
# What runs leave


def commits(run: str) -> list[int]:
    """n of the commits, the newest first."""
    from pipeline.runs.directory import committed
    from pipeline.storage.urls import open_storage

    return committed(open_storage(run)) if Path(run).is_dir() else []


def rows_of(run: str) -> list[dict[str, Any]]:
    from pipeline.tracking.tracker import read_rows

    return read_rows(Path(run, "metrics.jsonl"))


def unlike(one: str, other: str, n: int) -> str:
    """How the commits at n, the steps' figures or the ledgers of two runs differ, in words; "" where they are equal to
    the bit."""
    from pipeline.runs.checkpoint import read_commit, verify
    from pipeline.runs.ledger import read_ledger, totals
    from pipeline.storage.urls import open_storage

    storages = [open_storage(url) for url in (one, other)]
    hashes = []
    for storage in storages:
        commit = read_commit(storage, n)
        verify(storage, commit)
        hashes.append([entry["sha256"] for entry in commit.files])
    first, second = (figures(url) for url in (one, other))
    if first.keys() != second.keys():
        return f"rows of {len(first)} and of {len(second)} steps"
    if wrong := next((step for step in first if first[step] != second[step]), 0):
        return f"the step that ends at {wrong} samples: {first[wrong]} and {second[wrong]}"
    if hashes[0] != hashes[1]:
        return f"weights, moments or averages at {n} samples"
    if totals(read_ledger(storages[0])) != totals(read_ledger(storages[1])):
        return "the ledgers"
    return ""


def figures(run: str) -> dict[int, dict[str, Any]]:
    """n after each step -> what equal runs have in common."""
    rows = (row for row in rows_of(run) if row["kind"] == "train")
    return {row["n"]: {name: row[name] for name in LIKE if name in row} for row in rows}


def apart(one: str, other: str) -> float:
    """The largest relative difference between the losses of two runs, step by step."""
    first, second = figures(one), figures(other)
    return max(abs(row["loss"] - second[n]["loss"]) / abs(row["loss"]) for n, row in first.items())


def nccl(said: str) -> str:
    """NCCL's version as it says it itself; "" where it has said none."""
    found = re.search(r"NCCL version ([\w.+-]+)", said)
    return found.group(1) if found else ""
