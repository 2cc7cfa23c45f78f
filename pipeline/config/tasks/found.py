"""Imports what the table of tasks names."""

from __future__ import annotations

import importlib
from typing import Any

from pipeline.config.tasks.base import TaskConfig
from pipeline.config.tasks.table import TASK_FACTS, TaskFacts


def facts_of(task: TaskConfig) -> TaskFacts:
    """The row of a task."""
    return TASK_FACTS[task.name]


def found(place: str) -> Any:
    """What "module:attribute" names."""
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)
