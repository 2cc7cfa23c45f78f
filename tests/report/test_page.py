"""The run report: what is in it, that it needs nothing from outside, and that text from outside stays text."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from made.report import CAPTIONS, fake_run, parse
from pipeline.errors import ConfigError, RunError
from pipeline.report import page
from pipeline.report.charts import Level, Series, line_chart, short
from pipeline.report.grid import GAP, captioned, tile
from pipeline.report.run import load


def test_report_of_one_run_shows_headline_samples_curves_and_configuration(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "a")
    page.write([str(run)], str(run / "report.html"), {"attribute_accuracy": 0.75, "fid_ratio": 3.0})
    html = (run / "report.html").read_text()
    parsed = parse(html)
    text = " ".join(parsed.text)
    assert "0.880" in text and "target ≥ 0.75: reached" in text
    assert "autoencoder floor 3.1: 1.77×" in text and "target ≤ 3× floor: reached" in text
    assert "1 restart" in text and "name: tiny" in text and "0123abcd" in text
    assert "fid_democlip of 512 images at 40000" in text
    assert "latentmill train run=runs/a" in text and "5 min 00 s" in text
    assert (
        parsed.tags.count("svg") == 10
    )  # accuracy, FID, CLIP, by objects; loss, norm, rate; throughput, steps, waiting
    assert html.count("background-image:url(data:image/png;base64,") == 4  # each evaluation's sheet once


def test_what_commits_cost_and_the_validation_loss_are_shown_where_rows_tell_them(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "a")
    page.write([str(run)], str(run / "report.html"))
    before = (run / "report.html").read_text()
    assert "Validation loss" not in before and "training waited" not in before
    with (run / "metrics.jsonl").open("a") as file:
        for n in (20_000, 40_000):
            commit = {"kind": "checkpoint", "stall_s": 0.25, "write_s": n / 1e4, "bytes": 25e6}
            for facts in (commit, {"kind": "val", "loss": 0.5}):
                file.write(json.dumps({"n": n, "time": 1100.0, **facts}) + "\n")
    page.write([str(run)], str(run / "report.html"))
    after = (run / "report.html").read_text()
    assert "2 commits, 25 MB each of rank 0: training waited 0.50 s for them in all" in after
    assert "the slowest was there 4.0 s after it began" in after
    assert "Validation loss" in after


def test_missed_target_is_called_missed(tmp_path: Path) -> None:
    run = load(str(fake_run(tmp_path / "a")))
    assert "target ≥ 0.95: not reached" in page.page([run], {"attribute_accuracy": 0.95})


def test_report_is_self_contained(tmp_path: Path) -> None:
    html = page.page([load(str(fake_run(tmp_path / "a")))], {})
    parsed = parse(html)
    assert parsed.addresses == [] and "link" not in parsed.tags
    assert html.count("<script") == 1 and f"<script>{page.SCRIPT.read_text()}</script>" in html
    assert "http://" not in html and "https://" not in html and "@import" not in html


def test_captions_of_any_script_are_text_and_never_markup(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "a")
    html = page.page([load(str(run))], {})
    assert html.count("<script") == 1 and "&lt;script&gt;" in html
    text = " ".join(parse(html).text)
    assert all(caption in text for caption in CAPTIONS)


def test_several_runs_are_compared_in_one_table_and_drawn_together(tmp_path: Path) -> None:
    runs = [str(fake_run(tmp_path / name, seed=i)) for i, name in enumerate("ab")]
    dest = tmp_path / "both.html"
    assert page.main([*runs, f"dest={dest}"]) == 0
    text = " ".join(parse(dest.read_text()).text)
    assert "Runs compared" in text and "loss, last tenth" in text
    assert dest.read_text().count('<path class="line s1"') >= 4


def test_run_without_evaluations_still_has_a_report(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "a", evaluations=0)
    assert page.main([str(run)]) == 0
    assert "Throughput" in (run / "report.html").read_text()


def test_run_that_has_only_started_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    assert "seed: 0" in page.page([load(str(tmp_path))], {})


def test_missing_run_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run at"):
        load(str(tmp_path / "nothing"))


def test_unknown_option_is_refused() -> None:
    with pytest.raises(ConfigError, match="colour"):
        page.main(["runs/a", "colour=red"])


def test_unfinished_evaluation_and_cut_last_row_are_left_out(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "a")
    (run / "evals" / f"{40_000:012d}" / "metrics.json").unlink()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"n": 50000, "kind": "tr')
    loaded = load(str(run))
    assert loaded.last is not None and loaded.last.n == 26_666 and loaded.samples == 40_000


def test_time_of_a_run_does_not_count_what_passed_before_a_restart(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    rows = [(0, 10.0, "start"), (64, 14.0, "train"), (64, 1000.0, "start"), (128, 1003.0, "train")]
    lines = [json.dumps({"n": n, "time": time, "kind": kind}) + "\n" for n, time, kind in rows]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    run = load(str(tmp_path))
    assert run.seconds == 7.0 and run.restarts == 1


def test_every_step_of_the_rows_has_its_time(tmp_path: Path) -> None:
    run = load(str(fake_run(tmp_path / "a")))
    times = page.step_times(run)
    assert len(times) == 600 and times[-1][0] == 40_000 and all(0.16 <= t <= 0.18 for _, t in times)


# --------------------------------------------------------------------------------------------------------------------


def test_chart_leaves_out_what_an_axis_cannot_show() -> None:
    chart = line_chart([Series("a", [(0, 1.0), (1, -1.0), (2, math.nan), (3, 10.0)], dots=True)], title="t", log_y=True)
    assert chart.count("<circle") == 2 and "nan" not in chart
    assert line_chart([Series("a", [(0, math.inf)])], title="t") == ""


def test_an_error_bar_beyond_all_axes_is_left_out() -> None:
    chart = line_chart([Series("a", [(0, 1.0), (1, 2.0)], bars={0: (0.5, 1e306), 1: (1.0, 3.0)})], title="t")
    assert chart.count('class="bar-ends') == 1 and "inf" not in chart


def test_factors_are_evenly_apart_on_a_logarithmic_axis() -> None:
    points = [(x, 1.0 + x) for x in (0, 1, 2, 4, 8)]  # 0 has no place there
    chart = line_chart([Series("a", points, dots=True)], title="t", log_x=True, x_ticks=(1, 2, 4, 8))
    places = [float(x) for x in re.findall(r'<circle[^>]* cx="([0-9.]+)"', chart)]
    assert np.diff(places) == pytest.approx([places[1] - places[0]] * 3, abs=0.2) and len(places) == 4
    assert re.findall(r'text-anchor="middle">([0-9]+)</text>', chart) == ["1", "2", "4", "8"]


def test_chart_of_many_points_keeps_its_mean() -> None:
    points = [(i, float(i % 2)) for i in range(10_000)]
    chart = line_chart([Series("a", points)], title="t")
    assert chart.count("<circle") <= 240 and ": 0.5 at" in chart


def test_chart_of_one_value_has_a_range() -> None:
    assert "NaN" not in line_chart([Series("a", [(5, 2.0)])], title="t", levels=[Level("floor", 2.0)])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (12_345, "12.35k"), (0.004123, "0.00412"), (2e6, "2M"), (3e-7, "3e-07"), (0.75, "0.75")],
)
def test_short_numbers(value: float, text: str) -> None:
    assert short(value) == text


def test_levels_that_lie_close_share_a_text_and_others_have_their_own() -> None:
    curve = [Series("a", [(0, 0.0), (5, 100.0)])]
    levels = [Level("real", 50.0), Level("reconstructed", 52.0), Level("target", 90.0)]
    drawn = line_chart(curve, title="t", levels=levels)
    assert drawn.count('<line class="level"') == 3
    assert ">reconstructed 52, real 50</text>" in drawn and ">target 90</text>" in drawn


def test_tiles_stand_in_reading_order() -> None:
    images = np.stack([np.full((4, 6, 3), i * 10, np.uint8) for i in range(5)])
    sheet = np.asarray(tile(images, 3))
    assert sheet.shape == (2 * 4 + GAP, 3 * 6 + 2 * GAP, 3)
    assert (sheet[4 + GAP :, 6 + GAP : 12 + GAP] == 40).all()


@pytest.mark.parametrize("caption", [*CAPTIONS, "", "x" * 5000, "a\nb\tc\x00d", "word " * 400])
def test_any_caption_can_be_drawn(caption: str) -> None:
    images = np.zeros((1, 2, 8, 8, 3), np.uint8)
    picture = captioned(images, [caption])
    assert picture.width == 2 * 128 + GAP + 24 and 128 < picture.height < 300
