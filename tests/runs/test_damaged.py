"""Files of a run directory that somebody has damaged or made up: one line each, which names the file."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from made import cache as small_cache
from made.commits import save
from made.lease import elsewhere
from pipeline.config import DataConfig, TrainConfig
from pipeline.config.loading.merge import to_dict, to_yaml
from pipeline.data.format.contract import plain
from pipeline.errors import CheckpointCorrupt, LatentmillError, RunError
from pipeline.runs.checkpoint import load_weights, newest_good, read_commit
from pipeline.runs.directory import load_run, require_resumable
from pipeline.runs.holder import holder_bytes
from pipeline.runs.lease import newest
from pipeline.runs.ledger import Stretch, read_ledger, truncate_ledgers
from pipeline.runs.retention import Retention, retain
from pipeline.runs.stored import read_config, read_rows
from pipeline.status import status
from pipeline.storage.base import Storage
from pipeline.storage.urls import open_storage

CONFIG = TrainConfig(run="r", data=DataConfig(train="cache"))
FACTS = {"manifests": {"train": "a" * 64}, "contract": plain(small_cache.contract()), "order": 3}
NESTED = "[" * 200_000
N = 640
FILE = f"checkpoints/{N:012d}/"


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    """A run directory with a commit at N samples."""
    run = open_storage(str(tmp_path / "run"))
    run.put("config.yaml", to_yaml(CONFIG).encode())
    run.put("run.json", json.dumps(FACTS).encode())
    save(run, N)
    return run


def refused(action: Callable[[], object], named: str) -> str:
    """The line with which `action` is refused, which names the file."""
    with pytest.raises(LatentmillError) as raised:
        action()
    assert named in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 1000
    return str(raised.value)


def changed_config(**changes: Any) -> str:
    """config.yaml with changed keys, such as optim__batch."""
    tree = to_dict(CONFIG)
    for key, value in changes.items():
        group, _, name = key.rpartition("__")
        (tree[group] if group else tree)[name] = value
    return yaml.safe_dump(tree)


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch owned']",
        "run: !!python/name:os.system",
        BOMB + "seed: *i\n",
        "\xff\xfe binary \x00\t",
        "a: b: c:\n\t- x",
        NESTED,
        "{" * 100_000,
        "- a\n- list\n",
        "just text",
        "",
        "run: 5\n",
    ],
    ids=lambda text: text[:40].encode("unicode_escape").decode(),
)
def test_a_configuration_that_is_damaged_or_impossible_is_refused_in_a_line(run: Storage, text: str) -> None:
    run.put("config.yaml", text.encode("latin-1"))
    for action in (lambda: load_run(run.url), lambda: require_resumable(CONFIG, run)):
        assert "choose another run" in refused(action, f"{run.url}/config.yaml")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("samples", 10**400),
        ("samples", 1e308),
        ("samples", -5),
        ("samples", "many"),
        ("optim.batch", 0),
        ("optim.batch", 10**14),
        ("optim.lr", float("inf")),
        ("model.channels", 10**9),
        ("model.blocks", 10**9),
        ("model.transformer_depth", 10**9),
        ("model.multipliers", [1] * 10_000),
        ("model.multipliers", []),
        ("model.context_width", 2**60),
        ("model.heads", 0),
        ("data", []),
        ("data.mix", [["nested"]]),
        ("optim.future", "of a newer version"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_value_that_cannot_be_is_refused_by_its_key_before_anything_is_built(
    run: Storage, key: str, value: Any
) -> None:
    run.put("config.yaml", changed_config(**{key.replace(".", "__"): value}).encode())
    line = refused(lambda: load_run(run.url), f"{run.url}/config.yaml")
    assert any(word in line for word in (key, "an integer beyond", "no finite number"))


def test_keys_of_a_later_version_are_passed_over_where_they_change_nothing(run: Storage) -> None:
    run.put("config.yaml", changed_config(optim__future=1, later={"a": 1}).encode())
    assert read_config(run, forward=True) == CONFIG
    refused(lambda: read_config(run), "later: no such key")


def changed_facts(**changes: Any) -> str:
    return json.dumps({**FACTS, **changes})


@pytest.mark.parametrize(
    "text",
    [
        "garbage",
        "null",
        "[]",
        "{}",
        NESTED,
        '{"a":' * 100_000,
        "\xff\xfe",
        '{"manifests": {"train": "%s"}, "manifests": {}, "contract": {}}' % ("a" * 64),
        changed_facts(manifests={}),
        changed_facts(manifests=[]),
        changed_facts(manifests={"val": "a" * 64}),
        changed_facts(manifests={"train": "../../x\x1b[31m"}),
        changed_facts(manifests={"train": 5}),
        changed_facts(order="three"),
        changed_facts(order=10**30),
        changed_facts(mixture=[-1]),
        changed_facts(mixture={"a": 1}),
        changed_facts(contract=5),
        changed_facts(init=[]),
        changed_facts(changes=[{"n": "x"}]),
        changed_facts(dataset_samples=float("nan")),
    ],
    ids=lambda text: text[:60].encode("unicode_escape").decode(),
)
def test_facts_of_a_run_that_are_damaged_are_refused_in_a_line(run: Storage, text: str) -> None:
    run.put("run.json", text.encode("latin-1"))
    assert "choose another run" in refused(lambda: load_run(run.url), f"{run.url}/run.json")


def test_a_contract_that_is_none_is_refused_in_a_line(run: Storage) -> None:
    contract: dict[str, Any] = plain(small_cache.contract())
    for wrong in ({}, {**contract, "later": 1}, {**contract, "members": 5}, {**contract, "buckets": [1]}):
        run.put("run.json", changed_facts(contract=wrong).encode())
        refused(lambda: load_run(run.url).contract, f"{run.url}/run.json: its contract is damaged")


def test_what_a_later_version_adds_to_the_facts_is_passed_over(run: Storage) -> None:
    run.put("run.json", changed_facts(later={"x": [1]}).encode())
    assert load_run(run.url).facts["later"] == {"x": [1]}


# --------------------------------------------------------------------------------------------------------------------
# Commits and checkpoints


def reseal(run: Storage, **changes: Any) -> None:
    """Change a commit, and its hash with it."""
    commit = json.loads(run.get(FILE + "commit.json"))["commit"] | changes
    body = json.dumps(commit, sort_keys=True)
    sealed = {"sha256": hashlib.sha256(body.encode()).hexdigest(), "commit": commit}
    run.put(FILE + "commit.json", json.dumps(sealed).encode())


ENTRY = {"name": "rank00000-0123abcd.safetensors", "bytes": 8, "sha256": "a" * 64}


@pytest.mark.parametrize(
    "changes",
    [
        {"files": [{**ENTRY, "name": 5}]},
        {"files": [{**ENTRY, "name": "../../secret"}]},
        {"files": [{**ENTRY, "name": "/etc/passwd"}]},
        {"files": [{**ENTRY, "name": "commit.json"}]},
        {"files": [{**ENTRY, "bytes": -1}]},
        {"files": [{**ENTRY, "bytes": "8"}]},
        {"files": [{**ENTRY, "sha256": "x"}]},
        {"files": ["text"]},
        {"files": {}},
        {"shapes": {"conv": [2**60]}},
        {"shapes": {"conv": [2**31, 2**31]}},
        {"shapes": {"conv": [-3, -2]}},
        {"shapes": {"conv": ["3"]}},
        {"shapes": {"conv": [1] * 1000}},
        {"shapes": []},
        {"n": 10},
        {"n": "640"},
        {"steps": -1},
        {"world": 0},
        {"guard": {"skipped": "x"}},
        {"guard": {"loss": 5}},
        {"manifests": 5},
        {"mixture": ["a"]},
        {"config": 5},
        {"format": 99},
        {"format": None},
    ],
    ids=str,
)
def test_a_commit_that_no_run_can_have_sealed_is_damaged(run: Storage, changes: dict[str, Any]) -> None:
    reseal(run, **changes)
    refused(lambda: read_commit(run, N), FILE + "commit.json")
    with pytest.raises(CheckpointCorrupt, match="no checkpoint of"):
        newest_good(run)


@pytest.mark.parametrize("text", ["", "{", "null", "[1]", NESTED, '{"commit": []}', '{"commit": {}, "sha256": 5}'])
def test_a_commit_of_garbage_is_damaged(run: Storage, text: str) -> None:
    run.put(FILE + "commit.json", text.encode())
    refused(lambda: read_commit(run, N), FILE + "commit.json")


def test_a_damaged_commit_is_passed_over_for_the_one_before_and_nothing_is_removed(run: Storage) -> None:
    save(run, 2 * N)
    run.put(f"checkpoints/{2 * N:012d}/commit.json", NESTED.encode())
    commit = newest_good(run)
    assert commit is not None
    assert commit.n == N
    before = [info.key for info in run.list("checkpoints/")]
    retain(run, Retention(1))
    assert [info.key for info in run.list("checkpoints/")] == before


def test_what_a_later_version_adds_to_a_commit_is_passed_over(run: Storage) -> None:
    before = read_commit(run, N)
    reseal(run, later=[1])
    assert read_commit(run, N) == before


def with_file(run: Storage, data: bytes, *, sectioned: bool) -> None:
    """Replace the checkpoint's file, and what its commit says of it. sectioned: whether that names its header, and
    everything after it as one average; commits of earlier versions have the hash of the file alone."""
    (entry,) = read_commit(run, N).files
    run.put(FILE + entry["name"], data)
    end = min(8 + int.from_bytes(data[:8], "little"), len(data))
    sections = [
        {"kind": kind, "bytes": len(part), "sha256": hashlib.sha256(part).hexdigest()}
        for kind, part in (("", data[:end]), ("ema", data[end:]))
    ]
    facts = {"name": entry["name"], "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    reseal(run, files=[{**facts, "sections": sections} if sectioned else facts])


def header_of(run: Storage) -> tuple[dict[str, Any], bytes]:
    """(header, data) of the checkpoint's file."""
    (entry,) = read_commit(run, N).files
    data = run.get(FILE + entry["name"])
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


PADDED = b" " * 1000
HOW = pytest.mark.parametrize("sectioned", [False, True], ids=["a hash of the file", "hashes of its kinds"])


@HOW
@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<Q", 2**62) + PADDED,
        struct.pack("<Q", 2000) + PADDED,
        struct.pack("<Q", 1000) + b"x" * 1000,
        struct.pack("<Q", 1000) + PADDED,
        struct.pack("<Q", 200_000) + NESTED.encode(),
        struct.pack("<Q", 1000) + b"[]".ljust(1000),
    ],
    ids=["2**62", "longer than the file", "garbage", "blanks", "nested", "a list"],
)
def test_a_checkpoint_file_whose_header_is_damaged_is_refused_though_its_hash_is_right(
    run: Storage, data: Any, sectioned: bool
) -> None:
    with_file(run, data, sectioned=sectioned)
    refused(lambda: load_weights(run, N), "rank00000")


@HOW
@pytest.mark.parametrize(
    "change",
    [
        {"data_offsets": [0, 2**60]},
        {"data_offsets": [-8, 0]},
        {"data_offsets": [8, 0]},
        {"data_offsets": [0, 7]},
        {"data_offsets": ["0", "4"]},
        {"data_offsets": [4, 24]},
        {"dtype": "F16"},
        {"shape": [2**40]},
        {"shape": [1] * 100},
        {"later": 1},
    ],
    ids=str,
)
def test_a_fragment_that_does_not_lie_in_its_file_is_refused(
    run: Storage, change: dict[str, Any], sectioned: bool
) -> None:
    header, data = header_of(run)
    header["ema/bias@0"] |= change
    text = json.dumps(header).encode()
    with_file(run, struct.pack("<Q", len(text)) + text + data, sectioned=sectioned)
    refused(lambda: load_weights(run, N), "rank00000")


@HOW
@pytest.mark.parametrize(
    "label", ["ema/conv@4", "ema/conv@99999999999999999", "ema/conv@-1", "ema/conv", "conv@0", "/@0"]
)
def test_values_that_lie_twice_or_nowhere_are_refused(run: Storage, label: str, sectioned: bool) -> None:
    header, data = header_of(run)
    header[label] = header.pop("ema/bias@0")
    text = json.dumps(header).encode()
    with_file(run, struct.pack("<Q", len(text)) + text + data, sectioned=sectioned)
    refused(lambda: load_weights(run, N), run.url)


# --------------------------------------------------------------------------------------------------------------------
# Leases, ledgers, metrics


def lease_with(**changes: Any) -> str:
    fixed = {"token": "0123456789abcdef", "began": 1.5e9, "beat": 1.5e9}  # names of tests do not change
    return json.dumps({**asdict(elsewhere()), **fixed, **changes})


@pytest.mark.parametrize(
    "text",
    [
        "garbage",
        "",
        "{}",
        "[]",
        "null",
        NESTED,
        lease_with(state="paused"),
        lease_with(beat="now"),
        lease_with(beat=1e300),
        lease_with(began=-1e300),
        lease_with(pid=-5),
        lease_with(n="many"),
        lease_with(n=10**30),
        lease_with(life=None),
        lease_with(job="--help"),
        lease_with(job="7; rm -rf /"),
        lease_with(token=5),
    ],
    ids=lambda text: text[-200:],
)
def test_a_damaged_lease_is_refused_in_a_line_that_says_what_to_do(run: Storage, text: str) -> None:
    run.put("lease/000001.json", holder_bytes(elsewhere(host="n1")))
    run.put("lease/000002.json", text.encode())
    line = refused(lambda: newest(run), f"{run.url}/lease/000002.json is no lease that can be read")
    assert line.endswith("see that no process trains the run, and delete that file")
    run.delete("lease/000002.json")
    assert newest(run)[0] == 1


def test_what_a_later_version_adds_to_a_lease_is_passed_over(run: Storage) -> None:
    run.put("lease/000001.json", lease_with(evil=1, later={"x": 2}).encode())
    _, holder = newest(run)
    assert holder is not None
    assert holder.host == "n9"


LINE = vars(Stretch(0, 64, 0, 1, 64, 2**64 - 1, 2**63))


@pytest.mark.parametrize(
    "line",
    [
        "garbage",
        NESTED,
        "[]",
        "5",
        *(json.dumps({**LINE, **wrong}) for wrong in ({"first": "0"}, {"last": None}, {"rank": -1}, {"world": 10**18})),
        *(json.dumps({**LINE, **wrong}) for wrong in ({"records": 2**64}, {"noise": -1}, {"samples": 1.5})),
        json.dumps({name: value for name, value in LINE.items() if name != "rank"}),
    ],
    ids=lambda line: line[:50],
)
def test_a_damaged_line_of_a_ledger_is_no_line(run: Storage, line: str) -> None:
    """The samples that it was about are then missing, which `latentmill ledger` says."""
    whole = json.dumps(LINE).encode()
    run.put("ledger/rank00000.jsonl", line.encode() + b"\n" + whole + b"\n")
    assert read_ledger(run) == [Stretch(**LINE)]
    truncate_ledgers(run, N)
    assert run.get("ledger/rank00000.jsonl") == whole + b"\n"


def test_what_a_later_version_adds_to_a_line_of_a_ledger_is_passed_over_and_kept(run: Storage) -> None:
    text = json.dumps({**LINE, "later": 1}).encode() + b"\n"
    run.put("ledger/rank00000.jsonl", text + b'{"first": 64')
    assert read_ledger(run) == [Stretch(**LINE)]
    truncate_ledgers(run, N)
    assert run.get("ledger/rank00000.jsonl") == text


def test_rows_of_metrics_that_are_damaged_are_passed_over(run: Storage) -> None:
    lines = [
        *('{"n": 1}', NESTED, '{"n": %s}' % ("9" * 4000), '{"n": "1"}', "[]", "5", '{"n": 2, "loss": "x"}'),
        *('{"n": 3, "time": NaN}', '{"n": 4, "images_per_s": 1e999}', '{"n": -1}', '{"n": 5, "kind": []}', '{"n": 6'),
    ]
    run.put("metrics.jsonl", "\n".join(lines).encode())
    assert [row.n for row in read_rows(run, 1 << 20)] == [1]
    run.put("metrics.jsonl", b'{"n": 1, "kind": "train", "loss": null, "time": 3}\n')
    assert [(row.n, row.loss, row.time) for row in read_rows(run, 1 << 20)] == [(1, None, 3.0)]


def test_a_configuration_that_is_a_folder_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").mkdir()
    with pytest.raises(RunError, match="not a run directory"):
        load_run(str(tmp_path))


@pytest.mark.parametrize("key", ["config.yaml", "run.json", FILE + "commit.json", "lease/000001.json", "metrics.jsonl"])
@pytest.mark.parametrize("what", ["pipe", "device", "huge"])
def test_what_is_no_file_or_a_huge_one_is_refused_before_it_is_read(run: Storage, key: str, what: str) -> None:
    path = run.local_path(key)
    assert path is not None
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if what == "pipe":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 1 << 40)
    for action in (
        lambda: load_run(run.url),
        lambda: load_weights(run),
        lambda: newest(run),
        lambda: read_rows(run, 1 << 20),
    ):
        with suppress(LatentmillError):
            action()
    line = " ".join(status(run.url).problem.split())
    if what == "huge" and key in ("config.yaml", "lease/000001.json"):
        assert f"{key}" in line
        assert "1,099,511,627,776 bytes" in line


def test_a_huge_ledger_is_refused_before_it_is_read(run: Storage) -> None:
    run.put("ledger/rank00000.jsonl", b"")
    os.truncate(str(run.local_path("ledger/rank00000.jsonl")), 1 << 40)
    refused(lambda: read_ledger(run), f"{run.url}/ledger/rank00000.jsonl has 1,099,511,627,776 bytes")
