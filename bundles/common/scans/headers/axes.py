# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Turn an array so that its axes run like those of another: swap and flip them, never resample."""

from __future__ import annotations

import nibabel as nib
import numpy as np
from nibabel.orientations import inv_ornt_aff

KEPT = [[0.0, 1.0], [1.0, 1.0], [2.0, 1.0]]


def turned(voxels: np.ndarray, affine: np.ndarray, *, like: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turn voxels so that their axes run as nearly as possible like those of another grid.

    Args:
        voxels: (X, Y, Z).
        affine: (4, 4), their voxel indices to mm.
        like: (4, 4), voxel indices of the other grid to mm.

    Returns:
        The turned voxels, a view, and their affine; the same objects if there is nothing to turn.
    """
    orientation = nib.io_orientation(np.linalg.solve(like, affine))
    if np.array_equal(orientation, KEPT):
        return voxels, affine
    return nib.apply_orientation(voxels, orientation), affine @ inv_ornt_aff(orientation, voxels.shape)


def in_ras(shape: tuple[int, ...], affine: np.ndarray) -> tuple[tuple[int, ...], np.ndarray]:
    """Return shape and affine that a grid has in RAS, after MONAI's ``Orientation``."""
    orientation = nib.io_orientation(affine)
    sizes = [0, 0, 0]
    for axis, size in enumerate(shape[:3]):
        sizes[int(orientation[axis, 0])] = size
    return tuple(sizes), affine @ inv_ornt_aff(orientation, shape[:3])
