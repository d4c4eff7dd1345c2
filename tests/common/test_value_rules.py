# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Rules accept what they name, at its limits, and refuse values of every other type with a message."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bundles.common import value_rules as rules
from bundles.common.errors import InputError

NOT_NUMBERS = (None, "x", "1", "", [], [1], {}, object(), math.nan, math.inf, -math.inf, True, False)


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        ("WHOLE", (0, 1, 10**9, np.int64(3)), (-1, 1.0, 0.5)),
        ("COUNT", (1, 2, np.int64(3)), (0, -1, 1.0)),
        ("NUMBER", (0, -1.5, np.float32(2)), ()),
        ("ABOVE_ZERO", (1e-9, 3), (0, -1e-9)),
        ("ZERO_OR_ABOVE", (0, 0.0, 3), (-1e-9,)),
        ("SHARE", (0, 0.5, 1), (-0.01, 1.01)),
        ("SHARE_BELOW_ONE", (0, 0.99), (1, -0.01)),
        ("SHARE_ABOVE_ZERO", (0.01, 1), (0, 1.01)),
    ],
)
def test_limits_and_types(rule, good, bad):
    rule = getattr(rules, rule)
    for value in good:
        rule.check("name", value)
    for value in (*bad, *NOT_NUMBERS):
        with pytest.raises(InputError) as caught:
            rule.check("name", value)
        assert str(caught.value) == f"--name {value!r} {rule.expected}."


def test_switches_are_true_and_false_alone():
    rules.SWITCH.check("resume", False)
    for value in (0, 1, "true", None):
        with pytest.raises(InputError, match="--resume .* must be true or false"):
            rules.SWITCH.check("resume", value)


def test_null_is_allowed_where_it_has_a_meaning():
    workers = rules.WORKERS
    for value in (None, 0, 4):
        workers.check("workers", value)
    with pytest.raises(
        InputError, match=r"^--workers -1 must be a whole number, 0 or more, or null for one per core\.$"
    ):
        workers.check("workers", -1)


def test_a_whole_number_has_the_limit_that_it_is_given():
    rules.whole_from(8).check("bins", 8)
    with pytest.raises(InputError, match="--bins 7 must be a whole number, 8 or more"):
        rules.whole_from(8).check("bins", 7)


def test_a_choice_is_checked_where_its_values_are_known():
    rules.check_choice(name="layout", value="official", choices=["official", "encoder"])
    with pytest.raises(InputError, match="--layout 'new' is not one of official, encoder"):
        rules.check_choice(name="layout", value="new", choices=["official", "encoder"])


def test_lists_have_their_length():
    assert rules.is_list([1, 2.5], 2) and rules.is_list((0, 0, 0), 3)
    assert not any(rules.is_list(value, 2) for value in ([1], [1, 2, 3], "ab", None, [1, "x"], [1, math.nan]))
