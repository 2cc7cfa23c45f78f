#!/usr/bin/env python3
"""Writes docs/reference/verbs.md and keys.md from the table of verbs and from `latentmill VERB --help`.

python scripts/reference.py             writes both pages
python scripts/reference.py --check     writes nothing; exits 1 if a page differs from what would be written
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pipeline import config  # noqa: E402
from pipeline.config.loading.help import verb_help  # noqa: E402
from pipeline.verbs import TAKES_PATHS, VERBS  # noqa: E402

WIDTH = 118
FOLDER = ROOT / "docs" / "reference"

EXAMPLES = {
    "synth": "dest=shapes images=10000 seed=0",
    "convert": "from=coco images=train2017 annotations=[instances_train2017.json] dest=shards",
    "encode": "source='shapes/{00000..00009}.tar' dest=cache encoders=demo",
    "columns": "dataset=cache source='recaptioned/*.jsonl' caption_key=json:caption dest=cache-captions",
    "index": "dataset=theirs source='theirs/*.tar' encoders=sd1",
    "verify": "dataset=cache source='shapes/{00000..00009}.tar'",
    "reference": "dataset=cache-ref source='shapes-ref/*.tar'",
    "train": "experiment=shapes data.train=cache run=runs/a launch.processes=2 deepspeed=zero2",
    "autoencoder": "experiment=kl_small data.train=pixels run=runs/ae",
    "eval": "run=runs/a images=1000 guidance=3",
    "reconstruct": "dataset=pixels-val encoders=sd1 dest=figures/sd1",
    "sample": 'run=runs/a prompt="a large red circle left of a small blue square" n=4 dest=out.png',
    "export": "run=runs/a dest=sd-folder format=diffusers",
    "fetch": "encoders=sd1 dest=s3://bucket/encoders/sd1",
    "status": "runs/a",
    "data": "dataset=cache batch=2048 world=64 nodes=8 images_per_s=20000",
    "ledger": "runs/a",
    "report": "runs/a runs/b dest=report.html",
    "demo": "",
    "plan": "experiment=sd1_256 images=100M cluster=a100 nodes=8 price=2.0",
    "calibrate": "experiment=sd1_256 launch.processes=8",
    "submit": "train cluster=a100 nodes=8 data.train=cache run=runs/a --dry-run",
}
"""Arguments of one example for each verb."""


@dataclass
class Key:
    """One key of a verb, as --help shows it."""

    name: str
    default: str
    allowed: str = ""
    words: list[str] = field(default_factory=list)


@dataclass
class Group:
    """Keys with one prefix. path: "" for the verb's own keys, else the prefix with its dot and star."""

    path: str
    about: str
    keys: list[Key] = field(default_factory=list)


def verbs_page() -> str:
    """The page of the verbs: what each does, an example, and where it lies."""
    lines = [
        "# Verbs",
        "",
        f"A verb is one command of latentmill; there are {len(VERBS)}.",
        "",
        "    latentmill VERB --help      # every key with its default, as in keys.md",
        "",
        "| verb | what it does | module |",
        "|---|---|---|",
    ]
    for verb, (module, what) in VERBS.items():
        anchor = f"[`{verb}`](keys.md#{verb})" if verb in config.CONFIGS else f"`{verb}`"
        lines.append(f"| {anchor} | {escaped(what)} | `{module}` |")
    lines += [
        "",
        "Keys are Hydra overrides (`optim.lr=2e-4`, `model=sd1`), and `-m` sweeps them. Paths are local, `s3://`,",
        "`gs://` or `az://` everywhere. Each verb is also a module, for torchrun:",
        "",
        "    torchrun --nproc-per-node 8 -m pipeline.train KEY=VALUE ...",
        "",
        "How a verb ends is in [exit_status.md](exit_status.md).",
        "",
        "## One example of each",
        "",
    ]
    lines += [f"    latentmill {verb} {EXAMPLES[verb]}".rstrip() for verb in VERBS]
    lines += ["", "## Verbs that take paths in place of keys", ""]
    lines += [f"    {usage.removeprefix('usage: ')}" for usage in TAKES_PATHS.values()]
    return "\n".join([*lines, "", *GENERATED])


def keys_page() -> str:
    """The page of all keys, verb by verb."""
    lines = [
        "# Keys",
        "",
        "A key is one setting of a verb, written on the command line as `KEY=VALUE`.",
        "",
        "    latentmill train optim.lr=2e-4 model=sd1 data.train=cache run=runs/a",
        "",
        "The page holds what `latentmill VERB --help` prints. A group (`model=sd1`) sets several keys from a file of",
        "`conf/`; a key that is given beside it wins. The verbs without keys take paths: [verbs.md](verbs.md).",
    ]
    for verb in config.CONFIGS:
        lines += ["", *keys_of(verb)]
    return "\n".join([*lines, "", *GENERATED])


GENERATED = [
    "<!-- Written by scripts/reference.py from --help; change the dataclasses of pipeline/config, not this. -->",
    "",
]


def keys_of(verb: str) -> list[str]:
    """The section of one verb."""
    about, usage, choices, groups = parsed(verb_help(verb).splitlines())
    lines = [f"## {verb}", "", *wrapped(about.partition(": ")[2] or about), "", f"    {usage}"]
    if choices:
        lines += ["", "Groups:", ""]
    for name, names in choices:
        listed = f"- `{name}=` {', '.join(f'`{one}`' for one in names)}"
        lines += textwrap.wrap(listed, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    for group in groups:
        if group.path:
            lines += ["", f"### {verb}: {group.path.replace('.*', '')}", "", *wrapped(group.about)]
        if group.keys:
            lines += ["", "| key | default | meaning |", "|---|---|---|"]
        for key in group.keys:
            meaning = " ".join(
                filter(None, [escaped(" ".join(key.words)), f"<br>{code(key.allowed)}" if key.allowed else ""])
            )
            lines.append(f"| `{key.name}` | {code(key.default) or 'empty'} | {meaning} |")
    return lines


def parsed(lines: list[str]) -> tuple[str, str, list[tuple[str, list[str]]], list[Group]]:
    """What a verb's --help says: (what it is for, usage, (group, choices) pairs, keys by their prefix)."""
    usage_at = next(i for i, line in enumerate(lines) if line.startswith("usage: "))
    keys_at = lines.index("Keys:")
    about = " ".join(lines[:usage_at]).strip()
    heads: list[str] = []
    for line in lines[usage_at + 1 : keys_at]:
        if re.match(r"  \S", line):
            heads.append(line.strip())
        elif line.startswith("      "):
            heads[-1] += line.strip()
    choices = [(head.partition("=")[0], head.partition("{")[2].rstrip("}").split(",")) for head in heads]
    groups = [Group("", "")]
    for line in lines[keys_at + 1 :]:
        if found := re.match(r"  (\S+\.\*(?: \(\S+\))?): ?(.*)", line):
            groups.append(Group(found[1], found[2]))
        elif found := re.match(r"  ([\w.]+)=(.*)", line):
            default, _, allowed = found[2].partition("  ")
            allowed = "" if default == "..." else allowed.strip()
            groups[-1].keys.append(Key(found[1], default, allowed))
        elif line.startswith("      "):
            key = groups[-1].keys[-1]
            if key.allowed.count("{") > key.allowed.count("}"):
                key.allowed += line.strip()
            else:
                key.words.append(line.strip())
        elif line:
            break  # what follows the keys: a note on sweeps
    return about, lines[usage_at].removeprefix("usage: "), choices, groups


def wrapped(text: str) -> list[str]:
    """A sentence of --help as lines of Markdown, with a capital letter."""
    return textwrap.wrap(escaped(text[:1].upper() + text[1:]), WIDTH, break_long_words=False, break_on_hyphens=False)


def code(text: str) -> str:
    """Text as code; lists get spaces, at which a table may break them."""
    if text == "...":
        return "must be given"
    return f"`{re.sub(r',(?=[^ ])', ', ', text)}`" if text else ""


def escaped(text: str) -> str:
    """Prose of --help as Markdown: markup is escaped outside of code, and pages of docs/ are linked."""
    parts = re.split(r"(`[^`]*`)", text)
    plain = [part if part.startswith("`") else re.sub(r"([\\*])", r"\\\1", part).replace("<", "&lt;") for part in parts]
    joined = re.sub(r"(?<!\\)\|", r"\\|", "".join(plain))
    return re.sub(r"docs/([\w/-]+\.md)", lambda found: f"[{found[1].rpartition('/')[2]}](../{found[1]})", joined)


PAGES = {"verbs.md": verbs_page, "keys.md": keys_page}
"""Page of docs/reference -> what writes it."""


def differing() -> list[str]:
    """The pages that differ from what would be written."""
    found = []
    for name, page in PAGES.items():
        path = FOLDER / name
        if not path.exists() or path.read_text(encoding="utf-8") != page():
            found.append(path.relative_to(ROOT).as_posix())
    return found


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, and exit 1 if a page differs")
    if parser.parse_args().check:
        for name in (stale := differing()):
            print(f"{name} is not what --help says: run python scripts/reference.py")
        return int(bool(stale))
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
