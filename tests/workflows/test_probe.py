# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A pre-training with --probe_list, through the command line."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch

from bundles.common.training.log import read_log

from .command_line import SMALL, kill_when, run_bundle, succeed

SMALL = {**SMALL, "roi_size": "[64,64,32]", "spacing": "[6.0,6.0,8.0]", "max_steps": 4, "warmup_steps": 1}
TRAIN = "swin_unetr_pretrain", "train.yaml"
TWO = "swin_unetr_pretrain", ["train.yaml", "multi_gpu_train.yaml"]
NAMES = {"0": "background", "1": "Liver", "2": "right kidney"}
FIGURES = ("step", "probe_dice", "probe_dice_liver", "probe_dice_right_kidney", "intensity_alone")


@pytest.fixture(scope="session")
def probe_list(tmp_path_factory, btcv):
    """Two training scans and one validation scan with two of BTCV's organs."""
    content = json.loads((btcv / "dataset.json").read_text())
    folder = tmp_path_factory.mktemp("probe")
    sections = {}
    for section in ("training", "validation"):
        sections[section] = []
        for entry in content[section]:
            label = nib.load(btcv / entry["label"])
            organs = np.asarray(label.dataobj)
            name = entry["label"].rpartition("/")[2]
            nib.save(
                nib.Nifti1Image(np.select([organs == 6, organs == 2], [1, 2]).astype(np.uint8), label.affine),
                folder / name,
            )
            sections[section].append({"image": str(btcv / entry["image"]), "label": name})
    path = folder / "probe.json"
    path.write_text(json.dumps({"labels": NAMES, **sections}))
    return path


@pytest.fixture(scope="session")
def probed(tmp_path_factory, unlabelled, probe_list):
    """Output folder of a run with a probe, and what it printed."""
    output = tmp_path_factory.mktemp("probed")
    options = {**SMALL, "dataset_dir": unlabelled, "probe_list": probe_list, "select_by": "probe_dice"}
    return output, succeed(run_bundle(*TRAIN, output_dir=output, **options))


def table(folder):
    return [{name: row[name] for name in FIGURES} for row in read_log(folder / "probe.csv")]


def weights(folder):
    return torch.load(folder / "models" / "last.pt", weights_only=True)["network"]


def test_the_dice_over_steps_is_in_the_table_the_log_and_the_picture(probed):
    folder, output = probed
    rows = table(folder)
    assert [row["step"] for row in rows] == [0, 2, 4]
    for row in rows:
        assert row["probe_dice"] == pytest.approx((row["probe_dice_liver"] + row["probe_dice_right_kidney"]) / 2)
        assert 0 < row["intensity_alone"] < row["probe_dice"] < 1
    assert len({row["probe_dice"] for row in rows}) == 3 and len({row["intensity_alone"] for row in rows}) == 1
    assert f"probe at step 4: Dice {rows[2]['probe_dice']:.3f}; before training {rows[0]['probe_dice']:.3f}" in output
    assert (folder / "probe_curve.png").stat().st_size > 5000


def test_the_best_weights_are_those_of_the_best_dice(probed):
    folder, _ = probed
    best = max(table(folder)[1:], key=lambda row: row["probe_dice"])
    trained = torch.load(folder / "models" / "encoder.pt", weights_only=True)["trained"]
    assert trained["steps"] == best["step"]
    assert trained["score"] == {"probe_dice": pytest.approx(best["probe_dice"])}
    assert trained["probe"]["classes"] == ["background", "liver", "right_kidney"]


def test_the_weights_are_those_of_a_run_without_a_probe(tmp_path, probed, unlabelled):
    succeed(run_bundle(*TRAIN, output_dir=tmp_path, dataset_dir=unlabelled, **SMALL))
    plain, other = weights(tmp_path), weights(probed[0])
    assert plain.keys() == other.keys() and all(torch.equal(plain[name], other[name]) for name in plain)
    assert not (tmp_path / "probe.csv").exists()


def test_a_killed_run_resumes_to_the_table_and_the_weights_of_the_unbroken_one(
    tmp_path, probed, unlabelled, probe_list
):
    options = {**SMALL, "dataset_dir": unlabelled, "probe_list": probe_list, "select_by": "probe_dice"}
    options["output_dir"] = tmp_path
    kill_when(*TRAIN, appears=tmp_path / "models" / "last.pt", **options)
    refused = run_bundle(*TRAIN, resume=True, **{**options, "probe_voxels": 50})
    assert refused.returncode == 1 and "probe_voxels was 1000, now 50" in refused.stderr
    succeed(run_bundle(*TRAIN, resume=True, **options))
    assert table(tmp_path) == table(probed[0])
    one, other = weights(tmp_path), weights(probed[0])
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_two_processes_measure_what_one_does(tmp_path, probed, unlabelled, probe_list):
    """Before the training: later, two processes have another batch. Both know the best Dice, so both end."""
    options = {**SMALL, "dataset_dir": unlabelled, "probe_list": probe_list, "batch_size": 1}
    options |= {"max_steps": 2, "output_dir": tmp_path, "select_by": "probe_dice"}
    output = succeed(run_bundle(*TWO, processes=2, **options))
    assert output.count("probe before training") == output.count("probe at step 2") == 1  # rank 0 alone reports
    one, two = table(probed[0])[0], table(tmp_path)[0]
    assert two == pytest.approx(one, abs=1e-6)
    assert [row["step"] for row in table(tmp_path)] == [0, 2]


def refused(tmp_path, unlabelled, **options):
    run = run_bundle(*TRAIN, output_dir=tmp_path / "output", dataset_dir=unlabelled, **{**SMALL, **options})
    assert run.returncode == 1, run.stdout[-2000:] + run.stderr[-4000:]
    assert "step 1" not in run.stdout and "Traceback" not in run.stderr
    return run.stderr[run.stderr.rindex("Stopped:") :]


def test_a_score_of_a_probe_needs_a_probe(tmp_path, unlabelled):
    assert "name its labelled scans with --probe_list" in refused(tmp_path, unlabelled, select_by="probe_dice")


def test_a_label_of_another_shape_than_its_image(tmp_path, unlabelled, probe_list):
    content = json.loads(probe_list.read_text())
    label = nib.load(probe_list.parent / content["training"][1]["label"])
    cut = tmp_path / "cut.nii.gz"
    nib.save(nib.Nifti1Image(np.asarray(label.dataobj)[:-3], label.affine), cut)
    for section in ("training", "validation"):
        for entry in content[section]:
            entry["label"] = str(probe_list.parent / entry["label"])
    content["training"][1]["label"] = str(cut)
    path = tmp_path / "probe.json"
    path.write_text(json.dumps(content))
    message = refused(tmp_path, unlabelled, probe_list=path, check_data="none")  # the headers of these few, always
    assert "cut.nii.gz" in message and "shape" in message


def test_a_class_that_no_training_scan_has(tmp_path, unlabelled, probe_list):
    content = json.loads(probe_list.read_text())
    for section in ("training", "validation"):
        for entry in content[section]:
            entry["label"] = str(probe_list.parent / entry["label"])
    content["labels"]["3"] = "spleen"
    path = tmp_path / "probe.json"
    path.write_text(json.dumps(content))
    message = refused(tmp_path, unlabelled, probe_list=path)
    assert "none of its 2 training scans has a voxel of spleen" in message
    del content["validation"]
    path.write_text(json.dumps(content))
    message = refused(tmp_path, unlabelled, probe_list=path)
    assert "has no 'validation' section" in message
