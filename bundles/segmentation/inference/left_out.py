# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Judge by its values whether a file named like a mask may be a scan: no scan may be lost only because of its name."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from ...common.data.label_values import TOLERANCE
from ...common.data.nifti_files import is_nifti
from ...common.scans.nifti import open_scan

MOST_VALUES = 255  # values of a mask; TotalSegmentator has 117 structures
PICTURES = r"_(masked|reconstruction)\.nii(\.gz)?$"  # results of these bundles that hold the values of a scan


def scan_in_disguise(path: str | os.PathLike) -> str | None:
    """Return the file of a scan among files that are named like masks; None if they are masks, as far as can be seen.

    Args:
        path: a NIfTI file, or a folder, whose first file is looked at.
    """
    files = sorted(file for file in Path(path).rglob("*") if is_nifti(file.name)) if os.path.isdir(path) else [path]
    first = os.fspath(files[0]) if files else ""
    name = os.path.basename(first).lower()
    return first if is_nifti(name) and not re.search(PICTURES, name) and _is_no_mask(first) else None


def _is_no_mask(file: str | os.PathLike) -> bool:
    """Return whether the first or middle slice has values below 0, between whole numbers, or more than `MOST_VALUES`.

    A file of 8-bit values may be either. Most masks are such files, so these count as masks and are not decoded.
    """
    try:
        scan = open_scan(file)
        if scan.get_data_dtype() == np.uint8 and (scan.dataobj.slope, scan.dataobj.inter) == (1, 0):
            return False
        for z in (0, scan.shape[2] // 2):  # air in the first one reveals most CT
            values = np.unique(scan.dataobj[:, :, z])
            off = np.abs(values - np.rint(values)).max()
            if values.min() < 0 or off > TOLERANCE or len(values) > MOST_VALUES:
                return True
    except Exception:  # nobody asked for this file, so its faults are not reported
        return False
    return False
