# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A study of tiny synthetic patients through the bundles' command line gives the same table after it was killed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from evidence.run import main
from evidence.runs import execution
from tools.child_process import child_environment
from tools.synthetic_ct import write_dataset

from ..forked_python import ForkedPython

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

STUDY = {
    "name": "tiny",
    "preset": "cpu",
    "row": {
        "modality": "CT",
        "channels": ["CT"],
        "labels": None,
        "spacing": [12.0, 12.0, 12.0],
        "hu_window": [-175.0, 250.0],
        "roi_size": [32, 32, 64],
        "foreground": -175.0,
        "nsd_tolerance": 12.0,
    },
    "pretraining": {"max_steps": 2, "val_interval": 1, "depths": [1, 1, 1, 1], "check_data": "none", "warmup_steps": 0},
    "finetuning": {"val_interval": 1, "learning_rate": 1e-12, "warmup_steps": 0, "check_data": "none"},
    "evaluation": {"check_data": "none", "mask_interpolation": "nearest"},
    "arms": {
        "scratch": {"pretraining": None, "finetuning": {"depths": [1, 1, 1, 1]}},
        "pretrained": {"pretraining": {}},
    },
    "steps": 3,
    "curve": {"n": [1], "seeds": [0], "encoder_per_seed": True},
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The study file and its data: two training patients and two scored patients."""
    folder = tmp_path_factory.mktemp("study")
    lists = write_dataset(
        folder / "data", unlabelled=0, training=2, validation=2, test=0, shuffled=False, progress=False
    )
    labels = json.loads(lists.labelled.read_text())["labels"]
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**STUDY, "row": {**STUDY["row"], "labels": labels}}))
    return [str(folder / "tiny.yaml"), "--data", str(lists.labelled.parent), "--threads", "1"]


def command(study, out):
    return [sys.executable, "-m", "evidence.run", *study, "--out", str(out)]


def run_forked(words, *, cwd, log, threads, on_poll, title, patience, die_with_parent):
    """Stands for `run_python`: seconds less for each command. The study that is killed starts real processes."""
    assert words[:2] == ["-W", "ignore"] and patience and die_with_parent
    process = ForkedPython(words[2:], cwd=cwd, env=child_environment(threads), merge=True)
    try:
        status = process.wait(timeout=600)
    finally:
        process.kill()
    with open(log, "a") as file:
        file.write(f"$ {title}python {shlex.join(words)}\n{process.output}")
    on_poll(process.output)
    return status


def finish(study, out):
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(execution, "run_python", run_forked)
        assert main([*study, "--out", str(out)]) == 0, said.getvalue()[-6000:]
    return said.getvalue()


def wait_for(path, process):
    for _ in range(60000):
        if path.exists() or process.poll() is not None:
            break
        time.sleep(0.01)
    assert path.exists(), f"ended with {process.returncode} before {path} existed"


def test_killed_and_started_again_gives_the_same_table_and_weights(study, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(study, whole)

    # Killed during a training: its command dies with it, and its claim is taken over.
    process = subprocess.Popen(command(study, broken), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    run = broken / "runs/finetune_pretrained_n1_seed0"
    wait_for(run / "train/models/last.pt", process)
    process.kill()
    process.wait()
    assert not (run / "done.json").exists()

    assert "pretrained_n1_seed0 done" in finish(study, broken)
    for name in ("curve.csv", "curve.md", "curve.png"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()
    for name in ("finetune_pretrained_n1_seed0", "finetune_scratch_n1_seed0"):
        one, other = (
            torch.load(out / "runs" / name / "train/models/model.pt", weights_only=True)["model"]
            for out in (whole, broken)
        )
        assert all(torch.equal(one[key], other[key]) for key in one)

    # With a learning rate close to 0, the weights are still the initial ones: one decoder, two encoders.
    scratch, pretrained = (
        torch.load(whole / "runs" / f"finetune_{arm}_n1_seed0/train/models/model.pt", weights_only=True)["model"]
        for arm in ("scratch", "pretrained")
    )
    decoder = [key for key in scratch if not key.startswith("swinViT.")]
    assert len(decoder) > 30
    assert all(torch.allclose(scratch[key], pretrained[key], rtol=0, atol=1e-9) for key in decoder)
    key = "swinViT.layers4.0.blocks.0.mlp.linear1.weight"
    assert not torch.allclose(scratch[key], pretrained[key], atol=1e-4)

    # A finished study runs nothing.
    before = {path: path.stat().st_mtime_ns for path in (whole / "runs").rglob("*") if path.is_file()}
    assert "3 of 3 runs done" in finish(study, whole)
    assert before == {path: path.stat().st_mtime_ns for path in before} and os.listdir(whole / "runs")


def weights(path):
    content = torch.load(path, weights_only=True)
    return content["model"] if "model" in content else content["state_dict"]


def test_floor_and_whole_network_start_from_the_files_that_they_name(tmp_path):
    """With a learning rate close to 0, the trained weights are still the initial ones."""
    lists = write_dataset(tmp_path, unlabelled=0, training=4, validation=1, test=0, shuffled=False, progress=False)
    content = {**STUDY, "row": {**STUDY["row"], "labels": json.loads(lists.labelled.read_text())["labels"]}}
    content |= {"tuning": 2, "finetuning": {**STUDY["finetuning"], "average_steps": 1}}
    whole = {"tasks": ["inpainting"], "reconstruction_head": "unet"}
    content["arms"] = {"scratch": {"pretraining": None}, "whole": {"start": "network", "pretraining": whole}}
    convergence = {"seeds": [10], "gain": 0.5, "most": 6}
    content["headroom"] = {"n": [1], "seeds": [0], "floor": True, "ceiling": False, "convergence": convergence}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content))
    study = [str(tmp_path / "tiny.yaml"), "--data", str(lists.labelled.parent), "--threads", "1"]
    out = tmp_path / "out"
    text = finish(study, out)
    assert "twice 3 steps gain less than 0.5: 3 are enough" in text and "| 1 | floor | 3 | 1 of 1 |" in text

    random = weights(out / "runs/pretrain_floor_seed0/train/models/encoder.pt")
    norms = {name: value for name, value in random.items() if "norm" in name}
    assert len(norms) > 20 and all(  # a single step of AdamW would have moved every one of them
        torch.equal(value, torch.full_like(value, float(name.endswith("weight")))) for name, value in norms.items()
    )
    frozen = weights(out / "runs/finetune_floor_n1_seed0/train/models/model.pt")
    assert all(torch.equal(frozen[name], value) for name, value in random.items())

    start = weights(out / "runs/pretrain_whole_seed0/train/models/network.pt")
    model = weights(out / "runs/finetune_whole_n1_seed0/train/models/model.pt")
    scratch = weights(out / "runs/finetune_scratch_n1_seed0/train/models/model.pt")
    assert {name.split(".")[0] for name in model.keys() - start.keys()} == {"out"}
    taken = [name for name in start if name.startswith("decoder")]
    assert len(taken) == 20  # four convolutions of five stages
    assert all(torch.allclose(model[name], start[name], rtol=0, atol=1e-9) for name in start)
    assert not torch.allclose(scratch[taken[0]], start[taken[0]], atol=1e-4)
