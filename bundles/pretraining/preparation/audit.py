# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Measure one scan and decide whether it is fit for training."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from ...common.scans.hounsfield import doubt_of_hounsfield
from ...common.scans.reading import Volume

QUANTILES = {"hu_p0.5": 0.005, "hu_p5": 0.05, "hu_p50": 0.5, "hu_p95": 0.95, "hu_p99.5": 0.995}
USED, LEFT_OUT = "used", "left_out"


def audit_scan(
    volume: Volume,
    *,
    foreground_hu: float,
    min_body: int,
    min_slices: int,
    max_spacing: float,
    keep_suspect: bool = False,
) -> dict[str, Any]:
    """Measure a scan and judge it.

    Args:
        volume: scan in the orientation of its file.
        foreground_hu: voxels above this value are the body.
        min_body: smallest number of body voxels.
        min_slices: smallest number of voxels along every axis.
        max_spacing: largest voxel size in mm along any axis.
        keep_suspect: use scans whose values do not look like HU (`doubt_of_hounsfield`), and record it as the reason.

    Returns:
        A row of plain values: shape, spacing and orientation of the file; hu_min, hu_max and `QUANTILES`; body_share;
        body_box, half-open ``[[low, high], ...]`` in voxels of the scan in RAS, and body_mm, its sides; sha256 of the
        voxels in RAS; verdict (used or left_out) and reason.
    """
    ras = volume.to_ras()
    quantiles = dict(zip(QUANTILES, quantiles_of(ras.voxels, list(QUANTILES.values())), strict=True))
    low, high = float(ras.voxels.min()), float(ras.voxels.max())
    body = ras.voxels > foreground_hu
    box = body_box(body)
    row = {
        "shape": list(volume.voxels.shape),
        "spacing": list(volume.spacing),
        "orientation": volume.orientation,
        "hu_min": low,
        **quantiles,
        "hu_max": high,
        "body_share": float(body.mean()),
        "body_box": box,
        "body_mm": [(end - start) * size for (start, end), size in zip(box, ras.spacing, strict=True)],
        "sha256": hash_of(ras.voxels),
    }
    doubt = doubt_of_hounsfield(low, high, p95=quantiles["hu_p95"], p99_5=quantiles["hu_p99.5"])
    fault = _fault(row, int(body.sum()), foreground_hu, min_body, min_slices, max_spacing)
    if low == high or (doubt and not keep_suspect):
        return row | {"verdict": LEFT_OUT, "reason": doubt}
    if fault:
        return row | {"verdict": LEFT_OUT, "reason": fault}
    return row | {"verdict": USED, "reason": f"kept by --keep_suspect: {doubt}" if doubt else ""}


def _fault(
    row: dict, body: int, foreground_hu: float, min_body: int, min_slices: int, max_spacing: float
) -> str | None:
    if max(row["spacing"]) > max_spacing:
        sizes = " x ".join(f"{size:.4g}" for size in row["spacing"])
        return f"too coarse: its voxels are {sizes} mm, but --max_spacing is {max_spacing:g}"
    if min(row["shape"]) < min_slices:
        return f"too few slices: its shape is {'x'.join(map(str, row['shape']))}, but --min_slices is {min_slices}"
    if body < min_body:
        return f"too little body: {body} voxels above {foreground_hu:g} HU, but --min_body is {min_body}"
    return None


def body_box(body: np.ndarray) -> list[list[int]]:
    """Return the bounding box of the true voxels, half-open per axis, as MONAI's ``CropForeground``; zeros if empty."""
    if not body.any():
        return [[0, 0]] * body.ndim
    found = [np.flatnonzero(body.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    return [[int(places[0]), int(places[-1]) + 1] for places in found]


def quantiles_of(voxels: np.ndarray, shares: list[float]) -> list[float]:
    """Return quantiles of the voxels (method ``inverted_cdf``: values that occur in the scan)."""
    if voxels.dtype != np.int16:
        return np.quantile(voxels, shares, method="inverted_cdf").tolist()
    counts = np.zeros(2**16, dtype=np.int64)  # sorting 10^8 voxels takes half a minute
    for z in range(voxels.shape[2]):
        counts += np.bincount(voxels[:, :, z].astype(np.int32).ravel() + 2**15, minlength=2**16)
    wanted = np.maximum(1, np.ceil(np.multiply(shares, voxels.size) - 1e-9))
    return (np.searchsorted(np.cumsum(counts), wanted) - 2**15).astype(float).tolist()


def hash_of(voxels: np.ndarray) -> str:
    """Return the SHA-256 of shape, type and values; file name, format, compression and memory layout do not matter."""
    digest = hashlib.sha256(f"{voxels.shape} {voxels.dtype.name}".encode())
    for z in range(voxels.shape[2]):
        plane = np.ascontiguousarray(voxels[:, :, z].T)  # X runs fastest, as in most files
        digest.update((plane if plane.dtype.kind == "i" else plane + np.float32(0)).tobytes())  # + 0 turns -0 into 0
    return digest.hexdigest()
