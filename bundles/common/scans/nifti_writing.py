# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Write NIfTI files atomically."""

from __future__ import annotations

import logging
import os

import nibabel as nib
import numpy as np
from monai.config import PathLike
from monai.data import NibabelWriter

from ..files import atomic_path

logger = logging.getLogger(__name__)


class AtomicNibabelWriter(NibabelWriter):
    """`monai.data.NibabelWriter` that writes to a hidden file and renames it: a stopped run leaves no partial mask.

    For ``SaveImaged(writer=...)``, as the class or its dotted path. Arguments are those of the parent.
    """

    def write(self, filename: PathLike, verbose: bool = False, **obj_kwargs) -> None:
        """Write the file; see `monai.data.NibabelWriter.write`. An existing file is replaced.

        Args:
            filename: the file, ending in ``.nii`` or ``.nii.gz``.
            verbose: log the name of the file once it is written.
            obj_kwargs: passed on to `nibabel.Nifti1Image`.
        """
        with atomic_path(filename) as temporary:
            super().write(temporary, verbose=False, **obj_kwargs)
        if verbose:
            logger.info("wrote %s", filename)


def write_nifti(path: str | os.PathLike, *, voxels: np.ndarray, affine: np.ndarray) -> None:
    """Write a scan atomically, with its grid in mm as scanner coordinates (sform and qform).

    Args:
        path: the file, ending in ``.nii`` or ``.nii.gz``.
        voxels: (X, Y, Z).
        affine: (4, 4), voxel indices to mm in RAS.
    """
    image = nib.Nifti1Image(voxels, affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    with atomic_path(path) as temporary:
        nib.save(image, temporary)
