# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Workflows of tiny patients through the bundles' own command lines: a study, and the Decathlon from data to archive."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

from tools.synthetic_ct import write_dataset

from ..workflows.miniature_decathlon import write_miniature
from .made_up_workflow import own_environment

pytest.importorskip("snakemake")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
TINY = {"depths": [1, 1, 1, 1], "check_data": "none", "val_interval": 1, "warmup_steps": 0}
STUDY = {
    "name": "tiny",
    "preset": "cpu",
    "row": {
        "modality": "CT",
        "channels": ["CT"],
        "spacing": [12.0, 12.0, 12.0],
        "hu_window": [-175.0, 250.0],
        "roi_size": [32, 32, 64],
        "foreground": -175.0,
        "nsd_tolerance": 12.0,
    },
    "pretraining": {**TINY, "max_steps": 2},
    # With a learning rate close to 0, the trained weights are still the initial ones.
    "finetuning": {
        "val_interval": 1,
        "learning_rate": 1e-12,
        "warmup_steps": 0,
        "check_data": "none",
        "average_steps": 1,
    },
    "evaluation": {"check_data": "none", "mask_interpolation": "nearest"},
    "arms": {
        "scratch": {"pretraining": None, "finetuning": {"depths": [1, 1, 1, 1]}},
        "pretrained": {"pretraining": {}},
        "whole": {"start": "network", "pretraining": {"tasks": ["inpainting"], "reconstruction_head": "unet"}},
    },
    "steps": 3,
    "curve": {"n": [1], "seeds": [0], "encoder_per_seed": True},
    "headroom": {"n": [1], "seeds": [0], "floor": True, "ceiling": False},
}


def carry_out(*words):
    done = subprocess.run(
        [sys.executable, "-m", "workflow", *map(str, words), "--threads", "1"],
        cwd=ROOT, env=own_environment(), capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    return done.stdout + done.stderr


def weights(path):
    content = torch.load(path, weights_only=True)
    return content["model"] if "model" in content else content["state_dict"]


def test_arms_and_floor_of_a_study_start_from_the_files_that_they_name(tmp_path):
    lists = write_dataset(
        tmp_path / "data", unlabelled=0, training=2, validation=1, test=0, shuffled=False, progress=False
    )
    labels = json.loads(lists.labelled.read_text())["labels"]
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**STUDY, "row": {**STUDY["row"], "labels": labels}}))
    out = tmp_path / "out"
    text = carry_out("study", "--study", tmp_path / "tiny.yaml", "--data", lists.labelled.parent, "--out", out)
    assert "| 1 | floor | 3 | 1 of 1 |" in text and (out / "curve.png").is_file()

    def model(arm):
        return weights(out / f"runs/finetune_{arm}_n1_seed0/train/models/model.pt")

    scratch, pretrained, whole, floor = map(model, ("scratch", "pretrained", "whole", "floor"))
    decoder = [key for key in scratch if not key.startswith("swinViT.")]
    assert len(decoder) > 30  # one decoder, two encoders
    assert all(torch.allclose(scratch[key], pretrained[key], rtol=0, atol=1e-9) for key in decoder)
    key = "swinViT.layers4.0.blocks.0.mlp.linear1.weight"
    assert not torch.allclose(scratch[key], pretrained[key], atol=1e-4)

    random = weights(out / "runs/pretrain_floor_seed0/train/models/encoder.pt")
    norms = {name: value for name, value in random.items() if "norm" in name}
    assert len(norms) > 20 and all(  # a single step of AdamW would have moved every one of them
        torch.equal(value, torch.full_like(value, float(name.endswith("weight")))) for name, value in norms.items()
    )
    assert all(torch.equal(floor[name], value) for name, value in random.items())

    start = weights(out / "runs/pretrain_whole_seed0/train/models/network.pt")
    assert {name.split(".")[0] for name in whole.keys() - start.keys()} == {"out"}
    taken = [name for name in start if name.startswith("decoder")]
    assert len(taken) == 20  # four convolutions of five stages
    assert all(torch.allclose(whole[name], start[name], rtol=0, atol=1e-9) for name in start)
    assert not torch.allclose(scratch[taken[0]], start[taken[0]], atol=1e-4)


def test_the_decathlon_from_data_to_archive(tmp_path):
    write_miniature(tmp_path / "data", "Task09_Spleen")
    options = {"max_steps": 2, "val_interval": 2, "depths": [1, 1, 1, 1], "check_data": "none"}
    content = {"name": "mini", "folds": 2, "preset": "cpu", "training": options, "evaluation": {"check_data": "none"}}
    prepare = {"max_spacing": 20.0, "min_body": 10, "validation_share": 0.2, "workers": 0}
    own = {
        "scans": str(tmp_path / "data/Task09_Spleen/imagesTr"),
        "prepare": prepare,
        "options": {**TINY, "max_steps": 2},
    }
    content |= {"arms": {"ours": {"encoder": "pretraining"}}, "pretraining": own}
    content |= {"ensemble": ["ours"], "submission": True}
    (tmp_path / "mini.yaml").write_text(yaml.safe_dump(content))
    out = tmp_path / "out"
    carry_out("decathlon", "--folds", tmp_path / "mini.yaml", "--data", tmp_path / "data", "--out", out)
    table = (out / "results/results.md").read_text()
    assert "Task09_Spleen" in table
    encoder = weights(out / "runs/pretrain/train/models/encoder.pt")
    assert len(encoder) > 30 and json.loads((out / "runs/prepare/data/dataset.json").read_text())["training"]
    cases = {
        line.split(",")[0] for fold in (0, 1)
        for line in (out / f"runs/Task09_Spleen_ours_fold{fold}/evaluation/scores.csv").read_text().splitlines()[1:]
    }  # fmt: skip
    listed = json.loads((tmp_path / "data/Task09_Spleen/dataset.json").read_text())
    assert len(cases) == len(listed["training"])  # every case is scored by the fold that held it out
    with zipfile.ZipFile(out / "submission.zip") as archive:
        assert len(archive.namelist()) == len(listed["test"])
        assert all(name.startswith("Task09_Spleen/") for name in archive.namelist())
