# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""CT in HU passes whatever its padding; MR, PET, windowed, scaled and unsigned CT are doubted with the reason."""

from __future__ import annotations

import numpy as np
import pytest

from bundles.common.scans.hounsfield import doubt_of_hounsfield


@pytest.fixture(scope="module")
def ct() -> np.ndarray:
    """Air, lung, fat, soft tissue and bone in the shares of a chest."""
    generator = np.random.default_rng(0)
    tissues = {-1000: 50_000, -850: 15_000, -100: 10_000, 50: 20_000, 700: 5_000}
    return np.concatenate([generator.normal(value, 20, number) for value, number in tissues.items()]).round()


def doubt(voxels: np.ndarray) -> str | None:
    p95, p99_5 = np.percentile(voxels, (95, 99.5), method="inverted_cdf")
    return doubt_of_hounsfield(voxels.min(), voxels.max(), p95=p95, p99_5=p99_5)


def test_ct_in_hu_is_not_doubted(ct):
    assert doubt(ct) is None


@pytest.mark.parametrize("padding", [-1024, -2000, -2048, -3024, -32768])
def test_padding_is_no_reason_to_doubt(ct, padding):
    assert doubt(np.concatenate([ct, np.full(ct.size, padding)])) is None


def test_scan_cut_to_the_patient_is_not_doubted(ct):
    """OpenKBP: -1024 outside of the treated region, which is 2% of the volume."""
    assert doubt(np.concatenate([ct, np.full(50 * ct.size, -1024)])) is None


def test_window_of_the_pre_training_and_saturated_metal_are_not_doubted(ct):
    assert doubt(ct.clip(-1000, 1000)) is None
    assert doubt(np.concatenate([ct, np.full(ct.size // 50, 3071)])) is None


@pytest.mark.parametrize("window", [(-175, 250), (-160, 240), (-125, 275), (-1350, 150), (-1000, 400)])
def test_windowed_ct_is_doubted(ct, window):
    reason = doubt(ct.clip(*window))
    assert "windowed" in reason and f"{window[1]:g}" in reason


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-1, 1), (-3, 3)])
def test_scaled_ct_is_doubted(ct, low, high):
    scaled = low + (ct.clip(-1000, 1000) + 1000) / 2000 * (high - low)
    assert "scaled" in doubt(scaled)


def test_lost_intercept_is_doubted(ct):
    assert "intercept" in doubt((ct + 1024).clip(0, 4095))
    padded = np.concatenate([(ct + 1024).clip(0, 4095), np.full(ct.size // 2, -2000)])
    assert "intercept" in doubt(padded)


def test_mr_and_pet_are_doubted():
    generator = np.random.default_rng(0)
    assert "not CT" in doubt(generator.gamma(2, 100, 10_000).round())  # counts
    assert "not CT" in doubt(generator.gamma(2, 100, 10_000).round() - 40)  # overshoot of a resampling
    assert "not CT" in doubt(generator.gamma(2, 100_000, 10_000))
    assert "not CT" in doubt(generator.gamma(1, 5, 10_000) * 10)  # SUV


def test_normalised_mr_is_doubted():
    assert "scaled" in doubt(np.random.default_rng(0).normal(size=10_000))


def test_constant_is_doubted():
    assert "every voxel is 7" in doubt(np.full(10, 7.0))
