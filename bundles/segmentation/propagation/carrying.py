# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Carry the label map of a registered scan, or the scan itself, to the voxels of the other scan."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
from monai.transforms import generate_spatial_bounding_box
from scipy import ndimage

from ...common.errors import InputError
from ...common.scans.reading import Volume
from ...common.value_rules import check_choice
from .fusion import IGNORE
from .itk_images import TO_LPS, as_label, as_volume, one_thread, simple_itk, to_image

if TYPE_CHECKING:
    import SimpleITK

SLAB_VOXELS = 2**21  # points that are mapped at once: about 300 MiB of working memory


def carry_label(
    label: Volume | str | os.PathLike,
    transform: SimpleITK.Transform,
    *,
    like: Volume | str | os.PathLike,
    interpolation: str = "linear",
) -> np.ndarray:
    """Return a label map on the voxels of the fixed scan.

    ``linear`` interpolates the mask of every class and takes the largest, as if each were resampled alone, but with one
    pass for all: of the eight voxels around a point the weights of equal labels are added. Between classes with equal
    weights the lower value wins. ``nearest`` takes the nearest voxel. Linear is the default because it is closer to the
    truth on known warps between grids (see the test); SimpleITK's label-gaussian does the same with a wider kernel,
    which rounds thin organs off, and takes longer.

    Args:
        label: label map of the moving scan, whole numbers from 0 to 255, on any grid; 255 is "ignore".
        transform: from fixed to moving points, as `register` returns it.
        like: the fixed scan, or its file; only its grid counts.
        interpolation: ``linear`` or ``nearest``.

    Returns:
        uint8 (X, Y, Z) with the shape and affine of ``like``; `IGNORE` where the point is outside the label's field of
        view, because the labelled scan says nothing there.

    Raises:
        InputError: a file cannot be read, or the label map has values that are not labels.
    """
    check_choice(name="interpolation", value=interpolation, choices=("linear", "nearest"))
    like, source = as_volume(like), _Labels.of(label, _most_weight if interpolation == "linear" else _nearest)
    carried = np.empty(like.voxels.shape, np.uint8)
    for slab, points in _mapped_points(transform, like):
        carried[:, :, slab] = source.at(points)
    return carried


def carry_scan(
    scan: Volume | str | os.PathLike,
    transform: SimpleITK.Transform,
    *,
    like: Volume | str | os.PathLike,
) -> np.ndarray:
    """Return the moving scan on the voxels of the fixed one, linearly interpolated.

    Args:
        scan: the moving scan in HU, or its file.
        transform: from fixed to moving points, as `register` returns it.
        like: the fixed scan, or its file; only its grid counts.

    Returns:
        float32 (X, Y, Z) in HU; NaN outside the moving scan's field of view.

    Raises:
        InputError: a file cannot be read.
    """
    scan, like = as_volume(scan), as_volume(like)
    carried = np.empty(like.voxels.shape, np.float32)
    for slab, points in _mapped_points(transform, like):
        carried[:, :, slab] = _hounsfield_at(scan, points)
    return carried


def carry_both(
    scan: Volume | str | os.PathLike,
    label: Volume | str | os.PathLike,
    transform: SimpleITK.Transform,
    *,
    like: Volume | str | os.PathLike,
) -> tuple[np.ndarray, np.ndarray]:
    """Return `carry_scan` and `carry_label` of a labelled scan; the transform, half of the work, is computed once."""
    scan, like, labels = as_volume(scan), as_volume(like), _Labels.of(label, _most_weight)
    moved, carried = np.empty(like.voxels.shape, np.float32), np.empty(like.voxels.shape, np.uint8)
    for slab, points in _mapped_points(transform, like):
        moved[:, :, slab], carried[:, :, slab] = _hounsfield_at(scan, points), labels.at(points)
    return moved, carried


def _mapped_points(transform: SimpleITK.Transform, like: Volume) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield slabs of the fixed grid, and where their voxels lie in the moving scan: (X, Y, slab, 3), mm in LPS."""
    sitk = simple_itk()
    shape = like.voxels.shape
    thickness = max(1, SLAB_VOXELS // (shape[0] * shape[1]))
    with one_thread():
        for first in range(0, shape[2], thickness):
            slab = slice(first, min(first + thickness, shape[2]))
            corner = np.asarray(like.affine, dtype=float).copy()
            corner[:3, 3] += corner[:3, 2] * first
            grid = to_image(Volume(np.empty((1, 1, 1), np.uint8), corner))
            size = (shape[0], shape[1], slab.stop - first)
            field = sitk.TransformToDisplacementField(
                *(transform, sitk.sitkVectorFloat64, size),
                *(grid.GetOrigin(), grid.GetSpacing(), grid.GetDirection()),
            )
            moved = sitk.GetArrayViewFromImage(field).transpose(2, 1, 0, 3)
            lps = TO_LPS @ corner
            i, j, k = (np.arange(count, dtype=float) for count in size)
            start = (i[:, None] * lps[:3, 0])[:, None, None] + (j[:, None] * lps[:3, 1])[:, None]
            yield slab, start + k[:, None] * lps[:3, 2] + lps[:3, 3] + moved


def _in_voxels(points: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Return points (..., 3), mm in LPS, as indices of a grid."""
    to_voxels = np.linalg.inv(TO_LPS @ np.asarray(affine, dtype=float))
    return points @ to_voxels[:3, :3].T + to_voxels[:3, 3]


def _hounsfield_at(scan: Volume, points: np.ndarray) -> np.ndarray:
    """Return a scan at points (..., 3), mm in LPS; NaN outside its field of view."""
    points = _in_voxels(points, scan.affine)
    inside = _inside(points, scan.voxels.shape)
    found = np.full(inside.shape, np.nan, np.float32)
    found[inside] = ndimage.map_coordinates(scan.voxels, points[inside].T, output=np.float32, order=1, mode="nearest")
    return found


@dataclass(frozen=True)
class _Labels:
    """A label map to look up.

    Attributes:
        voxels: uint8 (X, Y, Z).
        affine: the grid's affine.
        box: first and last index along each axis of what is not background; empty: all is background.
        sample: returns labels at points in voxels.
    """

    voxels: np.ndarray
    affine: np.ndarray
    box: tuple[np.ndarray, ...]
    sample: Callable[[np.ndarray, np.ndarray], np.ndarray]

    @classmethod
    def of(cls, label: Volume | str | os.PathLike, sample: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> _Labels:
        name = "The label map" if isinstance(label, Volume) else os.fspath(label)
        label = as_label(label)
        voxels = label.voxels.astype(np.uint8)
        if not np.array_equal(voxels, label.voxels):
            wrong = label.voxels[voxels != label.voxels].flat[0]
            raise InputError(f"{name} has the value {wrong}: labels must be whole numbers from 0 to 255.")
        box = ()
        if voxels.any():
            first, end = generate_spatial_bounding_box(voxels[None])
            box = (np.array(first), np.array(end) - 1)
        return cls(voxels, label.affine, box, sample)

    def at(self, points: np.ndarray) -> np.ndarray:
        """Return the labels at points (..., 3), mm in LPS; `IGNORE` outside the field of view."""
        points = _in_voxels(points, self.affine)
        inside = _inside(points, self.voxels.shape)
        found = np.where(inside, 0, IGNORE).astype(np.uint8)
        if self.box:  # elsewhere all eight voxels around a point are background
            near = inside & ((points > self.box[0] - 1) & (points < self.box[1] + 1)).all(axis=-1)
            found[near] = self.sample(self.voxels, points[near])
        return found


def _inside(points: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return whether points (..., 3) in voxels lie in a grid, whose border is half a voxel outside its centres."""
    return ((points >= -0.5) & (points <= np.array(shape) - 0.5)).all(axis=-1)


def _nearest(labels: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return the label of the voxel nearest to each point (N, 3)."""
    return labels[tuple(np.clip(np.rint(points).astype(int), 0, np.array(labels.shape) - 1).T)]


def _most_weight(labels: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return the label with the largest linear weight among the eight voxels around each point (N, 3)."""
    last = np.array(labels.shape) - 1
    points = np.clip(points, 0, last)
    low = np.minimum(points.astype(int), np.maximum(last - 1, 0))
    share = points - low
    # Eight neighbours by N points. Where all are equal, which is nearly everywhere, there is nothing to weigh.
    corners = np.array(list(product((0, 1), repeat=3)))
    around = np.stack([labels[tuple(np.minimum(low + corner, last).T)] for corner in corners])
    result = around[0].copy()
    mixed = np.flatnonzero((around != around[0]).any(axis=0))
    around, share = around[:, mixed], share[mixed]
    weights = np.stack([np.where(corner, share, 1 - share).prod(axis=1) for corner in corners])
    most = np.full(len(mixed), -1.0)
    for candidate in around:
        weight = np.where(around == candidate, weights, 0).sum(axis=0)
        # Sums of the same weights in another order differ in the last bits.
        better = (weight > most + 1e-9) | ((weight > most - 1e-9) & (candidate < result[mixed]))
        result[mixed] = np.where(better, candidate, result[mixed])
        most = np.maximum(most, weight)
    return result
