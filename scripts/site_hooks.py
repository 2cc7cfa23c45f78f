"""Hooks of mkdocs: pages of docs/ link files of the checkout, as on a code host, and the site takes what it can.

The tables of benchmarks/results/ become pages of the site. A link to any other file of the checkout becomes the file's
path. A link to nothing is a warning, which a strict build makes an error.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TABLES = "measured/results"
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)(#[^)\s]*)?\)")
log = logging.getLogger("mkdocs.hooks.site")


def on_files(files: Any, config: Any) -> Any:
    """Adds the tables of benchmarks/results/ to the site."""
    for path in sorted(RESULTS.glob("*.md")):
        files.append(File.generated(config, f"{TABLES}/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Leads links out of docs/ to where they can be followed in the site."""
    docs = Path(config.docs_dir)
    source = page.file.src_uri
    here = RESULTS if source.startswith(TABLES) else (docs / source).parent

    def led(found: re.Match[str]) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        path = (here / target).resolve()
        if re.match(r"[a-z]+:", target) or path.is_relative_to(docs):
            return found[0]
        if not path.exists() or not path.is_relative_to(ROOT):
            log.warning(f"{source} links to {target}, and there is no such file in the checkout")
            return found[0]
        if path.is_relative_to(RESULTS) and path.suffix == ".md":
            up = "../" * source.count("/")
            return f"[{text}]({up}{TABLES}/{path.name}{anchor})"
        name = path.relative_to(ROOT).as_posix()
        return f"`{name}`" if text.strip("`") in name else f"{text} (`{name}`)"

    return LINK.sub(led, markdown)


def on_post_build(config: Any) -> None:
    """Puts the index of the search into a script, too: a page that is opened from a folder may fetch nothing else."""
    folder = Path(config.site_dir) / "search"
    index = (folder / "search_index.json").read_text(encoding="utf-8")
    (folder / "search_index.js").write_text(f"var __index = {index}", encoding="utf-8")
