"""The indented blocks of a page, and the commands in them.

A block's first line says what it is: `# run by tests/docs/NAME` (that test runs its commands as they are written),
`# theirs, not run` (commands of other software). Commands of `latentmill` in any other block are read as the command
line reads them (`read`).
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import status, submit
from pipeline.cli import _flags
from pipeline.config import CONFIGS
from pipeline.config.loading.load import load
from pipeline.errors import ConfigError
from pipeline.jobs.cluster import divided as of_cluster
from pipeline.jobs.members import members_of
from pipeline.jobs.sweep import DRY_RUN, NO_WAIT, OUTPUT
from pipeline.plan import divided
from pipeline.verbs import TAKES_PATHS, VERBS

INDENT = "    "
MODULES = {module: verb for verb, (module, _) in VERBS.items()}
RUN_BY, THEIRS = "# run by ", "# theirs, not run"
COMMENT = re.compile(r"(^|\s+)#(\s.*)?$")
"""A comment of a shell that is meant as one: `a#b` and `#sha256=...` are words."""
USAGE = ("KEY=VALUE", "RUN", "VERB")
"""Words of a line that shows how a verb is typed, not what is typed."""
PLACES = {
    "run": "runs/x",
    "data.train": "x-cache",
    "source": "'x/*.tar'",
    "dest": "x-dest",
    "dataset": "x-cache",
    "reference": "x.safetensors",
}
OF_CONVERT = {"from": "classes", "images": "x-images"}
"""What `...` stands for where a verb must be given it."""


@dataclass(frozen=True)
class Block:
    """Lines of a page that stand together, without their indent. line: the number of the first."""

    page: Path
    line: int
    lines: tuple[str, ...]

    @property
    def run_by(self) -> str:
        """The test that runs it, as a path in the checkout; "" for none."""
        return self.lines[0].removeprefix(RUN_BY).strip() if self.lines[0].startswith(RUN_BY) else ""

    @property
    def kind(self) -> str:
        """run, theirs or commands."""
        kinds = {RUN_BY: "run", THEIRS: "theirs"}
        return next((kind for start, kind in kinds.items() if self.lines[0].startswith(start)), "commands")

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command; lines that end in a backslash are joined, comments left out."""
        text = "\n".join(COMMENT.sub("", line) for line in self.lines).replace("\\\n", " ")
        return [words for line in text.splitlines() if (words := shlex.split(line))]


def blocks(page: Path, *, through_empty_lines: bool = False) -> Iterator[Block]:
    """The indented blocks of a page, in order. An empty line ends one, or is part of it, as in Python
    (through_empty_lines)."""
    lines = page.read_text(encoding="utf-8").splitlines()
    held = list[str]()
    empty = 0
    for number, line in enumerate([*lines, "the end"], 1):
        if line.startswith(INDENT):
            held += [*[""] * empty, line.removeprefix(INDENT)]
            empty = 0
        elif held and not line and through_empty_lines:
            empty += 1
        elif held:
            yield Block(page, number - empty - len(held), tuple(held))
            held, empty = [], 0


def ours(block: Block) -> list[list[str]]:
    """Verb and words of each command of ours in a block: of `latentmill VERB ...`, and of a module of a verb behind any
    launcher (`torchrun -m pipeline.train ...`). Other lines are passed over."""
    text = "\n".join(COMMENT.sub("", line) for line in block.lines).replace("\\\n", " ")
    found = []
    for line in text.splitlines():
        try:
            words = shlex.split(line.split("; ")[0])
        except ValueError:  # what a command printed
            assert not re.match(r"latentmill \w+ ", line), f"{block.page}: quotes do not pair in: {line}"
            continue
        start = next((at for at, word in enumerate(words) if "=" not in word), len(words))
        module = next((word for word in words if word in MODULES), "")
        if words[start : start + 1] == ["latentmill"] and re.fullmatch(r"-{0,2}\w+", (words[start + 1 :] or [""])[0]):
            found.append(words[start + 1 :])
        elif module:
            found.append([MODULES[module], *words[words.index(module) + 1 :]])
    return found


def read(words: Sequence[str]) -> None:
    """Reads the words after `latentmill` as the command line does: verb, keys and values, without running anything.
    Raises LatentmillError for what the command line would refuse."""
    verb, *rest = words
    if verb.startswith("-") or verb in USAGE:
        return
    if verb not in VERBS:
        raise ConfigError(f"{verb}: no such verb")
    if any(word.lstrip("[") in USAGE for word in rest) or "-h" in rest or "--help" in rest:
        return
    if verb in TAKES_PATHS:
        if verb == "status":
            status._asked(rest)
        return
    if submit.MULTIRUN.intersection(rest):
        return _sweep(*(rest if verb == "submit" else words))
    elided = "..." in rest
    rest = [word for word in rest if word != "..." and not word.endswith("=...")]
    if verb == "submit":
        for segment in submit.split([word for word in rest if word != submit.DRY_RUN]):
            if segment:
                name, cluster, own = submit.divide(segment)
                load("submit", cluster)
                _load(name, own, filled=True)
    elif verb == "plan":
        divided_words = divided(rest)
        load("plan", divided_words.own)
        _load(divided_words.verb(""), divided_words.run, filled=True)
    else:
        _load(verb, _flags(rest), filled=elided or len(rest) != len(words) - 1)


def _sweep(verb: str, *words: str) -> None:
    """Reads a sweep: its flags, its cluster, and the configuration of each member."""
    flags = {word for word in words if re.match(r"--?[a-z]", word)}
    if unknown := flags - submit.MULTIRUN - {DRY_RUN, NO_WAIT}:
        raise ConfigError(f"{sorted(unknown)[0]}: no flag of a sweep")
    cluster, own = of_cluster([word for word in words if word not in flags])
    load("submit", cluster)
    key = OUTPUT[verb]
    swept = [word for word in own if not word.startswith(f"{key}=") and word != "..."]
    if not swept or ("..." in own and not any("," in word for word in swept)):
        return  # what is swept is left out
    for member in members_of(verb, key, "x", swept):
        _load(verb, member.words, filled=True)


def _load(verb: str, words: Sequence[str], *, filled: bool) -> None:
    """Loads a verb's configuration. filled: whether places stand for those that are not given."""
    given = {word.partition("=")[0] for word in words}
    fields = {field.name for field in dataclasses.fields(CONFIGS[verb])}
    places = {key: place for key, place in PLACES.items() if key.split(".")[0] in fields}
    places |= OF_CONVERT if verb == "convert" else {}
    places |= {"data.val": "x-val"} if "eval.reference" in given else {}
    stand = [f"{key}={place}" for key, place in places.items() if key not in given]
    load(verb, [*(stand if filled else ()), *words])
