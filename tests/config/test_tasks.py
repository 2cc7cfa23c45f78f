"""A group may be one of several dataclasses, as `task` is; what does not fit is known before any process starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import ClassTask, TaskConfig, TrainConfig
from pipeline.config.check.verbs import check
from pipeline.config.loading.help import verb_help
from pipeline.config.loading.load import load
from pipeline.config.loading.merge import from_dict, to_dict
from pipeline.config.loading.stored import from_stored
from pipeline.errors import ConfigError

TRAIN = ["run=r", "data.train=c"]
PLAIN = "model.context_width=0"


def refusal(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load("train", [*TRAIN, *words])
    return str(caught.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["task=unconditional"],
            "gives the UNet no tokens to attend to, and model.context_width=128 waits for it: set",
        ),
        (["task=class", PLAIN], "gives the UNet tokens to attend to, and model.context_width=0 takes none"),
        (
            ["task=class", "task.mode=vector", PLAIN],
            "a vector beside the timestep, and model.vector_width=0 takes none",
        ),
        (
            ["task=class", "model.vector_width=8"],
            "no vector beside the timestep, and model.vector_width=8 waits for it",
        ),
        (["task=superres", PLAIN, "task.noise=9"], "a vector beside the timestep, and model.vector_width=0"),
        (["task=inpaint", PLAIN, "task.drop=0.1"], "nothing that it could do without (task.text=true drops captions)"),
        (["task=inpaint", PLAIN, "data.val=v"], "never learns that: set eval.sampler.guidance=1"),
        (["task=class", "task.drop=0", "data.val=v"], "set eval.sampler.guidance=1, or train with task.drop=0.1"),
        (["task=class", "task.depth=3"], "task.depth: task=class has no such key (task=text, layout has)"),
        (["task=class", "task.mood=vector"], "task.mood: no such key; did you mean task.mode?"),
        (["task=lay"], "no such task; there are class, classifier, inpaint"),
        (["task.name=lay"], "task.name=lay: there are text, unconditional, class, layout"),
        (["task=semantic", PLAIN, "task.labels=mean"], "task.labels=mean: there are shuffle, average"),
        (["task=superres", PLAIN, "task.noise=1000"], "task.noise=1000: a number from 0 to 999 is wanted"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line_that_says_what_to_set(words: list[str], said: str) -> None:
    line = refusal(*words)
    assert said in line
    assert "\n" not in line


@pytest.mark.parametrize("name", TaskConfig.kinds())
def test_a_task_survives_being_stored_and_read_again(name: str) -> None:
    config = load("train", [*TRAIN, f"task={name}", *([] if TaskConfig.kinds()[name]().makes_context else [PLAIN])])
    assert type(config.task) is TaskConfig.kinds()[name]
    for read in (from_dict(TrainConfig, to_dict(config)), from_stored(TrainConfig, to_dict(config))):
        assert read == config
        assert type(read.task) is type(config.task)


def test_a_stored_task_of_before_this_version_is_read() -> None:
    config = load("train", TRAIN)
    for name in ("text", "unconditional"):
        stored = to_dict(config) | {"task": {"name": name, "drop": 0.1}}
        assert (from_dict(TrainConfig, stored).task.name, from_dict(TrainConfig, stored).task.drop) == (name, 0.1)
    unconditional = to_dict(config) | {"task": {"name": "unconditional", "drop": 0.1}}
    unconditional["model"]["context_width"] = 0
    check(from_dict(TrainConfig, unconditional))


def test_the_help_lists_the_keys_of_every_task_with_the_choice_that_has_them() -> None:
    said = verb_help("train")
    for name in TaskConfig.kinds():
        assert f"  task.* (task={name}): " in said
    assert "task.mode=token  {token,vector}" in said
    assert said.count("task.drop=") == len(TaskConfig.kinds())


def test_a_task_of_ones_own_is_chosen_by_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its files, its row, and a file of one's own conf folder: nothing else."""
    from made import toy_task
    from pipeline.config.tasks.table import TASK_FACTS

    monkeypatch.setitem(TASK_FACTS, "toy", toy_task.ROW)
    (tmp_path / "conf" / "task").mkdir(parents=True)
    (tmp_path / "conf" / "task" / "toy.yaml").write_text("name: toy\ndrop: 0.2\n")
    monkeypatch.setenv("LATENTMILL_CONF", str(tmp_path / "conf"))
    config = load("train", [*TRAIN, "task=toy", PLAIN])
    assert isinstance(config.task, toy_task.ToyTask)
    assert config.task.drop == 0.2
    assert ClassTask().members == config.task.members
