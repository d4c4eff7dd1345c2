# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A SLURM cluster of two nodes on this host, which a test has for itself.

munged, slurmctld and two slurmd run with a key, a configuration and folders of their own. Nothing of /etc is read or
changed. There is no accounting database, so `sacct` and `sacctmgr` answer with an error.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.orthanc import free_port

NODES = ("node1", "node2")
#: What a daemon may take to start or to stop, seconds. On two busy cores, start and stop take four seconds together.
PATIENCE = 25

# config_overrides: a node has what stands here, whatever the host has. linuxproc: needs no cgroups.
# MinJobAge: squeue shows ended jobs for so many seconds, and `SlurmCluster.jobs` with it.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}({address})
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
MailProg=/bin/true
{bound}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=sched_min_interval=0
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=3600
KillWait=2
GresTypes=gpu
NodeName=node1 NodeHostname={host} NodeAddr={address} Port={ports[1]} CPUs=1 RealMemory=4000 Gres=gpu:1
NodeName=node2 NodeHostname={host} NodeAddr={address} Port={ports[2]} CPUs=1 RealMemory=4000 Gres=gpu:1
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Job:
    """A job as `squeue` shows it: its state is a word such as PENDING, its node is empty before it starts."""

    number: int
    state: str
    node: str
    name: str
    comment: str


@dataclass(frozen=True)
class SlurmCluster:
    """A running cluster.

    Args:
        folder: configuration, state and logs of the daemons.
        environment: the environment, whole, in which a client (`sbatch`, `snakemake`) finds this cluster.
    """

    folder: Path
    environment: dict[str, str]

    def run(self, words: Sequence[object], *, timeout: float = 60) -> str:
        """Run a client to its end and return what it printed.

        Raises:
            AssertionError: it fails; the text has its messages.
            subprocess.TimeoutExpired: it takes longer than ``timeout`` seconds.
        """
        ended = subprocess.run(
            list(map(str, words)), env=self.environment, capture_output=True, text=True, timeout=timeout
        )
        assert ended.returncode == 0, f"{words}: {ended.stdout}{ended.stderr}"
        return ended.stdout

    def drain(self, node: str) -> None:
        """Give a node no further job. The one that runs there goes on."""
        self.run(["scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test"])

    def resume(self, node: str) -> None:
        """Give a drained node jobs again."""
        self.run(["scontrol", "update", f"NodeName={node}", "State=RESUME"])

    def states(self) -> dict[str, str]:
        """Return the state of each node: a word such as idle, allocated, draining or drained."""
        return dict(line.split() for line in self.run(["sinfo", "-N", "-h", "-o", "%N %T"]).splitlines())

    def jobs(self) -> list[Job]:
        """Return all jobs since the start, ended ones too, in the order of their numbers."""
        shown = self.run(["squeue", "-h", "--states=all", "-o", "%A|%T|%N|%j|%k"]).splitlines()
        jobs = [line.split("|", maxsplit=4) for line in shown]
        return sorted((Job(int(number), *rest) for number, *rest in jobs), key=lambda job: job.number)


@contextmanager
def slurm_cluster() -> Iterator[SlurmCluster]:
    """Start a cluster of two idle nodes, each with one core, 4000 MB and one GPU that does not exist.

    Leaving the context kills the jobs, their processes and every client that is still running.
    The test is skipped where it cannot be: SLURM and munge are not installed, or the user is not root.

    Raises:
        AssertionError: it did not start; the text has the logs.
    """
    if os.geteuid() != 0:
        pytest.skip("root")
    for program in ("slurmctld", "slurmd", "sbatch", "srun", "munged", "setpriv"):
        if shutil.which(program) is None:
            pytest.skip(program)
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:  # not of pytest: a socket's path has 107 characters
        folder = Path(name)
        cluster = SlurmCluster(folder, _environment(folder))
        _configure(folder)
        daemons: dict[str, subprocess.Popen[bytes]] = {}
        try:
            _start(cluster, daemons)
            yield cluster
        finally:
            _stop(cluster, daemons)


def _environment(folder: Path) -> dict[str, str]:
    """Return this process's environment without what a job or a user's default has put into it."""
    of_slurm = ("SLURM_", "SBATCH_", "SRUN_", "SQUEUE_", "SINFO_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(of_slurm)}
    path = os.pathsep.join([str(folder / "bin"), kept.get("PATH", os.defpath)])
    return {**kept, "PATH": path, "SLURM_CONF": str(folder / "slurm.conf")}


def _configure(folder: Path) -> None:
    host = socket.gethostname().split(".")[0]
    address, bound = _address(host)
    ports = [free_port() for _ in range(1 + len(NODES))]
    text = CONFIGURATION.format(folder=folder, host=host, address=address, bound=bound, ports=ports)
    (folder / "slurm.conf").write_text(text)
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
    for name in ("bin", "state", *(f"spool.{node}" for node in NODES)):
        (folder / name).mkdir()
    # Inside a job, Snakemake's executor starts srun without SLURM_CONF: a real cluster has its file in /etc.
    srun = folder / "bin" / "srun"
    srun.write_text(f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {shutil.which("srun")} "$@"\n')
    srun.chmod(0o755)
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))


def _address(host: str) -> tuple[str, str]:
    """Return the address of the daemons and the line of the configuration that makes them listen there and nowhere else.

    SLURM has one for the address of the host's own name only. Where that is not on the loopback, as in a container,
    the daemons listen everywhere; without the key, which is this cluster's own, they answer nobody.
    """
    with suppress(OSError):
        if (address := socket.gethostbyname(host)).startswith("127."):
            return address, "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny"
    return "127.0.0.1", ""


def _start(cluster: SlurmCluster, daemons: dict[str, subprocess.Popen[bytes]]) -> None:
    folder = cluster.folder

    def start(name: str, *words: str) -> None:
        with open(folder / f"{name}.log", "w") as log:
            # a test that is killed takes its cluster along
            words = ("setpriv", "--pdeathsig", "TERM", *words)
            daemons[name] = subprocess.Popen(words, env=cluster.environment, stdout=log, stderr=log, cwd=folder)

    def waits_for(ready: Callable[[], bool]) -> None:
        if not _in_time(lambda: ready() or any(one.poll() is not None for one in daemons.values())) or not ready():
            raise AssertionError("the cluster did not start:\n" + _logs(folder))

    files = {"socket": "socket", "key-file": "key", "log-file": "munged", "pid-file": "pid", "seed-file": "seed"}
    # force: a folder that the owner alone may read is an error to munged
    start(
        "munged",
        "munged",
        "--foreground",
        "--force",
        "--origin=127.0.0.1",
        *(f"--{one}={folder}/munge.{end}" for one, end in files.items()),
    )
    waits_for((folder / "munge.socket").exists)
    start("slurmctld", "slurmctld", "-D")
    for node in NODES:
        start(node, "slurmd", "-D", "-N", node)
    waits_for(lambda: _idle(cluster))


def _idle(cluster: SlurmCluster) -> bool:
    try:
        return cluster.states() == dict.fromkeys(NODES, "idle")
    except AssertionError:  # slurmctld does not listen yet
        return False


def _stop(cluster: SlurmCluster, daemons: dict[str, subprocess.Popen[bytes]]) -> None:
    """End the jobs, then the nodes, then slurmctld and munged, which the others need, and what is left."""
    if daemons.keys() >= {"slurmctld", *NODES}:
        with suppress(AssertionError, subprocess.TimeoutExpired):  # slurmctld may be what has failed
            cluster.run(["scancel", "--full", "--signal=KILL", "--user=root"], timeout=5)
            cluster.run(["scancel", "--user=root"], timeout=5)
    for name in reversed(daemons):
        daemons[name].terminate()
        with suppress(subprocess.TimeoutExpired):
            daemons[name].wait(PATIENCE)
        daemons[name].kill()
        daemons[name].wait()

    def none_left() -> bool:
        left = processes(cluster)
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        return not left

    assert _in_time(none_left), f"processes of the cluster go on: {processes(cluster)}"


def processes(cluster: SlurmCluster) -> list[int]:
    """Return the processes that run in the cluster's environment: steps of jobs, jobs and clients."""
    mark = f"SLURM_CONF={cluster.environment['SLURM_CONF']}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            if mark in (folder / "environ").read_bytes().split(b"\0") and int(folder.name) != os.getpid():
                found.append(int(folder.name))
    return found


def _in_time(done: Callable[[], bool]) -> bool:
    end = time.monotonic() + PATIENCE
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _logs(folder: Path) -> str:
    return "\n".join(
        f"{path.name}:\n{path.read_text(errors='replace')[-2000:]}" for path in sorted(folder.glob("*.log"))
    )
