# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""CT values are kept as int16 where that is exact, else as float32."""

import numpy as np
import pytest

from bundles.common.scans.int16_voxels import int16_or_float32


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (np.array([-32768.0, 0.0, 32767.0]), np.int16),
        (np.array([-32769.0, 0.0]), np.float32),
        (np.array([0.0, 32768.0]), np.float32),
        (np.array([0.0, 0.5]), np.float32),
        (np.array([0.0, np.nan], np.float32), np.float32),
        (np.array([0.0, np.inf], np.float32), np.float32),
        (np.array([0, 32767], np.uint16), np.int16),
        (np.array([0, 32768], np.uint16), np.float32),
        (np.array([-(2**20), 3], np.int64), np.float32),
        (np.array([True, False]), np.int16),
    ],
)
def test_int16_only_if_no_value_changes(values, dtype):
    converted = int16_or_float32(values)
    assert converted.dtype == dtype
    np.testing.assert_array_equal(converted, values)


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_what_has_the_right_type_is_not_copied(dtype):
    values = np.array([[0.5, 2], [3, 4]]).astype(dtype)
    assert int16_or_float32(values) is values
    assert int16_or_float32(values, order="C") is values


@pytest.mark.parametrize("value", [0.5, 1.0])
@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.float64])
def test_the_memory_layout_is_kept_or_made_contiguous(dtype, value):
    values = np.full((2, 3, 4), value, dtype, order="F")
    assert int16_or_float32(values).flags.f_contiguous
    assert int16_or_float32(values, order="C").flags.c_contiguous
