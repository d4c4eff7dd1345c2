# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Read one raw scan into memory with the values that its file defines, or refuse it with the reason."""

from __future__ import annotations

from dataclasses import dataclass

import nibabel as nib
import numpy as np

from ..errors import RefusedScan
from .dicom_series import read_series
from .int16_voxels import int16_or_float32
from .meta_image import read_meta_image
from .nifti import check_finite, check_image_shape, open_scan, stored_voxels
from .search import Candidate


@dataclass(frozen=True)
class Volume:
    """A scan on its grid.

    Attributes:
        voxels: (X, Y, Z), int16 if all values are whole and fit, else float32.
        affine: (4, 4), voxel indices to mm in RAS.
    """

    voxels: np.ndarray
    affine: np.ndarray

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Size of a voxel in mm."""
        return tuple(nib.affines.voxel_sizes(self.affine).tolist())

    @property
    def orientation(self) -> str:
        """Directions in which the axes point, such as ``LPS``."""
        return "".join(nib.aff2axcodes(self.affine))

    def to_ras(self) -> Volume:
        """Return the scan in RAS: axes are swapped and flipped, as by MONAI's ``Orientation``, never resampled."""
        orientation = nib.io_orientation(self.affine)
        affine = self.affine @ nib.orientations.inv_ornt_aff(orientation, self.voxels.shape)
        return Volume(nib.apply_orientation(self.voxels, orientation), affine)


def read_scan(candidate: Candidate, *, straighten_tilt: bool = False) -> Volume:
    """Read a scan from its file or series.

    Args:
        candidate: the scan.
        straighten_tilt: see `read_series`.

    Raises:
        RefusedScan: it cannot be read, or is not a single volume of numbers.
    """
    try:
        if candidate.series is not None:
            series = read_series(candidate.series, straighten_tilt=straighten_tilt)
            return Volume(series.voxels, series.affine)
        return _read_meta_image(candidate.source) if candidate.kind == "metaimage" else _read_nifti(candidate.source)
    except RefusedScan:
        raise
    except MemoryError:
        raise RefusedScan("does not fit into memory: use fewer --workers, or a machine with more memory") from None
    except Exception as error:  # nibabel, gzip, zlib, pydicom and numpy raise many kinds of errors for broken files
        if isinstance(error, OSError) and error.strerror:  # a permission, a network
            raise RefusedScan(f"cannot be read: {error.strerror}") from error
        first_line = str(error).partition("\n")[0]
        raise RefusedScan(
            f"cannot be read, perhaps damaged or cut short ({type(error).__name__}: {first_line})"
        ) from error


def _read_nifti(path: str) -> Volume:
    scan = open_scan(path)
    check_image_shape(scan.shape, 1)
    raw, slope, inter = stored_voxels(scan)
    check_finite(raw, slope, inter)
    return Volume(scaled(raw, slope, inter), scan.affine)


def _read_meta_image(path: str) -> Volume:
    raw, affine = read_meta_image(path)
    check_finite(raw, 1.0, 0.0)
    return Volume(scaled(raw, 1.0, 0.0), affine)


def scaled(raw: np.ndarray, slope: float, inter: float) -> np.ndarray:
    """Return ``raw * slope + inter`` as int16 if that keeps every value, else as float32."""
    if raw.dtype == np.int16 and (slope, inter) == (1.0, 0.0):
        return raw
    values = np.empty(raw.shape, np.int16, order="F")
    for z in range(raw.shape[2]):  # plane by plane: the whole volume in float64 would need 4 times the memory
        plane = int16_or_float32(raw[:, :, z] * np.float64(slope) + inter)
        if plane.dtype != np.int16:
            break
        values[:, :, z] = plane
    else:
        return values
    values = np.empty(raw.shape, np.float32, order="F")
    for z in range(raw.shape[2]):
        values[:, :, z] = raw[:, :, z] * np.float64(slope) + inter
    return values
