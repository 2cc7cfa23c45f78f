"""Guides on the command line: which are chosen, their weights, and keys that lack their guide."""

from __future__ import annotations

import pytest

from pipeline.config import GuideConfig, SampleConfig
from pipeline.config.loading.load import load
from pipeline.errors import ConfigError

SAMPLE = ["run=r", "prompt=a red circle", "class=3", "guide.target=small.png", "guide.run=c"]


def sample(*words: str) -> SampleConfig:
    config: SampleConfig = load("sample", ["run=r", *words])
    return config


def test_no_guide_is_chosen_by_default() -> None:
    for verb in ("sample", "eval"):
        assert load(verb, ["run=r"]).guide == load(verb, ["run=r", "guide=none"]).guide == GuideConfig()
        assert not GuideConfig().weights and not GuideConfig().asks


def test_one_guide_or_several_are_chosen_by_their_names() -> None:
    one = sample("guide=image", "guide.target=a.png", "guide.target=b.png", "guide.weight=8", "guide.grey=true")
    assert one.guide.weights == {"image": 8.0} and one.guide.target == ("a.png", "b.png") and one.rows == 2
    several = sample("guide=[image,clip]", "guide.target=a.png", "prompt=x", "guide.clip=0.5")
    assert several.guide.weights == {"image": sample("guide=image", "guide.target=a.png").guide.image, "clip": 0.5}
    assert several.guide.asks == ("guide.target", "prompt")
    away = sample("guide=classifier", "guide.run=c", "class=3", "guide.weight=-2")
    assert away.guide.weights == {"classifier": -2.0}
    assert load("eval", ["run=r", "guide=image", "guide.weight=0"]).guide.weights == {"image": 0.0}
    assert sample("guide.target=[a.png,b.png]", "guide=image").guide.target == ("a.png", "b.png")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["guide=imge"], "guide=imge: no such guide; there are classifier, clip, image, none"),
        (["guide=[image,imge]"], "guide=imge: no such guide"),
        (["guide.target=a.png"], "guide.target is given without guide=image"),
        (["guide.mask=a.png"], "guide.mask is given without guide=image"),
        (["guide.run=c"], "guide.run is given without guide=classifier"),
        (["guide=clip", "prompt=x", "guide.grey=true"], "guide.grey is given without guide=image"),
        (["guide.weight=3"], "guide.weight=3.0 without a guide: choose one, guide=classifier, clip, image"),
        (["guide=image", "guide.target=a.png", "guide.weight=0"], "guide.weight=0 with guide=image guides nothing"),
        (["guide=image"], "guide=image needs guide.target: give guide.target=FILE"),
        (["guide=clip"], "guide=clip needs prompt"),
        (["guide=clip", "prompt="], "guide=clip needs prompt"),
        (["guide=classifier", "class=3"], "guide=classifier needs guide.run=RUN"),
        (["guide=classifier", "guide.run=c"], "guide=classifier needs class: give class=3"),
        (
            ["guide=[image,clip]", "guide.target=a.png", "prompt=x", "guide.weight=3"],
            r"guide.weight=3.0 with guide=\[image,clip\]: it is for one guide alone",
        ),
        (["guide=image", "guide.target=a.png", "guide.factor=2"], "guide.factor=2: here the target's own size"),
        (
            ["guide=image", "guide.target=a.png", "guide.target=b.png", "size=[64x64,64x64,64x64]"],
            "size: 3 for 2 rows",
        ),
        (["guide=image", "guide.target=a.png", "tile=64"], "tile=64 with guide=image: a guide follows its gradient"),
        (["guide=clip", "prompt=x", "tile=auto"], "tile=auto with guide=clip"),
        (["guide=clip", "prompt=x", "guide.cutouts=-1"], "guide.cutouts=-1: a number from 0 to 64"),
    ],
)
def test_a_guide_that_cannot_be_followed_is_refused_in_one_line(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sample(*words)


def test_eval_takes_no_targets_and_a_card_says_how_its_pictures_were_guided() -> None:
    with pytest.raises(ConfigError, match=r"guide\.target=a\.png: in eval the target is each record's own picture"):
        load("eval", ["run=r", "guide=image", "guide.target=a.png"])
    with pytest.raises(ConfigError, match="tile=64 with guide=image: a guide follows its gradient"):
        load("eval", ["run=r", "guide=image", "tile=64"])
    with pytest.raises(ConfigError, match=r"guide\.image with from_card: the card says how images were guided"):
        load("eval", ["from_card=c.json", "guide=image"])
    assert load("eval", ["from_card=c.json", "guide.run=c"]).guide.run == "c"
