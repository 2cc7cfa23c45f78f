"""Command lines, environments and destinations: what is mistyped, left over, or would be written over."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

from scripts.faults.base import ENCODE, EVAL, TRAIN
from scripts.faults.bytes_of import ESCAPES
from scripts.faults.trial import Case

SECRET = "SENTINEL/abc+123456789"
URL = "s3://SENTINELUSER:SENTINEL/pass@bucket/x"
BEGIN = ("train", *TRAIN, "data.train=cache", "samples=16", "run=new")


def cases() -> Iterator[Case]:
    """All of them."""
    yield from _command_lines()
    yield from _environments()
    yield from _secrets()
    yield from _destinations()
    yield from _full_disks()


def _command_lines() -> Iterator[Case]:
    lines: dict[str, tuple[str, ...]] = {
        "100,000 overrides": ("data", *(f"seed={i}" for i in range(100_000))),
        "a source of 10**9 names": ("encode", "source={1..1000000000}.tar", "dest=d", *ENCODE),
        "a value of 1 MB": ("verify", f"dataset={'x' * 10**6}"),
        "an unknown key with escapes": ("verify", f"{ESCAPES}=1"),
        "a path with escapes": ("verify", f"dataset={ESCAPES}"),
        "no key": ("train", "nonsense"),
        "an unclosed bracket": ("train", "optim.betas=[0.9"),
        "a seed of 2**64": (*BEGIN, f"seed={2**64}"),
        "a seed of 400 digits": (*BEGIN, "seed=" + "9" * 400),
        "a seed below 0": (*BEGIN, "seed=-1"),
        "a rate of NaN": (*BEGIN, "optim.lr=nan"),
        "a plugin of Hydra": ("train", "-m", "hydra/launcher=os.system", "seed=1,2"),
        "pictures of 10**12 pixels": ("sample", "run=run", "dest=p.png", "prompt=x", "size=1000000x1000000"),
        "10**9 pictures": ("sample", "run=run", "dest=p.png", "prompt=x", "n=1000000000"),
        "a picture as a text file": ("sample", "run=run", "dest=notes.txt", "prompt=x", "n=1", "sampler.steps=1"),
        "validation on the training data": (*BEGIN, "data.val=./cache"),
        "a verb that is none": ("trian", "run=x"),
        "an option of report that is none": ("report", "run", "dets=x.html"),
    }
    for name, words in lines.items():
        yield Case("command line", name, words)
    yield Case(
        "command line",
        "a path with an equals sign",
        ("status", "runs/optim.lr=0.1"),
        _moved("run", "runs/optim.lr=0.1"),
        "done",
    )
    yield Case(
        "command line",
        "a report of such a path",
        ("report", "runs/optim.lr=0.1", "dest=r.html"),
        _moved("run", "runs/optim.lr=0.1"),
        "done",
    )
    yield Case(
        "command line",
        "a ledger of such a path",
        ("ledger", "runs/optim.lr=0.1"),
        _moved("run", "runs/optim.lr=0.1"),
        "either",
        "optim.lr=0.1",
    )
    yield Case(
        "command line",
        "a number from the environment",
        (*BEGIN, "optim.lr=${oc.env:LR}"),
        wants="done",
        environment=(("LR", "1e-4"),),
    )


def _environments() -> Iterator[Case]:
    places = {
        "RANK without the rest": {"RANK": "0"},
        "WORLD_SIZE that is no number": {
            "RANK": "0",
            "WORLD_SIZE": "two",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29511",
        },
        "an empty RANK": {"RANK": "", "WORLD_SIZE": "2"},
        "a rank beyond the world": {
            "RANK": "2",
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29511",
        },
        "no MASTER_ADDR": {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        "a port that is none": {
            "RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "99999",
        },
        "a half-set Slurm step": {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0"},
        "a half-set Slurm step of two": {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"},
    }
    for name, environment in places.items():
        yield Case("environment", f"{name} (train)", BEGIN, wants="either", environment=tuple(environment.items()))
    arrays = {"a half-set array": {"SLURM_ARRAY_TASK_ID": "3"}, "RANK without the rest": {"RANK": "0"}}
    for name, environment in arrays.items():
        words = ("encode", "source=source/*.tar", "dest=made", *ENCODE)
        yield Case("environment", f"{name} (encode)", words, wants="either", environment=tuple(environment.items()))


def _secrets() -> Iterator[Case]:
    """What comes from the environment, or stands in a URL, is neither shown nor stored."""
    lines: dict[str, tuple[str, ...]] = {
        "a number": (*BEGIN, "optim.lr=${oc.env:FAULTS_SECRET}"),
        "a whole number": ("data", "dataset=cache", "batch=${oc.env:FAULTS_SECRET}"),
        "a choice": ("data", "dataset=cache", "tail=${oc.env:FAULTS_SECRET}"),
        "a text": (*BEGIN, "tracking.project=${oc.env:FAULTS_SECRET}"),
        "weights from a URL": (
            *BEGIN,
            "eval.features_weights=http://SENTINELUSER:SENTINELPASS@127.0.0.1:1/w?X-Amz-Signature=SENTINELSIG",
        ),
        "verify": ("verify", f"dataset={URL}"),
        "encode from": ("encode", f"source={URL}/{{0..1}}.tar", "dest=made", *ENCODE),
        "encode to": ("encode", "source=source/*.tar", f"dest={URL}", *ENCODE),
        "a run": ("train", *TRAIN, "data.train=cache", "samples=16", f"run={URL}"),
        "a beginning": (*BEGIN, "init=https://SENTINELUSER:SENTINELPASS@h/x.ckpt"),
        "a report": ("report", "run", f"dest={URL}.html"),
        "a status": ("status", URL),
    }
    for name, words in lines.items():
        environment = (("FAULTS_SECRET", SECRET), ("AWS_EC2_METADATA_DISABLED", "true"))
        yield Case("secrets", name, words, wants="either", check=_no_sentinel, environment=environment)


def _no_sentinel(folder: Path) -> bool:
    return not any(
        b"SENTINEL" in path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink() and path.name != "words.txt"
    )


def _destinations() -> Iterator[Case]:
    """Nothing is written over that this command did not make."""

    def foreign(*names: str) -> Callable[[Path], None]:
        def apply(folder: Path) -> None:
            for name in names:
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"mine")

        return apply

    def keep(*names: str) -> Callable[[Path], bool]:
        return lambda folder: all(_is_mine(folder / name) for name in names)

    encode = ("encode", "source=source/*.tar", "dest=made", *ENCODE)
    for name in (
        "000000.tar",
        "000000.index.json",
        "units/000000.json",
        "manifest.json",
        "uncond.npy",
        "contract.json",
    ):
        yield Case("destinations", f"encode over {name}", encode, foreign(f"made/{name}"), check=keep(f"made/{name}"))
    same = ("encode", "source=six/*.tar", "dest=six", *ENCODE)
    yield Case("destinations", "encode into its own source", same, _six_digits, check=_six_unchanged)
    yield Case(
        "destinations",
        "encode below its own source",
        ("encode", "source=six/**/*.tar", "dest=six/cache", *ENCODE),
        _six_digits,
        "either",
        check=_six_unchanged,
    )
    yield Case(
        "destinations",
        "synth over a tar",
        ("synth", "dest=made", "images=32", "shard_size=16"),
        foreign("made/00000.tar"),
        check=keep("made/00000.tar"),
    )
    for name in ("config.yaml", "run.json", "metrics.jsonl"):
        yield Case("destinations", f"train over {name}", BEGIN, foreign(f"new/{name}"), check=keep(f"new/{name}"))
    yield Case("destinations", "train into a dataset", ("train", *TRAIN, "data.train=cache", "samples=16", "run=cache"))
    yield Case(
        "destinations",
        "export over a folder of others",
        ("export", "run=run", "dest=new"),
        foreign("new/model_index.json"),
        check=keep("new/model_index.json"),
    )
    yield Case(
        "destinations", "export over a file", ("export", "run=run", "dest=new"), foreign("new"), check=keep("new")
    )
    yield Case(
        "destinations",
        "export again beside files of others",
        ("export", "run=run", "dest=exported"),
        foreign("exported/.git/HEAD", "exported/safety_checker/x"),
        "done",
        check=keep("exported/.git/HEAD", "exported/safety_checker/x"),
    )
    yield Case(
        "destinations",
        "export again through a link",
        ("export", "run=run", "dest=link"),
        lambda f: (f / "link").symlink_to("exported"),
        "done",
    )
    yield Case(
        "destinations",
        "report over a file of others",
        ("report", "run", "dest=notes.html"),
        foreign("notes.html"),
        check=keep("notes.html"),
    )
    yield Case(
        "destinations",
        "reference over a file of others",
        ("reference", "dataset=cache", "source=source/*.tar", "dest=x.safetensors"),
        foreign("x.safetensors"),
        check=keep("x.safetensors"),
    )
    yield Case(
        "destinations",
        "index over a manifest of others",
        ("index", "dataset=cache/units"),
        foreign("cache/units/manifest.json"),
        check=keep("cache/units/manifest.json"),
    )
    for name in (".ipynb_checkpoints", "backup", "000000000032 (copy)", "²²²"):

        def stray(folder: Path, name: str = name) -> None:
            path = folder / "run/checkpoints" / name / "commit.json"
            path.parent.mkdir(parents=True)
            path.write_text("{}")

        yield Case(
            "destinations",
            f"a stray checkpoints/{name}",
            ("train", *TRAIN, "data.train=cache", "samples=48", "checkpoint.every=16", "run=run"),
            stray,
            "done",
        )
    yield Case(
        "destinations",
        "another evaluation beside the first",
        ("eval", "run=run", *EVAL),
        lambda f: None,
        "done",
        check=lambda f: len(list((f / "run/evals").iterdir())) >= 2,
    )


def _full_disks() -> Iterator[Case]:
    """A file that cannot be written to its end leaves one line, and no temporary file."""
    lines: dict[str, tuple[str, ...]] = {
        "encode": ("encode", "source=source/*.tar", "dest=made", *ENCODE),
        "train": BEGIN,
        "export": ("export", "run=run", "dest=new"),
        "export format=compvis": ("export", "run=run", "format=compvis", "dest=new.safetensors"),
        "report": ("report", "run", "dest=new.html"),
        "reference": ("reference", "dataset=cache", "source=source/*.tar", "dest=new.safetensors"),
        "synth": ("synth", "dest=made", "images=32", "shard_size=16"),
        "sample": ("sample", "run=run", "dest=new.png", "prompt=a circle", "n=16", "sampler.steps=1"),
        "fetch": ("fetch", "encoders=demo", "dest=fetched"),
    }
    for name, words in lines.items():
        for size in (10_000, 100_000) if name in ("encode", "train") else (10_000,):
            yield Case("full disks", f"{name}, {size:,} bytes", words, check=_no_temporary_files, file_bytes=size)


def _no_temporary_files(folder: Path) -> bool:
    return not list(folder.rglob("*.tmp"))


def _is_mine(path: Path) -> bool:
    return path.is_file() and path.read_bytes() == b"mine"


def _six_digits(folder: Path) -> None:
    (folder / "six").mkdir()
    for number in range(2):
        (folder / f"six/{number:06d}.tar").write_bytes((folder / f"source/{number:05d}.tar").read_bytes())


def _six_unchanged(folder: Path) -> bool:
    def digest(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    return all(digest(folder / f"six/{n:06d}.tar") == digest(folder / f"source/{n:05d}.tar") for n in range(2))


def _moved(source: str, to: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / to).parent.mkdir(parents=True, exist_ok=True)
        (folder / source).rename(folder / to)

    return apply
