"""Processes that we start import nothing from where the user stands, show nobody their configuration, and do not
outlive who started them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.config import ClusterConfig
from pipeline.config.loading.load import load
from pipeline.distributed import children, ranks
from pipeline.distributed.children import handed_over, own_command, own_environment, verb_command
from pipeline.distributed.place import take_local_rank
from pipeline.errors import OverrideError
from pipeline.jobs.encode import encode_jobs
from pipeline.jobs.eval import eval_jobs
from pipeline.jobs.members import job_folder

HOSTILE = "raise SystemExit('the user\\'s own file was run')\n"


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the user stands, with files that are named like what we import."""
    where = tmp_path / "stands here"
    for package in ("pipeline", "preprocess", "multiprocessing", "hydra"):
        (where / package).mkdir(parents=True)
        (where / package / "__init__.py").write_text(HOSTILE)
    for module in ("torch", "json", "numpy", "yaml", "random", "PIL"):
        (where / f"{module}.py").write_text(HOSTILE)
    monkeypatch.chdir(where)
    return where


def test_a_rank_and_a_command_are_ours_wherever_the_user_stands(
    hostile: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = load("synth", [f"dest={tmp_path / 'a'}", "images=3", "shard_size=3"])
    assert ranks.run_ranks("synth", config, processes=1, threads=1) == 0
    assert ranks.run_command(*verb_command("synth", [f"dest={tmp_path / 'b'}", "images=3", "shard_size=3"])) == 0
    assert (tmp_path / "a/00000.tar").exists() and (tmp_path / "b/00000.tar").exists()
    assert "own file" not in capfd.readouterr().err


def test_decoding_workers_are_ours_wherever_the_user_stands(hostile: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from preprocess.source.decoders import Decoders
    from preprocess.source.recipe import recipe_of

    config = load("encode", ["source=a.tar", "dest=b", "encoders=demo"])
    recipe = recipe_of(config)
    with Decoders(recipe, config.encoders, 1, processes=True) as decoders:
        assert decoders.submit([]).result(60)[0] == []
    assert "own file" not in capfd.readouterr().err


def test_the_server_that_verbs_are_forked_from_is_ours_wherever_the_user_stands(hostile: Path, tmp_path: Path) -> None:
    """In a process of its own, as a process has one such server."""
    script = (
        "import multiprocessing as m, sys\nfrom pipeline import cli\nfrom pipeline.distributed import forks\n"
        "preload = m.set_forkserver_preload\nm.set_forkserver_preload = lambda _: preload(['json', 'yaml'])\n"
        "if __name__ == '__main__':\n    forks.begin()\n    sys.exit(forks.run_verb(cli.main, 'status', ['x']))\n"
    )
    (tmp_path / "job.py").write_text(script)  # its folder is searched, as the console script's is
    done = subprocess.run([sys.executable, tmp_path / "job.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "latentmill status: no run at x" in done.stderr
    assert "own file" not in done.stderr


def test_batch_scripts_start_what_they_start_with_p(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = ClusterConfig(python="/opt/py thon/bin/python", gpus=0)
    scripts = encode_jobs(cluster, ["source=a.tar", "dest=b"]).scripts
    scripts = [*scripts, *eval_jobs(cluster, ["run=r"], coming=["r"]).scripts]
    assert len(scripts) == 3
    for script in scripts:
        assert "'/opt/py thon/bin/python' -P -m pipeline.cli " in script.text()


def test_no_source_starts_a_module_without_p() -> None:
    """Whoever adds a child finds own_command. under.py looks for launchers beside the interpreter, and starts no module
    of ours."""
    root = Path(children.__file__).parents[2]
    paths = [path for package in ("pipeline", "preprocess", "slurm") for path in (root / package).rglob("*.*")]
    texts = {path: path.read_text() for path in paths if path.suffix in (".py", ".sbatch")}
    assert sorted(path.name for path, text in texts.items() if "sys.executable" in text) == ["children.py", "under.py"]
    assert [
        path.name for path, text in texts.items() if 'python" -m' in text or "python -m pipeline.jobs" in text
    ] == []


def test_a_checkout_that_is_not_installed_is_found_by_children_too(monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(children.ROOT)
    monkeypatch.setattr(sys, "path", [root, "/usr/lib/python3"])
    assert own_environment({"PYTHONPATH": "/mine"})["PYTHONPATH"] == f"{root}{os.pathsep}/mine"
    monkeypatch.setattr(sys, "path", ["/venv/bin", root])
    assert own_environment({}) == {}
    monkeypatch.setattr(sys, "path", ["/home/me/project", "/venv/lib"])
    assert own_environment({"A": "b"}) == {"A": "b"}


def test_what_is_handed_over_is_read_whole_by_every_child() -> None:
    data = json.dumps({"text": "é" * 300_000}).encode()
    read = "import hashlib, sys; from pipeline.distributed.children import take_over;"
    read += "print(hashlib.sha256(take_over()).hexdigest(), sys.stdin.read() == '')"
    with handed_over(data) as descriptor:
        jobs = [
            subprocess.Popen([sys.executable, "-P", "-c", read], stdin=descriptor, stdout=subprocess.PIPE)
            for _ in range(2)
        ]
    said = {job.communicate()[0] for job in jobs}
    assert len(said) == 1
    assert said.pop().split()[1] == b"True"


def test_the_configuration_of_ranks_is_not_in_the_list_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[list[str], dict[str, str]]] = []
    popen = subprocess.Popen

    def remember(command: list[str], **options: object) -> subprocess.Popen[bytes]:
        started.append((command, options["env"]))  # type: ignore[arg-type]
        return popen(command, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(ranks.subprocess, "Popen", remember)
    config = load("synth", [f"dest={tmp_path / 'SENTINEL'}", "images=3", "shard_size=3"])
    assert ranks.run_ranks("synth", config, processes=2, threads=1) == 0
    ranks.run_command(*verb_command("status", ["SENTINEL"]))
    assert len(started) == 3
    for command, environment in started:
        assert "SENTINEL" not in " ".join([*command, *environment.values()])
        assert command[1:3] == ["-P", "-m"]


@pytest.mark.parametrize(
    "given", [b"", b"{", b"[]", b'{"verb": "synth"}', b'{"verb": "x", "launcher": 1, "config": {}}']
)
def test_a_rank_that_nobody_has_started_ends_in_a_line(given: bytes) -> None:
    done = subprocess.run(
        own_command("pipeline.distributed.rank", "synth"), input=given, capture_output=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1
    assert b"is started by launch.processes" in done.stderr


def test_words_are_handed_over_by_us_alone(capfd: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run(
        own_command("pipeline.cli", "synth", "--handed-over"), input=b"no", capture_output=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1


def test_a_rank_whose_launcher_died_before_it_began_ends(tmp_path: Path) -> None:
    """The signal of the launcher's death cannot reach it any more."""
    order = json.dumps({"verb": "synth", "launcher": 1 << 21, "config": {"dest": str(tmp_path / "a")}}).encode()
    done = subprocess.run(
        own_command("pipeline.distributed.rank", "synth"), input=order, capture_output=True, check=False
    )
    assert done.returncode == 1
    assert b"the launcher of this rank has ended" in done.stderr
    assert not (tmp_path / "a").exists()


def test_ranks_end_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    """By SIGKILL, as early as both ranks can be seen."""
    words = f"['dest={tmp_path}/out', 'images=100000', 'shard_size=8']"
    code = "from pipeline.config.loading.load import load; from pipeline.distributed.ranks import run_ranks;"
    code += f"run_ranks('synth', load('synth', {words}), 2, 1)"
    with subprocess.Popen([sys.executable, "-c", code], start_new_session=True) as launcher:
        found: list[int] = []
        deadline = time.monotonic() + 60
        while len(found) < 2 and time.monotonic() < deadline:
            found = children_of(launcher.pid)
            time.sleep(0.01)
        launcher.kill()
    assert len(found) == 2
    deadline = time.monotonic() + 20
    while any(map(alive, found)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children_of(parent: int) -> list[int]:
    """The processes that one has started, as of now."""
    text = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    return [int(pid) for pid in text.split() if b"distributed.rank" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_second_ctrl_c_is_not_called_out_of_memory(tmp_path: Path) -> None:
    """Nor does it send a job back to the queue: somebody sits there who wants it to end."""
    (tmp_path / "ranked.py").write_text(
        "import os, signal, sys, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "open(f'{sys.argv[1]}/ready{os.environ[\"RANK\"]}', 'w').close()\ntime.sleep(120)\n"
    )
    code = "import sys; from pipeline.distributed.ranks import run_local;"
    code += f"sys.exit(run_local('ranked', [{str(tmp_path)!r}], 2))"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}"}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True) as launcher:
        deadline = time.monotonic() + 60
        while not all((tmp_path / f"ready{rank}").exists() for rank in range(2)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        launcher.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert launcher.poll() is None
        launcher.send_signal(signal.SIGINT)
        _, said = launcher.communicate(timeout=30)
    assert launcher.returncode == 130
    assert "a second Ctrl-C has killed the ranks" in said
    assert "memory" not in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ["--local_rank=1", "run=r"],
        ["--local-rank=1", "run=r"],
        ["run=r", "--local_rank", "1"],
        ["--local-rank", "1", "run=r"],
    ],
)
def test_the_rank_that_launchers_add_to_the_command_line_is_taken(words: list[str]) -> None:
    for environ in ({}, {"LOCAL_RANK": "1"}):
        assert take_local_rank(words, environ) == ["run=r"]
        assert environ["LOCAL_RANK"] == "1"
    for environ, wrong in (({"LOCAL_RANK": "0"}, words), ({}, ["--local_rank=x"]), ({}, ["--local_rank"])):
        with pytest.raises(OverrideError, match=r"^--local.rank"):
            take_local_rank(wrong, environ)


def test_every_verb_that_ranks_run_takes_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline import cli

    monkeypatch.setenv("LOCAL_RANK", "0")
    for words in (["train", "--local_rank=0"], ["encode", "--local-rank=0"], ["eval", "--local-rank", "0"]):
        assert cli.main(words) == 1
        assert "is missing" in capsys.readouterr().err


def test_a_jobs_folder_is_named_by_its_values_and_cut_where_file_systems_would_refuse_it(tmp_path: Path) -> None:
    assert job_folder("optim.lr=1e-4,model=tiny") == "optim.lr=1e-4,model=tiny"
    long = ",".join(f"optim.key_number_{number}={number}" for number in range(30))
    names = {job_folder(long), job_folder(long + "1"), job_folder(long)}
    assert len(names) == 2
    assert all(len(name) <= 200 for name in names)
    (tmp_path / names.pop() / ".staging.tmp").mkdir(parents=True)
    assert len(job_folder("prompt=" + "日本語" * 200).encode()) <= 200
    assert job_folder("data.train=" + "/x" * 200) == "data.train=" + "/x" * 200
