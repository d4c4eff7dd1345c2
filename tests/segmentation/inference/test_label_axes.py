# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A label whose file is turned against its scan is compared on the axes of the scan."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from monai.transforms import Compose, EnsureChannelFirstd, Orientationd, Spacingd

from bundles.common.scans.checks import check_scans
from bundles.common.scans.decode_once import LoadScand
from bundles.segmentation.inference.label_axes import OnAxesOfScand

SHAPE = (7, 6, 5)
AFFINE = np.array([[-2.0, 0.1, 0, 60], [0.1, -2, 0, 60], [0, 0, 3, -40], [0, 0, 0, 1]])
PREPROCESSING = Compose(
    [
        LoadScand(["image", "reference"], labels="reference"),
        EnsureChannelFirstd(["image", "reference"]),
        Orientationd("image", axcodes="RAS", labels=None),
        Spacingd("image", pixdim=(2, 2, 2)),
        OnAxesOfScand("reference"),
    ]
)


def files(folder, axes: str) -> dict[str, str]:
    """A scan in LPS, and its label in the given orientation."""
    rng = np.random.default_rng(0)
    nib.save(nib.Nifti1Image(rng.normal(size=SHAPE).astype(np.float32), AFFINE), folder / "image.nii.gz")
    label = nib.Nifti1Image(rng.integers(0, 3, SHAPE).astype(np.uint8), AFFINE)
    ornt = nib.orientations.ornt_transform(nib.io_orientation(AFFINE), nib.orientations.axcodes2ornt(axes))
    nib.save(label.as_reoriented(ornt), folder / "label.nii.gz")
    return {"image": str(folder / "image.nii.gz"), "label": str(folder / "label.nii.gz")}


@pytest.mark.parametrize("axes", ["LPS", "RAS", "SPL", "PIR"])
def test_the_label_gets_the_axes_of_the_file_of_the_scan(tmp_path, axes):
    item = files(tmp_path, axes)
    check_scans([item], labels=[0, 1, 2])
    expected = np.random.default_rng(0)
    expected.normal(size=SHAPE)
    reference = PREPROCESSING({"image": item["image"], "reference": item["label"]})["reference"]
    np.testing.assert_array_equal(reference[0].numpy(), expected.integers(0, 3, SHAPE))
    np.testing.assert_allclose(reference.affine.numpy(), AFFINE, atol=1e-4)


def test_a_label_that_is_not_turned_stays_the_same_object(tmp_path):
    item = files(tmp_path, "LPS")
    before = Compose(PREPROCESSING.transforms[:2])({"image": item["image"], "reference": item["label"]})
    assert OnAxesOfScand("reference")(before)["reference"] is before["reference"]
