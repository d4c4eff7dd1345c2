# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Open NIfTI files and check their headers."""

from __future__ import annotations

import os

import nibabel as nib
import numpy as np

from ..errors import RefusedScan


def open_scan(file: str) -> nib.spatialimages.SpatialImage:
    """Open a NIfTI file without reading its voxels.

    Raises:
        RefusedScan: it is missing or empty, or its header has no voxels, no positive spacing, or no usable affine.
    """
    if not os.path.isfile(file):
        raise RefusedScan("does not exist")
    if os.path.getsize(file) == 0:
        raise RefusedScan("is empty (0 bytes)")
    scan = nib.load(file)
    if 0 in scan.shape:
        raise RefusedScan(f"has no voxels: its shape is {scan.shape}")
    spacing = np.asarray(scan.header.get_zooms()[:3], dtype=float)
    if isinstance(scan, nib.Nifti1Image):
        # nibabel changes a spacing of 0 to 1 and drops a minus sign when it loads a file: read the stored values.
        with scan.file_map["image"].get_prepare_fileobj("rb") as stream:
            spacing = type(scan.header).from_fileobj(stream, check=False)["pixdim"][1:4].astype(float)
    spacing = spacing[: len(scan.shape)]
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise RefusedScan(f"has spacing {spacing.tolist()} mm; every spacing must be above 0")
    if not np.isfinite(scan.affine).all():
        raise RefusedScan(f"has an affine that is not finite: {scan.affine.tolist()}")
    lengths = np.linalg.norm(scan.affine[:3, :3], axis=0)
    if len(scan.shape) > 2 and abs(np.linalg.det(scan.affine[:3, :3])) <= 1e-3 * lengths.prod():
        raise RefusedScan(f"has an affine whose axes are zero or lie in one plane: {scan.affine.tolist()}")
    return scan


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
    """Return the smallest and largest value of `stored_voxels`; raise `RefusedScan` if any is NaN or infinite."""
    # min and max are NaN if any voxel is, so two numbers check all voxels without a copy of them.
    low, high = float(raw.min()) * slope + inter, float(raw.max()) * slope + inter
    if not np.isfinite([low, high]).all():
        count = raw.size - int(np.isfinite(raw).sum())
        raise RefusedScan(f"has {count} of {raw.size} voxels that are NaN or infinite; set them to a number")
    return min(low, high), max(low, high)
