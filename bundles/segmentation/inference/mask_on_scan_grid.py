# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Resample probabilities from the preprocessed grid to a label map on the scan's own grid, slab by slab."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import MetaKeys, convert_to_numpy
from torch.nn import functional as F

from ...common.data.case_names import image_file_of
from ...common.errors import InputError
from ...common.value_rules import check_choice

AFFINE, ORIGINAL_AFFINE, SPATIAL_SHAPE = (
    key.value for key in (MetaKeys.AFFINE, MetaKeys.ORIGINAL_AFFINE, MetaKeys.SPATIAL_SHAPE)
)
SLAB_BYTES = 128 * 2**20


def resample_labels(
    probabilities: torch.Tensor,
    *,
    to_model: np.ndarray,
    shape: Sequence[int],
    mode: str = "linear",
    slab_bytes: int = SLAB_BYTES,
) -> torch.Tensor:
    """Return the label map of probabilities on another grid; background (0) outside of the probabilities' grid.

    Only the bounding box of the foreground is sampled, in slabs along the first axis of the new grid. Elsewhere all
    neighbouring voxels are background, and so is the result.

    Args:
        probabilities: (K, X, Y, Z), any floating type and device.
        to_model: affine (4, 4) from voxels of the new grid to voxels of the probabilities.
        shape: shape of the new grid.
        mode: ``linear``: the most probable class after interpolating the probabilities. ``nearest``: the most probable
            class of the nearest voxel; in a tie, of the voxel nearer to the centre of the grid.
        slab_bytes: working memory per slab, in addition to probabilities and result. A slab has at least one slice.

    Returns:
        Label map of ``shape`` on the CPU; uint8, or uint16 for more than 256 classes.
    """
    check_choice(name="mode", value=mode, choices=("linear", "nearest"))
    size = np.array(probabilities.shape[1:])
    labels = torch.zeros(tuple(shape), dtype=torch.uint8 if len(probabilities) <= 256 else torch.uint16)
    organs = _box_of_labels(probabilities)
    if organs is None:
        return labels
    (first, last), *plane = box = _covered_box(to_model, organs, shape)
    if any(low >= high for low, high in box):
        return labels
    if mode == "linear":
        volume, sampling = probabilities.float(), "bilinear"
    else:  # float64: many voxels are exactly half-way between two if one spacing is a multiple of the other
        volume, sampling = probabilities.max(0, keepdim=True).indices.double(), "nearest"

    # Map to the coordinates of grid_sample: -1 and 1 are the outer faces of the first and last voxel.
    to_grid = 2 * to_model[:3] / size[:, None]
    to_grid[:, 3] += 1 / size - 1
    # Make rounding irrelevant: the outer face of the last voxel is inside, the centre of the next one is not.
    to_grid *= 1 - 1e-6 if mode == "nearest" else 1 + 1e-6

    slice_bytes = math.prod(high - low for low, high in plane) * ((len(volume) + 5) * volume.element_size() + 8)
    thickness = max(1, slab_bytes // slice_bytes)
    for start in range(first, last, thickness):
        box = [(start, min(start + thickness, last)), *plane]
        grid = _grid(to_grid, box, like=volume)
        # One batch entry per slice: on a CPU grid_sample is parallel only over the batch.
        slices = volume.expand(len(grid), *volume.shape)
        sampled = F.grid_sample(slices, grid, mode=sampling, padding_mode="zeros", align_corners=False)
        # On a CPU argmax would take four times as long as max.
        winner = sampled.max(1).indices if mode == "linear" else sampled[:, 0]
        labels[tuple(slice(*ends) for ends in box)] = winner[:, 0].to(labels.dtype).cpu()
        del grid, sampled, winner  # free the memory before the next slab
    return labels


def _grid(to_grid: np.ndarray, box: Sequence[tuple[int, int]], *, like: torch.Tensor) -> torch.Tensor:
    """Return the coordinates (X, 1, Y, Z, 3) of a box's voxels for `grid_sample`, which expects the last axis first."""
    x, y, z = (torch.arange(*ends).to(like) for ends in box)
    grid = like.new_empty((len(x), 1, len(y), len(z), 3))
    for axis, (a, b, c, offset) in enumerate(to_grid.tolist()):
        grid[:, 0, :, :, 2 - axis] = (a * x)[:, None, None] + (b * y)[:, None] + (c * z + offset)
    return grid


class MaskOnScanGridd(MapTransform):
    """Replace the probabilities of the preprocessed scan by the label map on the voxel grid of the scan's file.

    Use it instead of ``AsDiscreted(argmax=True)`` and ``Invertd`` after preprocessing that keeps the image's affine
    correct, such as `Orientationd`, `Spacingd`, crops and pads. A single affine then maps native voxels to preprocessed
    voxels. ``linear`` gives the same result as inverting all K class volumes and then taking the argmax, ``nearest``
    the same as inverting the argmax. Both need little memory beyond the probabilities, the label map and a slab.

    The result is a `MetaTensor` (1, X, Y, Z) on the CPU, uint8 (uint16 for more than 256 classes), with the affine and
    the file name of the scan. `SaveImaged` (``resample: false``) writes it on exactly the scan's grid.

    Args:
        keys: keys of the probabilities, (K, X, Y, Z) on the grid of the image.
        image_key: key of the preprocessed image, a `MetaTensor` loaded by `LoadImaged`.
        mode: ``linear`` or ``nearest``; see `resample_labels`.
        slab_bytes: see `resample_labels`.
        allow_missing_keys: ignore missing keys.

    Raises:
        InputError: here for an unknown mode; when called, if the image's metadata lacks the grid of its file, or the
            probabilities and the image are on different grids.
    """

    def __init__(
        self,
        keys: KeysCollection,
        *,
        image_key: str = "image",
        mode: str = "linear",
        slab_bytes: int = SLAB_BYTES,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        check_choice(name="mode", value=mode, choices=("linear", "nearest"))
        self.image_key = image_key
        self.mode = mode
        self.slab_bytes = slab_bytes

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item with label maps under ``keys``."""
        item = dict(data)
        image = item.get(self.image_key)
        file = image_file_of(item, self.image_key)
        if not {ORIGINAL_AFFINE, SPATIAL_SHAPE} <= set(image.meta):
            raise InputError(
                f"The metadata of the image of {file} lack the grid of its file ({ORIGINAL_AFFINE} and {SPATIAL_SHAPE}): "
                "load it with LoadImaged."
            )
        native, preprocessed = (convert_to_numpy(a).astype(float) for a in (image.meta[ORIGINAL_AFFINE], image.affine))
        shape = [int(size) for size in image.meta[SPATIAL_SHAPE]]
        for key in self.key_iterator(item):
            if item[key].shape[1:] != image.shape[1:]:
                raise InputError(
                    f"'{key}' of {file} has the shape {tuple(item[key].shape)}, the image {tuple(image.shape)}: both "
                    "must be on the preprocessed grid. Make MaskOnScanGridd the first step of the postprocessing."
                )
            probabilities = item[key].as_tensor() if isinstance(item[key], MetaTensor) else item[key]
            labels = resample_labels(
                probabilities.detach(),
                to_model=np.linalg.solve(preprocessed, native),
                shape=shape,
                mode=self.mode,
                slab_bytes=self.slab_bytes,
            )
            item[key] = MetaTensor(labels[None], meta={**image.meta, AFFINE: torch.as_tensor(native)})
        return item


def _box_of_labels(probabilities: torch.Tensor) -> list[tuple[int, int]] | None:
    """Return start and stop along each axis of the foreground's bounding box; None if there is no foreground."""
    planes: list[list[torch.Tensor]] = [[], [], []]
    for part in probabilities.split(8, dim=1):  # a few slices at a time, to save memory
        organs = (part[1:] > part[:1]).any(0)
        for axis in range(3):
            planes[axis].append(organs.any(dim=[other for other in range(3) if other != axis]))
    ends = []
    for occupied in (torch.cat(planes[0]), *(torch.stack(parts).any(0) for parts in planes[1:])):
        found = occupied.nonzero()[:, 0]
        if len(found) == 0:
            return None
        ends.append((int(found[0]), int(found[-1]) + 1))
    return ends


def _covered_box(to_model: np.ndarray, box: Sequence[tuple[int, int]], shape: Sequence[int]) -> list[tuple[int, int]]:
    """Return start and stop along each native axis of the box that covers ``box`` and a margin of one model voxel."""
    corners = np.array([[*corner, 1] for corner in product(*((first - 1, stop) for first, stop in box))])
    native = np.linalg.solve(to_model, corners.T)[:3]
    return [
        (max(0, math.floor(low)), min(n, math.ceil(high) + 1))
        for low, high, n in zip(native.min(1), native.max(1), shape, strict=True)
    ]
