"""From a verb and its command-line overrides to a checked, frozen configuration.

Hydra composes the packaged conf directory. `from_dict` then merges the values into the dataclasses of config/. It
trusts nothing: an unknown key, a wrong type or an unknown choice is refused with one line that says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.config import CONFIGS
from pipeline.config.check.verbs import check
from pipeline.config.loading.folders import conf_dir
from pipeline.config.loading.merge import from_dict
from pipeline.config.loading.overrides import _check_grammar, search_path, translate
from pipeline.errors import OverrideError


def load(verb: str, overrides: Sequence[str] = ()) -> Any:
    """The checked configuration of a verb. Raises ConfigError (one line), OverrideError."""
    config: Any = from_dict(CONFIGS[verb], compose(verb, overrides))
    check(config)
    return config


def compose(verb: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The tree of plain values that Hydra composes from conf/ and the overrides."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    words = translate(verb, overrides)
    for word in words:
        _check_grammar(word)
    try:
        with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
            tree = hydra_compose(config_name=verb, overrides=[*search_path(), *words])
        plain = OmegaConf.to_container(tree, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise OverrideError(" ".join(str(error).split())) from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}
