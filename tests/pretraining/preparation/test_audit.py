# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The numbers of a scan are those of slow formulas, its box is the one that train.yaml crops, and the verdict has its reason."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import CropForeground, Orientation

from bundles.common.scans.reading import Volume
from bundles.pretraining.preparation.audit import QUANTILES, audit_scan, body_box, hash_of, quantiles_of

SPACING = (2.0, 3.0, 4.0)


def affine(axes: str, shape: tuple[int, ...]) -> np.ndarray:
    return nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(axes), shape) @ np.diag([*SPACING, 1])


def patient(shape=(20, 24, 16)) -> np.ndarray:
    """Air with an asymmetric body of soft tissue and bone in it."""
    generator = np.random.default_rng(0)
    voxels = generator.integers(-1010, -990, shape).astype(np.int16)
    voxels[3:15, 5:20, 2:13] = generator.integers(-50, 80, (12, 15, 11))
    voxels[8:10, 15:18, 2:13] = 900
    return voxels


def audit(voxels: np.ndarray, axes: str = "RAS", **options) -> dict:
    limits = {"foreground_hu": -500.0, "min_body": 100, "min_slices": 8, "max_spacing": 8.0} | options
    return audit_scan(Volume(voxels, affine(axes, voxels.shape)), **limits)


# ---- numbers -------------------------------------------------------------------------------------------------------


def test_a_patient_is_used_and_measured():
    row = audit(patient())
    assert (row["verdict"], row["reason"]) == ("used", "")
    assert (row["shape"], row["orientation"]) == ([20, 24, 16], "RAS")
    np.testing.assert_allclose(row["spacing"], SPACING)
    assert (row["hu_min"], row["hu_max"]) == (-1010, 900)
    assert row["body_box"] == [[3, 15], [5, 20], [2, 13]]
    np.testing.assert_allclose(row["body_mm"], [12 * 2, 15 * 3, 11 * 4])
    assert row["body_share"] == pytest.approx(12 * 15 * 11 / (20 * 24 * 16))


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SRA", "PIR"])
def test_the_box_is_the_one_that_train_yaml_crops(axes):
    voxels = patient()
    scan = MetaTensor(torch.from_numpy(voxels[None].astype(np.float32)), affine=affine(axes, voxels.shape))
    crop = CropForeground(select_fn=lambda x: torch.gt(x, -500.0), allow_smaller=True, return_coords=True)
    oriented = Orientation(axcodes="RAS", labels=None)(scan)
    _, start, end = crop(oriented)
    row = audit(voxels, axes)
    assert row["body_box"] == [[int(s), int(e)] for s, e in zip(start, end, strict=True)]
    assert row["orientation"] == "".join(nib.aff2axcodes(affine(axes, voxels.shape)))


def test_box_of_random_voxels_is_monais():
    for seed in range(20):
        body = np.random.default_rng(seed).random((5, 6, 7)) > 0.97
        _, start, end = CropForeground(select_fn=lambda x: x > 0, allow_smaller=True, return_coords=True)(
            body[None].astype(float)
        )
        expected = [[int(s), int(e)] for s, e in zip(start, end, strict=True)] if body.any() else [[0, 0]] * 3
        assert body_box(body) == expected


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
@pytest.mark.parametrize("shape", [(1, 1, 8), (7, 11, 13), (10, 10, 10)])
def test_quantiles_are_numpys(dtype, shape):
    voxels = np.random.default_rng(1).integers(-32768, 32767, shape).astype(dtype)
    shares = list(QUANTILES.values())
    expected = np.quantile(voxels.astype(np.float64), shares, method="inverted_cdf")
    np.testing.assert_array_equal(quantiles_of(voxels, shares), expected)


def test_hash_tells_voxels_and_shape_and_nothing_else():
    voxels = patient()
    first = hash_of(voxels)
    assert first == hash_of(np.asfortranarray(voxels)) == hash_of(voxels.copy())
    changed = voxels.copy()
    changed[0, 0, 0] += 1
    assert hash_of(changed) != first
    assert hash_of(voxels.reshape(24, 20, 16)) != first
    zeros = np.zeros((2, 2, 2), np.float32)
    assert hash_of(zeros) == hash_of(-zeros)


@pytest.mark.parametrize("axes", ["LPS", "SLP", "AIR"])
def test_hash_does_not_depend_on_the_orientation_of_the_file(axes):
    image = nib.Nifti1Image(patient(), affine("RAS", patient().shape))
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axes))
    turned = image.as_reoriented(turn)
    volume = Volume(np.asanyarray(turned.dataobj), turned.affine)
    assert volume.orientation == axes
    assert hash_of(volume.to_ras().voxels) == hash_of(patient())


# ---- verdicts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("voxels", "options", "words"),
    [
        (np.full((20, 20, 20), 7, np.int16), {}, "every voxel is 7"),
        (patient() + 1024, {}, "not CT in HU"),
        (patient().clip(-175, 250), {}, "windowed"),
        ((patient().clip(-1000, 1000) / 1000).astype(np.float32), {}, "scaled"),
        (patient(), {"max_spacing": 3.9}, "too coarse: its voxels are 2 x 3 x 4 mm, but --max_spacing is 3.9"),
        (patient()[:, :, :7], {}, "too few slices: its shape is 20x24x7, but --min_slices is 8"),
        (patient(), {"min_body": 1981}, "too little body: 1980 voxels above -500 HU, but --min_body is 1981"),
    ],
)
def test_scans_that_are_left_out_say_why(voxels, options, words):
    row = audit(voxels, **options)
    assert row["verdict"] == "left_out"
    assert words in row["reason"]


def test_limits_are_included():
    assert audit(patient(), max_spacing=4.0, min_slices=16, min_body=1980)["verdict"] == "used"


def test_suspects_can_be_kept_and_say_so():
    row = audit(patient().clip(-175, 250), keep_suspect=True)
    assert row["verdict"] == "used"
    assert "--keep_suspect" in row["reason"] and "windowed" in row["reason"]


@pytest.mark.parametrize("voxels", [np.full((20, 20, 20), 7, np.int16), (patient() + 1024)[:, :, :7]])
def test_keeping_suspects_keeps_no_faulty_scans(voxels):
    assert audit(voxels, keep_suspect=True)["verdict"] == "left_out"
