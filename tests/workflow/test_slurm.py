# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A study on a real SLURM gives the tables of one machine: two jobs at once, a drained node, a killed engine."""

from __future__ import annotations

import time

import pytest

from .made_up_workflow import finish, own_environment, start, steps_of, write_made_up
from .slurm_cluster import slurm_cluster

pytest.importorskip("snakemake_executor_plugin_slurm")
pytestmark = pytest.mark.slow

# The shipped profile, with less patience, and jobs that fit on the cluster's small nodes.
PROFILE = """\
executor: slurm
jobs: 4
scheduler: greedy
slurm-status-command: squeue
slurm-init-seconds-before-status-checks: 1
retries: 1
rerun-incomplete: true
rerun-triggers: [mtime, input]
keep-going: true
quiet: [host, rules]
default-resources: {slurm_partition: main, mem_mb: 500, runtime: 5}
"""
TABLES = ("curve.md", "curve.csv", "curve.png", "power.md")


@pytest.fixture
def cluster():
    with slurm_cluster() as cluster:
        yield cluster


@pytest.fixture
def profile(tmp_path):
    folder = tmp_path / "profile"
    folder.mkdir()
    (folder / "config.yaml").write_text(PROFILE)
    return str(folder)


def nodes_of(out):
    """Node to when its jobs computed their first and last step, for each command."""
    found = []
    for path in out.glob("runs/*/*/**/steps"):
        lines = [line.split() for line in path.read_text().splitlines()]
        found.append((lines[0][2], float(lines[0][1]), float(lines[-1][1])))
    return sorted(found, key=lambda each: each[1])


def wait_until(met, process, seconds=120):
    end = time.monotonic() + seconds
    while not met():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)


def test_a_study_on_two_nodes_one_drained_one_engine_killed(cluster, profile, tmp_path):
    out, local = tmp_path / "out", tmp_path / "local" / "out"
    local.parent.mkdir()
    environment = {**own_environment(), **cluster.environment}
    write_made_up(out, steps=100)
    engine = start(out, profile=profile, environment=environment)
    wait_until(lambda: len({node for node, *_ in nodes_of(out)}) == 2, engine)
    engine.kill()  # its jobs go on
    engine.wait()
    assert [job.state for job in cluster.jobs()].count("RUNNING") == 2
    cluster.drain("node1")
    text = finish(out, profile=profile, environment=environment)
    assert "jobs that an earlier start left in SLURM's queue" in text
    write_made_up(local, steps=1)
    finish(local)
    for name in TABLES:
        assert (out / name).read_bytes() == (local / name).read_bytes()

    found = nodes_of(out)
    first, second = found[:2]
    assert {first[0], second[0]} == {"node1", "node2"} and second[1] < first[2]  # two at once
    assert "node1" not in {node for node, *_ in found[3:]}
    for folder, steps in steps_of(out).items():
        assert steps == sorted(steps) and set(steps) == set(range(1, 101)), folder
    assert sum(map(len, steps_of(out).values())) - 1000 <= 2  # of the two that were running
