# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The miniature tasks have the form of MSD's tasks, and contain their structures."""

from __future__ import annotations

import json
import re

import nibabel as nib
import numpy as np
import pytest

from .decathlon_runs import CT, MR, TABLE
from .miniature_decathlon import write_miniature

FIRST = {  # first case in MSD's files
    "Task01_BrainTumour": "BRATS_001",
    "Task02_Heart": "la_003",
    "Task03_Liver": "liver_0",
    "Task04_Hippocampus": "hippocampus_001",
    "Task05_Prostate": "prostate_00",
    "Task06_Lung": "lung_001",
    "Task07_Pancreas": "pancreas_001",
    "Task08_HepaticVessel": "hepaticvessel_001",
    "Task09_Spleen": "spleen_2",
    "Task10_Colon": "colon_001",
}


@pytest.mark.parametrize("task", TABLE)
def test_a_miniature_is_shipped_as_its_task(tmp_path, task):
    folder = write_miniature(tmp_path, task, cases=3, tests=1)
    content, row = json.loads((folder / "dataset.json").read_text()), TABLE[task]
    plain = [re.sub(r"[ _-]", "", word).lower() for word in content["modality"].values()]
    assert plain == [re.sub(r"[ _-]", "", word).lower() for word in row["channels"]]
    assert list(content["labels"]) == list(row["labels"])
    assert (content["numTraining"], content["numTest"], len(content["test"])) == (3, 1, 1)
    assert content["tensorImageSize"] == ("4D" if task in ("Task01_BrainTumour", "Task05_Prostate") else "3D")
    assert content["training"][0]["image"] == f"./imagesTr/{FIRST[task]}.nii.gz"
    held = []
    for entry in content["training"]:
        image, label = nib.load(folder / entry["image"]), nib.load(folder / entry["label"])
        assert image.get_data_dtype() == (np.int16 if task in CT else np.float32)
        assert label.get_data_dtype() == np.uint8
        assert image.shape == label.shape + ((len(row["channels"]),) if len(row["channels"]) > 1 else ())
        np.testing.assert_array_equal(image.affine, label.affine)
        corner, values = np.asarray(image.dataobj)[0, 0, 0], set(np.unique(label.dataobj).tolist())
        assert (
            np.all(np.abs(corner - (-1000)) < 100) if task in CT else task == "Task04_Hippocampus" or not corner.any()
        )
        held.append(values)
    every = set(map(int, row["labels"]))
    tumour = any(word in name for name in row["labels"].values() for word in ("cancer", "tumour", "tumor"))
    assert held == [every - {max(every)} if tumour else every, every, every]


def test_intensities_of_mr_have_no_common_scale(tmp_path):
    (task, *_) = MR
    folder = write_miniature(tmp_path, task)
    tops = [np.asarray(nib.load(path).dataobj).max() for path in (folder / "imagesTr").iterdir()]
    assert max(tops) > 3 * min(tops)
