"""A batch script as text."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.errors import ConfigError, Interrupted

SELF = "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
"""The number of this job, for use in a script. SLURM_JOB_ID alone will not do: for the last task of an array it is the
number of the whole array, all of which would be requeued."""


@dataclass(frozen=True)
class Script:
    """One batch script.

    about: lines of comment. options: long options of sbatch and their values; an empty value leaves the option out,
    None stands for an option without a value. setup: shell lines. step: options of srun. program: the program with its
    first arguments. arguments: further arguments, each on a line of its own. requeue: whether exit status 75 (stopped
    in good order, with work left) sends the task back to the queue. killed: whether the exit status of processes that a
    signal ended (128 and more) does so too. before: shell lines between the set-up and the step.
    """

    about: Sequence[str]
    options: Mapping[str, str | None]
    setup: Sequence[str]
    step: Sequence[str]
    program: Sequence[str]
    arguments: Sequence[str]
    requeue: bool
    killed: bool = False
    before: Sequence[str] = ()

    def text(self) -> str:
        """The script's text. Raises ConfigError where a value cannot be written into it."""
        lines = ["#!/bin/bash", *(f"# {line}" for line in self.about)]
        lines += [directive(name, value) for name, value in self.options.items() if value != ""]
        lines += ["", "set -e", *self.setup, "", *self.before]
        command = [shlex.join(["srun", *self.step]), shlex.join(self.program), *map(shlex.quote, self.arguments)]
        lines += ["status=0", " \\\n    ".join(command) + " || status=$?"]
        if self.requeue:
            stopped = Interrupted.exit_code
            why = f"# {stopped}: told to stop before the time limit, with everything stored. Back to the queue."
            when = f'[ "$status" -eq {stopped} ]'
            if self.killed:
                why = f"# {stopped}: told to stop, with everything committed. 128 or more: a signal has ended a rank."
                when += ' || [ "$status" -ge 128 ]'
            lines += ["", why, f'if {when}; then scontrol requeue "{SELF}"; fi']
        return "\n".join([*lines, 'exit "$status"', ""])


def directive(name: str, value: str | None) -> str:
    """One #SBATCH line. Raises ConfigError for a value with a control character such as a line break."""
    if value is not None and re.search(r"[\x00-\x1f\x7f]", value):
        raise ConfigError(f"{value!r} holds a control character, which an sbatch option ({name}) cannot")
    return f"#SBATCH {name}" if value is None else f"#SBATCH {name}={shlex.quote(value)}"


def log_path(folder: str, name: str) -> str:
    """The value of --output for a file `name` in a folder. Percent signs of the folder are escaped, since Slurm would
    replace them; those of `name` are not."""
    return f"{os.path.abspath(folder).replace('%', '%%')}/{name}"
