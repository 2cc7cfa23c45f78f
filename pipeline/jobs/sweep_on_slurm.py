"""The members of a sweep as jobs of Slurm: each is the job that `latentmill submit` makes of the same words.

All are checked before the first is submitted. Members that are finished, trained or in the queue already are passed
over, so that the same command goes on with the others. Where cluster.concurrent bounds how many run at a time, they
share as many job names: of the jobs of one name Slurm runs one at a time (--dependency=singleton), the oldest first,
also where that one is back in the queue.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from pipeline.config import ClusterConfig
from pipeline.config.loading.load import load
from pipeline.errors import ConfigError, LatentmillError, RunFinished, RunTaken, SubmitError
from pipeline.jobs.members import Member
from pipeline.jobs.options import Job
from pipeline.jobs.secrets import require_no_secrets
from pipeline.jobs.sending import make_logs, send
from pipeline.jobs.train import train_jobs
from pipeline.jobs.waiting import logs_of, wait_for
from pipeline.log import log, show
from pipeline.scheduler import slurm
from pipeline.storage.urls import open_storage


@dataclass(frozen=True)
class Sweep:
    """What all members of a sweep have in common. root: the folder of their runs as it was typed. place: the same, with
    references to the environment resolved."""

    verb: str
    cluster: ClusterConfig
    root: str
    place: str


def run_on_slurm(sweep: Sweep, members: Sequence[Member], *, dry_run: bool, wait: bool) -> int:
    """Check all members, submit those that are left to do, and wait for them; returns 0. dry_run: their scripts are
    printed and the first is checked, and nothing is submitted.

    Raises what train_jobs raises, with the member's name, before anything is submitted; SubmitError; and what wait_for
    raises where a member does not reach its end.
    """
    cluster = sweep.cluster
    if not slurm.is_here() and not dry_run:
        raise SubmitError("sbatch is not on this machine's PATH: sweep from the cluster's login node, or --dry-run")
    heading = "# ==" if dry_run else "=="
    jobs: dict[Member, Job] = {}
    numbers: dict[Member, str] = {}  # of the jobs to wait for
    notes: Sequence[str] = ()
    for member in members:
        try:
            job = train_jobs(cluster, member.words, verb=sweep.verb)
        except (RunFinished, RunTaken) as error:
            numbers |= _passed_over(sweep, member, error, heading)
            continue
        except LatentmillError as error:
            _refuse(member, error)
        for note in job.notes if job.notes != notes else ():  # what is the same as of the member before is not repeated
            log.info(f"{member.name}: {note}")
        notes, jobs[member] = job.notes, job
    jobs = in_turn(sweep, jobs)
    texts = {member: [script.text() for script in job.scripts] for member, job in jobs.items()}
    for member in jobs:
        try:
            require_no_secrets("\n".join(texts[member]))
        except ConfigError as error:
            _refuse(member, error)
    first = next(iter(texts.values()), [])  # Slurm is asked about one: options differ in the job's name at most
    answers = [slurm.check(text, cluster.partition, cluster.time) for text in first if slurm.is_here()]
    if dry_run:
        show("\n".join(f"{heading} {member.name}\n{text}" for member in jobs for text in texts[member]))
        log.info(f"sweep: {' '.join(answers) or 'not checked by Slurm'}; {len(jobs)} of {len(members)} to be submitted")
        return 0
    try:
        numbers |= _submit(sweep, jobs, texts)
        if not numbers:
            show("nothing is left to submit")
            return 0
        _report(sweep, list(numbers.values()))
        if wait:
            wait_for(sweep.verb, {number: member for member, number in numbers.items()}, cluster.logs)
    except KeyboardInterrupt:
        log.info(
            f"the jobs stay with Slurm: latentmill status {in_shell(sweep.root)} shows their runs, and the same "
            "command waits for them again"
        )
        raise
    return 0


def in_turn(sweep: Sweep, jobs: dict[Member, Job]) -> dict[Member, Job]:
    """The jobs, of which Slurm runs cluster.concurrent at a time (0 = all): each gets one of so many names, the one
    that the fewest jobs have so far. Raises ConfigError where cluster.options sets the same, SubmitError."""
    count = sweep.cluster.concurrent
    given = {option.partition("=")[0] for option in sweep.cluster.options} & {"--job-name", "--dependency"}
    if not count or not jobs:
        return jobs
    if given:
        raise ConfigError(
            f"cluster.concurrent={count} bounds a sweep by --job-name and --dependency: leave {sorted(given)[0]} out "
            "of cluster.options"
        )
    digest = hashlib.sha256(open_storage(sweep.place).url.encode()).hexdigest()[:8]
    names = [f"latentmill-sweep-{digest}-{number}" for number in range(1, count + 1)]
    taken = Counter(slurm.in_queue(names) if slurm.is_here() else [])
    named = {}
    for member, job in jobs.items():
        name = min(names, key=lambda name: taken[name])
        taken[name] += 1
        options = {"--job-name": name, "--dependency": "singleton"}
        scripts = [replace(script, options={**script.options, **options}) for script in job.scripts]
        named[member] = replace(job, scripts=scripts)
    return named


def in_shell(folder: str) -> str:
    """A folder as it was typed, for a command line: ${oc.env:NAME} becomes the shell's own ${NAME}. FOLDER for one
    with other references."""
    parts = re.split(r"\$\{oc\.env:(\w+)\}", folder)  # text, name, text, ..., name, text
    if any("${" in text for text in parts[::2]):
        return "FOLDER"
    if len(parts) == 1:
        return shlex.quote(folder)
    parts[::2] = [re.sub(r'([\\"`$])', r"\\\1", text) for text in parts[::2]]
    parts[1::2] = [f"${{{name}}}" for name in parts[1::2]]
    return f'"{"".join(parts)}"'


def _passed_over(sweep: Sweep, member: Member, error: LatentmillError, heading: str = "==") -> dict[Member, str]:
    """Say why a member is not submitted. Returns the job of Slurm that trains it, or will; {} for none."""
    from pipeline.runs.lease import ONCE, job_state, newest

    if isinstance(error, RunFinished):
        show(f"{heading} {member.name}: finished")
        return {}
    show(f"{heading} {member.name}: {str(error).removesuffix(f'; {ONCE}')}")
    _, holder = newest(open_storage(load(sweep.verb, member.words).run))
    return {member: holder.job} if holder is not None and holder.job and job_state(holder) else {}


def _submit(sweep: Sweep, jobs: dict[Member, Job], texts: dict[Member, list[str]]) -> dict[Member, str]:
    """Submit jobs; returns their numbers. Raises SubmitError with the member that Slurm refused."""
    if jobs:
        make_logs(sweep.cluster.logs)
    numbers: dict[Member, str] = {}
    for member, job in jobs.items():
        own: list[str] = []
        try:
            send(job, texts[member], own)
        except RunTaken as error:  # since it was checked
            numbers |= _passed_over(sweep, member, error)
            continue
        except LatentmillError as error:
            raise SubmitError(
                f"{member.name}: {error} ({len(numbers)} jobs of the sweep are in the queue; the same command goes on "
                "with the others)"
            ) from error
        numbers[member] = own[0]
        show(f"== {member.name}: job {own[0]}")
    return numbers


def _report(sweep: Sweep, numbers: Sequence[str]) -> None:
    """Print what to expect of the jobs, and how to follow them."""
    show(
        f"\nfollow:    squeue --jobs={','.join(numbers)}; latentmill status {in_shell(sweep.root)}\n"
        f"logs:      {logs_of('JOB', sweep.cluster.logs)}\n"
        f"stop:      scancel {' '.join(numbers)}; the same command then continues from what is stored\n"
    )


def _refuse(member: Member, error: LatentmillError) -> NoReturn:
    raise type(error)(f"{member.name}: {error} (nothing of the sweep was submitted)") from error
