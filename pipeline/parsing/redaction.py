"""What is secret in a text, and what is shown in its place. Everything that is printed or stored goes through here.

    redact("https://me:pass@host/x?sig=ab")    https://[redacted]@host/x?sig=[redacted]

Found are users and passwords of URLs whatever characters they hold, the signed parts of queries, values beside names
such as password or api_key, tokens whose form is known, private keys, the values of the environment's own secrets, and
values that a configuration took from the environment: of the latter the reference is shown, ${oc.env:NAME}.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any
from urllib.parse import quote

REDACTED = "[redacted]"
SHORTEST = 6
"""Characters of the shortest value of the environment that is looked for in texts: shorter ones stand in every word."""
LONGEST_USER = 4096
"""Characters after :// within which the end of a user and password is looked for."""

_references: dict[str, str] = {}
"""Values that a configuration took from the environment -> the reference that is shown in their place."""


def hide(value: str, shown: str) -> None:
    """From now on `redact` shows `shown` wherever `value` stands, also where it is escaped for a URL, a shell or JSON.
    Values of fewer than SHORTEST characters are not looked for."""
    forms = {value, value.strip(), " ".join(value.split()), quote(value), quote(value, safe=""), shlex.quote(value)}
    forms |= {json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1], repr(value)[1:-1]}
    for form in forms:
        if len(form) >= SHORTEST:
            _references[form] = shown


def redact(text: str, *, references: bool = True) -> str:
    """`text` without secrets. references: whether values that a configuration took from the environment are replaced as
    well, which they are not where the same text may have come from elsewhere."""
    return _redact(text, _known_values(references))


def _redact(text: str, known: Sequence[tuple[str, str]]) -> str:
    return _without_kinds(_without_known_values(text, known))


def holds_secret(text: str) -> bool:
    """Whether a text holds a secret of a known kind, such as a URL with a password."""
    return _without_kinds(text) != text


def _without_kinds(text: str) -> str:
    """`text` without what looks like a secret."""
    if "://" in text:
        text = "".join(_without_users(text))
    if "-----BEGIN" in text:
        text = PRIVATE_KEY.sub(REDACTED, text)
    if "=" in text or ":" in text or "--" in text:
        text = QUERY.sub(_without_signature, text)
        text = HEADER.sub(rf"\1{REDACTED}", text)
        text = "".join(_without_named_values(text))
    return TOKEN.sub(_without_token, text)


def redact_values(value: Any, key: str = "", *, references: bool = True) -> Any:
    """A copy of plain data without secrets: values whose key is the name of a secret, and what `redact` finds in texts
    and keys."""
    return _redact_values(value, key, _known_values(references))


def _redact_values(value: Any, key: str, known: Sequence[tuple[str, str]]) -> Any:
    if isinstance(value, Mapping):
        return {
            _redact(k, known) if isinstance(k, str) else k: _redact_values(v, str(k), known) for k, v in value.items()
        }
    if isinstance(value, list | tuple):
        return [_redact_values(v, key, known) for v in value]
    if value not in ("", None) and not is_harmless(value) and is_secret_name(key):
        return REDACTED
    return _redact(value, known) if isinstance(value, str) else value


# --------------------------------------------------------------------------------------------------------------------
# Names

SECRET_WORDS = ("password", "passwd", "passphrase", "secret", "credential", "apikey", "accesskey", "secretkey")
"""Parts of a name that make its value a secret."""
KEY_OF: tuple[str, ...] = (
    "api",
    "access",
    "secret",
    "private",
    "signing",
    "encryption",
    "account",
    "auth",
    "ssh",
    "service",
)
KEY_OF += ("shared", "storage", "license", "wandb", "client", "master", "deploy")
"""What stands before the word key where that is a secret; caption_key is none."""
WORD_TOKENS = ("eot", "eos", "bos", "pad", "unk", "mask", "cls", "sep", "start", "end", "special", "text", "image")
"""What stands beside the word token where that is a tokenizer's."""
PLACES = ("file", "path", "dir", "folder", "sock", "length", "count", "limit", "type", "ids", "name", "url")
"""Last words of names whose value says something about a secret, and is none."""


def is_secret_name(name: str) -> bool:
    """Whether a value under this name is a secret: api_key, wandbToken, AWS_SECRET_ACCESS_KEY; not caption_key."""
    words = [word for word in re.split(r"[^a-z0-9]+", _CAMEL.sub("_", name).lower()) if word]
    if not words or words[-1] in PLACES:
        return False
    joined = "".join(words)
    if any(word in joined for word in SECRET_WORDS) or words[-1] in ("pwd", "authorization", "sig", "signature"):
        return True
    if "token" in words and not set(words).intersection(WORD_TOKENS):
        return True
    return any(word == "key" and before.endswith(KEY_OF) for before, word in pairwise(words))


_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


def is_harmless(value: Any) -> bool:
    """Whether a value cannot be a secret: nothing, a truth value, a placeholder or what is hidden already."""
    if isinstance(value, bool) or value is None:
        return True
    return isinstance(value, str) and (value.startswith((REDACTED, "${")) or value.lower() in ("null", "none", "..."))


# --------------------------------------------------------------------------------------------------------------------
# Values that are known


def _known_values(references: bool) -> list[tuple[str, str]]:
    """The environment's own secrets, by their variables' names, and what a configuration took from it, each with what
    is shown in its place; the longest first."""
    known = {value: REDACTED for name, value in os.environ.items() if len(value) >= 8 and _is_secret_variable(name)}
    if references:
        known |= _references
    return sorted(known.items(), key=lambda pair: -len(pair[0]))


def _without_known_values(text: str, known: Sequence[tuple[str, str]]) -> str:
    """`text` without what _known_values has found."""
    for value, shown in known:
        if value in text:
            text = _as_a_word(value).sub(lambda _: shown, text)  # noqa: B023
    return text


@lru_cache(1000)
def _as_a_word(value: str) -> re.Pattern[str]:
    """A pattern for a value; a short one must not be a part of a longer word."""
    short = len(value) < 12
    before = r"(?<![A-Za-z0-9])" if short and value[0].isalnum() else ""
    return re.compile(before + re.escape(value) + (r"(?![A-Za-z0-9])" if short and value[-1].isalnum() else ""))


def _is_secret_variable(name: str) -> bool:
    known = _variables.get(name)
    if known is None:
        known = _variables[name] = name not in ("PWD", "OLDPWD") and is_secret_name(name)  # these are folders
    return known


_variables: dict[str, bool] = {}


# --------------------------------------------------------------------------------------------------------------------
# URLs

SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,30}://")
QUERY = re.compile(
    r"(?P<before>(?:[?&#;]|&amp;|%26|\\u0026)(?P<name>[A-Za-z0-9_.%~-]{1,64})=)(?P<value>[^&\s\"'<>\\]+)"
)
SIGNED = re.compile(
    r"(?i)x-(amz|goog|ms|oss|cos)-(?!algorithm|date|expires|signedheaders)[a-z-]+|sig|signature|awsaccesskeyid"
    r"|googleaccessid|ossaccesskeyid|policy|key-pair-id|token|auth|key|code|(hd|ak)\w*a"
)
"""Names in a URL's query whose values sign it, or stand for whoever has them."""


def _without_users(text: str) -> Iterator[str]:
    """`text` in pieces, with [redacted] in place of what stands before the @ of each URL."""
    written = 0
    starts = [match.end() for match in SCHEME.finditer(text)]
    for start, following in zip(starts, [*starts[1:], len(text)]):
        if start < written:
            continue
        length = _length_of_user(text[start : min(start + LONGEST_USER, max(following, start))])
        if length:
            yield text[written:start] + REDACTED
            written = start + length
    yield text[written:]


def _length_of_user(rest: str) -> int:
    """How many characters after a URL's :// are user and password; 0 where there are none. They may hold what a URL
    must not: with a colon before the path, everything up to the last @ of the word is taken for them."""
    rest = re.split(r"[\n\"<>]", rest, maxsplit=1)[0]
    word = re.split(r"\s", rest, maxsplit=1)[0]
    head = re.split(r"[/?#]", word, maxsplit=1)[0]
    port = re.sub(r"^\[[0-9A-Fa-f:.]*\]", "", head).partition(":")
    with_password = bool(port[1]) and not re.fullmatch(r"\d{0,5}", port[2])
    if with_password and "@" in word:
        return word.rindex("@")
    if with_password and "@" in rest:  # a password with a space in it
        return rest.index("@")
    return head.rindex("@") if "@" in head else 0


def _without_signature(match: re.Match[str]) -> str:
    name = match["name"]
    if is_harmless(match["value"]) or not (SIGNED.fullmatch(name) or is_secret_name(name)):
        return match[0]
    return match["before"] + REDACTED


# --------------------------------------------------------------------------------------------------------------------
# Prose, JSON, command lines

HEADER = re.compile(
    r"(?i)(\b(?:proxy-)?(?:authorization|cookie|x-api-key)\b[\"']?+\s*+[:=]\s*+[\"']?+)(?!\[redacted\])[^\"'\n]+"
)
NAMED = re.compile(
    r"(?P<name>[A-Za-z_][A-Za-z0-9_-]{0,80})\\?[\"']?"
    r"(?:\s*(?:=>|[:=])\s*|(?<=--password)\s+|(?<=--token)\s+|(?<=--secret)\s+|(?<=-key)\s+)"
)
VALUE = re.compile(
    r"(?P<escaped>\\\").*?(?=\\\"|$)|(?P<double>\")(?:[^\"\\]|\\.)*|(?P<single>')(?:[^'\\]|\\.)*|[^\s\"'&][^\s&]*",
    re.DOTALL,
)
PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----.*?(?:-----END [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----|\Z)",
    re.DOTALL,
)
TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"(?:AKIA|ASIA|AROA|AIDA)[A-Z0-9]{12,}|hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{20,}"
    r"|gl(?:pat|dt|ptt)-[\w-]{16,}|sk-[\w-]{20,}|xox[abeprs]-[\w-]{10,}|AIza[\w-]{30,}|wandb_v\d+_\w{16,}"
    r"|local-[0-9a-f]{40}|npm_[A-Za-z0-9]{30,}|pypi-[\w-]{40,}|dckr_pat_[\w-]{20,}|ya29\.[\w-]{20,}"
    r"|GOOG1[A-Z0-9]{20,}|eyJ[\w-]{6,}\.[\w-]{4,}(?:\.[\w-]*)?"
    r"|(?P<scheme>(?:[Bb]earer|BEARER|Basic)\s+)(?=[^\s\"']*[0-9=])[\w.~+/=-]{8,}"
    r"|(?P<netrc>login\s+\S+\s+password\s+)\S+"
    r")"
)


def _without_named_values(text: str) -> Iterator[str]:
    """`text` in pieces, with [redacted] in place of the value beside each name of a secret."""
    written = 0
    for match in NAMED.finditer(text):
        if match.start() < written or not is_secret_name(match["name"]):
            continue
        value = VALUE.match(text, match.end())
        if value is None:
            continue
        opening = value["escaped"] or value["double"] or value["single"] or ""
        bare = value[0].removeprefix(opening)
        if not opening and not is_harmless(bare):
            bare = bare.rstrip(",;)}]\"'\\")
        numbered = "token" in match["name"].lower() and re.fullmatch(r"\d{1,6}", bare)
        if not bare or is_harmless(bare) or numbered:
            continue
        yield text[written : match.end()] + opening + REDACTED
        written = match.end() + len(opening) + len(bare)
    yield text[written:]


def _without_token(match: re.Match[str]) -> str:
    return f"{match['scheme'] or match['netrc'] or ''}{REDACTED}"
