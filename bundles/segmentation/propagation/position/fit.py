# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Lay scans over each other by their maps of positions: a scale and a shift by axis, and how badly they fit.

A position network predicts for every voxel where in an average body it is. Along each axis, the position in the scan
(mm) is fitted to the predicted one by ``predicted = scale * scan + shift``; the line reveals scans of another region.
Two scans are laid over each other by comparing the predictions for both, slice by slice (`align`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ROUNDS = 20  # rounds of reweighting; the weights settle in fewer
TUNING = 1.345  # Huber's constant in robust standard deviations: 95% efficiency for normal errors
MAD = 1.4826  # factor from the median absolute deviation to the standard deviation of a normal distribution
AXES = ("x", "y", "z")
BIN = 5.0  # mm, of a bin of a profile
LEAST_IN_BIN = 0.1  # share of the mean number of voxels in a bin
SCALES_TRIED = tuple(np.geomspace(0.8, 1.25, 15).tolist())  # scales between two adults
STEP = 2.5  # mm between the shifts that are tried
LEAST_COVERED = 0.3  # share of the shorter scan
PER_LOG_SCALE = 20.0  # mm for a scale of e: another size must be worth it
PER_UNCOVERED = 10.0  # mm for a shorter scan that is not covered at all


@dataclass(frozen=True)
class PositionFit:
    """Fit of a scan's positions to those of the network, by axis (x to the right, y to the front, z to the head).

    Attributes:
        scale: predicted mm per mm of the scan, about 1. Negative: the axis is mirrored.
        shift: mm, in the network's positions.
        residual: mean absolute error in mm.
    """

    scale: tuple[float, float, float]
    shift: tuple[float, float, float]
    residual: tuple[float, float, float]

    def problem(self, *, scales: tuple[float, float]) -> str | None:
        """Return why the scan should be left out, or None.

        Args:
            scales: smallest and largest scale of an axis.
        """
        for axis, scale in zip(AXES, self.scale, strict=True):
            if scale <= 0:
                return f"its {axis} axis is mirrored or turned (scale {scale:.2f})"
        for axis, scale in zip(AXES, self.scale, strict=True):
            if not scales[0] <= scale <= scales[1]:
                return f"its {axis} axis has scale {scale:.2f}, not {scales[0]:g} to {scales[1]:g}: another region?"
        return None


def _huber_line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Return slope and intercept by iteratively reweighted least squares with Huber's weights (Huber, 1964)."""
    weights = np.ones_like(x)
    slope, intercept = 1.0, 0.0
    for _ in range(ROUNDS):
        total = weights.sum()
        mean_x, mean_y = (weights * x).sum() / total, (weights * y).sum() / total
        spread = (weights * (x - mean_x) ** 2).sum()
        slope = (weights * (x - mean_x) * (y - mean_y)).sum() / spread if spread else 0.0
        intercept = mean_y - slope * mean_x
        error = np.abs(y - slope * x - intercept)
        limit = TUNING * max(MAD * float(np.median(error)), 1e-6)
        weights = np.minimum(1.0, limit / np.maximum(error, 1e-12))
    return float(slope), float(intercept)


def fit_positions(true: np.ndarray, predicted: np.ndarray) -> PositionFit:
    """Fit the predicted positions of the body's voxels.

    Args:
        true: (N, 3), positions in the scan in mm.
        predicted: (N, 3), by the network in mm.

    Raises:
        ValueError: there are fewer than two voxels, or the shapes differ.
    """
    if true.shape != predicted.shape or true.ndim != 2 or true.shape[1] != 3 or len(true) < 2:
        raise ValueError(f"expected two arrays (N, 3) with N > 1, got {true.shape} and {predicted.shape}")
    lines = [_huber_line(true[:, axis].astype(float), predicted[:, axis].astype(float)) for axis in range(3)]
    residual = [
        float(np.abs(predicted[:, axis] - slope * true[:, axis] - shift).mean())
        for axis, (slope, shift) in enumerate(lines)
    ]
    scale, shift = zip(*lines, strict=True)
    return PositionFit(tuple(scale), tuple(shift), tuple(residual))


Profile = tuple[tuple[float, ...], tuple[float, ...]]


def profiles_of(true: np.ndarray, predicted: np.ndarray) -> tuple[Profile, Profile, Profile]:
    """Return along each axis where the network believes the slices of a body to be.

    Args:
        true: (N, 3), positions of the body's voxels in mm.
        predicted: (N, 3), by the network in mm.

    Returns:
        For each axis the middles of bins of `BIN` mm, and the median prediction in each. Bins with few voxels are left
        out.
    """
    profiles = []
    for axis in range(3):
        bins = np.floor(true[:, axis] / BIN).astype(int)
        numbers, counts = np.unique(bins, return_counts=True)
        kept = numbers[counts >= max(2, LEAST_IN_BIN * len(true) / len(numbers))]
        medians = [float(np.median(predicted[bins == number, axis])) for number in kept]
        profiles.append((tuple(((kept + 0.5) * BIN).tolist()), tuple(medians)))
    return tuple(profiles)


@dataclass(frozen=True)
class Alignment:
    """How one scan lies over another, by axis: position in the other = scale * position in the one + shift.

    Attributes:
        scale: sizes, near 1.
        shift: mm.
        residual: mm, mean difference of the two predictions where the scans overlap.
        common: share of the one's length along the body (z) that the other covers.
    """

    scale: tuple[float, float, float]
    shift: tuple[float, float, float]
    residual: tuple[float, float, float]
    common: float


def align(one: Sequence[Profile], other: Sequence[Profile]) -> Alignment:
    """Lay one scan over another by comparing what the network says about both.

    A network that is unsure predicts positions that are too close to the middle, in all scans of a region alike. So two
    scans are compared with each other, and not each with the truth: what is wrong in the same way in both does no harm.

    Args:
        one, other: from `profiles_of`.
    """
    found = [_align_axis(own, its) for own, its in zip(one, other, strict=True)]
    scale, shift, residual, common = zip(*found, strict=True)
    return Alignment(scale, shift, residual, common[2])


def _align_axis(one: Profile, other: Profile) -> tuple[float, float, float, float]:
    """Return scale, shift, residual in mm and common share along an axis, by trying all on a grid."""
    at, says = (np.array(values) for values in one)
    its_at, its_says = (np.array(values) for values in other)
    best = (np.inf, 1.0, 0.0, np.inf, 0.0)
    for scale in SCALES_TRIED:
        first, last = its_at[0] - scale * at[-1], its_at[-1] - scale * at[0]
        for shift in np.arange(first, last + STEP, STEP):
            moved = scale * at + shift
            inside = (moved >= its_at[0]) & (moved <= its_at[-1])
            # Enough of the shorter scan must be covered: a few slices fit anywhere.
            covered = inside.sum() / min(len(at), len(its_at))
            if covered < LEAST_COVERED:
                continue
            difference = float(np.abs(np.interp(moved[inside], its_at, its_says) - says[inside]).mean())
            cost = difference + PER_LOG_SCALE * abs(np.log(scale)) + PER_UNCOVERED * max(0.0, 1 - covered)
            if cost < best[0] - 1e-9:
                best = (cost, float(scale), float(shift), difference, float(inside.mean()))
    return best[1:]
