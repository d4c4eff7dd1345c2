# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Judge by its values whether a scan is in Hounsfield units (HU): a NIfTI file does not record its unit."""

from __future__ import annotations

# In HU air is -1000, fat -100, water 0, soft tissue up to 100, dense bone 700 to 2000; a scanner stores up to 3071.
NARROW = 50.0  # a smaller range cannot be a patient: the scan was scaled to [0, 1] or to unit variance
NO_AIR = -500.0  # lung is at most about -500
NO_BONE = 300.0  # windows for soft tissue end at 200 to 300
# If half a percent of the voxels have the largest value, it is the edge of a window; above this value it may be metal.
CLIPPED_BELOW = 900.0
TISSUE = 1000.0  # value of soft tissue if 1024 was never subtracted


def doubt_of_hounsfield(low: float, high: float, *, p95: float | None = None, p99_5: float | None = None) -> str | None:
    """Return why the voxels of a scan do not look like CT in HU.

    Padding below -1024 and a scan cropped to the patient (-1024 elsewhere) are accepted as HU. A small crop of soft
    tissue, without air or bone, cannot be distinguished from a windowed scan and is doubted as well.

    Args:
        low: smallest value of the scan.
        high: largest value.
        p95: 95th percentile, as a value that occurs in the scan, if known.
        p99_5: 99.5th percentile, likewise.

    Returns:
        The reason, worded to follow the name of the file; None if there is no doubt.
    """
    span = f"its values range from {low:g} to {high:g}"
    if low == high:
        return f"every voxel is {low:g}"
    if high - low < NARROW:
        return f"{span}: scaled, not in HU"
    if low >= 0:
        return f"not CT in HU: {span}, but air is -1000 (MR, PET, or a CT whose intercept was lost)"
    if low > NO_AIR:
        return f"not CT in HU, or already windowed: {span}, but air is -1000"
    if high < NO_BONE:
        return f"already windowed: {span}, but bone is above {NO_BONE:g}"
    if p99_5 is not None and p99_5 == high < CLIPPED_BELOW:
        return f"already windowed: {span}, and more than 0.5% of the voxels are {high:g}"
    if p95 is not None and p95 > TISSUE:
        return f"not CT in HU: more than 5% of the voxels are above {TISSUE:g}, like dense bone (intercept lost, or MR)"
    return None
