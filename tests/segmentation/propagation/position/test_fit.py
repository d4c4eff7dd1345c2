# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Fits find scale and shift in spite of outliers, and say which scans do not fit."""

from __future__ import annotations

import numpy as np
import pytest

from bundles.segmentation.propagation.position.fit import PositionFit, align, fit_positions, profiles_of


def scan(scale=(1.0, 1.0, 1.0), shift=(0.0, 0.0, 0.0), noise=0.0, outliers=0.0, number=4000, seed=0):
    random = np.random.default_rng(seed)
    true = random.uniform([-200, -150, -300], [200, 150, 300], size=(number, 3))
    predicted = np.array(scale) * true + np.array(shift) + noise * random.standard_normal((number, 3))
    wrong = random.random(number) < outliers
    predicted[wrong] += random.uniform(100, 400, size=(wrong.sum(), 3))
    return true, predicted


def test_scale_shift_and_residual_are_found():
    fit = fit_positions(*scan((0.9, 1.1, 1.05), (10, -20, 400), noise=10))
    np.testing.assert_allclose(fit.scale, (0.9, 1.1, 1.05), atol=0.01)
    np.testing.assert_allclose(fit.shift, (10, -20, 400), atol=1)
    np.testing.assert_allclose(fit.residual, 10 * np.sqrt(2 / np.pi), rtol=0.05)


def test_a_tenth_of_wrong_voxels_hardly_matters():
    true, predicted = scan((0.9, 1.1, 1.05), (10, -20, 400), noise=10, outliers=0.1)
    fit = fit_positions(true, predicted)
    np.testing.assert_allclose(fit.scale, (0.9, 1.1, 1.05), atol=0.02)
    np.testing.assert_allclose(fit.shift, (10, -20, 400), atol=4)
    plain = [np.polyfit(true[:, axis], predicted[:, axis], 1) for axis in range(3)]
    assert all(abs(line[1] - shift) > 15 for line, shift in zip(plain, (10, -20, 400), strict=True))


def shrunk(position):
    """What an unsure network says: right in the middle of the region, and too close to it elsewhere."""
    return 80 * np.tanh(position / 150)


def seen(scale, shift, *, low=-300.0, high=300.0, seed=0):
    """Profiles of a scan that is ``scale`` times as large as the average body and shifted, cut off along z."""
    random = np.random.default_rng(seed)
    average = random.uniform([-200, -150, low], [200, 150, high], size=(20_000, 3))
    true = average * np.array(scale) + np.array(shift)
    return profiles_of(true, shrunk(average) + random.normal(0, 5, average.shape))


def test_profiles_are_medians_of_slices():
    true, predicted = scan((0.9, 1.1, 1.05), (10, -20, 400), noise=5, outliers=0.1)
    for axis, (at, says) in enumerate(profiles_of(true, predicted)):
        assert np.ptp(np.diff(at)) < 1e-9 and at[1] - at[0] == 5
        expected = np.array((0.9, 1.1, 1.05))[axis] * np.array(at) + (10, -20, 400)[axis]
        assert np.abs(np.array(says) - expected).mean() < 4


def test_scans_are_laid_over_each_other_although_the_network_is_unsure():
    one, other = seen((1.0, 1.1, 0.9), (10, -20, 400)), seen((1.1, 1.0, 1.0), (-30, 40, -700), seed=1)
    found = align(one, other)
    np.testing.assert_allclose(found.scale, (1.1, 1 / 1.1, 1 / 0.9), rtol=0.06)  # a size of 1 is preferred
    middle = np.array(found.scale) * (10, -20, 400) + np.array(found.shift)
    np.testing.assert_allclose(middle, (-30, 40, -700), atol=6)
    assert max(found.residual) < 4 and found.common > 0.9
    # Straight lines through the same maps would differ in scale, because the parts of the body differ.
    part = seen((1.0, 1.0, 1.0), (0, 0, 0), low=-300, high=0)
    found = align(part, other)
    np.testing.assert_allclose(found.scale[2] * -150 + found.shift[2], -150 - 700, atol=10)
    assert found.common > 0.9 and align(other, part).common == pytest.approx(0.5, abs=0.07)


def test_what_the_network_says_otherwise_is_the_residual():
    one = seen((1, 1, 1), (0, 0, 0))
    raised = tuple((at, tuple(value + 200 for value in says)) for at, says in one)
    assert min(align(one, raised).residual) > 50 and max(align(one, one).residual) < 1


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        ((1.0, -1.0, 1.0), "y axis is mirrored or turned"),
        ((1.0, 1.0, 2.0), "z axis has scale 2.00, not 0.3 to 1.4"),
        ((0.9, 1.0, 0.1), "z axis has scale 0.10, not 0.3 to 1.4: another region?"),
        ((0.8, 1.3, 0.5), None),
    ],
)
def test_scans_that_do_not_fit_are_named(scale, words):
    problem = PositionFit(scale, (0, 0, 0), (5, 5, 5)).problem(scales=(0.3, 1.4))
    assert problem is None if words is None else words in problem


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="expected two arrays"):
        fit_positions(np.zeros((1, 3)), np.zeros((1, 3)))
