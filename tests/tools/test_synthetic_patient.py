# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Synthetic patients are plausible, different from each other and reproducible."""

from __future__ import annotations

from itertools import combinations

import nibabel as nib
import numpy as np
import pytest

from tools.synthetic_ct import stamp
from tools.synthetic_patient import ORGANS, draw_patient, render

# Allowed volumes in millilitres. Wider than the range in adults where the shapes are generous (adrenal glands).
VOLUME = {
    "spleen": (60, 350),
    "right_kidney": (70, 300),
    "left_kidney": (70, 300),
    "gallbladder": (15, 100),
    "esophagus": (8, 70),
    "liver": (600, 2300),
    "stomach": (120, 700),
    "aorta": (40, 250),
    "inferior_vena_cava": (40, 250),
    "portal_and_splenic_veins": (12, 90),
    "pancreas": (25, 150),
    "right_adrenal_gland": (3, 14),
    "left_adrenal_gland": (3, 14),
}


@pytest.fixture(scope="module")
def patients():
    return [(seed, *render(draw_patient(seed))) for seed in range(12)]


def centre_mm(label, affine, name):
    organ = next(organ for organ, its_name in ORGANS.items() if its_name == name)
    return affine[:3, :3] @ np.argwhere(label == organ).mean(0) + affine[:3, 3]


def mean_dice(one, other):
    """Mean over the organs, after cropping or padding to the same grid."""
    other = stamp(other, one.shape)
    return np.mean([2 * ((one == o) & (other == o)).sum() / ((one == o).sum() + (other == o).sum()) for o in ORGANS])


def test_organs_have_the_ids_of_btcv():
    assert list(ORGANS) == list(range(1, 14))
    assert [ORGANS[i] for i in (1, 2, 6, 8, 11, 13)] == [
        "spleen",
        "right_kidney",
        "liver",
        "aorta",
        "pancreas",
        "left_adrenal_gland",
    ]


def test_types_and_grid_are_those_of_a_ct(patients):
    for _, image, label, affine in patients:
        assert image.dtype == np.int16 and label.dtype == np.uint8 and image.shape == label.shape
        assert all(low <= n <= high for n, low, high in zip(image.shape, (88, 72, 52), (104, 88, 64), strict=True))
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        assert 3.5 <= spacing[0] <= 4.5 and 4.5 <= spacing[2] <= 5.5
        assert spacing[0] == pytest.approx(spacing[1])
        assert nib.aff2axcodes(affine) == ("L", "P", "S")
        assert np.abs(affine[:3, 3]).min() > 1
        assert image.min() >= -1024 and np.percentile(image, 5) == pytest.approx(-1000, abs=45) and image.max() > 250


def test_about_one_grid_in_four_is_oblique():
    oblique = [bool(np.any(draw_patient(seed).oblique)) for seed in range(400)]
    assert 0.17 < np.mean(oblique) < 0.33


def test_same_seed_gives_the_same_voxels_and_another_seed_does_not(patients):
    image, label, affine = render(draw_patient(3))
    assert np.array_equal(image, patients[3][1])
    assert np.array_equal(label, patients[3][2])
    assert np.array_equal(affine, patients[3][3])
    assert image.shape != patients[4][1].shape or not np.array_equal(image, patients[4][1])


def test_every_organ_is_there_with_a_plausible_volume(patients):
    for seed, _, label, affine in patients:
        millilitres = abs(np.linalg.det(affine[:3, :3])) / 1000
        assert set(np.unique(label)) == set(range(14))
        for organ, name in ORGANS.items():
            low, high = VOLUME[name]
            assert low < (label == organ).sum() * millilitres < high, f"{name} of patient {seed}"


def test_organs_stay_off_the_border_but_for_the_vessels_that_run_on(patients):
    for seed, _, label, _ in patients:
        inner = label[1:-1, 1:-1, 1:-1]
        for organ, name in ORGANS.items():
            if name not in ("esophagus", "aorta", "inferior_vena_cava"):
                assert (inner == organ).sum() == (label == organ).sum(), f"{name} of patient {seed}"


def test_organs_lie_on_the_right_side_in_scanner_coordinates(patients):
    """RAS: x grows to the patient's right, y to the front, z to the head."""
    for _, _, label, affine in patients:
        at = {name: centre_mm(label, affine, name) for name in ORGANS.values()}
        middle = at["aorta"][0]
        assert min(at[name][0] for name in ("liver", "right_kidney", "gallbladder", "inferior_vena_cava")) > middle
        assert max(at[name][0] for name in ("spleen", "left_kidney", "stomach", "left_adrenal_gland")) < middle
        assert at["stomach"][1] > at["left_kidney"][1] and at["gallbladder"][1] > at["right_kidney"][1]
        assert at["right_adrenal_gland"][2] > at["right_kidney"][2] and at["esophagus"][2] > at["pancreas"][2]


def test_label_and_image_agree(patients):
    """The mean HU inside uniform organs is the drawn value, so image and label have the same geometry."""
    for seed, image, label, _ in patients:
        for organ in (1, 6, 8):
            inside = label == organ
            for axis in range(3):
                inside &= np.roll(label == organ, 1, axis) & np.roll(label == organ, -1, axis)
            assert image[inside].mean() == pytest.approx(draw_patient(seed).organ_hu[organ], abs=12)


def test_one_threshold_does_not_find_the_liver(patients):
    for _, image, label, _ in patients:
        liver = image[label == 6]
        band = (image > np.percentile(liver, 5)) & (image < np.percentile(liver, 95))
        dice = 2 * (band & (label == 6)).sum() / (band.sum() + (label == 6).sum())
        assert dice < 0.75


def test_label_map_of_one_patient_does_not_fit_another(patients):
    scores = [mean_dice(one, other) for (_, _, one, _), (_, _, other, _) in combinations(patients, 2)]
    assert np.mean(scores) < 0.15 and np.max(scores) < 0.5
