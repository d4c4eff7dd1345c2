# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Refuse a grid that no scan of a patient has, before memory is asked for it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from nibabel.affines import voxel_sizes

from ...errors import RefusedScan

# The finest clinical scans (cone-beam CT, inner ear) have voxels of 0.075 mm, the coarsest (localizers, gaps of old MR)
# of 15 mm. A header in metres or micrometres that says mm is off by 1000.
MIN_SPACING, MAX_SPACING = 0.05, 20.0  # mm
# The smallest crops (a hippocampus) are 30 mm wide. The longest scan is a whole body.
MIN_EXTENT, MAX_EXTENT = 3.0, 2500.0  # mm; the longest side
MAX_VOLUME = 2e9  # mm^3, such as 0.9 x 0.9 x 2.4 m
MAX_VOXELS = 2**32  # 1024 x 1024 x 4096
ROUNDING = 1e-3
IN_MM = {"mm": 1.0, "metres": 1000.0, "micrometres": 0.001}


def check_voxel_count(shape: Sequence[int]) -> None:
    """Raise `RefusedScan` if a shape has no voxels, or more than any scan.

    Args:
        shape: that of the stored array, with channels.
    """
    if not shape or min(shape) < 1:
        raise RefusedScan(f"has no voxels: its shape is {tuple(shape)}")
    count = math.prod(int(size) for size in shape)
    if count > MAX_VOXELS:
        raise RefusedScan(
            f"has a header that claims {count:.3g} voxels (shape {tuple(shape)}), more than any scan ({MAX_VOXELS:.3g} "
            "are allowed): the header is damaged, or the file is no scan"
        )


def check_plausible(shape: Sequence[int], affine: np.ndarray, *, unit: str = "") -> None:
    """Raise `RefusedScan` if the size of a voxel or of the scan is not that of a scan of a patient.

    Args:
        shape: (X, Y, Z), or more; axes of one voxel may have any spacing.
        affine: (4, 4), voxel indices to mm.
        unit: unit that the file states for its numbers, for the message.
    """
    check_voxel_count(shape)
    sizes = np.array(shape[:3])
    spacing = voxel_sizes(affine)[: len(sizes)]
    extent = sizes * spacing
    stated = f" (the file states its unit as {unit})" if unit else ""
    several = spacing[sizes > 1]
    for wrong, bound in (
        (several < MIN_SPACING * (1 - ROUNDING), f"below {MIN_SPACING:g}"),
        (several > MAX_SPACING * (1 + ROUNDING), f"above {MAX_SPACING:g}"),
    ):
        if wrong.any():
            raise RefusedScan(
                f"has voxels of {_product(spacing)} mm, {bound} mm, which no scan of a patient has{stated}: correct "
                f"spacing and affine in its header{_hint(spacing, unit)}"
            )
    if extent.max() < MIN_EXTENT:
        raise RefusedScan(
            f"is {_product(extent)} mm in size, below {MIN_EXTENT:g} mm on every side{stated}: it shows no organ. "
            f"Correct spacing and affine in its header{_hint(spacing, unit)}"
        )
    if extent.max() > MAX_EXTENT or math.prod(extent.tolist()) > MAX_VOLUME:
        raise RefusedScan(
            f"is {_product(extent)} mm in size, larger than a whole body ({MAX_EXTENT:g} mm, and "
            f"{MAX_VOLUME / 1e9:g} m^3){stated}: correct spacing and affine in its header"
        )


def _hint(spacing: np.ndarray, unit: str) -> str:
    """Return what the numbers may be, if they are plausible in another unit."""
    stored = spacing / IN_MM.get(unit, 1.0)
    for name, factor in IN_MM.items():
        if name != (unit or "mm") and (stored * factor >= 0.2).all() and (stored * factor <= MAX_SPACING).all():
            return f"; its numbers look like {name}" + (", so correct its unit" if unit else "")
    return ""


def _product(values: np.ndarray) -> str:
    return " x ".join(f"{value:.4g}" for value in values)
