# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A scan as a NIfTI file on its own grid."""

from __future__ import annotations

import os

import nibabel as nib
import numpy as np

from .checkpoint_file import atomic_path


def write_nifti(path: str | os.PathLike, *, voxels: np.ndarray, affine: np.ndarray) -> None:
    """Write a scan with its grid, in mm, as scanner coordinates (sform and qform), whole or not at all.

    Args:
        path: the file, ending in ``.nii`` or ``.nii.gz``.
        voxels: (X, Y, Z).
        affine: (4, 4), voxel indices to RAS mm.
    """
    image = nib.Nifti1Image(voxels, affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    with atomic_path(path) as temporary:
        nib.save(image, temporary)
