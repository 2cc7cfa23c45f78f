"""What a newcomer looks for is two clicks from docs/index.md at most, and the README names it."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from made.places import REPOSITORY

INDEX = REPOSITORY / "docs" / "index.md"
README = REPOSITORY / "README.md"
CLICKS = 2

WHERE_PEOPLE_ARE = {
    "accelerate's launcher": ("how_to/choose_a_launcher.md", ["accelerate launch", "torchrun", "srun", "deepspeed"]),
    "a loop of one's own": ("how_to/use_your_own_loop.md", ["open_dataset", "StatefulDataLoader", "as_webdataset"]),
    "diffusers' UNet trained by accelerate": ("how_to/use_your_own_loop.md", ["examples/diffusers_unet.py"]),
    "sweeps whose members use several nodes": ("how_to/slurm.md", ["-m cluster=a100 nodes="]),
    "Docker and Apptainer": ("how_to/use_containers.md", ["containers/Dockerfile", "containers/latentmill.def"]),
    "the workflow": ("how_to/use_containers.md", [".github/workflows/test.yml"]),
    "Google's and Azure's storage": ("how_to/use_google_or_azure_storage.md", ["gs://", "az://"]),
    "Kubernetes and SkyPilot": ("how_to/run_on_kubernetes_or_skypilot.md", ["deploy/kubernetes", "deploy/skypilot"]),
    "TensorBoard": ("how_to/track_runs.md", ["tracking.to=[wandb,tensorboard]"]),
    "status that refreshes": ("how_to/track_runs.md", ["status --watch"]),
    "the hub": ("how_to/publish_on_the_hub.md", ["push=hub:"]),
    "from diffusers' scripts": ("coming_from/diffusers.md", ["latentmill train", "accelerate launch"]),
    "from SimpleTuner": ("coming_from/simpletuner.md", ["latentmill train"]),
    "from kohya": ("coming_from/kohya.md", ["latentmill train"]),
    "from MDS": ("coming_from/mosaicml_streaming.md", ["latentmill index"]),
    "from MLPerf's caches": ("coming_from/mlperf.md", ["latentmill index"]),
    "what breaks elsewhere": ("coming_from/what_breaks_elsewhere.md", ["latentmill ledger"]),
}
"""What is looked for: the page that tells of it, and words that stand there."""

NEVER_RUN = [
    *("how_to/run_on_kubernetes_or_skypilot.md", "how_to/use_containers.md", "how_to/publish_on_the_hub.md"),
    *("how_to/use_google_or_azure_storage.md", "how_to/choose_a_launcher.md"),
]
"""Pages of what cannot be run where this is developed."""


@cache
def links(page: Path) -> frozenset[Path]:
    """Files that a page leads to with one click."""
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", page.read_text(encoding="utf-8"))
    found = ((page.parent / target).resolve() for target in targets if not re.match(r"[a-z]+:", target))
    return frozenset(path for path in found if path.is_file())


def clicks(start: Path, most: int = CLICKS) -> dict[Path, int]:
    """The files that are `most` clicks away from a page or fewer, each with its number of clicks."""
    away, edge = {start: 0}, [start]
    for number in range(1, most + 1):
        edge = [path for page in edge if page.suffix == ".md" for path in links(page) if path not in away]
        away |= dict.fromkeys(edge, number)
    return away


@pytest.mark.parametrize("what", WHERE_PEOPLE_ARE)
def test_what_people_look_for_is_two_clicks_from_the_map_and_the_page_tells_of_it(what: str) -> None:
    target, words = WHERE_PEOPLE_ARE[what]
    page = INDEX.parent / target
    assert page in clicks(INDEX)
    text = " ".join(page.read_text(encoding="utf-8").split())
    assert [word for word in words if word not in text] == []


@pytest.mark.parametrize("target", sorted({target for target, _ in WHERE_PEOPLE_ARE.values()}))
def test_the_readme_leads_there_too(target: str) -> None:
    assert (INDEX.parent / target) in links(README)


@pytest.mark.parametrize("target", NEVER_RUN)
def test_a_page_of_what_was_never_run_says_so(target: str) -> None:
    text = (INDEX.parent / target).read_text(encoding="utf-8")
    assert re.search(r"never (been )?run", text, re.IGNORECASE)


def test_every_page_is_two_clicks_from_the_map() -> None:
    pages = {path.resolve() for path in INDEX.parent.rglob("*.md")}
    assert sorted(path.name for path in pages - clicks(INDEX).keys()) == []


def test_a_page_that_nothing_leads_to_is_missed(tmp_path: Path) -> None:
    for name, text in {"a": "[b](b.md)", "b": "[c](c.md)", "c": "[d](d.md) [a](a.md)", "d": "", "e": ""}.items():
        (tmp_path / f"{name}.md").write_text(text)
    away = clicks(tmp_path / "a.md")
    assert {path.stem: number for path, number in away.items()} == {"a": 0, "b": 1, "c": 2}
