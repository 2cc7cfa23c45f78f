"""What eval.perceptual and loss.perceptual may name: the weights of a perceptual distance."""

from __future__ import annotations

import re

from pipeline.config.values.bounds import require

NAMED = ("none", "st-alex", "st-vgg")
LPIPS = "lpips-vgg"
WANTED = f"give st-alex, st-vgg, a file or a URL of st-LPIPS, {LPIPS}:FILE, or none"


def require_distance(value: str, key: str) -> None:
    """Raise ConfigError for a value that names no weights. Whether a file is there is not looked at."""
    require(value.strip() != "", f"{key}= is empty: {WANTED}")
    kind, colon, place = value.partition(":")
    if kind == LPIPS:
        require(
            re.split("#sha256=", place)[0].strip() != "",
            f"{key}={value} names no file: give {LPIPS}:FILE or {LPIPS}:URL, with the weights of LPIPS with VGG-16",
        )
        return
    a_kind = colon != "" and not place.startswith("//") and re.fullmatch(r"(lpips|st)\b[\w-]*", kind) is not None
    a_word = re.fullmatch(r"[\w-]+(#.*)?", value) is not None  # weights are read of files with a suffix alone
    require(value in NAMED or not (a_kind or a_word), f"{key}={value} is no perceptual distance: {WANTED}")
