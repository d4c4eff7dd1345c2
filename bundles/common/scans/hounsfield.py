# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Are these Hounsfield units? Told by the values alone, as a NIfTI file does not say what it measures."""

from __future__ import annotations

# In HU air is -1000, fat -100, water 0, soft tissue up to 100, dense bone 700 to 2000; a scanner stores up to 3071.
NARROW = 50.0  # a range that no patient fits in: what was scaled to [0, 1] or to unit variance has it
NO_AIR = -500.0  # lung is at most about -500
NO_BONE = 300.0  # windows for soft tissue end at 200 to 300
CLIPPED_BELOW = 900.0  # a top value that half a percent of the voxels share is a window's edge; beyond, it may be metal
TISSUE = 1000.0  # where soft tissue lies if 1024 was never subtracted


def doubt_of_hounsfield(low: float, high: float, *, p95: float | None = None, p99_5: float | None = None) -> str | None:
    """Say why the voxels of a scan are hardly CT in HU.

    Padding below -1024 and a scan cut to the patient (-1024 elsewhere) are HU. A small scan cut out of the soft tissue, without air
    or bone, cannot be told from a windowed one and is doubted, too.

    Args:
        low: least value of the scan.
        high: greatest value.
        p95: value that 95% of the voxels do not exceed, if known.
        p99_5: the same of 99.5%.

    Returns:
        The reason, to follow the name of the file; None where there is no doubt.
    """
    span = f"its values lie between {low:g} and {high:g}"
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
        return (
            f"not CT in HU: more than 5% of the voxels are above {TISSUE:g}, as dense bone is (intercept lost, or MR)"
        )
    return None
