"""Files of names that others publish: of OpenImages' classes, of folders of classes, of the values of label maps."""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Mapping
from typing import Any

from pipeline.conditions.names import MOST_BYTES
from pipeline.errors import ConfigError, NotFound, ParseError
from pipeline.parsing.text import one_line
from pipeline.parsing.values import parse_json
from pipeline.storage.urls import open_storage, split_url
from preprocess.converting.streams import Input

HEADER = ["LabelName", "DisplayName"]
WORDNET = re.compile(r"(n\d{8})[ \t]+(.+)")
"""A line of ImageNet's LOC_synset_mapping.txt."""
MOST_VALUES = 256


def descriptions(place: str) -> tuple[dict[str, str], Input]:
    """Names by LabelName, in the order of a csv of both (class-descriptions-boxable.csv, with or without a first line
    that names the columns), and the file. Raises ConfigError."""
    data, known = _read(place)
    found: dict[str, str] = {}
    try:
        rows = [row for row in csv.reader(io.StringIO(_text(data), newline=""), strict=True) if row]
        for row in rows[1:] if rows[:1] == [HEADER] else rows:
            if len(row) != 2 or not all(map(str.strip, row)):
                raise ParseError(f"a line is {','.join(row)[:80]!r}; a label and its name are wanted")
            if row[0] in found:
                raise ParseError(f"it names {row[0][:80]} twice")
            found[row[0]] = row[1].strip()
        if not found:
            raise ParseError("it holds no names")
    except (ParseError, csv.Error) as error:
        raise _refused(place, error, "a csv such as class-descriptions-boxable.csv, LABEL,NAME in each line") from None
    return found, known


def folders(place: str) -> tuple[dict[str, str], Input]:
    """Names of the classes by folder, in the order of their numbers, and the file. Raises ConfigError."""
    data, known = _read(place)
    try:
        pairs = _of_json(data) if place.endswith(".json") else [_of_line(line) for line in _lines(data)]
        found = dict(pairs)
        if not found or len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next((name for name in names if names.count(name) > 1), "")
            raise ParseError(f"it names the folder {twice[:80]} twice" if twice else "it holds no names")
    except ParseError as error:
        what = (
            "a .txt with FOLDER, or FOLDER, a tab and a name, in each line; or a .json list, or {'0': [FOLDER, NAME]}"
        )
        raise _refused(place, error, what) from None
    return found, known


def values(place: str) -> tuple[dict[int, str], Input]:
    """Names by value, 0 to 255, sorted, and the file. Raises ConfigError."""
    data, known = _read(place)
    try:
        if place.endswith(".json"):
            value = parse_json(data)
            pairs = list(enumerate(value)) if isinstance(value, list) else _numbered(value)
        else:
            pairs = list(enumerate(_lines(data)))
        if not pairs or not all(isinstance(name, str) and name.strip() for _, name in pairs):
            raise ParseError("it holds no names, or one that is no text")
        if max(number for number, _ in pairs) >= MOST_VALUES:
            raise ParseError(f"it names the value {max(number for number, _ in pairs)}; a map has 0 to 255")
    except ParseError as error:
        raise _refused(place, error, "a .json list or {'7': 'road'}, or a .txt with a name in each line") from None
    return {number: name.strip() for number, name in sorted(pairs)}, known


def _read(place: str) -> tuple[bytes, Input]:
    folder, name = split_url(place)
    storage = open_storage(folder)
    try:
        size = storage.stat(name).size
        if size > MOST_BYTES:
            raise ConfigError(f"names={place}: it has {size} bytes, {MOST_BYTES} at most are read")
        data = storage.get(name)
    except NotFound:
        raise ConfigError(f"names={place}: there is no such file") from None
    return data, Input(name, len(data), hashlib.sha256(data).hexdigest())


def _refused(place: str, error: Exception, what: str) -> ConfigError:
    return ConfigError(one_line(f"names={place}: {error} (wanted is {what})"))


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ParseError("it is not UTF-8") from None


def _lines(data: bytes) -> list[str]:
    text = _text(data).rstrip()
    return [line.strip("\r ") for line in text.split("\n")] if text else []


def _of_line(line: str) -> tuple[str, str]:
    """The folder and the name of a line."""
    if known := WORDNET.fullmatch(line):
        return known[1], known[2].strip()
    folder, _, name = line.partition("\t")
    if not folder:
        raise ParseError("a line is empty")
    return folder, name.strip() or folder


def _of_json(data: bytes) -> list[tuple[str, str]]:
    """Folders and names of a list of folders, or of {"0": [folder, name], ...}."""
    value = parse_json(data)
    pairs = [(name, name) for name in value] if isinstance(value, list) else []
    if isinstance(value, dict):
        numbered = _numbered(value)
        if [number for number, _ in numbered] != list(range(len(numbered))):
            raise ParseError(f"the numbers 0 to {len(numbered) - 1} are wanted")
        if not all(isinstance(pair, list) and len(pair) == 2 for _, pair in numbered):
            raise ParseError("its values are no pairs of folder and name")
        pairs = [(pair[0], pair[1]) for _, pair in numbered]
    if not all(isinstance(word, str) and word for pair in pairs for word in pair):
        raise ParseError("a folder or a name is no text")
    return pairs


def _numbered(value: Any) -> list[tuple[int, Any]]:
    """The values of an object by number, sorted."""
    if not isinstance(value, Mapping) or not all(re.fullmatch("[0-9]{1,6}", name) for name in value):
        raise ParseError("it is no list, and no object by number")
    if len({int(name) for name in value}) != len(value):
        raise ParseError("it has a number twice")
    return sorted((int(name), one) for name, one in value.items())
