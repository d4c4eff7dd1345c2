# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Three middle slices of a scan, small enough to keep one of every scan of a data set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import zoom

SIDE = 96  # pixels of one small slice


def thumbnail(
    voxels: np.ndarray,
    *,
    spacing: Sequence[float],
    box: Sequence[Sequence[int]],
    window: tuple[float, float] | None,
) -> np.ndarray:
    """Draw the middle axial, coronal and sagittal slice of a box, small and in true proportions.

    Radiological convention, as in `overlay`: the patient's right (in the sagittal slice: anterior) is at the left, superior at the top.

    Args:
        voxels: (X, Y, Z) in RAS.
        spacing: mm per axis.
        box: half-open ``[[low, high], ...]``, the body; an empty one stands for the whole scan.
        window: values shown black and white; None for the 0.5th and 99.5th percentile of the three slices.

    Returns:
        Grey values (SIDE, 3 * SIDE), uint8.
    """
    if all(high > low for low, high in box):
        voxels = voxels[tuple(slice(low, high) for low, high in box)]
    x, y, z = (size // 2 for size in voxels.shape)
    slices = [plane.T[::-1, ::-1] for plane in (voxels[:, :, z], voxels[:, y], voxels[x])]
    low, high = window or np.percentile(np.concatenate([plane.ravel() for plane in slices]), (0.5, 99.5))
    picture = np.zeros((SIDE, 3 * SIDE), np.uint8)
    for place, (plane, (across, up)) in enumerate(zip(slices, ((0, 1), (0, 2), (1, 2)), strict=True)):
        size = np.array([plane.shape[0] * spacing[up], plane.shape[1] * spacing[across]])
        rows, columns = np.maximum(1, np.floor(size / size.max() * SIDE)).astype(int)
        grey = np.clip((plane.astype(np.float32) - low) / max(high - low, 1e-6), 0, 1) * 255
        top, left = (SIDE - rows) // 2, place * SIDE + (SIDE - columns) // 2
        picture[top : top + rows, left : left + columns] = _resized(grey, rows, columns)
    return picture


def _resized(plane: np.ndarray, rows: int, columns: int) -> np.ndarray:
    for axis, wanted in ((0, rows), (1, columns)):  # means of whole pixels first, so that nothing thin is skipped
        whole = plane.shape[axis] // wanted
        if whole > 1:
            cut = np.take(plane, np.arange(plane.shape[axis] // whole * whole), axis=axis)
            shape = list(cut.shape)
            shape[axis : axis + 1] = [shape[axis] // whole, whole]
            plane = cut.reshape(shape).mean(axis=axis + 1)
    factors = (rows / plane.shape[0], columns / plane.shape[1])
    return np.clip(zoom(plane, factors, order=1, mode="nearest", grid_mode=True), 0, 255).astype(np.uint8)
