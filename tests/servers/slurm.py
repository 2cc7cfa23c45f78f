"""A real Slurm on this machine: munge, slurmctld and a few slurmd in one folder, over loopback.

Every daemon runs in its own PID namespace, which lasts as long as this process holds its end of a pipe open: when this
process ends in whatever way, the daemon, its job steps and their children are killed. Each node also has its own host
name, and closing its pipe is a crash of the whole machine. Needs Debian's slurm-wlm and munge (the build that allows
several slurmd on a host), and root or sudo without a password.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from servers.swift import free_ports

START_SECONDS = 60.0  # takes a second on an idle machine
COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare")
SYSTEM_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"  # users may lack the daemons' folders in PATH

SLURM_CONF = """
ClusterName=latentmill
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=5
InactiveLimit=0
MinJobAge=3600
KillWait=5
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
"""
"""cred_expire: a requeued job waits until its former credential expires, two minutes by default."""

NODE = "NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=16000 Gres=gpu:2"
"""This machine need not have these counts: config_overrides makes Slurm believe them."""
PARTITIONS = (
    "PartitionName=main Nodes=ALL Default=YES MaxTime=1-00:00:00 State=UP GraceTime=60",
    "PartitionName=urgent Nodes=ALL MaxTime=1-00:00:00 State=UP PriorityTier=10",
)
"""Jobs of the second partition preempt those of the first, which have a minute to commit."""
GPUS = "Name=gpu File=/dev/null,/dev/zero"  # two devices that always exist, as Slurm refuses a mere count

HOLD = '"$@" & cat >/dev/null; exit'
AS_NODE = f'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 || exit; {HOLD}'
"""Run a daemon beside a `cat` of the pipe. The shell is the first process of the namespace: it reaps orphans of job
steps, and when it ends the kernel kills all others."""


class Slurm:
    """`with Slurm(folder) as cluster:` runs it; `cluster.environment` is what sbatch needs to reach it."""

    def __init__(self, folder: Path, nodes: int = 2) -> None:
        self.folder = folder
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
        self._pipes: dict[str, subprocess.Popen[bytes]] = {}
        self._ports = dict(zip(("slurmctld", *self.nodes), free_ports(1 + nodes)))

    @staticmethod
    def missing() -> str:
        """What this machine lacks to run Slurm and how to get it, or ""."""
        missing_commands = [name for name in COMMANDS if not shutil.which(name, path=SYSTEM_PATH)]
        if missing_commands:
            packages = "slurm-wlm munge (python3 scripts/install.py --test)"
            return f"no {', '.join(missing_commands)} here: apt-get install {packages}"
        sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
        trial = [*sudo, "unshare", "--pid", "--fork", "--mount", "--uts", "--mount-proc", "true"]
        if not shutil.which(trial[0]) or subprocess.run(trial, capture_output=True, check=False).returncode:
            return f"`{' '.join(trial)}` fails here: root or sudo without a password is needed (Docker: --privileged)"
        return ""

    def __enter__(self) -> Slurm:
        try:
            self._write_conf()
            self._start("munged", ["munged", "--foreground", "--force", *self._munge_options()])
            self._wait("munged", (self.folder / "munge.socket").exists)
            self._start("slurmctld", ["slurmctld", "-D", "-f", f"{self.folder}/slurm.conf"])
            for node in self.nodes:
                self.boot(node)
            self._wait("nodes", lambda: self.states() == dict.fromkeys(self.nodes, "idle"))
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def boot(self, node: str) -> None:
        """Start a node."""
        self._start(node, ["slurmd", "-D", "-f", f"{self.folder}/slurm.conf", "-N", node], node)

    def crash(self, node: str) -> None:
        """Kill a node with everything that runs on it."""
        self._end(node)

    def on(self, node: str, *command: str) -> None:
        """Run a command as root in the mount namespace of a node."""
        # By its configuration, for another session's Slurm may have a node of this name.
        daemon = b"".join(
            word.encode() + b"\0" for word in ("slurmd", "-D", "-f", f"{self.folder}/slurm.conf", "-N", node)
        )
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                if path.read_bytes() == daemon:
                    enter = ["nsenter", f"--mount=/proc/{path.parent.name}/ns/mnt"]
                    subprocess.run([*self._sudo, *enter, *command], check=True)
                    return
        raise RuntimeError(f"{node} is not up")

    def stop(self) -> None:
        """End every daemon and all processes of jobs."""
        for name in reversed(list(self._pipes)):
            self._end(name)

    def states(self) -> dict[str, str]:
        """State of each node according to slurmctld; empty while it does not answer."""
        words = self.ask("sinfo", "--noheader", "--Node", "--format=%N %T").split()
        return dict(zip(words[::2], words[1::2]))

    def wait(self, *jobs: str, seconds: float = 120.0) -> None:
        """Wait until none of these jobs is in the queue. Raises TimeoutError with the queue."""
        deadline = time.monotonic() + seconds
        while queue := self.ask("squeue", "--noheader", "--array", f"--jobs={','.join(jobs)}"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"still in the queue after {seconds:.0f} s: {queue}")
            time.sleep(0.1)

    def jobs(self) -> list[str]:
        """Numbers of all present and past jobs."""
        return self.ask("squeue", "--noheader", "--states=all", "--format=%A").split()

    def ends(self, job: str) -> list[tuple[str, str]]:
        """(state, exit code) of a job, or of each task of an array in order."""
        tasks = []
        for line in self.ask("scontrol", "--oneliner", "show", "job", job).splitlines():
            facts = dict(word.split("=", 1) for word in line.split() if "=" in word)
            tasks.append((int(facts.get("ArrayTaskId", 0)), facts["JobState"], facts["ExitCode"].split(":")[0]))
        return [(state, code) for _, state, code in sorted(tasks)]

    def ask(self, *command: str) -> str:
        """The output of a client command of Slurm, or "" when it fails."""
        environment = os.environ | self.environment
        done = subprocess.run(["timeout", "20", *command], capture_output=True, text=True, check=False, env=environment)
        return done.stdout.strip() if done.returncode == 0 else ""

    def _munge_options(self) -> list[str]:
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "seed-file": "munge.seed"}
        return [f"--{option}={self.folder}/{name}" for option, name in files.items()]

    def _write_conf(self) -> None:
        """Write slurm.conf, the fake GPUs, a munge key for this cluster and the nodes' /etc/hosts."""
        host = socket.gethostname().partition(".")[0]
        text = SLURM_CONF.format(host=host, port=self._ports["slurmctld"], folder=self.folder)
        lines = [NODE.format(name=node, port=self._ports[node]) for node in self.nodes]
        (self.folder / "slurm.conf").write_text("\n".join([text, *lines, *PARTITIONS, ""]))
        (self.folder / "gres.conf").write_text(GPUS + "\n")
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost {host} {' '.join(self.nodes)}\n")
        (self.folder / "munge.key").touch(mode=0o600)
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        if self._sudo:  # munged refuses a key that another user owns
            subprocess.run([*self._sudo, "chown", "root", str(self.folder / "munge.key")], check=True)

    def _start(self, name: str, daemon: list[str], node: str = "") -> None:
        """Run a daemon in its own namespaces as long as this process holds its end of the pipe open."""
        options = ["--mount", "--propagation", "private", "--uts"] if node else ["--mount"]
        namespaces = ["unshare", "--pid", "--fork", "--kill-child=KILL", *options, "--mount-proc"]
        script = ["sh", "-c", AS_NODE, "sh", f"{self.folder}/hosts", node] if node else ["sh", "-c", HOLD, "sh"]
        environment = ["env", f"PATH={SYSTEM_PATH}"]
        with (self.folder / f"{name}.out").open("ab") as log:
            self._pipes[name] = subprocess.Popen(
                [*self._sudo, *environment, *namespaces, *script, *daemon],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches pytest alone, which ends the daemons in order
            )

    def _end(self, name: str) -> None:
        process = self._pipes.pop(name)
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=30)

    def _wait(self, what: str, ready: Callable[[], bool]) -> None:
        """Wait until a part is ready. Raises RuntimeError with the ends of all logs."""
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            if time.monotonic() > deadline:
                paths = [*self.folder.glob("*.log"), *self.folder.glob("*.out")]
                logs = {path.name: path.read_text(errors="replace")[-1500:] for path in paths}
                raise RuntimeError(f"Slurm's {what} did not come up within {START_SECONDS:.0f} s: {logs}")
            time.sleep(0.05)
