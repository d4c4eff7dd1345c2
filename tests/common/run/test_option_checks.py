# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
from __future__ import annotations

import pytest

from bundles.common.errors import InputError
from bundles.common.run.option_checks import check_options


def test_good_values_pass():
    check_options(
        whole={"sw_batch_size": 4},
        above_zero={"learning_rate": 1e-4},
        zero_or_above={"warmup_steps": 0, "weight_decay": 1e-5},
        true_or_false={"resume": False},
        spacing=[1.5, 1.5, 2],
        hu_window=[-175.0, 250.0],
        overlap=0.5,
    )
    check_options(overlap=[0.5, 0.5, 0.25])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"whole": {"sw_batch_size": 0}}, "--sw_batch_size 0 must be a whole number"),
        ({"whole": {"batch_size": "x"}}, "--batch_size 'x' must be a whole number"),
        ({"whole": {"batch_size": 1.5}}, "--batch_size 1.5 must be a whole number"),
        ({"whole": {"batch_size": True}}, "--batch_size True must be a whole number"),
        ({"above_zero": {"learning_rate": "abc"}}, "--learning_rate 'abc' must be a number above 0"),
        ({"above_zero": {"learning_rate": 0}}, "--learning_rate 0 must be a number above 0"),
        ({"zero_or_above": {"background_weight": -3}}, "--background_weight -3 must be a number, 0 or above"),
        ({"zero_or_above": {"background_weight": float("nan")}}, "--background_weight nan must be"),
        ({"true_or_false": {"resume": "yes"}}, "--resume 'yes' must be true or false"),
        ({"spacing": [1.5, 0, 2]}, r"--spacing \[1.5, 0, 2\] must be three sizes"),
        ({"spacing": "x"}, "--spacing 'x' must be three sizes"),
        ({"spacing": [1.5]}, r"--spacing \[1.5\] must be three sizes"),
        ({"hu_window": [250, -175]}, r"--hu_window \[250, -175\] must be two values"),
        ({"hu_window": 5}, "--hu_window 5 must be two values"),
        ({"overlap": 1.0}, "--overlap 1.0 must be a share"),
        ({"overlap": "x"}, "--overlap 'x' must be a share"),
    ],
)
def test_bad_values_are_named(options, words):
    with pytest.raises(InputError, match=words):
        check_options(**options)
