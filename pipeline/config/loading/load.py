"""From a verb and its command-line overrides to a checked, frozen configuration.

Hydra composes the packaged conf directory. `from_stored` then merges the values into the dataclasses of config/. It
trusts nothing: an unknown key, a wrong type or an unknown choice is refused with one line that says so. References to
the environment are resolved there, not by Hydra, so that they can be stored and shown in place of what they become.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pipeline.config import CONFIGS
from pipeline.config.check.verbs import check
from pipeline.config.loading.folders import check_own_files, conf_dir, own_conf_dir
from pipeline.config.loading.overrides import parse, search_path, translate
from pipeline.config.loading.references import holds_reference, references_of, set_aside, value_at
from pipeline.config.loading.stored import from_stored
from pipeline.errors import ConfigError, OverrideError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

WRITTEN = {
    "the contract of the dataset": (
        *("caption_key", "filters.keep", "moments_member", "text_member", "class_member", "boxes_member"),
        *(f"encoders.{name}" for name in ("name", "vae", "vae_subfolder", "text", "text_pretrained")),
    ),
    "exports and reports": ("model.name", "autoencoder.name"),
    "wandb": ("tracking.project", "tracking.group"),
}
"""Where texts are written that must be there as they are: a reference to the environment is refused for them."""
WRITERS = {
    "the contract of the dataset": ("encode", "columns", "index", "fetch"),
    "exports and reports": ("train", "autoencoder"),
}
"""Verbs that write there; all verbs, where none are named."""

SHORT = 4
"""Shorter values are looked for in a message only where they follow = or [: a 1 stands in many places."""


def load(verb: str, overrides: Sequence[str] = ()) -> Any:
    """The checked configuration of a verb. Raises ConfigError (one line), OverrideError."""
    config: Any = from_stored(CONFIGS[verb], compose(verb, overrides), os.environ, lenient=False)
    _refuse_written_references(verb, config)
    return checked(config)


def checked(config: Any) -> Any:
    """A configuration, if nothing in it is outside of its bounds or contradicts itself. Raises ConfigError, which shows
    references in place of what they have become."""
    try:
        check(config)
    except ConfigError as error:
        raise ConfigError(_with_references(str(error), config)) from None
    return config


def compose(verb: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The tree of plain values that Hydra composes from conf/ and the overrides. References to the environment are left
    as they are."""
    from omegaconf import OmegaConf

    words = translate(verb, overrides)
    parsed = [parse(word) for word in words]
    check_own_files()
    try:
        tree = OmegaConf.to_container(_composed(verb, parsed), resolve=False)
        plain = tree
        if _holds_dollar(tree):
            plain = OmegaConf.to_container(OmegaConf.create(set_aside(tree)), resolve=True)
    except Exception as error:  # of Hydra, OmegaConf and their parsers, which have no common base
        raise OverrideError(_first_lines(error)) from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _composed(verb: str, overrides: Sequence[Override]) -> DictConfig:
    """What Hydra composes. The choices of groups are composed once in a process, and the values of keys are then set in
    a copy, as Hydra itself sets them: composing takes 15 times as long, and Hydra takes a key for a group that has the
    name of another verb's, such as `task` of demo. A user's own groups are composed anew each time."""
    from hydra.errors import ConfigCompositionException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    chosen = tuple(str(override.input_line) for override in overrides if not override.is_force_add())
    tree = _hydra(verb, (*search_path(), *chosen)) if own_conf_dir() else copy.deepcopy(_packaged(verb, chosen))
    for override in overrides:
        if not override.is_force_add():
            continue
        try:
            OmegaConf.update(tree, override.key_or_group, override.value(), merge=True, force_add=True)
        except OmegaConfBaseException as error:
            raise ConfigCompositionException(f"Error merging override {override.input_line}") from error
    return tree


def _hydra(verb: str, words: Sequence[str]) -> DictConfig:
    """What Hydra composes of words in its grammar."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
        return hydra_compose(config_name=verb, overrides=list(words))


_packaged = lru_cache(maxsize=64)(_hydra)
"""The same of packaged files alone, which stay as they are while a process runs. Not to be changed."""


def _holds_dollar(tree: Any) -> bool:
    """Whether a text of a plain tree may refer to something, which OmegaConf then has to resolve."""
    if isinstance(tree, dict):
        return any(_holds_dollar(item) for item in tree.values())
    if isinstance(tree, list):
        return any(_holds_dollar(item) for item in tree)
    return isinstance(tree, str) and "$" in tree


def _first_lines(error: Exception) -> str:
    """What an error of Hydra says, in one line."""
    if isinstance(error, RecursionError):
        return "the configuration nests too deep, or refers to itself"
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 1000 else f"{text[:1000]}..."


def _refuse_written_references(verb: str, config: Any) -> None:
    """Raise ConfigError where a value of the environment would be written somewhere as it is."""
    references = references_of(config)
    for key, written in references.items():
        if key.split(".")[0] == "cluster" and verb == "submit":
            raise ConfigError(
                f"{key}={written}: what is under cluster is written into the batch script, and values of the "
                "environment are written nowhere; write it out, or set Slurm's own variable, such as SBATCH_ACCOUNT"
            )
        for place, keys in WRITTEN.items():
            if key in keys and verb in WRITERS.get(place, CONFIGS):
                raise ConfigError(
                    f"{key}={written}: this text goes into {place}, and values of the environment are written nowhere; "
                    "write it out"
                )


def _with_references(message: str, config: Any) -> str:
    """A message about a configuration, with references in place of what they have become."""
    shown: dict[str, str] = {}
    for key, written in references_of(config).items():
        value = value_at(config, key)
        if isinstance(written, list):
            shown[str(list(value))] = f"[{','.join(map(str, written))}]"
            pairs = [pair for pair in zip(written, value) if holds_reference(pair[0])]
        else:
            pairs = [(written, value)]
        for text, item in pairs:
            is_number = isinstance(item, float | int) and not isinstance(item, bool)
            forms = [f"{item:g}", f"{item:,}", str(item)] if is_number else [str(item)]
            shown |= {form: str(text) for form in forms if form}
    patterns = []
    for form in sorted(shown, key=len, reverse=True):
        before = r"(?<=[=\[])" if len(form) < SHORT else r"(?<![\w.])" if form[0].isalnum() else ""
        patterns.append(before + re.escape(form) + (r"(?!\w)" if form[-1].isalnum() else ""))
    return re.sub("|".join(patterns), lambda match: shown[match[0]], message) if patterns else message
