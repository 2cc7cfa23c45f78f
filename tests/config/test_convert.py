"""The keys of `latentmill convert`: each format takes its own."""

from __future__ import annotations

import pytest

from pipeline.config import ConvertConfig
from pipeline.config.check.converting import check_convert
from pipeline.config.loading.load import load
from pipeline.errors import ConfigError

BOTH = ["images=i", "dest=d"]


def test_the_commands_of_the_page_are_taken() -> None:
    """docs/how_to/convert_annotations.md."""
    import shlex

    from made.places import REPOSITORY

    page = (REPOSITORY / "docs" / "how_to" / "convert_annotations.md").read_text(encoding="utf-8")
    code = "\n".join(line[4:] for line in page.replace("\\\n", " ").splitlines() if line.startswith("    "))
    commands = [shlex.split(line)[1:] for line in code.splitlines() if "=" in line]
    assert len([words for words in commands if words[0] == "convert"]) >= 8
    for verb, *words in commands:
        assert load(verb, words).dest


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["images=i", "dest=d"], "from is missing"),
        (["from=voc", *BOTH], "from=voc: there are coco, openimages, labels, classes"),
        (["from=coco", *BOTH], "annotations is missing: from=coco needs annotations=["),
        (["from=openimages", "annotations=[a.csv]", *BOTH], "names is missing: from=openimages needs names="),
        (["from=labels", *BOTH], "labels is missing: from=labels needs labels=FOLDER"),
        (["from=classes", "dest=d", "images="], "images is missing: give images=... (the folder of the images)"),
        (
            ["from=classes", "crowds=same", *BOTH],
            "crowds is given, but from=classes has no use for it (from=coco, open",
        ),
        (["from=coco", "annotations=[a]", "names=n", *BOTH], "names is given, but from=coco has no use for it"),
        (["from=coco", "annotations=[a]", "label_end=_x", *BOTH], "label_end=_x is for label maps: give labels=FOLDER"),
        (["from=labels", "labels=l", "label_offset=1", *BOTH], "label_offset=1 without names: maps are copied"),
        (["from=labels", "labels=l", "label_end=a/b", *BOTH], "label_end=a/b: the end of a name has no slash"),
        (["from=coco", "annotations=[a]", "min_boxes=3", "max_boxes=2", *BOTH], "min_boxes=3 and max_boxes=2"),
        (["from=classes", "shard_size=0", *BOTH], "shard_size=0"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load("convert", words)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_name_of_a_file_is_not_empty() -> None:
    with pytest.raises(ConfigError, match="annotations: the name of a file is empty"):
        check_convert(ConvertConfig(from_="coco", images="i", dest="d", annotations=("a", " ")))
