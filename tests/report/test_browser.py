"""The run report in a real browser: it opens, draws and sorts, in light and dark, on a phone, without network."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from made.report import fake_run
from pipeline.report import page
from servers.browser import Browser

PHONE = {"width": 390, "height": 844}


def add_curve(run: Path) -> None:
    """Evaluations of five guidance scales with two samplers, as `latentmill eval` leaves them."""
    for sampler in ("ddim", "unipc"):
        for guidance in (1, 2, 3, 5, 8):
            folder = run / "evals" / f"{40_000:012d}-{sampler}-20-g{guidance}-n512-s0"
            folder.mkdir()
            metrics = {
                "n": 40_000, "images": 512, "guidance": guidance, "clip_score": 20 + 4 * np.log(guidance),
                "fid_democlip": 5 + (guidance - 2.5) ** 2 + (sampler == "ddim"), "fid_democlip_error": 0.4,
            }  # fmt: skip
            (folder / "metrics.json").write_text(json.dumps(metrics))
            (folder / "card.json").write_text(json.dumps({"sampler": sampler, "steps": 20, "line": "a line"}))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """one.html: of one run with a curve over guidance scales; sweep.html: of four runs."""
    folder = tmp_path_factory.mktemp("pages")
    run = fake_run(folder / "one")
    add_curve(run)
    page.write([str(run)], str(folder / "one.html"))
    runs = []
    for i, lr in enumerate((1e-4, 1e-3, 2e-3, 1e-2)):
        runs.append(fake_run(folder / f"optim.lr={lr:g}", seed=i, evaluations=2 if i else 0))
        (runs[-1] / "config.yaml").write_text(f"run: {runs[-1]}\noptim:\n  lr: {lr}\n  name: adamw\n")
        rows = [{"n": (9, 1000, 80, 200)[i], "time": 1.0, "kind": "train", "loss": 1.0}]
        (runs[-1] / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page.write([str(one) for one in runs], str(folder / "sweep.html"))
    return folder


def pixels(browser: Browser) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(browser.screenshot())).convert("RGB")).astype(int)


def column(browser: Browser, heading: str) -> list[str]:
    """Cells of the first table's column, as they stand."""
    return browser.run(
        "const table = document.querySelector('table.sortable');"
        "const i = [...table.tHead.rows[0].cells].findIndex(cell => cell.textContent === arguments[0]);"
        "return [...table.tBodies[0].rows].map(row => row.cells[i].textContent)",
        heading,
    )


@pytest.mark.parametrize("name", ["one", "sweep"])
@pytest.mark.parametrize("dark", [False, True])
def test_a_page_opens_and_draws_without_a_word_on_the_console(
    browser: Browser, pages: Path, name: str, dark: bool
) -> None:
    browser.open(pages / f"{name}.html", dark=dark)
    assert browser.run("return document.readyState") == "complete"
    charts = browser.run(
        "return [...document.querySelectorAll('svg')].map(svg => {"
        " const box = svg.getBoundingClientRect();"
        " return [box.width, box.height, svg.querySelectorAll('.line').length] })"
    )
    assert len(charts) >= {"one": 11, "sweep": 4}[name] and all(
        width > 200 and height > 100 and lines for width, height, lines in charts
    )
    tiles = browser.run(
        "return [...document.querySelectorAll('.tile')].map(tile => [tile.getBoundingClientRect().width,"
        " getComputedStyle(tile).backgroundImage.slice(0, 15)])"
    )
    assert tiles and all(width > 40 and image == 'url("data:image' for width, image in tiles)
    ground = np.median(pixels(browser).reshape(-1, 3), axis=0)
    assert (ground < 60).all() if dark else (ground > 200).all()
    assert browser.console() == []


@pytest.mark.parametrize("name", ["one", "sweep"])
def test_a_page_can_be_read_on_a_phone(browser: Browser, pages: Path, name: str) -> None:
    """Nothing but tables, which scroll by themselves, is wider than the window, and no text is tiny."""
    browser.open(pages / f"{name}.html", width=PHONE["width"], height=PHONE["height"])
    assert browser.run("return document.documentElement.scrollWidth") <= PHONE["width"]
    smallest = browser.run(
        "return Math.min(...[...document.querySelectorAll('p, td, th, figcaption, summary, .card span, li')]"
        ".map(one => parseFloat(getComputedStyle(one).fontSize)))"
    )
    assert smallest >= 12
    texts = browser.run(
        "return [...document.querySelectorAll('svg text.tick')].map(one => one.getBoundingClientRect().height)"
    )
    assert min(texts) > 8
    assert browser.console() == []


def test_a_table_sorts_by_numbers_and_by_text_both_ways(browser: Browser, pages: Path) -> None:
    browser.open(pages / "sweep.html")
    names = ["optim.lr=0.0001", "optim.lr=0.001", "optim.lr=0.002", "optim.lr=0.01"]
    assert column(browser, "run") == names and column(browser, "samples seen") == ["9", "1,000", "80", "200"]
    headings = browser.run("return [...document.querySelectorAll('table.sortable th')].map(cell => cell.textContent)")

    def sort(heading: str) -> None:
        browser.click(f"table.sortable th:nth-child({headings.index(heading) + 1}) button")

    sort("samples seen")
    assert column(browser, "samples seen") == ["9", "80", "200", "1,000"]
    assert column(browser, "run") == [names[i] for i in (0, 2, 3, 1)]
    sort("samples seen")
    assert column(browser, "samples seen") == ["1,000", "200", "80", "9"]
    sort("optim.lr")
    assert column(browser, "optim.lr") == ["0.0001", "0.001", "0.002", "0.01"]
    sort("run")
    sort("run")
    assert column(browser, "run") == names[::-1]
    for _ in range(2):  # the run without an evaluation comes last either way
        sort("attribute accuracy")
        assert column(browser, "attribute accuracy")[-1] == "–"
    sorted_by = browser.run("return [...document.querySelectorAll('th[aria-sort]')].map(cell => cell.textContent)")
    assert sorted_by == ["attribute accuracy"] and browser.console() == []


def test_the_curve_over_guidance_scales_is_drawn_in_their_order_with_error_bars(browser: Browser, pages: Path) -> None:
    browser.open(pages / "one.html")
    chart = "svg[aria-label='fid_democlip against CLIP score']"
    titles = browser.run(f'return [...document.querySelectorAll("{chart} circle title")].map(one => one.textContent)')
    scales = [re.search(r"guidance (\d+): FID ([\d.]+), CLIP score ([\d.]+)", title) for title in titles]
    found = [match.groups() for match in scales if match]
    assert [scale for scale, *_ in found] == ["1", "2", "3", "5", "8"] * 2
    assert found[1] == ("2", "6.25", "22.77") and found[6] == ("2", "5.25", "22.77")
    places = browser.run(
        f'return [...document.querySelectorAll("{chart} circle")]'
        ".map(one => [one.cx.baseVal.value, one.cy.baseVal.value])"
    )
    for one in (places[:5], places[5:]):
        assert [x for x, _ in one] == sorted(x for x, _ in one)
        assert max(range(5), key=lambda i: one[i][1]) == 1  # the lowest FID is the lowest point
    assert browser.run(f'return document.querySelectorAll("{chart} .bar-ends").length') == 10
