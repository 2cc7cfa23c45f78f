"""The pages of docs/ as text: where they lie, how they begin, and that what they name is there."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from made.places import REPOSITORY
from pipeline.verbs import VERBS

DOCS = REPOSITORY / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
AROUND = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md", "SECURITY.md")]
ROOMS = ("start", "how_to", "coming_from", "reference", "explained", "measured")
WIDTH = 120
CODE = ("benchmarks", "conf", "examples", "latentmill", "pipeline", "preprocess", "scripts", "slurm", "tests")


def name(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def outside_code(page: Path) -> Iterator[str]:
    """The lines of a page that are no indented commands."""
    for line in page.read_text(encoding="utf-8").splitlines():
        if not line.startswith("    "):
            yield line


@cache
def reference() -> ModuleType:
    """scripts/reference.py."""
    spec = importlib.util.spec_from_file_location("reference", REPOSITORY / "scripts" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["reference"] = module
    spec.loader.exec_module(module)
    return module


def test_pages_lie_by_what_the_reader_wants() -> None:
    assert {path.parent.name for path in PAGES} == {"docs", *ROOMS}
    assert [path.name for path in PAGES if path.parent == DOCS] == ["index.md"]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_page_begins_with_one_sentence_and_a_picture_or_a_command(page: Path) -> None:
    title, sentence, shown = re.split(r"\n\n+", page.read_text(encoding="utf-8"))[:3]
    assert re.fullmatch(r"# [^\n]+", title)
    assert len(re.findall(r"[.!?:;](?=\s|$)", re.sub(r"`[^`]*`", "", sentence))) <= 2, sentence
    assert sentence.endswith((".", ":")), sentence
    assert "|" not in sentence
    assert shown.startswith(("    ", "![")), f"no picture and no command after: {sentence}"


@pytest.mark.parametrize("page", [*PAGES, *AROUND], ids=name)
def test_lines_are_short_but_for_tables(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > WIDTH and not line.startswith("|")] == []


@pytest.mark.parametrize("page", [*PAGES, *AROUND], ids=name)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    """Paths such as `tests/data/test_stream.py`, in prose and in commands, and the modules of `python -m`."""
    text = page.read_text(encoding="utf-8")
    paths = re.findall(
        r"(?<![\w/.:-])((?:tests|pipeline|preprocess|benchmarks|examples|scripts|conf|slurm|docs)/[\w./-]*\w)", text
    )
    placeholders = ("ROOM", "NAME", "test_X")
    named = [path for path in paths if not any(word in path for word in placeholders)]
    assert [path for path in named if not (REPOSITORY / path).exists()] == []
    modules = re.findall(r"-m ((?:pipeline|preprocess|benchmarks)(?:\.\w+)+)", text)
    files = [REPOSITORY / module.replace(".", "/") for module in modules]
    assert [str(file) for file in files if not (file.with_suffix(".py").exists() or file.is_dir())] == []


@pytest.mark.parametrize("page", [*PAGES, *AROUND], ids=name)
def test_links_of_a_page_lead_to_files(page: Path) -> None:
    """As a code host follows them; tests/docs/test_site.py follows them in the site."""
    text = "\n".join(outside_code(page))
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", text)
    local = [target for target in targets if not re.match(r"[a-z]+:", target)]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_pages_that_code_names_are_there() -> None:
    """`--help`, messages and docstrings say (docs/...md): no reader is sent to a page that has moved."""
    missing = []
    for folder in CODE:
        for path in (REPOSITORY / folder).rglob("*"):
            if path.suffix not in (".py", ".yaml", ".sbatch", "") or not path.is_file() or "results" in path.parts:
                continue
            for found in re.findall(r"\bdocs/[\w/-]+\.md", path.read_text(encoding="utf-8", errors="replace")):
                if not (REPOSITORY / found).exists():
                    missing.append(f"{name(path)}: {found}")
    assert missing == []


def test_the_pages_of_verbs_and_keys_are_what_help_says() -> None:
    command = [sys.executable, str(REPOSITORY / "scripts" / "reference.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_check_tells_a_page_that_differs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = reference()
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    assert module.differing() == ["verbs.md", "keys.md"]
    for page, text in module.PAGES.items():
        (tmp_path / page).write_text(text(), encoding="utf-8")
    assert module.differing() == []
    (tmp_path / "keys.md").write_text("# Keys\n", encoding="utf-8")
    assert module.differing() == ["keys.md"]


def test_every_verb_has_its_row_and_an_example() -> None:
    text = (DOCS / "reference" / "verbs.md").read_text(encoding="utf-8")
    assert set(reference().EXAMPLES) == set(VERBS)
    for verb, (module, _) in VERBS.items():
        assert f"| `{module}` |" in text
        assert f"\n    latentmill {verb}" in text


def test_every_key_of_help_is_on_the_page() -> None:
    """Counted by themselves: as many rows of a verb as its --help has keys."""
    from pipeline import config
    from pipeline.config.loading.help import verb_help

    text = (DOCS / "reference" / "keys.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE))
    assert list(sections) == list(config.CONFIGS)
    for verb, section in sections.items():
        keys = verb_help(verb).partition("\nKeys:\n")[2]
        assert len(re.findall(r"^\| `", section, re.MULTILINE)) == len(re.findall(r"^  [\w.]+=", keys, re.MULTILINE))
    assert "| `optim.lr` | `0.0001` | Peak learning rate." in text


def test_readme_is_about_a_page_and_leads_everywhere() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 100
    for room in ROOMS:
        assert f"(docs/{room}/" in text
    assert "make demo" in text
    assert "make test" in text
