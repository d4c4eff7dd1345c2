# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Labels arrive on the voxels of the other scan, where a known transform says; out of the field of view nothing is."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from bundles.common.errors import InputError
from bundles.common.scans.nifti_writing import write_nifti
from bundles.common.scans.reading import Volume
from bundles.segmentation.propagation import carrying
from bundles.segmentation.propagation.carrying import carry_both, carry_label, carry_scan
from bundles.segmentation.propagation.fusion import IGNORE
from bundles.segmentation.propagation.itk_images import to_image, to_lps

from .bodies import mean_dice, scan_of

STILL = sitk.Transform()


def transform_of(matrix):
    matrix = to_lps(matrix)
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(matrix[:3, :3].ravel().tolist())
    transform.SetTranslation(matrix[:3, 3].tolist())
    return transform


def random_labels(shape=(7, 6, 5), seed=0):
    return np.random.default_rng(seed).choice([0, 1, 2, 7], shape).astype(np.uint8)


def test_a_shift_by_whole_voxels_moves_the_labels_the_right_way():
    """Moving point = fixed point + (2, -3, 5) mm in RAS, on voxels of that size."""
    labels = random_labels()
    affine = np.diag([2.0, 3.0, 5.0, 1.0])
    matrix = np.eye(4)
    matrix[:3, 3] = (2, -3, 5)
    for interpolation in ("linear", "nearest"):
        carried = carry_label(
            Volume(labels, affine), transform_of(matrix), like=Volume(labels, affine), interpolation=interpolation
        )
        expected = np.full(labels.shape, IGNORE, np.uint8)
        expected[:-1, 1:, :-1] = labels[1:, :-1, 1:]
        assert carried.dtype == np.uint8 and np.array_equal(carried, expected)


def test_the_stored_order_of_axes_makes_no_difference():
    scan, label = scan_of(1, oblique=np.array([6.0, -9.0, 12.0]))
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", (5, 10, -15), degrees=True).as_matrix() * (1.1, 0.9, 1)
    matrix[:3, 3] = (9, -14, 20)
    plain = carry_label(label, transform_of(matrix), like=scan)
    turns = nib.orientations.axcodes2ornt(("S", "L", "A"))
    turned = [
        Volume(
            nib.apply_orientation(each.voxels, turns),
            each.affine @ nib.orientations.inv_ornt_aff(turns, each.voxels.shape),
        )
        for each in (label, scan)
    ]
    carried = carry_label(turned[0], transform_of(matrix), like=turned[1])
    assert carried.shape != plain.shape
    differs = carried != nib.apply_orientation(plain, turns)
    assert differs.mean() < 1e-4  # rounding, where two classes have equal weights
    assert {1, 6, IGNORE} <= set(np.unique(plain))


def only_in(labels, corner):
    """Labels in a box of two by three by one voxels at a corner, background elsewhere."""
    kept = np.zeros_like(labels)
    box = tuple(slice(None, size) if low else slice(-size, None) for low, size in zip(corner, (2, 3, 1), strict=True))
    kept[box] = labels[box]
    return kept


@pytest.mark.parametrize("corner", [None, (True, True, True), (False, True, False), (False, False, False)])
def test_linear_is_the_largest_of_all_classes_resampled_alone(corner):
    labels = random_labels((9, 8, 7))
    if corner is not None:
        labels = only_in(labels, corner)
    source = Volume(labels, np.diag([2.0, 3.0, 2.5, 1.0]))
    grid = np.eye(4)
    grid[:3, :3] = Rotation.from_euler("xyz", (20, 10, 30), degrees=True).as_matrix() * 1.3
    grid[:3, 3] = (4, 5, 3)
    like = Volume(np.zeros((9, 10, 8), np.int16), grid)
    matrix = np.eye(4)
    matrix[:3, 3] = (0.7, -0.4, 1.1)
    transform = transform_of(matrix)
    reference = to_image(like)
    masks = []
    for value in (0, 1, 2, 7):
        mask = to_image(Volume((labels == value).astype(np.float64), source.affine))
        resampled = sitk.Resample(mask, reference, transform, sitk.sitkLinear, -1.0)
        masks.append(sitk.GetArrayFromImage(resampled).T)
    expected = np.array([0, 1, 2, 7])[np.argmax(masks, axis=0)]
    expected[masks[0] == -1] = IGNORE
    carried = carry_label(source, transform, like=like)
    assert (expected == IGNORE).any() and (expected != IGNORE).mean() > 0.3
    assert np.array_equal(carried, expected)


def test_equal_weights_go_to_the_lower_label():
    source = Volume(np.array([3, 1, 1, 2], np.uint8).reshape(4, 1, 1), np.eye(4))
    half = np.eye(4)
    half[0, 3] = 0.5
    like = Volume(np.zeros((3, 1, 1), np.uint8), half)
    assert carry_label(source, STILL, like=like).ravel().tolist() == [1, 1, 1]


def test_linear_is_closer_to_the_truth_than_nearest_and_not_behind_label_gaussian():
    """One body, drawn on two grids: the drawing on the second is the truth of the warp from the first."""
    fixed, truth = scan_of(2, spacing=(4.0, 4.0, 4.0), oblique=np.array([4.0, -7.0, 10.0]))
    _, label = scan_of(2, spacing=(5.0, 5.0, 6.0))
    seen = carry_label(label, STILL, like=fixed) != IGNORE
    scores = {
        kind: mean_dice(carry_label(label, STILL, like=fixed, interpolation=kind)[seen], truth.voxels[seen])
        for kind in ("linear", "nearest")
    }
    gaussian = sitk.Resample(to_image(label), to_image(fixed), STILL, sitk.sitkLabelGaussian, 0)
    scores["gaussian"] = mean_dice(sitk.GetArrayFromImage(gaussian).T[seen], truth.voxels[seen])
    assert scores["linear"] > 0.84
    assert scores["linear"] > scores["nearest"] + 0.005
    assert scores["linear"] > scores["gaussian"] - 0.005


def test_a_scan_and_its_label_together_are_what_they_are_alone():
    like, _ = scan_of(2, spacing=(4.0, 4.0, 4.0), oblique=np.array([4.0, -7.0, 10.0]))
    scan, _ = scan_of(2)
    _, label = scan_of(2, spacing=(5.0, 5.0, 6.0))  # a grid of its own
    moved, carried = carry_both(scan, label, STILL, like=like)
    assert np.array_equal(moved, carry_scan(scan, STILL, like=like), equal_nan=True)
    assert np.array_equal(carried, carry_label(label, STILL, like=like))
    assert {1, 6} <= set(np.unique(carried)) and np.isfinite(moved).any()


def test_a_label_map_without_labels_is_background_in_its_field_of_view():
    empty = Volume(np.zeros((4, 1, 1), np.uint8), np.eye(4))
    like = Volume(np.zeros((6, 1, 1), np.uint8), np.eye(4))
    assert carry_label(empty, STILL, like=like).ravel().tolist() == [0, 0, 0, 0, IGNORE, IGNORE]


def test_slabs_change_nothing(monkeypatch):
    scan, label = scan_of(1)
    whole = carry_label(label, STILL, like=scan), carry_scan(scan, STILL, like=label)
    monkeypatch.setattr(carrying, "SLAB_VOXELS", 3 * scan.voxels.shape[0] * scan.voxels.shape[1] + 1)
    slabs = carry_label(label, STILL, like=scan), carry_scan(scan, STILL, like=label)
    assert np.array_equal(whole[0], label.voxels) and np.array_equal(slabs[0], label.voxels)
    assert np.allclose(whole[1], scan.voxels, atol=1e-3) and np.allclose(slabs[1], scan.voxels, atol=1e-3)


def test_a_scan_equals_simple_itk_and_is_nan_out_of_its_field_of_view():
    scan, _ = scan_of(1)
    like, _ = scan_of(3, oblique=np.array([5.0, 3.0, -8.0]))
    like = Volume(like.voxels, like.affine.copy())
    like.affine[:3, 3] += scan.affine[:3, 3] - like.affine[:3, 3] + (30, -20, 40)
    image = to_image(Volume(scan.voxels.astype(np.float32), scan.affine))
    theirs = sitk.GetArrayFromImage(sitk.Resample(image, to_image(like), STILL, sitk.sitkLinear, -9999.0)).T
    ours = carry_scan(scan, STILL, like=like)
    out = theirs == -9999
    assert 0.05 < out.mean() < 0.95
    assert np.array_equal(np.isnan(ours), out)
    assert np.abs(ours - theirs)[~out].max() < 0.05


def test_files_and_their_errors(tmp_path):
    labels = random_labels().astype(np.int16)
    write_nifti(tmp_path / "label.nii.gz", voxels=labels, affine=np.eye(4))
    carried = carry_label(tmp_path / "label.nii.gz", STILL, like=str(tmp_path / "label.nii.gz"))
    assert np.array_equal(carried, labels)
    for wrong in (0.5, 300, -1):
        bad = labels.astype(np.float32)
        bad[0, 0, 0] = wrong
        write_nifti(tmp_path / "bad.nii.gz", voxels=bad, affine=np.eye(4))
        with pytest.raises(InputError, match=rf"bad\.nii\.gz has the value {wrong}"):
            carry_label(tmp_path / "bad.nii.gz", STILL, like=tmp_path / "label.nii.gz")
    with pytest.raises(InputError, match="cubic"):
        carry_label(tmp_path / "label.nii.gz", STILL, like=tmp_path / "label.nii.gz", interpolation="cubic")
