# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Write NIfTI files atomically."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import nibabel as nib
import numpy as np
from monai.config import NdarrayOrTensor, PathLike
from monai.data import NibabelWriter
from monai.data.utils import to_affine_nd
from monai.utils import ImageMetaKey, convert_to_numpy

from ..files import atomic_path
from .headers.nifti_grid import placing_fields

logger = logging.getLogger(__name__)


class AtomicNibabelWriter(NibabelWriter):
    """`monai.data.NibabelWriter` that writes to a hidden file and renames it: a stopped run leaves no partial mask.

    An image on the grid of the file that it was made from (``filename_or_obj``) carries the qform, sform and unit of
    that file, so that it lies on the scan in every program, whichever of them the program uses. One slice stays
    (X, Y, 1).

    For ``SaveImaged(writer=...)``, as the class or its dotted path. Arguments are those of the parent.
    """

    source: str | None = None

    def set_data_array(
        self, data_array: NdarrayOrTensor, channel_dim: int | None = 0, squeeze_end_dims: bool = True, **kwargs: Any
    ) -> None:
        """See `monai.data.NibabelWriter.set_data_array`; the three spatial axes stay, even if they have one voxel."""
        super().set_data_array(data_array, channel_dim, squeeze_end_dims=False, **kwargs)
        if squeeze_end_dims and self.data_obj.shape[3:] == (1,):
            self.data_obj = self.data_obj[..., 0]

    def set_metadata(self, meta_dict: Mapping | None, resample: bool = True, **options: Any) -> None:
        """See `monai.data.NibabelWriter.set_metadata`."""
        super().set_metadata(meta_dict, resample, **options)
        file = (meta_dict or {}).get(ImageMetaKey.FILENAME_OR_OBJ)
        self.source = file if isinstance(file, str) else None

    def write(self, filename: PathLike, verbose: bool = False, **obj_kwargs: Any) -> None:
        """Write the file; see `monai.data.NibabelWriter.write`. An existing file is replaced.

        Args:
            filename: the file, ending in ``.nii`` or ``.nii.gz``.
            verbose: log the name of the file once it is written.
            obj_kwargs: passed on to `nibabel.Nifti1Image`.
        """
        affine = to_affine_nd(3, np.eye(4) if self.affine is None else convert_to_numpy(self.affine))
        image = self.create_backend_obj(self.data_obj, affine=affine, dtype=self.output_dtype, **obj_kwargs)
        image.set_sform(affine, code=1)
        image.set_qform(affine, code=1)
        fields = placing_fields(self.source, shape=image.shape, affine=affine) if self.source else {}
        for name, value in fields.items():
            image.header[name] = value
        if fields:  # without an affine of its own, nibabel writes the forms of the header as they are
            image = type(image)(image.dataobj, None, image.header)
        with atomic_path(filename) as temporary:
            nib.save(image, temporary)
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
