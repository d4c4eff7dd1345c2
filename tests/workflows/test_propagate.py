# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""From three labels to a training on carried ones through the command line, with a position network that was trained."""

from __future__ import annotations

import csv
import json
import re

import nibabel as nib
import numpy as np
import pytest
import torch

from tests.segmentation.propagation.bodies import mean_dice, scan_of
from tools.synthetic_patient import ORGANS

from .command_line import SMALL, kill_when, run_bundle, succeed
from .conftest import save, write_list

# The whole body fits into one window, so that 80 steps are enough to know where in it a voxel is.
PRETRAINING = ["--preset", "cpu", "--spacing", "[12.0,12.0,12.0]", "--roi_size", "[32,32,64]", "--depths", "[1,1,1,1]"]
PRETRAINING += ["--batch_size", "1", "--max_steps", "80", "--val_interval", "80", "--warmup_steps", "5"]
PRETRAINING += ["--learning_rate", "2e-3", "--encoder_lr_factor", "1.0", "--validation_draws", "1"]
OPTIONS = {"spacing": "[12.0,12.0,12.0]", "affine_iterations": 30, "deformation_iterations": 3, "control_spacing": 90.0}
OPTIONS |= {"scales": "[0.6,1.6]", "max_residual": 40.0, "min_confidence": 0.3, "min_organs": 0.2, "workers": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three labelled patients, two without labels, one of them a second time mirrored, and one for validation."""
    folder = tmp_path_factory.mktemp("few")
    cases = {}
    for seed in range(6):
        image, label = scan_of(seed)
        cases[seed] = {
            "image": save(image.voxels, image.affine, folder / "imagesTr" / f"p{seed}.nii.gz"),
            "label": save(label.voxels, label.affine, folder / "labelsTr" / f"p{seed}.nii.gz"),
        }
    image, _ = scan_of(2)
    upside_down = save(image.voxels[:, :, ::-1], image.affine, folder / "imagesTr" / "upside_down.nii.gz")
    labels = {"0": "background"} | {str(value): name for value, name in ORGANS.items()}
    return write_list(
        folder,
        labels,
        {"0": "CT"},
        training=[cases[seed] for seed in (0, 1, 4)],
        unlabelled=[{"image": file} for file in (cases[2]["image"], cases[3]["image"], upside_down)],
        validation=[cases[5]],
    )


@pytest.fixture(scope="module")
def carried(tmp_path_factory, data):
    out = tmp_path_factory.mktemp("carried")
    scans = str(data / "imagesTr")
    options = {"dataset_dir": data, "output_dir": out, "pretrain_scans": scans, "pretrain_options": PRETRAINING}
    run = run_bundle("swin_unetr_btcv_seg", "propagate.yaml", **options, **OPTIONS)
    assert run.returncode == 3, run.stdout + run.stderr  # a scan was left out
    return out, run.stdout + run.stderr


def test_labels_reach_the_scans_and_a_turned_one_is_left_out(carried):
    out, text = carried
    assert "training the position network" in text and (out / "position_network" / "models" / "network.pt").exists()
    rows = list(csv.DictReader(open(out / "propagation.csv")))
    left_out = [row for row in rows if row["organ"] == "*"]
    assert [row["scan"] for row in left_out] == ["upside_down"] and "its z axis" in left_out[0]["reason"]
    for seed in (2, 3):
        mask = np.asarray(nib.load(out / "masks" / f"p{seed}_seg.nii.gz").dataobj)
        assert mean_dice(mask, scan_of(seed)[1].voxels) > 0.4
        assert (np.asarray(nib.load(out / "labels" / f"p{seed}.nii.gz").dataobj) == 255).any()
    assert "2 of 3 scans got a label" in text and "contact_sheet_001.png" in text
    assert "measuring on labelled scans: 3 of 3 scans" in text and "s left" in text


def test_the_list_trains_as_it_is_and_the_model_says_what_it_learnt_from(carried, tmp_path):
    options = {**SMALL, "dataset_dir": carried[0], "output_dir": tmp_path, "real_repeats": 2, "real_only_steps": 1}
    succeed(run_bundle("swin_unetr_btcv_seg", "train.yaml", **options))
    cases = torch.load(tmp_path / "models" / "model.pt", weights_only=True)["trained"]["cases"]
    assert (cases["real"], cases["carried"]) == (3, 2)


def test_a_killed_run_goes_on_and_repeats_nothing(carried, data, tmp_path):
    out, _ = carried
    options = {"dataset_dir": data, "output_dir": tmp_path, **OPTIONS}
    options["position_network"] = out / "position_network" / "models" / "network.pt"
    first = tmp_path / ".propagated" / "labels" / "p2.json"
    kill_when("swin_unetr_btcv_seg", "propagate.yaml", appears=first, **options)
    assert not (tmp_path / "dataset.json").exists()
    written = first.stat().st_mtime_ns
    run = run_bundle("swin_unetr_btcv_seg", "propagate.yaml", **options)
    assert run.returncode == 3, run.stderr
    assert first.stat().st_mtime_ns == written
    for name in ("labels/p2.nii.gz", "labels/p3.nii.gz", "masks/p3_seg.nii.gz", "propagation.csv", "left_one_out.csv"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()
    assert json.loads((tmp_path / "dataset.json").read_text()) == json.loads((out / "dataset.json").read_text())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Give either --position_network"),
        ({"position_network": "nowhere.pt"}, "--position_network nowhere.pt does not exist"),
        ({"position_network": __file__}, "cannot be read|is not a|no tensor"),
        ({"purpose": "test"}, "--purpose 'test' is not one of training, masks"),
        ({"atlases": 0}, "--atlases 0 must be a whole number"),
        ({"thresold": 0.5}, "--threshold"),
        ({"device": "gpu"}, "--device gpu"),
    ],
)
def test_bad_input_ends_with_one_message(data, tmp_path, options, message):
    run = run_bundle("swin_unetr_btcv_seg", "propagate.yaml", dataset_dir=data, output_dir=tmp_path, **options)
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert re.search(message, run.stdout + run.stderr), run.stderr
