# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
from __future__ import annotations

import numpy as np

from bundles.common.data.label_values import whole_labels


def test_rounding_errors_become_whole_and_all_else_stays():
    values = np.array([1.0000001, 0.9995, 2.0011, -0.0005, 0.5, np.nan, np.inf, 255.0])
    expected = [1.0, 1.0, 2.0011, 0.0, 0.5, np.nan, np.inf, 255.0]
    np.testing.assert_array_equal(whole_labels(values), expected)


def test_whole_numbers_are_the_same_array():
    values = np.array([0, 1, 2], np.uint8)
    assert whole_labels(values) is values
