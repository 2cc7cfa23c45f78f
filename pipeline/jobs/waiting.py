"""Waits for the jobs of a sweep, and says how each has ended."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Mapping

from pipeline.config import RunConfig
from pipeline.config.loading.load import load
from pipeline.errors import Interrupted, LatentmillError, RunError
from pipeline.jobs.members import Member
from pipeline.log import log, show
from pipeline.parsing.text import one_line
from pipeline.scheduler import slurm
from pipeline.storage.urls import open_storage

SHORTEST, LONGEST = 1.0, 15.0
"""Seconds between two questions to Slurm: a twentieth of the time waited so far, within these."""


def wait_for(verb: str, jobs: Mapping[str, Member], logs: str) -> None:
    """Wait until none of these jobs (number -> member) will run again. logs: the folder of their logs. Raises
    Interrupted where one was stopped with work left, RunError where one failed."""
    begun, left = time.monotonic(), dict(jobs)
    ended: dict[Member, tuple[int, str]] = {}
    silent = False
    while left:
        states = slurm.states(list(left))
        if len(states) < len(left) and not silent:
            log.warning("Slurm does not answer; the waiting goes on")
        silent = len(states) < len(left)
        for job, state in states.items():
            if state in ("", *slurm.ENDED):
                member = left.pop(job)
                ended[member] = outcome(verb, member, job, state, logs)
                show(f"== {member.name}: {ended[member][1]} (job {job})")
        if left:
            time.sleep(min(max((time.monotonic() - begun) / 20, SHORTEST), LONGEST))
    stopped = [member.name for member, (status, _) in ended.items() if status == Interrupted.exit_code]
    if stopped:
        raise Interrupted(f"{', '.join(stopped)}: stopped before the end; the same command goes on from what is stored")
    failed = [member.name for member, (status, _) in ended.items() if status]
    if failed:
        raise RunError(f"{len(failed)} of the sweep's jobs failed: {', '.join(failed)}")


def logs_of(job: str, folder: str) -> str:
    """The log of a job in a folder, as a shell's pattern."""
    return f"{shlex.quote(os.path.abspath(folder))}/*-{job}.log"


def outcome(verb: str, member: Member, job: str, state: str, logs: str) -> tuple[int, str]:
    """(exit status, words) of a member whose job has ended. state: Slurm's word, "" where it has forgotten the job. The
    run itself says whether it is finished, since Slurm without accounting forgets."""
    from pipeline.runs.directory import is_finished
    from pipeline.runs.lease import claim_of, newest, this_process

    slurms = f"Slurm says {state}" if state else "Slurm does not know its job any more"
    try:
        config: RunConfig = load(verb, member.words)
        run = open_storage(config.run)
        _, holder = newest(run)
        if is_finished(config, run) or (holder is not None and holder.state == "finished"):
            return 0, "finished"
        if holder is not None and holder.job != job and (claim := claim_of(holder, this_process())):
            return Interrupted.exit_code, f"not finished, and {claim}"
    except LatentmillError as error:
        return 1, f"ended, but its run cannot be read: {one_line(str(error))}"
    how, message = (holder.state, holder.message) if holder is not None else ("", "")
    if how == "failed":
        return 1, f"failed: {one_line(message)}"
    if how == "stopped":
        return Interrupted.exit_code, f"stopped with everything committed; {slurms}"
    if how == "queued" and state in ("CANCELLED", ""):
        return Interrupted.exit_code, f"never begun; {slurms}"
    if state == "CANCELLED":
        return Interrupted.exit_code, f"cancelled with work left; {slurms}"
    return 1, f"failed without a word; {slurms} ({logs_of(job, logs)} says more)"
