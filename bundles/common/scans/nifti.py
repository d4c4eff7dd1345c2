# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Open NIfTI files and check their headers."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections import Counter

import nibabel as nib
import numpy as np

from ..errors import RefusedScan
from .headers.nifti_bytes import stored_header
from .headers.nifti_grid import Doubt, grid_of
from .headers.plausible import check_plausible

logger = logging.getLogger(__name__)

LARGEST_VALUE = 1e30  # sums of squares of larger ones do not fit float32; PET and MR maps stay far below
NAMED = 10  # files with doubts of one kind that are named in the log of a process

_told: set[tuple[str, str]] = set()  # file and kind of the doubts that were logged
_lock = threading.Lock()


def is_whole(file: str | os.PathLike) -> bool:
    """Return whether a NIfTI file has all its voxels (a full disk cuts files), in most cases without unpacking it.

    The last four bytes of a gzip file are the size of its content (RFC 1952), which the header also gives. If they
    differ, the file is unpacked: some programs write gzip files of several parts.
    """
    try:
        voxels = nib.load(file).dataobj
        size = voxels.offset + math.prod(voxels.shape) * voxels.dtype.itemsize
        with open(file, "rb") as stream:
            if not os.fspath(file).endswith(".gz"):
                return os.fstat(stream.fileno()).st_size >= size
            stream.seek(-4, os.SEEK_END)
            if int.from_bytes(stream.read(4), "little") == size % 2**32:
                return True
        return np.asarray(voxels).size > 0
    except Exception:  # nibabel, gzip and zlib raise many kinds of errors for broken files
        return False


def open_scan(file: str | os.PathLike) -> nib.spatialimages.SpatialImage:
    """Open a NIfTI file without reading its voxels. Everything that reads scans opens them here.

    The image has its grid in mm (see `headers.nifti_grid.grid_of`) and no trailing axes of one voxel: (X, Y, Z, 1, 1)
    becomes (X, Y, Z). Where a header can be read in two ways, a warning gives both, once for each file.

    Raises:
        RefusedScan: it is missing, empty, or not a NIfTI file; or its header has no voxels, no positive spacing, no
            usable affine, a grid that no scan has (see `headers.plausible`), or more voxels than the file can hold.
    """
    if not os.path.isfile(file):
        raise RefusedScan("does not exist")
    if os.path.getsize(file) == 0:
        raise RefusedScan("is empty (0 bytes)")
    stored = stored_header(file)
    scan = _load(file, stored)
    # nibabel changes a spacing of 0 to 1 and drops a minus sign when it loads a file: use the stored values.
    spacing = stored["pixdim"][1:4].astype(float)[: len(scan.shape)]
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise RefusedScan(f"has spacing {spacing.tolist()} mm; every spacing must be above 0")
    shape = _without_trailing_ones(scan.shape)
    if len(shape) < 3:  # one slice, which no reader accepts: see `check_image_shape`
        return scan
    grid = grid_of(stored)
    check_plausible(shape, grid.affine, unit=grid.unit)
    _tell(os.path.abspath(file), grid.doubts)
    if shape == scan.shape and np.array_equal(grid.affine, scan.affine):
        return scan
    header = scan.header.copy()
    header.set_data_shape(shape)
    if grid.unit:
        header.set_xyzt_units("mm")
    if not np.array_equal(grid.affine, scan.affine):
        header.set_sform(grid.affine, code=max(int(header["sform_code"]), int(header["qform_code"]), 1))
        header.set_qform(grid.affine, code=int(header["qform_code"]))
    return type(scan)(scan.dataobj.reshape(shape), grid.affine, header, file_map=scan.file_map)


def _load(file: str | os.PathLike, stored: nib.Nifti1Header) -> nib.spatialimages.SpatialImage:
    try:
        return nib.load(file)
    except FileNotFoundError:  # nibabel changes the case of a suffix such as .Nii.Gz, and looks for that file
        kind = nib.Nifti2Image if isinstance(stored, nib.Nifti2Header) else nib.Nifti1Image
        return kind.from_file_map({"image": nib.FileHolder(os.fspath(file))})


def _tell(file: str, doubts: tuple[Doubt, ...]) -> None:
    for doubt in doubts:
        with _lock:
            if (file, doubt.kind) in _told:
                continue
            _told.add((file, doubt.kind))
            count = Counter(kind for _, kind in _told)[doubt.kind]
        if count <= NAMED:
            logger.warning("%s: %s", file, doubt.text)
        if count == NAMED:
            logger.warning("Further files like this one are not named.")


def check_dimensions(shape: tuple[int, ...]) -> None:
    """Raise `RefusedScan` unless the shape is (X, Y, Z) or (X, Y, Z, C), whatever the number of channels."""
    if len(shape) != 4:
        check_image_shape(shape, 1)


def check_image_shape(shape: tuple[int, ...], channels: int) -> None:
    """Raise `RefusedScan` unless the shape is (X, Y, Z) for one channel, or (X, Y, Z, channels)."""
    spatial = _without_trailing_ones(shape)
    if channels == 1 and len(spatial) == 3:
        return
    if channels > 1 and len(shape) == 4 and shape[-1] == channels:
        return
    if len(shape) < 3:
        advice = "it is a single slice; stack the slices of a scan into one 3D volume"
    elif channels == 1 and len(shape) == 4:
        advice = (
            f"it has {shape[-1]} volumes in one file; if they are channels of one scan, use a task or model with "
            f"{shape[-1]} input channels; if they are time points, write each to its own file"
        )
    elif channels == 1:
        advice = "write one 3D volume per file"
    else:
        content = "one channel" if len(spatial) == 3 else f"{shape[-1]} channels"
        advice = (
            f"it holds {content}, but {channels} are expected; store all {channels} along the fourth axis of the file, "
            f"or list {channels} 3D files as the image"
        )
    expected = "(X, Y, Z)" if channels == 1 else f"(X, Y, Z, {channels})"
    raise RefusedScan(f"has shape {shape}, not {expected}: {advice}")


def _without_trailing_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def stored_voxels(scan: nib.spatialimages.SpatialImage) -> tuple[np.ndarray, float, float]:
    """Read the voxels as stored, and their slope and intercept. Scaled voxels would need 8 bytes each.

    Raises:
        RefusedScan: the voxels are not plain numbers (colour, complex).
    """
    proxy = scan.dataobj
    if not hasattr(proxy, "get_unscaled"):
        return np.asanyarray(proxy), 1.0, 0.0
    raw = proxy.get_unscaled()
    if raw.dtype.kind not in "iufb":
        raise RefusedScan(f"has voxels of type {raw.dtype}; they must be plain numbers")
    return raw, float(proxy.slope), float(proxy.inter)


def check_finite(raw: np.ndarray, slope: float, inter: float) -> tuple[float, float]:
    """Return the smallest and largest of `stored_voxels`; raise `RefusedScan` if any is NaN, infinite or absurd."""
    # min and max are NaN if any voxel is, so two numbers check all voxels without a copy of them.
    low, high = float(raw.min()) * slope + inter, float(raw.max()) * slope + inter
    if np.isfinite([low, high]).all() and max(abs(low), abs(high)) > LARGEST_VALUE:
        raise RefusedScan(
            f"has values from {low:.3g} to {high:.3g}, which no scan has: the file or its scaling is damaged"
        )
    if not np.isfinite([low, high]).all():
        count = raw.size - int(np.isfinite(raw).sum())
        raise RefusedScan(f"has {count} of {raw.size} voxels that are NaN or infinite; set them to a number")
    return min(low, high), max(low, high)
