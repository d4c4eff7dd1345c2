# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Pre-training on several processes and with interruptions, through the command line."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bundles.common.training.log import read_log

from .command_line import BUNDLES, SMALL, kill_when, run_bundle, signal_when, start, succeed

SMALL = {**SMALL, "roi_size": "[64,64,32]"}


def test_a_killed_run_resumes_to_the_weights_of_the_unbroken_one(tmp_path, unlabelled):
    options = {**SMALL, "max_steps": 6, "dataset_dir": unlabelled}
    succeed(run_bundle("swin_unetr_pretrain", "train.yaml", output_dir=tmp_path / "whole", **options))
    killed = tmp_path / "killed"
    kill_when("swin_unetr_pretrain", "train.yaml", appears=killed / "models" / "last.pt", output_dir=killed, **options)
    assert not (killed / "models" / "model.pt").exists()
    output = succeed(run_bundle("swin_unetr_pretrain", "train.yaml", output_dir=killed, resume=True, **options))
    assert "the run continues after step" in output
    whole, resumed = (torch.load(run / "models" / "last.pt", weights_only=True) for run in (tmp_path / "whole", killed))
    assert whole["step"] == resumed["step"] == 6
    assert all(torch.equal(tensor, resumed["network"][name]) for name, tensor in whole["network"].items())
    assert [row["step"] for row in read_log(killed / "training_log.csv")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("options", [{"num_workers": 2}, {"processes": 2, "batch_size": 1}], ids=["workers", "ranks"])
def test_a_signal_saves_before_the_run_leaves_and_resume_makes_it_the_unbroken_one(tmp_path, unlabelled, options):
    configs = ["train.yaml", "multi_gpu_train.yaml"] if "processes" in options else "train.yaml"
    number = signal.SIGTERM if "processes" in options else signal.SIGINT
    options = {**SMALL, "max_steps": 6, "val_interval": 3, "dataset_dir": unlabelled, **options}
    succeed(run_bundle("swin_unetr_pretrain", configs, output_dir=tmp_path / "whole", **options))
    stopped = tmp_path / "stopped"
    status, output = signal_when("swin_unetr_pretrain", configs, number, says="step 1/6", output_dir=stopped, **options)
    assert status != 0
    assert f"stopped by {number.name} after step" in output and "run the same command with --resume true" in output
    step = torch.load(stopped / "models" / "last.pt", weights_only=True)["step"]
    assert 1 <= step < 6 and not (stopped / "models" / "model.pt").exists()
    if "processes" not in options:
        assert status == 128 + number
    output = succeed(run_bundle("swin_unetr_pretrain", configs, output_dir=stopped, resume=True, **options))
    assert f"the run continues after step {step}" in output
    for name in ("last.pt", "best.pt", "encoder.pt"):
        whole, resumed = (torch.load(run / "models" / name, weights_only=True) for run in (tmp_path / "whole", stopped))
        weights = "state_dict" if name == "encoder.pt" else "model" if name == "best.pt" else "network"
        assert all(torch.equal(tensor, resumed[weights][k]) for k, tensor in whole[weights].items()), name


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, unlabelled):
    """Output folder of a training on two processes, with the weights of both ranks."""
    output = tmp_path_factory.mktemp("two_ranks")
    output.mkdir(exist_ok=True)
    options = {"preset": "cpu", "roi_size": [64, 64, 32], "depths": [1, 1, 1, 1], "max_steps": 3, "val_interval": 3}
    options |= {"log_every": 1, "dataset_dir": str(unlabelled), "batch_size": 1, "warmup_steps": 1}
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = Path(__file__).with_name("save_every_rank.py")
    command += [str(script), str(BUNDLES / "swin_unetr_pretrain"), str(output), json.dumps(options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    assert succeed(run).count("step 3/3") == 1  # only rank 0 reports
    return output


def test_ranks_end_with_equal_weights_and_rank_0_writes(two_ranks):
    one, other = (torch.load(two_ranks / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    last = torch.load(two_ranks / "models" / "last.pt", weights_only=True)
    assert all(torch.equal(tensor, one[name]) for name, tensor in last["network"].items())
    assert last["settings"]["processes"] == 2


def test_a_shared_evaluation_equals_that_of_one_process(tmp_path, two_ranks, unlabelled):
    # three scans in batches of one: rank 0 evaluates two of them, rank 1 one and a repetition
    model = two_ranks / "models" / "model.pt"
    reports = []
    for processes, configs in ((1, "evaluate.yaml"), (2, ["evaluate.yaml", "multi_gpu_evaluate.yaml"])):
        output = tmp_path / str(processes)
        options = {"pretrained_model": model, "dataset_dir": unlabelled, "section": "all", "batch_size": 1}
        options |= {"preset": "cpu", "roi_size": "[64,64,32]", "output_dir": output, "processes": processes}
        succeed(run_bundle("swin_unetr_pretrain", configs, **options))
        reports.append(json.loads((output / "evaluation.json").read_text()))
    assert reports[0]["views"] == 48  # of three scans, each drawn four times
    assert reports[1].pop("verdicts") == reports[0].pop("verdicts")
    assert reports[1] == pytest.approx(reports[0], rel=1e-5)


def test_two_nodes_meet_as_the_docs_say(tmp_path, unlabelled):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {**SMALL, "batch_size": 1, "dataset_dir": unlabelled, "output_dir": tmp_path}
    nodes = []
    for node in (0, 1):
        rendezvous = [f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}"]
        nodes.append(
            start(
                "swin_unetr_pretrain",
                ["train.yaml", "multi_gpu_train.yaml"],
                launch=["--nnodes=2", "--nproc_per_node=1", *rendezvous],
                **options,
            )
        )
    outputs = [node.communicate(timeout=600)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert "step 2/2" in outputs[0] and "step 2/2" not in outputs[1]
    assert torch.load(tmp_path / "models" / "last.pt", weights_only=True)["settings"]["processes"] == 2


def test_processes_that_do_not_divide_the_global_batch_are_refused(tmp_path, unlabelled):
    options = {**SMALL, "dataset_dir": unlabelled, "batch_size": 2, "global_batch_size": 3, "output_dir": tmp_path}
    run = run_bundle("swin_unetr_pretrain", "train.yaml", **options)
    assert run.returncode == 1
    assert "choose 2 or 4" in run.stderr[run.stderr.rindex("Stopped:") :]


def test_torchrun_without_the_overlay_is_refused(tmp_path, unlabelled):
    run = run_bundle(
        "swin_unetr_pretrain", "train.yaml", processes=2, dataset_dir=unlabelled, output_dir=tmp_path, **SMALL
    )
    assert run.returncode != 0
    assert "multi_gpu_train.yaml" in run.stderr
