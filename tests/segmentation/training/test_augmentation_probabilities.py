# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
from __future__ import annotations

import pytest

from bundles.common.errors import InputError
from bundles.segmentation.training.augmentation import KINDS, augmentation_probabilities


def test_what_is_not_named_does_not_happen():
    drawn = {"flip": [0.5] * 3, "noise": 1.0}
    assert augmentation_probabilities({"flip": 0.5, "noise": 1}) == {kind: drawn.get(kind, 0.0) for kind in KINDS}
    assert augmentation_probabilities({})["flip"] == [0.0] * 3


def test_each_axis_may_be_flipped_as_often_as_one_likes():
    assert augmentation_probabilities({"flip": [0.5, 0, 1]})["flip"] == [0.5, 0.0, 1.0]


@pytest.mark.parametrize(
    ("augmentation", "words"),
    [
        ({"flips": 0.5}, "names flips; available kinds: flip, rot90"),
        ({"flip": 1.5}, r"flip 1\.5 must be a probability"),
        ({"flip": True}, "flip True must be a probability"),
        ({"flip": [0.5, 2, 0]}, "flip 2 must be a probability"),
        ({"flip": [0.5, 0]}, r"flip \[0\.5, 0\] must be one probability, or one for each of the three axes"),
        ({"noise": [0.5, 0, 0]}, r"noise \[0\.5, 0, 0\] must be a probability"),
        (0.5, r"--augmentation 0\.5 must map kinds to probabilities"),
    ],
)
def test_what_is_no_probability_is_refused(augmentation, words):
    with pytest.raises(InputError, match=words):
        augmentation_probabilities(augmentation)
