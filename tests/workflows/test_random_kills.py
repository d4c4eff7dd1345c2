# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Killed at random moments and started again, each workflow ends as if it had never been killed (make test-kills).

KILLS is the number of kills for each workflow; without it these tests are skipped. SEED chooses the moments.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from .. import forked_python
from ..forked_python import ForkedPython
from .command_line import SMALL, command, start, succeed
from .forked_ranks import ForkedRanks

KILLS = int(os.environ.get("KILLS", "0"))
SEED = int(os.environ.get("SEED", "0"))
IN_A_ROW = 3  # kills before a run may end, and is compared

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not KILLS, reason="set KILLS, the number of kills for each workflow"),
]


def begin(bundle: str, configs: str | list[str], *, processes: int = 1, **options) -> ForkedPython | ForkedRanks:
    """Start a run of one or several processes."""
    if processes == 1:
        return start(bundle, configs, merge=False, **options)
    how = command(bundle, configs, **options)
    return ForkedRanks(how["args"][3:], processes=processes, cwd=how["cwd"], env=how["env"])


def finish(bundle: str, configs: str | list[str], **options) -> None:
    """Run to the end, which must be a good one."""
    process = begin(bundle, configs, **options)
    try:
        stdout, stderr = process.communicate(timeout=900)
    finally:
        process.kill()
    succeed(subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr))


def kill_at_random(make, *, out: Path, compare) -> None:
    """Kill a workflow ``KILLS`` times; whenever it ends, compare its output folder with that of the unbroken run.

    Args:
        make: returns the arguments of `start` for an output folder.
        out: folder of the output folders.
        compare: gets the output folders of the unbroken run and of a broken one.
    """
    forked_python.run(["-c", ""], cwd=out, env=dict(os.environ), timeout=120)  # the first fork waits for the imports
    began = time.monotonic()
    bundle, configs, options = make(out / "whole")
    finish(bundle, configs, **options)
    duration = time.monotonic() - began
    moments, kills, number = random.Random(SEED), 0, 0
    while kills < KILLS:
        number += 1
        bundle, configs, options = make(out / f"broken {number}")
        for _ in range(IN_A_ROW):
            process = begin(bundle, configs, resume=True, **options)
            until = time.monotonic() + moments.uniform(0.05, duration)
            while process.poll() is None and time.monotonic() < until:
                time.sleep(0.01)
            if process.poll() is not None:
                break  # it was faster this time
            if isinstance(process, ForkedRanks):
                process.kill()
            else:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
        finish(bundle, configs, resume=True, **options)
        compare(out / "whole", out / f"broken {number}")
        left = [
            path for path in (out / f"broken {number}").rglob(".*") if path.suffix in (".pt", ".csv", ".gz", ".json")
        ]
        assert len(left) <= IN_A_ROW + 1, left  # at most the temporary file of each kill


def same_weights(whole: Path, broken: Path) -> None:
    one, other = (torch.load(folder / "models" / "model.pt", weights_only=True) for folder in (whole, broken))
    assert one["trained"]["score"] == other["trained"]["score"] and one["trained"]["steps"] == other["trained"]["steps"]
    assert all(torch.equal(tensor, other["model"][name]) for name, tensor in one["model"].items())
    tables = [np.genfromtxt(folder / "training_log.csv", delimiter=",", names=True) for folder in (whole, broken)]
    for column in ("step", "loss", "learning_rate"):
        np.testing.assert_array_equal(tables[0][column], tables[1][column])


def configs_of(name: str, processes: int) -> str | list[str]:
    return f"{name}.yaml" if processes == 1 else [f"{name}.yaml", f"multi_gpu_{name}.yaml"]


def parallel(processes: int) -> dict[str, int]:
    return {} if processes == 1 else {"processes": processes}


TRAINING = {**SMALL, "max_steps": 6, "val_interval": 2, "batch_size": 1, "warmup_steps": 1}
each_training = pytest.mark.parametrize(("steps", "processes"), [(1, 1), (2, 1), (1, 2), (2, 2)])


@each_training
def test_pre_training(tmp_path, unlabelled, steps, processes):
    def make(out: Path):
        options = {**TRAINING, "dataset_dir": unlabelled, "output_dir": out, "accumulation_steps": steps}
        return "swin_unetr_pretrain", configs_of("train", processes), options | parallel(processes)

    kill_at_random(make, out=tmp_path, compare=same_weights)


@each_training
def test_fine_tuning(tmp_path, btcv, steps, processes):
    def make(out: Path):
        options = {**TRAINING, "dataset_dir": btcv, "output_dir": out, "accumulation_steps": steps}
        return "swin_unetr_btcv_seg", configs_of("train", processes), options | parallel(processes)

    kill_at_random(make, out=tmp_path, compare=same_weights)


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation(tmp_path, btcv, segmenter, processes):
    def make(out: Path):
        options = {
            "preset": "cpu",
            "roi_size": "[64,64,32]",
            "dataset_dir": btcv,
            "output_dir": out,
            "section": "training",
        }
        options |= {"pretrained_model": segmenter / "models" / "model.pt"}
        return "swin_unetr_btcv_seg", configs_of("evaluate", processes), options | parallel(processes)

    def compare(whole: Path, broken: Path) -> None:
        assert (whole / "scores.csv").read_bytes() == (broken / "scores.csv").read_bytes()

    kill_at_random(make, out=tmp_path, compare=compare)


def test_inference(tmp_path, btcv, segmenter):
    def make(out: Path):
        options = {"preset": "cpu", "roi_size": "[64,64,32]", "dataset_dir": btcv / "imagesTr", "output_dir": out}
        options |= {"pretrained_model": segmenter / "models" / "model.pt"}
        return "swin_unetr_btcv_seg", "inference.yaml", options

    def compare(whole: Path, broken: Path) -> None:
        masks = [sorted(path.name for path in folder.glob("*.nii.gz")) for folder in (whole, broken)]
        assert masks[0] == masks[1] and len(masks[0]) == 3
        for name in masks[0]:
            one, other = (nib.load(folder / name) for folder in (whole, broken))
            np.testing.assert_array_equal(np.asanyarray(one.dataobj), np.asanyarray(other.dataobj))
            assert one.header.binaryblock == other.header.binaryblock
        assert (whole / "volumes.csv").read_bytes() == (broken / "volumes.csv").read_bytes()

    kill_at_random(make, out=tmp_path, compare=compare)
