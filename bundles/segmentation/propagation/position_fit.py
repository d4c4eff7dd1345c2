# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Lay a scan over others by its map of positions: a scale and a shift by axis, and how badly they fit.

A position network predicts for every voxel where in an average body it is. Along each axis, the position in the scan (mm)
is fitted to the predicted one by ``predicted = scale * scan + shift``. Two scans with such fits are laid over each other by
going through the predicted position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ROUNDS = 20  # of reweighting; the weights settle in fewer
TUNING = 1.345  # Huber's constant in robust standard deviations: 95% efficiency for normal errors
MAD = 1.4826  # from the median absolute deviation to the standard deviation of a normal distribution
AXES = ("x", "y", "z")


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

    def problem(self, *, max_residual: float, scales: tuple[float, float]) -> str | None:
        """Return why the scan should be left out, or None.

        Args:
            max_residual: largest mean residual over the axes, in mm.
            scales: smallest and largest scale of an axis.
        """
        for axis, scale in zip(AXES, self.scale, strict=True):
            if scale <= 0:
                return f"its {axis} axis is mirrored or turned (scale {scale:.2f})"
        mean = float(np.mean(self.residual))
        if mean > max_residual:
            return f"its positions are off by {mean:.0f} mm on average, more than {max_residual:.0f}: another region?"
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


def from_one_to_other(one: PositionFit, other: PositionFit) -> tuple[np.ndarray, np.ndarray]:
    """Return scale and shift by axis, (3,) each, that map positions (mm) of one scan onto those of the other."""
    scale = np.array(one.scale) / np.array(other.scale)
    return scale, (np.array(one.shift) - np.array(other.shift)) / np.array(other.scale)


def covered(fit: PositionFit, true: np.ndarray) -> np.ndarray:
    """Return the range of positions in the average body that a scan covers, (3, 2), from its body voxels (N, 3) in mm."""
    ends = np.percentile(true, [1, 99], axis=0).T  # (3, 2)
    return ends * np.array(fit.scale)[:, None] + np.array(fit.shift)[:, None]


def share_in_common(one: np.ndarray, other: np.ndarray) -> float:
    """Return the share of ``other``'s length along z that ``one`` covers, from two results of `covered`."""
    low, high = max(one[2, 0], other[2, 0]), min(one[2, 1], other[2, 1])
    return float(max(0.0, high - low) / max(other[2, 1] - other[2, 0], 1e-9))


def nearest(target: np.ndarray, atlases: Sequence[np.ndarray], number: int) -> list[int]:
    """Return the indices of the ``number`` labelled scans that share most of the region of a scan, best first."""
    shares = [share_in_common(atlas, target) for atlas in atlases]
    return sorted(range(len(atlases)), key=lambda index: (-shares[index], index))[:number]
