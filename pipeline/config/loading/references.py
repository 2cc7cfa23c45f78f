"""References of a configuration to the environment: ${oc.env:NAME}, also within a text.

    run='${oc.env:SCRATCH}/a'   optim.lr='${oc.env:LR,1e-4}'   seed='${oc.decode:${oc.env:SEED}}'

A value that came from the environment is used, and is neither stored nor shown: a configuration remembers its
references, `to_stored` (merge.py) gives them in place of the values, and `redact` shows them in place of the values in
every text. OmegaConf never resolves them, because it would forget where a value came from.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config.values.keys import field_of
from pipeline.errors import ConfigError, Unset
from pipeline.parsing.redaction import hide, holds_secret, is_secret_name

OPENING = re.compile(r"\$\{\s*oc\.(?P<kind>env|decode)\s*:\s*")
NAME = re.compile(r"\s*(?:\"(?P<double>[^\"]*)\"|'(?P<single>[^']*)'|(?P<bare>[A-Za-z_][A-Za-z0-9_.-]*))\s*")
DEFAULT = re.compile(r"\s*(?:\"(?P<double>[^\"]*)\"|'(?P<single>[^']*)'|(?P<bare>[^{}'\"]*?))\s*(?=\})")
DEEPEST = 8
"""Most references within one another."""
LITERAL = frozenset(["prompt", "negative"])
"""Keys whose values are captions: whatever stands in them is meant."""
REFERENCES = "_references"
"""Attribute of a configuration: dotted key -> value with references in it."""
ROUNDS = 100_000
"""Of PBKDF2, for the digests by which a value of the environment is recognised."""


@dataclass(frozen=True)
class Resolved:
    """A text that a reference has become. text: None for a default of null. reference: as it was written."""

    text: str | None
    reference: str


@dataclass(frozen=True)
class Lacking:
    """A reference that cannot be resolved here. why: in words. where: what precedes the key in messages."""

    reference: str
    why: str
    where: str = ""


def holds_reference(value: Any) -> bool:
    """Whether a text refers to the environment, or anything within a list or a group does."""
    if isinstance(value, str):
        return "${" in value and OPENING.search(value) is not None
    if isinstance(value, Mapping):
        return any(holds_reference(item) for item in value.values())
    return isinstance(value, list | tuple) and any(holds_reference(item) for item in value)


def references_of(config: Any) -> dict[str, Any]:
    """The references of a configuration: dotted key -> value with references in it, as it was written."""
    return dict(getattr(config, REFERENCES, {}))


def remember(config: Any, references: Mapping[str, Any]) -> None:
    """Keep a configuration's references with it."""
    if references:
        object.__setattr__(config, REFERENCES, dict(references))


def resolve(text: str, environ: Mapping[str, str], where: str) -> Resolved | Lacking:
    """A text with its references replaced by the environment's values. From now on `redact` shows them in their place.

    where: the key in messages. Raises ConfigError for a reference that cannot be read.
    """
    pieces: list[str | None] = []
    used: dict[str, str] = {}
    position = 0
    while match := OPENING.search(text, position):
        before = text[position : match.start()]
        value, position = _value(text, match, environ, where, used, 1)
        if isinstance(value, Lacking):
            return Lacking(text, value.why)
        pieces += [before, value] if before else [value]
    if rest := text[position:]:
        pieces.append(rest)
    for name, value in used.items():
        hide(value, f"${{oc.env:{name}}}")
    joined = None if pieces == [None] else "".join(piece or "" for piece in pieces)
    return Resolved(joined, text)


def _value(
    text: str, opening: re.Match[str], environ: Mapping[str, str], where: str, used: dict[str, str], depth: int
) -> tuple[str | Lacking | None, int]:
    """(value, position after it) of the reference that begins at a match of OPENING."""
    unreadable = ConfigError(f"{where}={text[:200]}: ${{oc.env:NAME}} or ${{oc.env:NAME,DEFAULT}} is wanted")
    if depth > DEEPEST:
        raise unreadable
    position = opening.end()
    if opening["kind"] == "decode":
        inner = OPENING.match(text, position)
        if inner is None:
            raise unreadable
        value, position = _value(text, inner, environ, where, used, depth + 1)
        return value, _closed(text, position, unreadable)
    match = NAME.match(text, position)
    if match is None:
        raise unreadable
    name = next(group for group in match.group("double", "single", "bare") if group is not None)
    position = match.end()
    default: str | Lacking | None = Lacking(text, f"the environment has no {name}")
    inner_used: dict[str, str] = {}
    if text[position : position + 1] == ",":
        blank = re.compile(r"\s*").match(text, position + 1)
        assert blank is not None
        if inner := OPENING.match(text, blank.end()):
            default, position = _value(text, inner, environ, where, inner_used, depth + 1)
        elif given := DEFAULT.match(text, position + 1):
            quoted = given["double"] if given["double"] is not None else given["single"]
            default = quoted if quoted is not None else None if given["bare"] == "null" else given["bare"]
            position = given.end()
        else:
            raise unreadable
    position = _closed(text, position, unreadable)
    if name in environ:
        used[name] = environ[name]
        return environ[name], position
    used.update(inner_used)
    return default, position


def _closed(text: str, position: int, unreadable: ConfigError) -> int:
    match = re.compile(r"\s*\}").match(text, position)
    if match is None:
        raise unreadable
    return match.end()


def typed(text: str | None) -> Any:
    """A number, a truth value, a list of them or null as a text writes it; any other text as it is."""
    if text is None:
        return None
    bare = text.strip()
    if bare.lower() in ("true", "false"):
        return bare.lower() == "true"
    if bare.lower() == "null":
        return None
    if bare.startswith("[") and bare.endswith("]"):
        return [typed(item.strip().strip("'\"")) for item in bare[1:-1].split(",")] if bare[1:-1].strip() else []
    if re.fullmatch(r"[+-]?\d{1,20}", bare):
        return int(bare)
    if re.fullmatch(r"[+-]?(\d{1,40}(\.\d{0,40})?|\.\d{1,40})([eE][+-]?\d{1,3})?", bare):
        return float(bare)
    return text


def set_aside(tree: Any) -> Any:
    """A copy of OmegaConf's plain tree in which references to the environment are literal text to OmegaConf."""
    if isinstance(tree, dict):
        return {key: set_aside(item) for key, item in tree.items()}
    if isinstance(tree, list):
        return [set_aside(item) for item in tree]
    return UNESCAPED.sub(r"\1\1\\\2", tree) if isinstance(tree, str) and "${" in tree else tree


UNESCAPED = re.compile(r"(?<!\\)((?:\\\\)*)(\$\{\s*oc\.(?:env|decode)\s*:)")


def lacking(config: Any, missing: Mapping[str, str]) -> None:
    """Make a configuration raise ConfigError where one of these keys is read. missing: name of a field -> message."""

    def refusal(message: str) -> property:
        def read(_: Any) -> Any:
            raise Unset(message)

        return property(read)

    cls = type(config)
    kind = type(cls.__name__, (cls,), {name: refusal(message) for name, message in missing.items()})
    object.__setattr__(config, "__class__", kind)


# --------------------------------------------------------------------------------------------------------------------
# Values that are recognised, and not stored


def digests_of(config: Any, former: Any = None) -> dict[str, str]:
    """Dotted key -> salted digest of its value, for each key with a reference. former: digests of an earlier start,
    whose salts are kept, so that equal values give equal digests."""
    former = former if isinstance(former, Mapping) else {}
    digests = {}
    for key in references_of(config):
        salt = str(former.get(key, "")).partition(":")[0]
        digests[key] = _digest(value_at(config, key), salt or secrets.token_hex(8))
    return digests


def is_known(digests: Any, key: str, value: Any) -> bool | None:
    """Whether a value is the one of which a digest was kept; None where none was."""
    digest = digests.get(key) if isinstance(digests, Mapping) else None
    if not isinstance(digest, str) or ":" not in digest:
        return None
    return secrets.compare_digest(digest.encode(), _digest(value, digest.partition(":")[0]).encode())


def _digest(value: Any, salt: str) -> str:
    text = json.dumps(value, sort_keys=True, default=str).encode()
    return f"{salt}:{hashlib.pbkdf2_hmac('sha256', text, salt.encode(), ROUNDS).hex()}"


def value_at(config: Any, key: str) -> Any:
    """The value of a dotted key."""
    for name in key.split("."):
        config = getattr(config, field_of(name))
    return dataclasses.asdict(config) if dataclasses.is_dataclass(config) and not isinstance(config, type) else config


def sounds_secret(reference: str, text: str | None) -> bool:
    """Whether what a reference has become looks like a secret, or its variable's name says so."""
    names = [match[1] for match in re.finditer(r"oc\.env\s*:\s*[\"']?([A-Za-z_][A-Za-z0-9_.-]*)", reference)]
    return any(is_secret_name(name) for name in names) or holds_secret(text or "")
