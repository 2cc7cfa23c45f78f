"""Files of ours that are damaged: those of a dataset, of a run and of weights, each read by a verb that needs it."""

from __future__ import annotations

from collections.abc import Iterator

from scripts.faults.base import EVAL, TRAIN
from scripts.faults.bytes_of import (
    ESCAPES,
    JSON_DAMAGE,
    LINES_DAMAGE,
    NO_FILES,
    YAML_DAMAGE,
    edited,
    in_place_of,
    replaced,
)
from scripts.faults.trial import Case

GO_ON = ("train", *TRAIN, "data.train=cache", "samples=48", "run=run")
BEGIN = ("train", *TRAIN, "data.train=cache", "samples=16", "run=new")
SAMPLE = ("sample", "run=run", "dest=pictures.png", "n=1", "prompt=a circle", "sampler.steps=1")
COMMIT = "run/checkpoints/000000000032/commit.json"
FIGURES = "run/evals"


def cases() -> Iterator[Case]:
    """All of them."""
    yield from _json("dataset", "cache/manifest.json", ("verify", "dataset=cache"))
    yield from _json("dataset", "cache/000000.index.json", BEGIN)
    yield from _json("dataset", "cache/contract.json", _encode_again(), wants="either")
    yield from _json("dataset", "cache/units/000000.json", _encode_again(), wants="either")
    yield from _json("run", "run/run.json", ("status", "run"), wants="either")
    yield from _json("run", "run/run.json", ("ledger", "run"), wants="either")
    yield from _json("run", COMMIT, SAMPLE)
    yield from _json("run", "run/lease/000001.json", GO_ON, wants="either")
    yield from _json("encoders", "exported/unet/config.json", _init("exported"), wants="either")
    yield from _json("encoders", "exported/scheduler/scheduler_config.json", _init("exported"), wants="either")
    for name, change in YAML_DAMAGE.items():
        yield Case("run", f"config.yaml: {name}", ("status", "run"), replaced("run/config.yaml", change), "either")
        yield Case("run", f"config.yaml: {name} (sample)", SAMPLE, replaced("run/config.yaml", change), "either")
    for name, change in LINES_DAMAGE.items():
        yield Case(
            "run",
            f"metrics.jsonl: {name}",
            ("report", "run", "dest=r.html"),
            replaced("run/metrics.jsonl", change),
            "either",
        )
        yield Case(
            "run", f"ledger: {name}", ("ledger", "run"), replaced("run/ledger/rank00000.jsonl", change), "either"
        )
    yield from _manifest()
    yield from _arrays()


def _json(area: str, file: str, words: tuple[str, ...], wants: str = "refused") -> Iterator[Case]:
    harmless = ("every text with escapes",)
    for name, change in JSON_DAMAGE.items():
        yield Case(area, f"{file}: {name}", words, replaced(file, change), "either" if name in harmless else wants)
    for what in NO_FILES:
        yield Case(area, f"{file}: {what}", words, in_place_of(file, what), wants)


def _manifest() -> Iterator[Case]:
    """Values of a manifest that are of the right type and cannot be true."""
    edits = {
        "a shard of 10**12 samples": (("shards", 0, "samples"), 10**12),
        "a shard of -5 samples": (("shards", 0, "samples"), -5),
        "a shard of 10**15 bytes": (("shards", 0, "bytes"), 10**15),
        "a shard of -1 bytes": (("shards", 0, "bytes"), -1),
        "a shard of unit 99": (("shards", 0, "unit"), 99),
        "a shard named ../../x": (("shards", 0, "name"), "../../x.tar"),
        "a shard named by an absolute path": (("shards", 0, "name"), "/etc/passwd"),
        "a shard named with escapes": (("shards", 0, "name"), f"{ESCAPES}.tar"),
        "two shards of one name": (("shards", 1, "name"), "000000.tar"),
        "a hash that is none": (("shards", 0, "sha256"), "zz"),
        "a latent of 10**12 values": (("contract", "latent_shape"), [4, 10**6, 10**6]),
        "a latent of no sides": (("contract", "latent_shape"), []),
        "no buckets": (("contract", "buckets"), []),
        "a scale of text": (("contract", "scale"), "x"),
        "a scale of 0": (("contract", "scale"), 0),
        "a scale of 1e308": (("contract", "scale"), 1e308),
        "statistics of text": (("statistics", "mean"), ["a", "b", "c", "d"]),
        "statistics of two channels": (("statistics", "mean"), [0.0, 0.0]),
        "another format": (("format",), 99),
        "-1 excluded records": (("excluded",), -1),
        "sources that are numbers": (("sources",), [1, 2]),
        "version 0": (("version",), 0),
    }
    for name, (path, value) in edits.items():
        change = edited("cache/manifest.json", *path, value=value)
        for words in (("verify", "dataset=cache"), BEGIN):
            yield Case("dataset", f"manifest: {name} ({words[0]})", words, change)
    for name, pattern in (
        ("3 * 10**9 names", "{1..3000000000}.tar"),
        ("24 nested braces", "{a,b}" * 24),
        ("the whole disk", "/**/*"),
        ("a stranger's bucket", "s3://somebody/x/*.tar"),
    ):
        change = edited("cache/manifest.json", "sources", value=[pattern])
        yield Case("dataset", f"manifest: sources of {name}", ("verify", "dataset=cache"), change, "either")


def _arrays() -> Iterator[Case]:
    damage = {
        "empty": lambda data: b"",
        "cut": lambda data: data[:-1],
        "garbage": lambda data: b"\x80\x04" * 100,
        "of objects": lambda data: data.replace(b"<f2", b"|O "),
        "of 10**18 values": lambda data: data.replace(b"(24, 128), ", b"(" + b"9" * 18 + b",),"),
        "a header of 9,000 signs": lambda data: b"\x93NUMPY\x01\x00" + (9000).to_bytes(2, "little") + b"-" * 9000,
        "negative sides": lambda data: data.replace(b"(24, 128)", b"(-24, -8)"),
    }
    for name, change in damage.items():
        yield Case("dataset", f"uncond.npy: {name}", BEGIN, replaced("cache/uncond.npy", change))
        yield Case(
            "dataset",
            f"a tar: {name}",
            ("verify", "dataset=cache"),
            replaced("cache/000000.tar", change),
            "either" if name[:2] in ("of", "ne", "a ") else "refused",
        )
    for name, change in {
        "empty": lambda data: b"",
        "cut in half": lambda data: data[: len(data) // 2],
        "a header of 2**62 bytes": lambda data: (2**62).to_bytes(8, "little") + data[8:],
        "a header that is no JSON": lambda data: data[:8] + b"x" * 100 + data[108:],
        "a pickle": lambda data: b"\x80\x04cos\nsystem\n(S'touch owned'\ntR.",
    }.items():
        yield Case(
            "weights",
            f"exported.safetensors: {name}",
            _init("exported.safetensors"),
            replaced("exported.safetensors", change),
        )
        yield Case(
            "weights",
            f"reference: {name}",
            ("eval", "run=run", "reference=reference.safetensors", *EVAL, "seed=3"),
            replaced("reference.safetensors", change),
        )
        file = "exported/unet/diffusion_pytorch_model.safetensors"
        yield Case("weights", f"a diffusers UNet: {name}", _init("exported"), replaced(file, change))


def _init(beginning: str) -> tuple[str, ...]:
    return ("train", *TRAIN, "data.train=cache", "samples=16", "run=new", f"init={beginning}")


def _encode_again() -> tuple[str, ...]:
    from scripts.faults.base import ENCODE

    return ("encode", "source=source/*.tar", "dest=cache", *ENCODE)
