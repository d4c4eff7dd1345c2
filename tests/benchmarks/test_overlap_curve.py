# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The curve has the windows, the Dice and the agreement of each overlap."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch

from benchmarks.overlap_curve import Point, curve, main, mean_dice, rows_of
from bundles.common.networks.swin_unetr import build_swin_unetr
from bundles.common.weights.checkpoint_file import save_atomically

from ..conftest import TINY_ENCODER

TRAINED = {"spacing": [4.0, 4.0, 4.0], "hu_window": [-175.0, 250.0], "roi_size": [64, 32, 32], "foreground": -175.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with one case, and random weights for it."""
    folder = tmp_path_factory.mktemp("data")
    torch.manual_seed(0)
    network = build_swin_unetr(TINY_ENCODER, out_channels=3)
    labels = {"0": "background", "1": "liver", "2": "spleen"}
    content = {"model": network.state_dict(), "encoder": TINY_ENCODER, "labels": labels, "trained": TRAINED}
    save_atomically(content, folder / "model.pt")
    voxels = np.random.default_rng(0).integers(0, 200, (112, 32, 32)).astype(np.int16)
    for name, array in (("image", voxels), ("label", (voxels > 100).astype(np.uint8))):
        nib.save(nib.Nifti1Image(array, np.diag([-4.0, -4.0, 4.0, 1.0])), folder / f"{name}.nii.gz")
    case = {"image": "image.nii.gz", "label": "label.nii.gz"}
    (folder / "dataset.json").write_text(json.dumps({"labels": labels, "modality": {"0": "CT"}, "validation": [case]}))
    return folder


def test_more_overlap_has_more_windows_and_the_largest_agrees_with_itself(data):
    cases = [{key: str(data / f"{key}.nii.gz") for key in ("image", "label")}]
    points = curve(cases, weights=str(data / "model.pt"), overlaps=[0.0, 0.75])
    assert [point.windows for point in points.values()] == [2, 4]
    assert points["torch", 0.75].same == [1.0] and 0.5 < points["torch", 0.0].same[0] <= 1
    assert all(0 <= point.dice[0] <= 1 and point.seconds > 0 for point in points.values())


def test_an_organ_that_the_label_lacks_does_not_count():
    truth, mask = np.array([0, 1, 1, 2, 2, 0]), np.array([3, 1, 0, 2, 2, 2])
    assert mean_dice(mask, truth) == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert np.isnan(mean_dice(mask, np.zeros(6)))


def test_changes_are_those_of_the_same_overlap_with_the_first_backend():
    points = {
        ("torch", 0.0): Point(4, 2.0, [0.5, 0.7], [0.9, 0.9]),
        ("torch", 0.5): Point(8, 4.0, [0.6, 0.7], [1.0, 1.0]),
        ("openvino", 0.0): Point(4, 1.0, [0.51, 0.67], [0.9, 0.8]),
    }
    rows = rows_of(points)
    assert [row["largest change"] for row in rows] == ["0.0000", "0.0000", "0.0300"]
    assert [row["time"] for row in rows] == ["1.00", "2.00", "0.50"]
    assert rows[2]["Dice"] == "0.5900" and rows[2]["same voxels"] == "85.000%"


def test_the_command_prints_a_row_per_overlap(data, capsys):
    options = ["--weights", str(data / "model.pt"), "--overlaps", "0", "0.5", "--json", str(data / "out.json")]
    assert main([str(data), *options]) == 0
    shown = capsys.readouterr().out
    assert "1 case; time" in shown and "1.00" in shown and "100.000%" in shown
    assert set(json.loads((data / "out.json").read_text())) == {"torch 0.0", "torch 0.5"}


def test_unusable_options_are_named(data, tmp_path, capsys):
    assert main([str(data), "--weights", str(data / "model.pt"), "--overlaps", "1"]) == 1
    assert "--overlaps [1.0]: each must be a share" in capsys.readouterr().err
    content = torch.load(data / "model.pt", weights_only=True)
    save_atomically(content | {"trained": {}}, tmp_path / "bare.pt")
    assert main([str(data), "--weights", str(tmp_path / "bare.pt")]) == 1
    assert "does not record its preprocessing" in capsys.readouterr().err
