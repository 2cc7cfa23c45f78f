"""What eval.perceptual, loss.perceptual and perceptual may name, and what is refused before anything is read."""

from __future__ import annotations

import pytest

from pipeline.config.loading.load import load
from pipeline.config.values.distances import require_distance
from pipeline.errors import ConfigError

SUPERRES = ["task=superres", "model.context_width=0", "model.in_channels=7", "data.train=a", "data.val=b", "run=r"]
SUPERRES += ["eval.sampler.guidance=1"]
KEYS = {
    "loss.perceptual": ("autoencoder", ["data.train=a", "run=r"]),
    "eval.perceptual": ("autoencoder", ["data.train=a", "run=r"]),
    "perceptual": ("reconstruct", ["dataset=a", "dest=b"]),
}


def refusal(verb: str, *words: str) -> str:
    with pytest.raises(ConfigError) as refused:
        load(verb, words)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("", "= is empty: give st-alex, st-vgg, a file or a URL of st-LPIPS, lpips-vgg:FILE, or none"),
        ("  ", "= is empty: give st-alex"),
        ("lpips-vgg", "=lpips-vgg names no file: give lpips-vgg:FILE or lpips-vgg:URL"),
        ("lpips-vgg:", "=lpips-vgg: names no file"),
        ("lpips-vgg:#sha256=00000000", "#sha256=00000000 names no file"),
        ("vgg", "=vgg is no perceptual distance: give st-alex, st-vgg"),
        ("lpips", "=lpips is no perceptual distance"),
        ("st-squeeze", "=st-squeeze is no perceptual distance"),
        ("st-vgg#sha256=00000000", "is no perceptual distance"),
        ("lpips-alex:a.pth", "=lpips-alex:a.pth is no perceptual distance"),
        ("st-vgg:a.pth", "=st-vgg:a.pth is no perceptual distance"),
    ],
)
def test_what_names_no_weights_is_one_line(value: str, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        require_distance(value, "perceptual")
    said = str(refused.value)
    assert said.startswith("perceptual=") and says in said and "\n" not in said


@pytest.mark.parametrize(
    "value",
    [
        *("none", "st-alex", "st-vgg", "vgg.pth", "weights/vgg", "s3://b/vgg.pth", "https://h/vgg.pth#sha256=00000000"),
        *("lpips-vgg:a.pth", "lpips-vgg:https://h/a,b.pth#sha256=00000000", "lpips-vgg:~/a b.safetensors", "c:a.pth"),
    ],
)
def test_what_names_weights_is_taken(value: str) -> None:
    require_distance(value, "perceptual")


def test_every_verb_with_such_a_key_refuses_it_and_takes_a_file_as_it_is_written() -> None:
    for key, (verb, words) in KEYS.items():
        assert refusal(verb, *words, f"{key}=").startswith(f"{key}= is empty: give st-alex")
        assert refusal(verb, *words, f"{key}=lpips").startswith(f"{key}=lpips is no perceptual distance")
        config, value = load(verb, [*words, f"{key}=lpips-vgg:~/a b,c.pth#sha256=00000000"]), ""
        for part in key.split("."):
            config = value = getattr(config, part)
        assert value == "lpips-vgg:~/a b,c.pth#sha256=00000000"
    assert "perceptual=lpips is no perceptual distance" in refusal("eval", "run=r", "perceptual=lpips")
    assert load("eval", ["run=r"]).perceptual == ""
    assert "=lpips is no perceptual distance" in refusal("train", *SUPERRES, "eval.perceptual=lpips")


def test_the_best_checkpoint_goes_by_a_distance_whose_weights_are_given() -> None:
    for verb, words in (("train", SUPERRES), ("autoencoder", ["data.train=a", "data.val=b", "run=r"])):
        for best, other, wanted in (
            ("lpips", "st-alex", "lpips-vgg:FILE"),
            ("st_lpips", "lpips-vgg:a.pth", "st-alex, st-vgg or FILE"),
            ("lpips", "none", "lpips-vgg:FILE"),
        ):
            said = refusal(verb, *words, f"checkpoint.best={best}", f"eval.perceptual={other}")
            assert said.endswith(f"best={best} wants the weights of that distance: eval.perceptual={wanted}")
        for best, right in (("lpips", "lpips-vgg:a.pth"), ("st_lpips", "a.pth")):
            config = load(verb, [*words, f"checkpoint.best={best}", f"eval.perceptual={right}"])
            assert config.checkpoint.best == best
