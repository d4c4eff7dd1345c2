# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Resample a scan made with a tilted gantry onto an upright grid."""

from __future__ import annotations

import numpy as np

from ..int16_voxels import int16_or_float32


def straighten(voxels: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Move each slice within its plane, so that the slices stack at right angles.

    The slices keep their planes, size and spacing of pixels: only linear interpolation between neighbours of one slice
    is needed. The grid grows so that no pixel is lost; what no slice covers gets the lowest value of the scan.

    Args:
        voxels: (X, Y, Z) in HU.
        affine: (4, 4), voxel indices to mm; the third axis leans.

    Returns:
        The voxels, (X', Y', Z), int16 if they were, else float32; and their affine, with three axes at right angles.
    """
    row, column, step = affine[:3, :3].T
    normal = np.cross(row, column)
    normal /= np.linalg.norm(normal)
    upright = step @ normal * normal
    drift = np.linalg.lstsq(np.stack([row, column], axis=1), step - upright, rcond=None)[0]  # pixels per slice
    places = np.arange(voxels.shape[2])[:, None] * drift
    low = np.floor(places.min(axis=0)).astype(int)
    size = np.ceil(places.max(axis=0)).astype(int) - low + voxels.shape[:2]

    moved = np.full((*size, voxels.shape[2]), voxels.min(), voxels.dtype)
    for z, place in enumerate(places - low):
        plane = np.full(size + 1, float(voxels.min()))
        first = np.floor(place).astype(int)
        plane[first[0] : first[0] + voxels.shape[0], first[1] : first[1] + voxels.shape[1]] = voxels[:, :, z]
        for axis, part in enumerate(place - first):
            plane = (1 - part) * plane + part * np.roll(plane, 1, axis)
        plane = plane[: size[0], : size[1]]
        moved[:, :, z] = int16_or_float32(np.rint(plane)) if voxels.dtype == np.int16 else plane

    new = affine.copy()
    new[:3, 2] = upright
    new[:3, 3] += affine[:3, :2] @ low
    return moved, new
