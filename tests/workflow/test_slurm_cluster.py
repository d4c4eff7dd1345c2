# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The cluster of `slurm_cluster` runs jobs, Snakemake's too, obeys drain and resume, and leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest

from .slurm_cluster import SlurmCluster, processes, slurm_cluster

SNAKEFILE = """\
rule all:
    input:
        expand("{n}.json", n=range(4)),


rule one:
    output:
        "{n}.json",
    shell:
        "{config[python]} record.py {output}"
"""

RECORD = """\
import json, os, sys, time

start = time.time()
time.sleep(2)
with open(sys.argv[1], "w") as file:
    json.dump({"node": os.environ["SLURMD_NODENAME"], "start": start, "end": time.time()}, file)
"""


@pytest.fixture
def cluster() -> Iterator[SlurmCluster]:
    with slurm_cluster() as cluster:
        yield cluster


def wait_for(met: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end, "not within the time"
        time.sleep(0.2)


def states(cluster: SlurmCluster) -> list[tuple[str, str]]:
    """State and node of each job."""
    return [(job.state, job.node) for job in cluster.jobs()]


def test_each_node_runs_one_job_and_a_drained_one_none(cluster):
    for _ in range(3):
        cluster.run(["sbatch", "--output=/dev/null", "--wrap=sleep 1000"])
    wait_for(lambda: states(cluster) == [("RUNNING", "node1"), ("RUNNING", "node2"), ("PENDING", "")], 20)
    cluster.drain("node1")
    cluster.run(["scancel", "1"])
    wait_for(lambda: cluster.states()["node1"] == "drained", 20)
    assert states(cluster) == [("CANCELLED", "node1"), ("RUNNING", "node2"), ("PENDING", "")]
    cluster.resume("node1")
    wait_for(lambda: states(cluster)[2] == ("RUNNING", "node1"), 40)


def test_a_gpu_and_memory_are_asked_for_and_refused_beyond_what_a_node_has(cluster):
    cluster.run(["sbatch", "--output=/dev/null", "--gres=gpu:1", "--mem=4000", "--wrap=true"])
    wait_for(lambda: cluster.jobs()[0].state == "COMPLETED", 20)
    for more in ("--gres=gpu:2", "--mem=4001", "--cpus-per-task=2"):
        with pytest.raises(AssertionError, match="Requested node configuration is not available|Memory specification"):
            cluster.run(["sbatch", "--nodes=1", more, "--wrap=true"])


def test_leaves_no_process_after_a_failure():
    with pytest.raises(ZeroDivisionError), slurm_cluster() as cluster:
        cluster.run(["sbatch", "--output=/dev/null", "--wrap=sleep 1000"])
        client = subprocess.Popen(["sleep", "1000"], env=cluster.environment)
        # its own session, so that SLURM no longer knows it as a part of the job
        cluster.run(["sbatch", "--output=/dev/null", "--wrap=setsid --fork sleep 1000"])
        wait_for(lambda: [job.state for job in cluster.jobs()] == ["RUNNING", "COMPLETED"], 20)
        assert len(processes(cluster)) >= 7  # munged, slurmctld, two slurmd, a step with its shell, sleep
        raise ZeroDivisionError
    assert processes(cluster) == []
    assert client.wait(5) != 0
    assert not cluster.folder.exists()


def test_a_daemon_that_does_not_start_is_told_with_its_log(monkeypatch):
    monkeypatch.setattr("tests.workflow.slurm_cluster.CONFIGURATION", "Nonsense=1\n")
    with pytest.raises(AssertionError, match="Nonsense"), slurm_cluster():
        pass


@pytest.mark.slow
def test_snakemake_uses_both_nodes_then_the_one_that_is_left(cluster, tmp_path):
    pytest.importorskip("snakemake")
    pytest.importorskip("snakemake_executor_plugin_slurm")
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    (tmp_path / "record.py").write_text(RECORD)
    words = [
        *(sys.executable, "-m", "snakemake", "--executor", "slurm", "--jobs", "4"),
        *("--config", f"python={sys.executable}"),
        *("--slurm-status-command", "squeue"),  # there is no database for sacct, the default
        *("--slurm-init-seconds-before-status-checks", "1"),
        *("--default-resources", "mem_mb=500", "runtime=5", "slurm_partition=main"),
    ]
    with open(tmp_path / "log", "w") as log:
        engine = subprocess.Popen(words, cwd=tmp_path, env=cluster.environment, stdout=log, stderr=log)
    try:
        wait_for(lambda: {("RUNNING", "node1"), ("RUNNING", "node2")} <= set(states(cluster)), 60)
        cluster.drain("node1")  # its first job goes on
        assert engine.wait(300) == 0, (tmp_path / "log").read_text()
    finally:
        engine.kill()
        engine.wait()
    assert [job.state for job in cluster.jobs()] == ["COMPLETED"] * 4
    records = [json.loads((tmp_path / f"{n}.json").read_text()) for n in range(4)]
    records.sort(key=lambda record: record["start"])
    assert sorted(record["node"] for record in records) == ["node1", "node2", "node2", "node2"]
    assert {record["node"] for record in records[:2]} == {"node1", "node2"}
    on_node2 = [record for record in records if record["node"] == "node2"]
    assert all(before["end"] <= after["start"] for before, after in pairwise(on_node2))
