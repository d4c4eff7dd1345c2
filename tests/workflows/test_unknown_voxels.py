# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Labels that are partly unknown, and carried labels beside real ones, through the command line."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from tools.synthetic_patient import ORGANS

from .command_line import SMALL, kill_when, run_bundle, succeed
from .conftest import save, write_list
from .decathlon_runs import read_csv

OPTIONS = {**SMALL, "max_steps": 4, "val_interval": 2, "real_repeats": 2, "real_only_steps": 1, "batch_size": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory, patients):
    """Each label is unknown (255) in a part: a case of a person, two carried ones, and the validation case."""
    folder = tmp_path_factory.mktemp("partly")
    cases = []
    for number, patient in enumerate([0, 1, 0, 2]):
        image, label, affine = patients[patient]
        label = label.copy()
        label[:, :, : label.shape[2] // 3] = 255
        cases.append(
            {
                "image": save(image, affine, folder / "imagesTr" / f"img{number:04d}.nii.gz"),
                "label": save(label, affine, folder / "labelsTr" / f"label{number:04d}.nii.gz"),
            }
        )
    for case in cases[1:3]:
        case |= {"carried": True, "weight": 0.5}
    labels = {"0": "background"} | {str(value): name for value, name in ORGANS.items()}
    return write_list(folder, labels, {"0": "CT"}, training=cases[:3], validation=cases[3:])


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    output = tmp_path_factory.mktemp("trained")
    run = run_bundle("swin_unetr_btcv_seg", "train.yaml", dataset_dir=data, output_dir=output, **OPTIONS)
    return output, succeed(run) + run.stderr


def content(folder, name):
    return torch.load(folder / "models" / name, weights_only=True)


def test_the_run_reports_and_records_what_it_learnt_from(trained):
    folder, output = trained
    assert "3 of the 3 training cases have unknown voxels (value 255)" in output
    training = content(folder, "model.pt")["trained"]
    assert (training["cases"]["real"], training["cases"]["carried"]) == (1, 2)
    assert (training["ignore_label"], training["real_repeats"], training["real_only_steps"]) == (255, 2, 1)
    losses = [float(row["loss"]) for row in read_csv(folder / "training_log.csv")]
    assert np.isfinite(losses).all() and len(losses) == 4
    assert 0 <= training["score"]["mean_dice"] <= 1


def test_a_resumed_run_ends_with_the_same_weights(trained, data, tmp_path):
    kill_when(
        "swin_unetr_btcv_seg",
        "train.yaml",
        appears=tmp_path / "models" / "last.pt",
        dataset_dir=data,
        output_dir=tmp_path,
        **OPTIONS,
    )
    options = {**OPTIONS, "resume": True}
    succeed(run_bundle("swin_unetr_btcv_seg", "train.yaml", dataset_dir=data, output_dir=tmp_path, **options))
    whole, resumed = (content(folder, "last.pt")["network"] for folder in (trained[0], tmp_path))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_resumed_run_with_other_weights_of_cases_is_refused(trained, data, tmp_path):
    listed = json.loads((data / "dataset.json").read_text())
    listed["training"][1]["weight"] = 0.25
    (data / "other.json").write_text(json.dumps(listed))
    options = {**OPTIONS, "resume": True, "data_list": "other.json"}
    run = run_bundle("swin_unetr_btcv_seg", "train.yaml", dataset_dir=data, output_dir=trained[0], **options)
    assert run.returncode == 1 and "other settings: cases was" in run.stderr


def test_an_evaluation_scores_known_voxels_only(trained, data, tmp_path):
    model = trained[0] / "models" / "model.pt"
    options = {"preset": "cpu", "dataset_dir": data, "pretrained_model": model}
    succeed(run_bundle("swin_unetr_btcv_seg", "evaluate.yaml", output_dir=tmp_path, **options))
    assert {row["label"] for row in read_csv(tmp_path / "scores.csv")} == set(ORGANS.values())
    run = run_bundle("swin_unetr_btcv_seg", "evaluate.yaml", output_dir=tmp_path, ignore_label=None, **options)
    assert run.returncode == 1
    assert "holds the label value 255" in run.stderr and "--ignore_label 255" in run.stderr
    run = run_bundle("swin_unetr_btcv_seg", "evaluate.yaml", output_dir=tmp_path, section="training", **options)
    assert run.returncode == 1 and "carried labels, such as" in run.stderr and "label0001.nii.gz" in run.stderr


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (lambda listed: listed["validation"][0].update(carried=True), {}, "section 'validation' has 1 .*label0003"),
        (lambda listed: listed["training"][0].update(weight=-1), {}, r"training\[0\] has the weight -1"),
        (lambda listed: None, {"ignore_label": 1}, "--ignore_label 1 is also a declared label"),
        (lambda listed: None, {"ignore_label": 0}, "--ignore_label 0 must be the label value of unknown voxels"),
        (lambda listed: None, {"real_repeats": 0}, "--real_repeats 0 must be a whole number, 1 or more"),
        (lambda listed: None, {"real_only_steps": 4}, "--real_only_steps 4 leaves none of the 4 steps"),
    ],
)
def test_bad_input_is_refused(data, tmp_path, change, options, words):
    listed = json.loads((data / "dataset.json").read_text())
    change(listed)
    (data / "bad.json").write_text(json.dumps(listed))
    run = run_bundle(
        "swin_unetr_btcv_seg",
        "train.yaml",
        dataset_dir=data,
        data_list="bad.json",
        output_dir=tmp_path,
        **{**OPTIONS, **options},
    )
    assert run.returncode == 1 and not (tmp_path / "models").exists()
    message = run.stderr[run.stderr.rindex("Stopped:") :]
    assert re.search(words, message), message
