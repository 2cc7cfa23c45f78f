"""Reads what a run directory holds in YAML and JSON, whoever wrote it last: with every type and bound checked, and in
one line that names the file where it is damaged. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

from pipeline.config import AutoencoderConfig, FirstStageConfig, ModelConfig, RunConfig, TrainConfig
from pipeline.config.check.first_stage import check_architecture
from pipeline.config.check.groups import check_diffusion, check_model, check_task
from pipeline.config.loading.merge import flat_types
from pipeline.config.loading.stored import from_stored
from pipeline.config.values.bounds import Between, Ge, check_bounds, require
from pipeline.errors import ConfigError, NotFound, ParseError, RunError, Unset
from pipeline.parsing.typed import build
from pipeline.parsing.values import YAML_BYTES, parse_json, parse_yaml
from pipeline.runs.names import CONFIG, DIGITS, FACTS, ROWS
from pipeline.storage.base import Storage

FACTS_BYTES = 16 << 20
"""Largest run.json: it takes some thousand bytes, and more only for the contract of a cache with many buckets."""
ROW_BYTES = 1 << 20
"""Longest row of metrics.jsonl."""
LARGEST = 10**DIGITS - 1
"""Largest number of samples: names have no room for more."""
LARGEST_BATCH = 1 << 24
"""Largest global batch."""
WIDEST, MOST = 1 << 16, 1 << 10
"""Largest width of a layer, and largest number of levels, of blocks in a level and of transformers in a block, of a
network that a configuration may describe. The largest that were published have widths of some thousand."""

Count = Annotated[int, Between(0, LARGEST)]
"""A number of samples."""
Seconds = Annotated[float, Between(0, 253402300799)]
"""Unix time, up to the year 9999."""


@dataclass(frozen=True)
class Matches:
    """A bound on text: a regular expression that all of it must match. words: what is wanted."""

    pattern: str
    words: str

    def admits(self, value: str) -> bool:
        return re.fullmatch(self.pattern, value) is not None


Digest = Annotated[str, Matches(r"[0-9a-f]{64}", "a SHA-256 of 64 hexadecimal digits is wanted")]


@dataclass(frozen=True, kw_only=True)
class Change:
    """A change of a key that may change and that the learning rate depends on. lr_old, lr_new: the learning rate at n
    samples as it was to be, and as it is."""

    n: Count
    """Samples seen when training went on with it."""
    key: str
    old: Count
    new: Count
    at: Count = 0
    """Samples seen at which the two rates are compared: n, or later where they are equal at n."""
    lr_old: float = 0.0
    lr_new: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The contents of run.json that verbs read."""

    manifests: dict[str, Digest]
    """Digest of each dataset's manifest, by role."""
    contract: dict[str, Any]
    """Of data.train's cache, as in its manifest."""
    dataset_samples: Count = 0
    order: Annotated[int, Ge(1)] = 1
    """Version of the order of samples."""
    mixture: list[Annotated[int, Between(1, LARGEST)]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    init: dict[str, Any] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of metrics.jsonl, as far as verbs that look at many runs read it."""

    n: Count
    kind: str = ""
    time: Seconds = 0.0
    images_per_s: float | None = None
    loss: float | None = None


def read_rows(run: Storage, most: int) -> list[Row]:
    """The rows in the last `most` bytes of metrics.jsonl. What is no row is passed over: others may have damaged it,
    and its first line here is cut. [] where there is no such file."""
    try:
        size = run.stat(ROWS).size
        data = run.get_range(ROWS, max(size - most, 0), min(size, most))
    except NotFound:
        return []
    rows = []
    for line in data.split(b"\n"):
        with suppress(ParseError):
            rows.append(build(Row, parse_json(line, ROW_BYTES), unknown="pass"))
    return rows


def read_bounded(run: Storage, key: str, most: int) -> bytes:
    """An object of `most` bytes at most; what is larger is not read at all. Raises NotFound, StorageError, ParseError
    for that."""
    if (size := run.stat(key).size) > most:
        raise ParseError(f"it has {size:,} bytes, {most:,} at most are read")
    return run.get(key)


def read_facts(run: Storage) -> dict[str, Any]:
    """The contents of run.json, found to be of the types that `Facts` says; what later versions add is there too.
    Raises NotFound where there is none, RunError where it is damaged."""
    try:
        facts: dict[str, Any] = parse_json(read_bounded(run, FACTS, FACTS_BYTES), FACTS_BYTES)
        if "train" not in build(Facts, facts, unknown="pass").manifests:
            raise ParseError("manifests name no train")
        return facts
    except ParseError as error:
        raise damaged(run, FACTS, error) from error


def read_config(
    run: Storage, *, forward: bool = False, environ: Mapping[str, str] = os.environ, digests: Any = None
) -> RunConfig:
    """The configuration in config.yaml, of whatever is trained, with its bounds checked.

    forward: whether keys that this version does not know are passed over; else they are refused, for they may change
    what the run is. environ, digests: as in from_stored. Raises NotFound where there is none, RunError where it is
    damaged or describes what cannot be.
    """
    try:
        tree = parse_yaml(read_bounded(run, CONFIG, YAML_BYTES))
        return config_from(tree, forward=forward, where=f"{run.url}: ", environ=environ, digests=digests)
    except (ParseError, ConfigError, OverflowError) as error:
        raise damaged(run, CONFIG, error) from error


def config_from(
    tree: Any,
    *,
    forward: bool = False,
    where: str = "",
    environ: Mapping[str, str] = os.environ,
    digests: Any = None,
) -> RunConfig:
    """The configuration that stored plain values describe. forward: as in read_config. where, environ, digests: as in
    from_stored. Raises ParseError, ConfigError, OverflowError."""
    if not isinstance(tree, dict):
        raise ParseError("it is no group of keys")
    cls = kind_of_run(tree)
    config = from_stored(cls, _known(cls, tree) if forward else tree, environ, where=where, digests=digests)
    require_plausible(config)
    return config


def kind_of_run(tree: Mapping[str, Any]) -> type[RunConfig]:
    """What the plain values of a run's configuration are of: those of an autoencoder have a group of that name."""
    return AutoencoderConfig if "autoencoder" in tree else TrainConfig


def damaged(run: Storage, key: str, error: Exception | str) -> RunError:
    """The line about a file of a run that cannot be read. error: what is wrong with it, and no more about where."""
    newer = ", take the version of latentmill that wrote it" if isinstance(error, ConfigError) else ""
    said = str(error).removeprefix(f"{run.url}: ")
    return RunError(f"{run.locate(key)}: {said}. Restore that file from a copy{newer}, or choose another run")


def missing(run: Storage, error: NotFound) -> RunError:
    """The line about a folder that is no run's."""
    return RunError(f"{run.url} is not a run directory ({error}); give the folder that `latentmill train run=` wrote")


def require_plausible(config: RunConfig) -> None:
    """Raise ConfigError for a stored configuration with values out of bounds, or of a network that nobody could have
    trained: it is refused before anything is built of it."""
    check_bounds(config)
    with suppress(Unset):
        require(config.samples <= LARGEST, f"samples={config.samples:g}: {LARGEST:,} at most is wanted")
    with suppress(Unset):
        batch = config.optim.batch
        require(batch <= LARGEST_BATCH, f"optim.batch={batch:g}: {LARGEST_BATCH:,} at most is wanted")
    if isinstance(config, AutoencoderConfig):
        _require_first_stage(config.autoencoder)
    if isinstance(config, TrainConfig):
        _require_network(config.model)
        with suppress(Unset):
            check_model(config.model)
            check_task(config.task, config.model)
        with suppress(Unset):
            check_diffusion(config.diffusion)


def _require_first_stage(stage: FirstStageConfig) -> None:
    """The same as _require_network, of an autoencoder."""
    with suppress(Unset):
        check_architecture(stage)
    widths: dict[str, Callable[[], int]] = {
        "channels x multipliers": lambda: stage.channels * max(stage.multipliers, default=1),
        "latent_channels": lambda: stage.latent_channels,
    }
    counts: dict[str, Callable[[], int]] = {
        "blocks": lambda: stage.blocks,
        "multipliers (levels)": lambda: len(stage.multipliers),
    }
    _require_sizes("autoencoder", widths, counts)


def _require_network(model: ModelConfig) -> None:
    """Raise ConfigError where a network would be wider, or have more parts, than any that could be trained."""

    def deepest() -> int:
        depth = model.transformer_depth
        return depth if isinstance(depth, int) else max(depth, default=0)

    widths: dict[str, Callable[[], int]] = {
        name: partial(getattr, model, name) for name in ("in_channels", "out_channels", "context_width", "vector_width")
    }
    widths["channels x multipliers"] = lambda: model.channels * max(model.multipliers, default=1)
    counts: dict[str, Callable[[], int]] = {
        "blocks": lambda: model.blocks,
        "multipliers (levels)": lambda: len(model.multipliers),
        "transformer_depth": deepest,
    }
    _require_sizes("model", widths, counts)


def _require_sizes(
    group: str, widths: Mapping[str, Callable[[], int]], counts: Mapping[str, Callable[[], int]]
) -> None:
    """Raise ConfigError for a width above WIDEST or a count above MOST. group: names them in the message."""
    for values, most in ((widths, WIDEST), (counts, MOST)):
        for name, value in values.items():
            with suppress(Unset):
                require(value() <= most, f"{group}.{name}={value()}: no network has more than {most:,}")


def _known(cls: type[RunConfig], tree: Mapping[str, Any]) -> dict[str, Any]:
    """`tree` without the keys that the configuration lacks, at any depth."""
    known = {name for name, _ in flat_types(cls)}

    def pruned(group: Mapping[str, Any], path: str) -> dict[str, Any]:
        return {
            key: pruned(value, f"{path}{key}.") if isinstance(value, Mapping) else value
            for key, value in group.items()
            if f"{path}{key}" in known
        }

    return pruned(tree, "")
