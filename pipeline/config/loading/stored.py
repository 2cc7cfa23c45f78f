"""Configurations as they are stored, sent and handed on, and as they are read again.

to_stored(config), to_yaml(config)   for what is stored or sent: references in place of the environment's values
from_stored(TrainConfig, tree)       from a run's config.yaml: the references are resolved
pack(config), unpack(cls, text)      for processes of one's own, with values: never stored
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, get_args

from pipeline.config.loading.merge import from_dict, kind_of, plain_of, to_dict
from pipeline.config.loading.references import (
    LITERAL,
    Lacking,
    Resolved,
    holds_reference,
    is_known,
    references_of,
    remember,
    resolve,
    sounds_secret,
    value_at,
)
from pipeline.config.values.hints import hints_of
from pipeline.errors import ConfigError

T = TypeVar("T")


def from_stored(
    cls: type[T],
    tree: Mapping[str, Any],
    environ: Mapping[str, str] = os.environ,
    *,
    where: str = "",
    lenient: bool = True,
    digests: Any = None,
) -> T:
    """As from_dict, with references to the environment resolved and remembered.

    where: what precedes the key in messages, such as "runs/a: ". lenient: a key whose variable is not set is refused
    when it is read, and not before; what looks like a secret is resolved for the process alone that has the digest of
    its value (digests: those of run.json). Otherwise it is refused at once.
    """
    references: dict[str, Any] = {}
    try:
        resolved = _resolve_tree(cls, tree, "", references, environ, where, lenient, digests)
        config = from_dict(cls, resolved)
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") if where else error from None
    except RecursionError:
        raise ConfigError(f"{where}its groups nest too deep") from None
    remember(config, references)
    return config


def pack(config: Any) -> str:
    """A configuration with its values and its references, as a text for a process of one's own. Not to be stored."""
    return json.dumps({"values": to_dict(config), "references": references_of(config)})


def unpack(cls: type[T], text: str) -> T:
    """The configuration that `pack` has packed."""
    packed = json.loads(text)
    config = from_dict(cls, packed["values"])
    remember(config, packed["references"])
    for key, written in packed["references"].items():
        _each_text(written, key, os.environ)
    return config


def _resolve_tree(
    cls: Any,
    tree: Any,
    path: str,
    references: dict[str, Any],
    environ: Mapping[str, str],
    where: str,
    lenient: bool,
    digests: Any,
) -> Any:
    """`tree` with Resolved, or Lacking, in place of the texts that refer to the environment. Fills `references`."""
    if not isinstance(tree, Mapping):
        return tree
    cls = kind_of(cls, tree, path)
    groups, hints = dict(_groups(cls)), hints_of(cls)
    resolved = {}
    for name, value in tree.items():
        key = f"{path}{name}"
        if name in groups and isinstance(value, Mapping):
            value = _resolve_tree(groups[name], value, f"{key}.", references, environ, where, lenient, digests)
        elif key not in LITERAL and holds_reference(value):
            references[key] = written = value
            value = _each_text(written, key, environ)
            failed = _first_lacking(value)
            free = str not in (hints.get(name), *get_args(hints.get(name)))  # a number gives nothing away
            if failed is None and lenient and not free and _is_withheld(value, key, digests):
                failed = Lacking(str(written), "it names a secret of the environment that is not this run's")
            if failed is not None:
                if not lenient:
                    raise ConfigError(f"{key}={failed.reference}: {failed.why}")
                value = Lacking(failed.reference, f"{failed.why}; set it as it was for the run", where)
        resolved[name] = value
    return resolved


def _is_withheld(value: Any, key: str, digests: Any) -> bool:
    """Whether a stored text asks for what looks like a secret, and nothing proves that it was this secret when it was
    stored: a stranger's configuration must not name a variable, and the verb send its value somewhere."""
    texts = value if isinstance(value, list) else [value]
    if not any(isinstance(item, Resolved) and sounds_secret(item.reference, item.text) for item in texts):
        return False
    plain = [item.text if isinstance(item, Resolved) else item for item in texts]
    return not is_known(digests, key, plain if isinstance(value, list) else plain[0])


def _each_text(value: Any, key: str, environ: Mapping[str, str]) -> Any:
    """A text, or every text of a list, resolved."""
    if isinstance(value, list | tuple):
        return [_each_text(item, key, environ) for item in value]
    return resolve(value, environ, key) if holds_reference(value) and isinstance(value, str) else value


def _first_lacking(value: Any) -> Lacking | None:
    if isinstance(value, list):
        return next((failed for item in value if (failed := _first_lacking(item))), None)
    return value if isinstance(value, Lacking) else None


def _groups(cls: Any) -> Iterator[tuple[str, Any]]:
    """(name, dataclass) of every field that is a group of keys."""
    for name, kind in hints_of(cls).items():
        if inner := next((kind for kind in (kind, *get_args(kind)) if dataclasses.is_dataclass(kind)), None):
            yield name, inner


def is_same(config: Any, digests: Any, key: str, old: Any, new: Any) -> bool:
    """Whether the value of a key is the one that was stored. old, new: as they are, and would be, stored. digests: of
    the stored values that came from the environment, by key."""
    if not (holds_reference(old) or holds_reference(new)):
        return bool(old == new)
    value = value_at(config, key)
    if holds_reference(old):
        known = is_known(digests, key, value)
        return bool(old == new) if known is None else known
    return bool(old == plain_of(value, {}))
