# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Votes are weighted by likeness, a scan without an organ abstains, and doubt is 255, never background."""

from __future__ import annotations

import numpy as np
import pytest

from bundles.common.errors import InputError
from bundles.segmentation.propagation.fusion import IGNORE, NOISE, fuse, local_likeness


def row(*values, dtype=np.uint8):
    """A volume of one row."""
    return np.array(values, dtype).reshape(-1, 1, 1)


def votes(*columns, weights, holds, threshold=0.0, gain=1.0):
    """Fuse the labels of one voxel."""
    fused = fuse(
        [row(value) for value in columns],
        [row(weight, dtype=np.float32) for weight in weights],
        holds=holds,
        gain=gain,
    )
    return int(fused.sure(threshold=threshold, alone=threshold).item()), pytest.approx(
        float(fused.confidence.item()), abs=1e-6
    )


def test_the_larger_weight_wins_and_its_share_is_the_confidence():
    both = [{1, 2}] * 3
    assert votes(1, 2, 2, weights=(0.9, 0.3, 0.2), holds=both) == (1, 0.9 / 1.4)
    assert votes(1, 2, 2, weights=(0.4, 0.3, 0.2), holds=both) == (2, 0.5 / 0.9)
    assert votes(0, 0, 2, weights=(0.4, 0.3, 0.2), holds=both) == (0, 0.7 / 0.9)


def test_gain_trusts_the_most_alike_scan_more():
    assert votes(1, 2, 2, weights=(0.8, 0.5, 0.5), holds=[{1, 2}] * 3) == (2, 1 / 1.8)
    assert votes(1, 2, 2, weights=(0.8, 0.5, 0.5), holds=[{1, 2}] * 3, gain=2) == (1, 0.64 / 1.14)


def test_random_votes_equal_a_slow_count():
    rng = np.random.default_rng(3)
    shape, holds = (5, 4, 3), [{1, 2, 3}, {1, 3}, {2}]
    labels = [rng.choice([0, *classes, IGNORE], shape).astype(np.uint8) for classes in holds]
    likeness = [rng.uniform(0, 1, shape).astype(np.float32) for _ in holds]
    fused = fuse(labels, likeness, holds=holds)
    label = fused.sure(threshold=0.55, alone=0.4)
    kinds = set()
    for at in np.ndindex(shape):
        shares, sure, least = {}, {}, {}
        for value in (0, 1, 2, 3):
            judges = [
                i
                for i in range(3)
                if labels[i][at] != IGNORE and (value == 0 or value in holds[i] or labels[i][at] != 0)
            ]
            agree = [i for i in judges if labels[i][at] == value]
            if agree:
                shares[value] = sum(likeness[i][at] for i in agree) / sum(likeness[i][at] for i in judges)
                sure[value] = shares[value] if len(judges) > 1 else likeness[agree[0]][at]
                least[value] = 0.55 if len(judges) > 1 else 0.4
        ranked = sorted(shares, key=shares.get, reverse=True)
        tied = len(ranked) > 1 and abs(shares[ranked[0]] - shares[ranked[1]]) < 1e-6
        confident = bool(ranked) and (tied or sure[ranked[0]] >= least[ranked[0]])
        expected = ranked[0] if confident and not tied else IGNORE
        kinds.add(expected)
        assert label[at] == expected, at
        assert fused.label[at] == (ranked[0] if ranked and not tied else IGNORE), at
        if ranked and not tied:
            assert fused.confidence[at] == pytest.approx(sure[ranked[0]], abs=1e-5)
    assert kinds == {0, 1, 2, 3, IGNORE}


def test_a_scan_that_lacks_an_organ_abstains_with_its_background_but_not_with_another_organ():
    # Scan 0 holds class 2, scans 1 and 2 do not. Their background weighs more and is no vote against class 2.
    assert votes(2, 0, 0, weights=(0.7, 0.9, 0.9), holds=[{1, 2}, {1}, {1}]) == (2, 0.7)
    # If they held it, background would win.
    assert votes(2, 0, 0, weights=(0.7, 0.9, 0.9), holds=[{1, 2}] * 3) == (0, 1.8 / 2.5)
    # Another organ in its place contradicts.
    assert votes(2, 1, 0, weights=(0.7, 0.9, 0.9), holds=[{1, 2}, {1}, {1}])[0] == 2
    assert votes(2, 1, 1, weights=(0.7, 0.9, 0.9), holds=[{1, 2}, {1}, {1}]) == (1, 1.8 / 2.5)


def test_outside_of_its_field_of_view_a_scan_has_no_vote():
    assert votes(1, IGNORE, IGNORE, weights=(0.4, 0.9, 0.9), holds=[{1}] * 3) == (1, 0.4)
    assert votes(IGNORE, IGNORE, weights=(0.9, 0.9), holds=[{1}] * 2) == (IGNORE, 0)


def test_doubt_is_ignored_and_never_background():
    holds = [{1}] * 2
    assert votes(1, 0, weights=(0.5, 0.5), holds=holds) == (IGNORE, 0.5)  # equal shares, at a threshold of 0
    assert votes(0, 0, weights=(0.0, 0.0), holds=holds) == (IGNORE, 0)  # nobody has weight
    assert votes(1, 0, weights=(0.3, 0.7), holds=holds, threshold=0.71)[0] == IGNORE
    assert votes(1, 0, weights=(0.3, 0.7), holds=holds, threshold=0.69)[0] == 0
    assert votes(1, 0, weights=(0.7, 0.3), holds=holds, threshold=0.71)[0] == IGNORE
    assert votes(1, 0, weights=(0.7, 0.3), holds=holds, threshold=0.69)[0] == 1


def test_the_confidence_of_one_labelled_scan_is_its_likeness():
    fused = fuse(
        [row(1, 0, 1, 0)],
        [row(0.9, 0.8, 0.3, 0.2, dtype=np.float32)],
        holds=[{1}],
        gain=3,
    )
    assert fused.label.ravel().tolist() == [1, 0, 1, 0]
    assert fused.sure(threshold=0.95, alone=0.25).ravel().tolist() == [1, 0, 1, IGNORE]
    assert fused.confidence.ravel() == pytest.approx([0.9, 0.8, 0.3, 0.2])
    assert fused.alone.all()


def test_where_one_scan_judges_alone():
    """Class 2 is in scan 0 alone; the second voxel lies in its field of view alone; at the third both vote."""
    fused = fuse(
        [row(2, 1, 1, 2), row(0, IGNORE, 1, 1)],
        [row(0.4, 0.4, 0.9, 0.1, dtype=np.float32), row(0.9, 0.9, 0.9, 0.9, dtype=np.float32)],
        holds=[{1, 2}, {1}],
    )
    assert fused.label.ravel().tolist() == [2, 1, 1, 1]
    assert fused.alone.ravel().tolist() == [True, True, False, False]
    assert fused.confidence.ravel() == pytest.approx([0.4, 0.4, 1.0, 0.9])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"holds": [{1}]}, "classes of 1 labelled"),
        ({"labels": [], "likeness": [], "holds": []}, "at least one"),
        ({"labels": [row(1), row(1, 1)]}, "same voxels"),
        ({"labels": [row(1), row(2)]}, r"Carried label 1 has the classes \[2\]"),
        ({"gain": 0}, "--gain 0 must be"),
        ({"likeness": [row(0.5, dtype=float), row(np.nan, dtype=float)]}, "Likeness 1 ranges"),
    ],
)
def test_refusals(change, message):
    given = {"labels": [row(1), row(1)], "likeness": [row(0.5, dtype=float)] * 2, "holds": [{1}] * 2}
    given |= change
    with pytest.raises(InputError, match=message):
        fuse(given.pop("labels"), given.pop("likeness"), **given)


@pytest.mark.parametrize("wrong", [1.5, float("nan"), "x"])
def test_a_confidence_out_of_range_is_refused(wrong):
    fused = fuse([row(1)], [row(0.5, dtype=float)], holds=[{1}])
    with pytest.raises(InputError, match=f"--threshold {wrong!r} must be a number from 0 to 1"):
        fused.sure(threshold=wrong, alone=0.3)
    with pytest.raises(InputError, match=f"--min_confidence {wrong!r} must be a number from 0 to 1"):
        fused.sure(threshold=0.6, alone=wrong)


def test_likeness_equals_a_slow_correlation_with_noise():
    rng = np.random.default_rng(0)
    fixed, moved = rng.normal(50, 60, (2, 8, 7, 6))
    moved = (moved + fixed) / 2
    moved[0] = np.nan
    alike = local_likeness(fixed, moved, spacing=(5, 3, 9), window=15)
    for at in [(4, 3, 3), (1, 0, 5), (7, 6, 0)]:
        box = tuple(slice(max(i - half, 0), i + half + 1) for i, half in zip(at, (1, 2, 1), strict=True))
        one, other = fixed[box], moved[box]
        seen = np.isfinite(other)
        covariance = np.cov(one[seen], other[seen], bias=True) + NOISE**2
        expected = covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1])
        assert alike[at] == pytest.approx(max(expected, 0), abs=1e-5)
    assert (alike[0] == 0).all() and alike[1:].max() <= 1 and alike[1:].mean() > 0.5


def test_likeness_of_equal_even_and_opposite_windows():
    rng = np.random.default_rng(1)
    edge = np.where(np.arange(12)[:, None, None] < 6, 0.0, 200.0) * np.ones((12, 9, 9))
    assert local_likeness(edge, edge, spacing=(5, 5, 5)) == pytest.approx(np.ones(edge.shape), abs=1e-6)
    even = local_likeness(*rng.normal(100, 10, (2, 9, 9, 9)), spacing=(5, 5, 5))
    assert even.mean() > 0.75  # noise of 10 HU does not make an organ unlike
    inverse = local_likeness(edge, 200 - edge, spacing=(5, 5, 5))
    assert inverse[5:7].max() == 0  # at the edge, the opposite
    brighter = local_likeness(edge, 1.5 * edge + 30, spacing=(5, 5, 5))
    assert brighter.min() > 0.95  # another phase of contrast


def test_likeness_refuses_other_shapes():
    with pytest.raises(InputError, match="same"):
        local_likeness(np.zeros((3, 3, 3)), np.zeros((3, 3, 4)), spacing=(1, 1, 1))
    with pytest.raises(InputError, match="above 0"):
        local_likeness(np.zeros((3, 3, 3)), np.zeros((3, 3, 3)), spacing=(1, 1, 0))
