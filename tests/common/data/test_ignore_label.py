# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
from __future__ import annotations

import pytest

from bundles.common.data.ignore_label import ignored_value
from bundles.common.errors import InputError

LABELS = {"0": "background", "1": "liver"}


@pytest.mark.parametrize("value", [None, 255, 2])
def test_a_value_that_is_no_class_is_unknown(value):
    assert ignored_value(ignore_label=value, labels=LABELS) == value


def test_a_declared_255_is_a_class():
    assert ignored_value(ignore_label=255, labels=map(str, range(256))) is None


def test_a_class_cannot_be_chosen_as_unknown():
    with pytest.raises(InputError, match="--ignore_label 1 is also a declared label.*None"):
        ignored_value(ignore_label=1, labels=LABELS)


def test_the_value_that_the_list_declares_comes_before_the_default():
    assert ignored_value(ignore_label=255, labels=LABELS, of_list=2) == 2
    assert ignored_value(ignore_label=2, labels=LABELS, of_list=2) == 2
    for other in (None, 3):
        with pytest.raises(InputError, match=f"--ignore_label is {other}, but the data list declares 2"):
            ignored_value(ignore_label=other, labels=LABELS, of_list=2)
    with pytest.raises(InputError, match="--ignore_label 1 is also a declared label"):
        ignored_value(ignore_label=255, labels=LABELS, of_list=1)
