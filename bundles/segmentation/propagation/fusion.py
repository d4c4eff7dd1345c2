# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Fuse the labels that several scans carried to one scan: votes weighted by how alike the scans look there (likeness).

Locally weighted voting: Artaechevarria et al., IEEE TMI 2009 (weights from local cross-correlation, raised to a gain),
and Sabuncu et al., IEEE TMI 2010 (the model behind it).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import uniform_filter

from ...common.data.ignore_label import IGNORE_LABEL
from ...common.errors import InputError
from ...common.value_rules import ABOVE_ZERO, SHARE

IGNORE = IGNORE_LABEL  # label of voxels without an answer; training leaves them out
NOISE = 20.0  # HU, standard deviation in an even organ of abdominal CT
SLAB_VOXELS = 2**22  # voxels that are compared at once: about half a gigabyte of working memory
EPSILON = 1e-6  # shares that differ by less are equal


@dataclass(frozen=True)
class Fused:
    """The fused label of a scan.

    Attributes:
        label: uint8 (X, Y, Z); `IGNORE` where there is no answer.
        confidence: float32 (X, Y, Z), from 0 to 1, of the class that has most votes.
        alone: bool (X, Y, Z), where one scan alone can judge that class: confidence is its likeness.
    """

    label: np.ndarray
    confidence: np.ndarray
    alone: np.ndarray

    def sure(self, *, threshold: float, alone: float) -> np.ndarray:
        """Return the label map, uint8 (X, Y, Z), with `IGNORE` where confidence is too low.

        Args:
            threshold: share of the votes that a voxel needs, from 0 to 1.
            alone: likeness that it needs where one scan alone can judge. Likeness is lower than a share of votes.

        Raises:
            InputError: a value is out of range.
        """
        SHARE.check("threshold", threshold)
        SHARE.check("min_confidence", alone)
        return np.where(self.confidence < np.where(self.alone, alone, threshold), IGNORE, self.label).astype(np.uint8)


def local_likeness(
    fixed: np.ndarray,
    moved: np.ndarray,
    *,
    spacing: Sequence[float],
    window: float = 15.0,
    hu_window: Sequence[float] = (-300.0, 900.0),
) -> np.ndarray:
    """Return how alike two scans look around each voxel: their normalised cross-correlation in a cube.

    Both variances, and the covariance, get the variance of noise (`NOISE`) on top. Without it the correlation inside an
    even organ would be that of two noises, about 0, however well the organs lie on each other; with it, two even
    windows are alike (1). A correlation cannot detect a different brightness: two even organs look alike.

    Args:
        fixed: (X, Y, Z) in HU.
        moved: the registered scan on the same voxels in HU; NaN where it has none, as from `carry_scan`.
        spacing: voxel size in mm.
        window: edge of the cube in mm; an odd number of voxels, at least 3, that is closest to it along each axis.
        hu_window: HU are clipped to it, so that metal does not decide.

    Returns:
        float32 (X, Y, Z) from 0 (not alike, or the opposite) to 1; 0 where ``moved`` is NaN. Windows that reach out of
        the volume, or of the moved scan, count only what is inside.

    Raises:
        InputError: the shapes differ, or a size is not above 0.
    """
    if fixed.shape != moved.shape or fixed.ndim != 3:
        raise InputError(
            f"The scan has the shape {fixed.shape}, the registered one {moved.shape}: both must be the same (X, Y, Z)."
        )
    if len(spacing) != 3 or not all(size > 0 for size in spacing) or not window > 0:
        raise InputError(f"spacing is {list(spacing)} mm and window {window} mm: all must be above 0.")
    size = [max(3, 2 * round((window / step - 1) / 2) + 1) for step in spacing]
    likeness, halo = np.empty(fixed.shape, np.float32), size[2] // 2
    for slab in _slabs(fixed.shape):
        seen_by_slab = slice(max(0, slab.start - halo), slab.stop + halo)
        alike = _likeness(fixed[:, :, seen_by_slab], moved[:, :, seen_by_slab], size, hu_window)
        first = slab.start - seen_by_slab.start
        likeness[:, :, slab] = alike[:, :, first : first + slab.stop - slab.start]
    return likeness


def _slabs(shape: Sequence[int]) -> Iterator[slice]:
    """Yield slices of z that together are a volume: what is computed at once takes a hundred bytes per voxel."""
    thickness = max(1, SLAB_VOXELS // (shape[0] * shape[1]))
    for first in range(0, shape[2], thickness):
        yield slice(first, min(first + thickness, shape[2]))


def _likeness(fixed: np.ndarray, moved: np.ndarray, size: Sequence[int], hu_window: Sequence[float]) -> np.ndarray:
    seen = np.isfinite(moved)
    one, other = (np.clip(np.where(seen, scan, 0), *hu_window).astype(np.float64) * seen for scan in (fixed, moved))

    def mean(values: np.ndarray) -> np.ndarray:
        return uniform_filter(values, size, mode="constant")

    count = np.maximum(mean(seen.astype(np.float64)), EPSILON)
    mean_one, mean_other = mean(one) / count, mean(other) / count
    noise = NOISE**2
    variance_one = np.maximum(mean(one * one) / count - mean_one**2, 0) + noise
    variance_other = np.maximum(mean(other * other) / count - mean_other**2, 0) + noise
    covariance = mean(one * other) / count - mean_one * mean_other + noise
    likeness = np.clip(covariance / np.sqrt(variance_one * variance_other), 0, 1)
    return np.where(seen, likeness, 0).astype(np.float32)


def fuse(
    labels: Sequence[np.ndarray],
    likeness: Sequence[np.ndarray],
    *,
    holds: Sequence[Collection[int]],
    gain: float = 1.0,
) -> Fused:
    """Fuse carried labels of one scan.

    A class's share of a voxel is the weight of the labelled scans that vote for it, over the weight of those that can
    judge it. These hold the class in their label map (``holds``). A scan that lacks an organ abstains: its background
    is not a vote against the organ. If it has another organ there, that is one. A carried label `IGNORE` is not a vote
    at all. The class with the largest share wins.

    Confidence is the share of the winner. Where only one scan can judge it, its share is always 1 and says nothing:
    there the scan's likeness is the confidence. With one labelled scan this is so everywhere, and confidence means that
    the two scans look alike around the voxel after registration. It is not a probability, and it does not notice a
    label that lies in the wrong place that looks the same.

    A voxel without an answer is `IGNORE`, never background: where the first two classes have equal shares, and where
    nobody votes or no vote has weight (confidence 0).

    Args:
        labels: uint8 (X, Y, Z) for each labelled scan, from `carry_label`.
        likeness: (X, Y, Z) from 0 to 1 for each, from `local_likeness`.
        holds: label values that occur in each labelled scan's own label map; the background 0 need not be named.
        gain: weights are the likeness to this power; above 1 trusts the most alike scan more.

    Raises:
        InputError: nothing to fuse, lengths or shapes differ, a value is out of range, or a carried label has a class
            that its labelled scan does not hold.
    """
    _check(labels, likeness, holds, gain)
    holds = [{0, *map(int, classes)} - {IGNORE} for classes in holds]
    shape = np.shape(labels[0])
    label, confidence, alone = (np.empty(shape, kind) for kind in (np.uint8, np.float32, bool))
    for slab in _slabs(shape):
        votes = [np.asarray(each)[:, :, slab] for each in labels]
        alike = [np.asarray(each, dtype=np.float32)[:, :, slab] for each in likeness]
        label[:, :, slab], confidence[:, :, slab], alone[:, :, slab] = _fuse(votes, alike, holds, gain)
    return Fused(label, confidence, alone)


def _fuse(
    votes: Sequence[np.ndarray],
    likeness: Sequence[np.ndarray],
    holds: Sequence[Collection[int]],
    gain: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    weights = [alike ** np.float32(gain) for alike in likeness]
    shape = votes[0].shape
    winner = np.full(shape, IGNORE, np.uint8)
    best, second, confidence = (np.zeros(shape, np.float32) for _ in range(3))
    alone = np.zeros(shape, bool)
    for value in sorted(set.union(*holds)):
        agree, judge, alike = (np.zeros(shape, np.float32) for _ in range(3))
        judges = np.zeros(shape, np.uint8)
        for vote, weight, own, classes in zip(votes, weights, likeness, holds, strict=True):
            judging = vote != IGNORE
            if value not in classes:
                judging &= vote != 0
            judge += np.where(judging, weight, 0)
            agree += np.where(vote == value, weight, 0)
            alike += np.where(vote == value, own, 0)
            judges += judging
        share = np.divide(agree, judge, out=np.zeros(shape, np.float32), where=judge > 0)
        better = share > best + EPSILON
        second = np.where(better, best, np.maximum(second, share))
        best = np.where(better, share, best)
        winner[better] = value
        single = judges == 1
        alone[better] = single[better]
        confidence[better] = np.where(single, alike, share)[better]
    return np.where(best - second <= EPSILON, IGNORE, winner).astype(np.uint8), confidence, alone


def _check(
    labels: Sequence[np.ndarray],
    likeness: Sequence[np.ndarray],
    holds: Sequence[Collection[int]],
    gain: float,
) -> None:
    if not len(labels) == len(likeness) == len(holds) or not len(labels):
        raise InputError(
            f"{len(labels)} carried labels, {len(likeness)} maps of likeness and the classes of {len(holds)} labelled "
            "scans: give one of each for every labelled scan, and at least one."
        )
    shapes = {np.shape(array) for array in (*labels, *likeness)}
    if len(shapes) > 1:
        raise InputError(f"Labels and likeness have the shapes {sorted(shapes)}: all must be on the same voxels.")
    ABOVE_ZERO.check("gain", gain)
    for i, (label, alike, classes) in enumerate(zip(labels, likeness, holds, strict=True)):
        strange = set(np.unique(label).tolist()) - {0, IGNORE, *map(int, classes)}
        if strange:
            raise InputError(
                f"Carried label {i} has the classes {sorted(strange)}, which its labelled scan does not hold: "
                f"{sorted(map(int, classes))}."
            )
        if not (np.min(alike) >= 0 and np.max(alike) <= 1):  # false for NaN as well
            raise InputError(f"Likeness {i} ranges from {np.min(alike)} to {np.max(alike)}: it must be from 0 to 1.")
