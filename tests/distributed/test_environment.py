"""What launchers and Slurm leave in an environment is a place, or is refused in a line before anything waits."""

from __future__ import annotations

import pytest

from pipeline import cli
from pipeline.distributed.meeting import Meeting, meeting_of
from pipeline.distributed.place import adopt_step, in_world, launcher_place, require_place, worker_place
from pipeline.errors import ConfigError

RANKS = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
MEET = RANKS | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577"}
STEP = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"}
STEP |= {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_JOB_ID": "7"}
ARRAY = {
    f"SLURM_ARRAY_TASK_{name}": value for name, value in (("ID", "3"), ("MIN", "0"), ("COUNT", "4"), ("STEP", "1"))
}


def but(environ: dict[str, str], *missing: str, **changed: str) -> dict[str, str]:
    return {name: value for name, value in (environ | changed).items() if name not in missing}


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"RANK": "0"}, "RANK=0 is set, and WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set, and RANK is not set"),
        (but(RANKS, RANK=""), "RANK is empty"),
        (but(RANKS, RANK="  "), "RANK is empty"),
        (but(RANKS, WORLD_SIZE="two"), "WORLD_SIZE=two in the environment: a whole number from 1"),
        (but(RANKS, WORLD_SIZE="0"), "WORLD_SIZE=0 "),
        (but(RANKS, WORLD_SIZE="1e3"), "WORLD_SIZE=1e3 "),
        (but(RANKS, WORLD_SIZE="9" * 400), "WORLD_SIZE=99999"),
        (but(RANKS, WORLD_SIZE="\u0662"), "WORLD_SIZE=\u0662 "),  # a digit, and no number of ours
        (but(RANKS, RANK="2"), "RANK=2 and WORLD_SIZE=2: ranks are 0 to 1"),
        (but(RANKS, RANK="-1"), "RANK=-1 "),
        (but(RANKS, RANK="+1"), "RANK=+1 "),
        (but(RANKS, LOCAL_RANK="x"), "LOCAL_RANK=x "),
        (but(RANKS, LOCAL_RANK="-1"), "LOCAL_RANK=-1 "),
        (but(RANKS, LOCAL_RANK="2"), "LOCAL_RANK=2 "),
        (but(RANKS, LOCAL_WORLD_SIZE="0"), "LOCAL_WORLD_SIZE=0 "),
        (but(RANKS, LOCAL_WORLD_SIZE="3"), "LOCAL_WORLD_SIZE=3 "),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK is not set: RANK=3 lies beyond"),
        (STEP | but(RANKS, WORLD_SIZE="1"), "WORLD_SIZE=1"),  # left over in the shell that called srun
        (STEP | {"WORLD_SIZE": "4"}, "WORLD_SIZE=4, but for srun this process has WORLD_SIZE 2"),
        ({"SLURM_STEP_ID": "0"}, "SLURM_NTASKS is not set, and SLURM_STEP_ID is set"),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}, "SLURM_NTASKS is not set"),
        (but(STEP, "SLURM_STEP_TASKS_PER_NODE"), "SLURM_STEP_TASKS_PER_NODE is not set"),
        (but(STEP, "SLURM_PROCID"), "SLURM_PROCID is not set"),
        (but(STEP, SLURM_LOCALID=""), "SLURM_LOCALID is empty"),
        (but(STEP, "SLURM_NODEID", SLURM_STEP_TASKS_PER_NODE="1(x2)"), "SLURM_NODEID is not set"),
        (but(STEP, SLURM_STEP_ID="first"), "SLURM_STEP_ID=first "),
        (but(STEP, SLURM_PROCID="2"), "SLURM_PROCID=2 "),
        (but(STEP, SLURM_NTASKS="0"), "SLURM_NTASKS=0 "),
        (but(STEP, SLURM_NTASKS="3"), "SLURM_NTASKS=3, but SLURM_STEP_TASKS_PER_NODE=2 are 2 tasks"),
        (but(STEP, SLURM_NODEID="1"), "SLURM_NODEID=1 "),
        (but(STEP, SLURM_STEP_TASKS_PER_NODE="many"), "SLURM_STEP_TASKS_PER_NODE=many"),
        (but(STEP, SLURM_STEP_TASKS_PER_NODE="2(x999999999)"), "SLURM_STEP_TASKS_PER_NODE=2(x999999999)"),
        (but(STEP, SLURM_STEP_TASKS_PER_NODE="2,"), "SLURM_STEP_TASKS_PER_NODE=2,"),
        (but(ARRAY, "SLURM_ARRAY_TASK_MIN"), "SLURM_ARRAY_TASK_MIN is not set"),
        ({"SLURM_ARRAY_TASK_ID": "3"}, "SLURM_ARRAY_TASK_MIN is not set, and SLURM_ARRAY_TASK_ID is set"),
        (but(ARRAY, "SLURM_ARRAY_TASK_ID"), "SLURM_ARRAY_TASK_ID is not set"),
        (but(ARRAY, SLURM_ARRAY_TASK_COUNT="0"), "SLURM_ARRAY_TASK_COUNT=0 "),
        (but(ARRAY, SLURM_ARRAY_TASK_STEP="0"), "SLURM_ARRAY_TASK_STEP=0 "),
        (but(ARRAY, SLURM_ARRAY_TASK_STEP="a"), "SLURM_ARRAY_TASK_STEP=a "),
        (but(ARRAY, SLURM_ARRAY_TASK_MIN="4"), "SLURM_ARRAY_TASK_MIN=4 "),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE=4: MPI has started 4 processes, and RANK and WORLD_SIZE"),
        ({"PMI_SIZE": "2"}, "PMI_SIZE=2: MPI has started 2"),
        ({"MV2_COMM_WORLD_SIZE": "2"}, "MV2_COMM_WORLD_SIZE=2: MPI has started 2"),
    ],
)
def test_a_place_that_is_half_set_or_none_is_refused_in_a_line(environ: dict[str, str], words: str) -> None:
    for look in (worker_place, lambda environ: require_place(1, environ)):
        with pytest.raises(ConfigError) as refused:
            look(environ)
        assert words in str(refused.value)
        assert "unset " in str(refused.value) or "lies beyond" in str(refused.value)
        assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        (but(MEET, "MASTER_ADDR"), "MASTER_ADDR is not set"),
        (but(MEET, MASTER_ADDR=" "), "MASTER_ADDR is not set"),
        (but(MEET, MASTER_ADDR="http://n1/"), "MASTER_ADDR=http://n1/ is no host name"),
        (but(MEET, MASTER_ADDR="a b"), "MASTER_ADDR=a b is no host name"),
        (but(MEET, MASTER_ADDR="x" * 300), "is no host name"),
        (but(MEET, "MASTER_PORT"), "MASTER_PORT is not set"),
        (but(MEET, MASTER_PORT="http"), "MASTER_PORT=http "),
        (but(MEET, MASTER_PORT="0"), "MASTER_PORT=0 "),
        (but(MEET, MASTER_PORT="65536"), "MASTER_PORT=65536 "),
        (but(STEP, "SLURM_STEP_NODELIST"), "MASTER_ADDR is not set"),
        (but(STEP, SLURM_JOB_ID="j7"), "SLURM_JOB_ID=j7 "),
        (but(STEP, SLURM_RESTART_COUNT="-1"), "SLURM_RESTART_COUNT=-1 "),
    ],
)
def test_a_place_to_meet_that_is_none_is_refused_in_a_line(environ: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        meeting_of(environ)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("environ", "processes", "words"),
    [
        (but(MEET, WORLD_SIZE="1", LOCAL_WORLD_SIZE="1"), 2, "launch.processes=2, but RANK and WORLD_SIZE"),
        (but(MEET, WORLD_SIZE="4", LOCAL_WORLD_SIZE="4"), 2, "rank 0 of 4"),
        (STEP, 4, "launch.processes=4, but SLURM_PROCID and SLURM_NTASKS"),
    ],
)
def test_a_launcher_that_contradicts_launch_processes_is_refused(
    environ: dict[str, str], processes: int, words: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        require_place(processes, environ)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("environ", "processes"),
    [
        ({}, 4),
        ({"RANK": "", "WORLD_SIZE": ""}, 4),
        (MEET, 1),
        (MEET, 2),  # what our own launcher sets
        ({"MASTER_ADDR": "n1", "MASTER_PORT": "29500"}, 2),  # exported, and nobody's rank
        (STEP, 1),
        (STEP, 2),
        (STEP | {"WORLD_SIZE": "2"}, 1),  # as a batch script exports it
        (STEP | ARRAY, 1),
        ({"SLURM_STEP_ID": str(0xFFFFFFFB), "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, 2),  # a batch script
        (RANKS | {"SLURM_STEP_ID": "0"}, 2),  # a container that passes a few of Slurm's variables on
        (RANKS | {"OMPI_COMM_WORLD_SIZE": "2"}, 2),
        (STEP | {"PMI_SIZE": "2"}, 1),
        ({"PMI_SIZE": "1"}, 4),
    ],
)
def test_a_whole_place_and_none_at_all_are_taken(environ: dict[str, str], processes: int) -> None:
    require_place(processes, environ)


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "SLURM_RESTART_COUNT"])
def test_numbers_of_the_job_are_numbers(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}=x in the environment: a whole number"):
        require_place(1, {name: "x"})


def test_variables_that_mean_nothing_alone_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    require_place(1, {"LOCAL_RANK": "3", "SLURM_STEP_NUM_TASKS": "2"})
    told = capsys.readouterr().err
    assert "LOCAL_RANK=3 is passed over" in told
    assert "SLURM_STEP_NUM_TASKS is passed over" in told


def test_the_one_process_that_accelerate_starts_for_several_on_cpus_is_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The environment that accelerate itself makes for `accelerate launch --cpu --num_processes N`."""
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    for processes in (1, 2):
        words = ["--cpu", f"--num_processes={processes}", "--num_machines=1", "--mixed_precision=no"]
        given = launch_command_parser().parse_args([*words, "--dynamo_backend=no", "-m", "pipeline.train"])
        given.use_cpu, given.num_cpu_threads_per_process = given.cpu, 1
        _, environ = prepare_simple_launcher_cmd_env(given)
        require_place(1, environ)
        told = capsys.readouterr().err
        assert ("accelerate launch --cpu has started one process" in told) == (processes == 2)


def test_a_step_whose_batch_script_exported_the_size_becomes_ranks() -> None:
    environ = STEP | {"WORLD_SIZE": "2"}
    adopt_step(environ)
    place = launcher_place(environ)
    assert place is not None
    assert (place.rank, place.world, place.local_rank) == (1, 2, 1)
    meeting = meeting_of(environ)
    assert (meeting.host, meeting.name) == ("n1", "7.0.0")
    assert len(set(meeting.ports)) == 8


def test_deepspeeds_launcher_says_how_many_ranks_a_node_has() -> None:
    place = launcher_place({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"})
    assert place is not None
    assert place.local_world == 4


def test_torchruns_agent_keeps_the_store_and_each_restart_is_a_meeting_of_its_own() -> None:
    torchrun = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "2"}
    assert meeting_of(MEET | torchrun) == Meeting("127.0.0.1", (29577,), "x.2", shared_store=True)


@pytest.mark.parametrize("value", ["two", "", "-3", "9" * 5000, "\x1b[31m"])
@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_no_verb_stumbles_over_the_variables_of_ranks(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each error's line, and each of the log, names the rank."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(name, value)
    assert cli.main(["status", "nothing"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "\x1b" not in said


def test_a_left_over_place_ends_training_and_encoding_before_they_look_at_anything(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    for words in (["train", "data.train=c", "run=r"], ["encode", "source=a.tar", "dest=b"]):
        assert cli.main(words) == 1
        assert "WORLD_SIZE=two in the environment" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["train", "data.train=c", "run=r"]) == 1
    assert "RANK is not set" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="RANK is not set"):
        in_world()
