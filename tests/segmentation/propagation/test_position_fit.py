# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Fits find scale and shift in spite of outliers, and say which scans do not fit."""

from __future__ import annotations

import numpy as np
import pytest

from bundles.segmentation.propagation.position_fit import (
    PositionFit,
    covered,
    fit_positions,
    from_one_to_other,
    nearest,
    share_in_common,
)


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


def test_positions_of_one_scan_are_carried_to_those_of_the_other_through_the_average_body():
    one = PositionFit((0.9, 1.1, 1.0), (10, -20, 400), (5, 5, 5))
    other = PositionFit((1.2, 0.8, 1.1), (-3, 7, 100), (5, 5, 5))
    scale, shift = from_one_to_other(one, other)
    point = np.array([12.0, -30.0, 55.0])
    average = np.array(one.scale) * point + np.array(one.shift)
    np.testing.assert_allclose(scale * point + shift, (average - np.array(other.shift)) / np.array(other.scale))


@pytest.mark.parametrize(
    ("fit", "words"),
    [
        (PositionFit((1.0, -1.0, 1.0), (0, 0, 0), (5, 5, 5)), "y axis is mirrored or turned"),
        (PositionFit((1.0, 1.0, 1.0), (0, 0, 0), (20, 20, 50)), "off by 30 mm on average, more than 25"),
        (PositionFit((1.0, 1.0, 2.0), (0, 0, 0), (5, 5, 5)), "z axis has scale 2.00, not 0.7 to 1.4"),
        (PositionFit((0.8, 1.3, 1.0), (0, 0, 0), (20, 25, 30)), None),
    ],
)
def test_scans_that_do_not_fit_are_named(fit, words):
    problem = fit.problem(max_residual=25, scales=(0.7, 1.4))
    assert problem is None if words is None else words in problem


def test_the_nearest_scans_share_most_of_the_region():
    unit = PositionFit((1, 1, 1), (0, 0, 0), (1, 1, 1))

    def region(low, high):
        z = np.linspace(low, high, 1001)
        return covered(unit, np.stack([z, z, z], axis=1))

    target = region(0, 100)
    atlases = [region(-300, -200), region(50, 200), region(-100, 200), region(20, 110)]
    assert nearest(target, atlases, 3) == [2, 3, 1]
    assert share_in_common(atlases[0], target) == 0
    assert share_in_common(atlases[2], target) == pytest.approx(1)
    assert share_in_common(atlases[1], target) == pytest.approx(0.5, abs=0.02)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="expected two arrays"):
        fit_positions(np.zeros((1, 3)), np.zeros((1, 3)))
