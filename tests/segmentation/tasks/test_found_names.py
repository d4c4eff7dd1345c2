# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A folder without a data list is a task: names come from its values, and this is said."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bundles.common.errors import InputError
from bundles.segmentation.tasks.found_names import found_names
from bundles.segmentation.tasks.proposal import proposed_row

SHAPE = (12, 12, 12)


def save(path: Path, voxels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.diag([1.0, 1.0, 2.0, 1.0])), path)


def ct(seed: int = 0) -> np.ndarray:
    voxels = np.random.default_rng(seed).integers(0, 100, SHAPE).astype(np.int16)
    voxels[:3], voxels[3, :4] = -1000, 1200
    return voxels


def label(*values: float) -> np.ndarray:
    voxels = np.zeros(SHAPE, np.float32 if any(value % 1 for value in values) else np.int16)
    for place, value in enumerate(values):
        voxels[5, place] = value
    return voxels


def case_folder(folder: Path, *labels: np.ndarray, image=ct) -> Path:
    for number, voxels in enumerate(labels):
        save(folder / f"case{number}" / "ct.nii.gz", image(number))
        save(folder / f"case{number}" / "label.nii.gz", voxels)
    return folder


def test_a_folder_becomes_a_task_that_says_how_its_names_were_found(tmp_path, caplog):
    folder = case_folder(tmp_path / "own", label(1, 3, 255), label(0, 3))
    name, row = proposed_row(folder, output_dir=tmp_path / "out")
    assert name == "own" and row["modality"] == "CT" and row["channels"] == ["CT"]
    assert row["labels"] == {"0": "background", "1": "label_1", "2": "label_2", "3": "label_3"}
    text = caplog.text
    assert f"{folder} has no dataset.json. Its labels hold the values 0, 1, 3, called label_1, label_2, label_3" in text
    assert "--labels \"{'0':'background','1':'NAME1','2':'NAME2','3':'NAME3'}\"" in text
    assert "unless you name all of them, in training, evaluation and inference" in text and "taken for CT in HU" in text
    assert "no training label contains label_2" in text
    assert f"--dataset_dir {folder}" in (tmp_path / "out" / "task.yaml").read_text()


def test_images_that_do_not_look_like_ct_are_z_scored_and_that_is_said(tmp_path, caplog):
    folder = case_folder(tmp_path / "mr", label(1), image=lambda seed: np.abs(ct(seed)))
    row = proposed_row(folder, output_dir=None)[1]
    assert (row["modality"], row["channels"], row["hu_window"]) == ("MR", ["channel_0"], None)
    assert "z-scored" in caplog.text and "air is -1000" in caplog.text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((500, 600), r"values 0, 500, 600. They must be 0 for the background, then 1, 2"),
        ((255,), r"hold no structure, only 0 \(255 is the value of unknown voxels"),
        ((1, 2.5), r"is no label map: it holds the values 0, 1, 2.5"),
        ((-1, 1), r"is no label map: it holds the values -1, 0, 1"),
    ],
)
def test_values_that_are_no_labels_are_refused(tmp_path, values, message):
    with pytest.raises(InputError, match=message):
        proposed_row(case_folder(tmp_path, label(*values)), output_dir=None)


def test_a_value_near_a_whole_number_is_that_number(tmp_path):
    save(tmp_path / "l.nii", label(1.0000001))
    save(tmp_path / "i.nii", ct())
    items = [{"image": str(tmp_path / "i.nii"), "label": str(tmp_path / "l.nii")}]
    assert found_names(items, folder=tmp_path, ignore_label=255)["labels"] == {"0": "background", "1": "label_1"}


def test_several_channels_are_no_ct(tmp_path):
    save(tmp_path / "l.nii", label(1))
    save(tmp_path / "i.nii", ct())
    items = [{"image": [str(tmp_path / "i.nii")] * 2, "label": str(tmp_path / "l.nii")}]
    found = found_names(items, folder=tmp_path, ignore_label=None)
    assert found["modality"] == {"0": "channel_0", "1": "channel_1"}


def test_a_damaged_label_is_named(tmp_path):
    folder = case_folder(tmp_path, label(1), label(1))
    (folder / "case1" / "label.nii.gz").write_bytes(b"no gzip")
    with pytest.raises(InputError, match=r"case1/label\.nii\.gz"):
        proposed_row(folder, output_dir=None)
