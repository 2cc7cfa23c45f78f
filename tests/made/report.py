"""Makes run directories for the report, and parses its pages strictly."""

from __future__ import annotations

import html.parser
import json
import math
from pathlib import Path

import numpy as np

from pipeline.report.grid import GAP, png, tile

HOSTILE = '<script>alert("x")</script> a "red" circle & \'square\''
CAPTIONS = ["a large red circle", HOSTILE, "красный круг слева", "一个大红圆", "دائرة حمراء كبيرة", "a 🔴 circle"]


def fake_run(folder: Path, evaluations: int = 4, seed: int = 0, captions: list[str] = CAPTIONS) -> Path:
    """Makes a run directory like one of training, with invented figures."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("run: runs/a\nmodel:\n  name: tiny\n")
    (folder / "run.json").write_text(json.dumps({"manifest": "0123abcd", "contract": {"resolution": 64}}))
    steps = [{"heading": "Train", "command": "latentmill train run=runs/a", "seconds": 300.2}]
    (folder / "steps.json").write_text(json.dumps(steps))
    samples, rows = 40_000, [{"n": 0, "time": 1000.0, "kind": "start", "world": 2, "host": "here"}]
    for i in range(1, 101):
        n = i * samples // 100
        rows.append(
            {
                "n": n, "time": 1000.0 + i, "kind": "train", "loss": 0.05 + math.exp(-i / 12) * rng.uniform(0.7, 1.3),
                "lr": 1e-3 * min(i / 10, 1), "grad_norm": rng.uniform(0.2, 1), "images_per_s": 400 + rng.normal() * 20,
                "step_s": 0.16, "steps_s": list(0.16 + 0.02 * rng.random(6)), "data_wait_s": 0.004 * rng.random(),
            }
        )  # fmt: skip
        if i == 60:
            rows.append({"n": n, "time": 1000.0 + i, "kind": "start", "world": 2, "host": "here"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for k in range(evaluations):
        n = k * samples // max(evaluations - 1, 1)
        share = k / max(evaluations - 1, 1)
        place = folder / "evals" / f"{n:012d}"
        place.mkdir(parents=True)
        noise = rng.integers(0, 256, (len(captions), 64, 64, 3)) * (1 - share)
        clean = np.stack([np.full((64, 64, 3), rng.integers(40, 250, 3)) for _ in captions]) * share
        (place / "grid.png").write_bytes(png(tile((noise + clean).astype(np.uint8), 4)))
        grid = {"captions": captions, "columns": 4, "width": 64, "height": 64, "gap": GAP}
        (place / "grid.json").write_text(json.dumps(grid))
        metrics = {
            "n": n, "images": 512, "guidance": 3.0, "seconds": 21.0, "attribute_accuracy": 0.02 + 0.86 * share,
            "attribute_accuracy_real": 0.998, "attribute_accuracy_reconstruction": 0.985, "clip_score": 11 + 20 * share,
            "attribute_accuracy_by_objects": {"1": share, "2": 0.8 * share, "3": 0.5 * share}, "clip_score_real": 32.0,
            "fid_democlip": 300 * math.exp(-4 * share), "fid_democlip_floor_real": 1.2,
            "fid_democlip_floor_reconstruction": 3.1, "clip_score_reconstruction": 31.0,
        }  # fmt: skip
        (place / "metrics.json").write_text(json.dumps(metrics))
        (place / "card.json").write_text(json.dumps({"line": f"fid_democlip of 512 images at {n}"}))
    return folder


class Strict(html.parser.HTMLParser):
    """Collects tags, addresses and text of a page, and checks that elements nest."""

    VOID = frozenset(["meta", "br", "img", "link", "input"])

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text.append(data)


def parse(text: str) -> Strict:
    parser = Strict()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser
