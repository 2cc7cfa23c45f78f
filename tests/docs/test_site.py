"""The site of docs/: it builds strictly, no link of it is dead, nothing is fetched, and pages open without an error."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from made.places import REPOSITORY
from servers.browser import Browser

OPENED = {
    "index.html": "latentmill",
    "how_to/encode.html": "Encode a dataset once",
    "explained/order_and_randomness.html": "Order and randomness",
}
"""Pages that are opened in a browser, and their headings."""
FETCHING = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src", "video": "src"}
"""Elements whose address a browser fetches by itself."""


class Page(HTMLParser):
    """Addresses of a page: those that are followed (links), those that are fetched (fetched), and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors |= {value for key in ("id", "name") if (value := values.get(key))}
        if tag == "a" and (href := values.get("href")):
            self.links.append(href)
        if tag in FETCHING and (address := values.get(FETCHING[tag])):
            self.fetched.append(address)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it, in a folder of its own."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    return folder


@cache
def page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def pages(site: Path) -> list[Path]:
    """Every page but the one for addresses that are not there, whose links are of the site's root."""
    return [path for path in sorted(site.rglob("*.html")) if path.name != "404.html"]


def test_every_page_of_docs_is_in_the_site_and_in_its_map(site: Path) -> None:
    built = {path.relative_to(site).with_suffix("").as_posix() for path in pages(site)}
    docs = REPOSITORY / "docs"
    written = {path.relative_to(docs).with_suffix("").as_posix() for path in docs.rglob("*.md")}
    tables = {f"measured/results/{path.stem}" for path in (REPOSITORY / "benchmarks" / "results").glob("*.md")}
    assert built == written | tables
    index = page(site / "index.html").links
    assert {f"{one}.html" for one in written} - set(index) == set()


def test_no_link_of_the_site_is_dead(site: Path) -> None:
    """Pages and anchors within it. Links to the checkout were led to text when it was built, or the build failed."""
    dead = []
    for path in pages(site):
        for link in page(path).links:
            if re.match(r"[a-z]+:", link):
                continue
            target, _, anchor = link.partition("#")
            there = (path.parent / unquote(target)).resolve() if target else path
            if there.is_dir():
                there /= "index.html"
            if not there.is_relative_to(site) or not there.exists():
                dead.append(f"{path.relative_to(site)}: {link}")
            elif anchor and there.suffix == ".html" and unquote(anchor) not in page(there).anchors:
                dead.append(f"{path.relative_to(site)}: {link} (no such anchor)")
    assert dead == []


def test_the_site_fetches_nothing_from_elsewhere(site: Path) -> None:
    fetched = {address for path in sorted(site.rglob("*.html")) for address in page(path).fetched}
    assert fetched
    assert [address for address in fetched if re.match(r"([a-z]+:)?//", address)] == []
    for sheet in site.rglob("*.css"):
        addresses = re.findall(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)", sheet.read_text(encoding="utf-8"))
        assert [one for pair in addresses for one in pair if re.match(r"([a-z]+:)?//", one)] == [], sheet.name


@pytest.mark.parametrize("name", OPENED)
def test_a_page_opens_with_its_heading_and_without_a_word_on_the_console(
    browser: Browser, site: Path, name: str
) -> None:
    browser.open(site / name)
    assert browser.run("return document.readyState") == "complete"
    heading = "const title = document.querySelector('h1'); return [title.firstChild.textContent, title.offsetHeight]"
    text, height = browser.run(heading)
    assert text == OPENED[name]
    assert height > 20
    assert browser.run("return [...document.images].filter(one => !one.naturalWidth).length") == 0
    assert browser.console() == []
