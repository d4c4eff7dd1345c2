# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""What one scan is like in numbers, and whether it is fit to train on."""

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
        volume: as the file has it.
        foreground_hu: voxels above it are the body.
        min_body: least number of voxels of the body.
        min_slices: least number of voxels along every axis.
        max_spacing: greatest size of a voxel in mm along any axis.
        keep_suspect: use a scan whose values are hardly HU (`doubt_of_hounsfield`), and say so.

    Returns:
        A row of plain values: shape, spacing and orientation of the file; hu_min, hu_max and `QUANTILES`; body_share; body_box, half-open
        ``[[low, high], ...]`` in voxels of the scan in RAS, and body_mm, its sides; sha256 of the voxels in RAS; verdict (used or left_out)
        and reason.
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
        return f"too coarse: its voxels are {sizes} mm, and --max_spacing is {max_spacing:g}"
    if min(row["shape"]) < min_slices:
        return f"too few slices: its shape is {'x'.join(map(str, row['shape']))}, and --min_slices is {min_slices}"
    if body < min_body:
        return f"too little body: {body} voxels above {foreground_hu:g} HU, and --min_body is {min_body}"
    return None


def body_box(body: np.ndarray) -> list[list[int]]:
    """The least box around the true voxels, half-open per axis, as MONAI's ``CropForeground`` draws it; zeros without any."""
    if not body.any():
        return [[0, 0]] * body.ndim
    found = [np.flatnonzero(body.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    return [[int(places[0]), int(places[-1]) + 1] for places in found]


def quantiles_of(voxels: np.ndarray, shares: list[float]) -> list[float]:
    """The values that the shares of the voxels do not exceed (``inverted_cdf``: a value that is there)."""
    if voxels.dtype != np.int16:
        return np.quantile(voxels, shares, method="inverted_cdf").tolist()
    counts = np.zeros(2**16, dtype=np.int64)  # sorting 10^8 voxels takes half a minute
    for z in range(voxels.shape[2]):
        counts += np.bincount(voxels[:, :, z].astype(np.int32).ravel() + 2**15, minlength=2**16)
    wanted = np.maximum(1, np.ceil(np.multiply(shares, voxels.size) - 1e-9))
    return (np.searchsorted(np.cumsum(counts), wanted) - 2**15).astype(float).tolist()


def hash_of(voxels: np.ndarray) -> str:
    """SHA-256 of shape and values, whatever the file's name, format, compression and order in memory."""
    digest = hashlib.sha256(f"{voxels.shape} {voxels.dtype.name}".encode())
    for z in range(voxels.shape[2]):
        plane = np.ascontiguousarray(voxels[:, :, z].T)  # X runs fastest, as in most files
        digest.update((plane if plane.dtype.kind == "i" else plane + np.float32(0)).tobytes())  # + 0: -0 is 0
    return digest.hexdigest()
