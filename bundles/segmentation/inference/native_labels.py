# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""From probabilities on the preprocessed grid to the label map on the scan's own, slab by slab."""

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
from ...common.run.options import check_choice

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
    """Return the label map of probabilities on another grid; outside of theirs it is background, 0.

    Only what the box around all labels but background covers is sampled, in slabs across the new grid's first axis:
    beyond it, background wins in all voxels that lie around.

    Args:
        probabilities: (K, X, Y, Z), any floating type and device.
        to_model: affine (4, 4) from voxels of the new grid to voxels of the probabilities.
        shape: of the new grid.
        mode: ``linear``: the class that wins after the probabilities were interpolated. ``nearest``: the class that
            wins in the nearest voxel; a tie between two voxels goes to the one nearer to the centre of the grid.
        slab_bytes: working memory of a slab, beside probabilities and result; never less than one slice.

    Returns:
        Label map of ``shape`` on the CPU, uint8, or uint16 from 257 classes on.
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
    else:  # in float64, since many voxels lie half-way between two where one spacing is a multiple of the other
        volume, sampling = probabilities.max(0, keepdim=True).indices.double(), "nearest"

    # To the coordinates of grid_sample: -1 and 1 are the outer faces of the first and last voxel.
    to_grid = 2 * to_model[:3] / size[:, None]
    to_grid[:, 3] += 1 / size - 1
    # Where rounding would decide: the outer face of the last voxel belongs to it, the centre beyond does not.
    to_grid *= 1 - 1e-6 if mode == "nearest" else 1 + 1e-6

    slice_bytes = math.prod(high - low for low, high in plane) * ((len(volume) + 5) * volume.element_size() + 8)
    thickness = max(1, slab_bytes // slice_bytes)
    for start in range(first, last, thickness):
        box = [(start, min(start + thickness, last)), *plane]
        grid = _grid(to_grid, box, like=volume)
        # One batch entry per slice: on a CPU grid_sample works on those in parallel, and on nothing else.
        slices = volume.expand(len(grid), *volume.shape)
        sampled = F.grid_sample(slices, grid, mode=sampling, padding_mode="zeros", align_corners=False)
        winner = (
            sampled.max(1).indices if mode == "linear" else sampled[:, 0]
        )  # on a CPU argmax takes four times as long
        labels[tuple(slice(*ends) for ends in box)] = winner[:, 0].to(labels.dtype).cpu()
        del grid, sampled, winner  # or they would stay beside the next slab's
    return labels


def _grid(to_grid: np.ndarray, box: Sequence[tuple[int, int]], *, like: torch.Tensor) -> torch.Tensor:
    """Coordinates (X, 1, Y, Z, 3) of the voxels of a box for `grid_sample`, which wants the last axis first."""
    x, y, z = (torch.arange(*ends).to(like) for ends in box)
    grid = like.new_empty((len(x), 1, len(y), len(z), 3))
    for axis, (a, b, c, offset) in enumerate(to_grid.tolist()):
        grid[:, 0, :, :, 2 - axis] = (a * x)[:, None, None] + (b * y)[:, None] + (c * z + offset)
    return grid


class NativeLabelsd(MapTransform):
    """Replace the probabilities of the preprocessed scan by the label map on the voxels of the scan's file.

    Takes the place of ``AsDiscreted(argmax=True)`` and ``Invertd`` after any preprocessing that keeps the affine of
    the image true (`Orientationd`, `Spacingd`, crops and pads do), for from native voxel to world to preprocessed voxel
    is one affine. ``linear`` gives what inverting all K class volumes and then taking the winner gives, ``nearest``
    what inverting the winners gives; both hold little more than the probabilities, the label map and a slab.

    The result is a `MetaTensor` (1, X, Y, Z), uint8 or above 256 classes uint16, on the CPU, with the affine and the
    file name of the scan: `SaveImaged` (``resample: false``) writes it on the scan's very grid.

    Args:
        keys: of the probabilities, (K, X, Y, Z) on the grid of the image.
        image_key: of the preprocessed image, a `MetaTensor` that `LoadImaged` made.
        mode: ``linear`` or ``nearest``; see `resample_labels`.
        slab_bytes: see `resample_labels`.
        allow_missing_keys: pass over keys that are not there.

    Raises:
        InputError: here for an unknown mode; when called, if the image does not know the grid of its file, or the
            probabilities lie on another grid than the image.
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
                f"The image of {file} does not know the grid of its file ({ORIGINAL_AFFINE} and {SPATIAL_SHAPE} in its "
                "metadata): load it with LoadImaged."
            )
        native, preprocessed = (convert_to_numpy(a).astype(float) for a in (image.meta[ORIGINAL_AFFINE], image.affine))
        shape = [int(size) for size in image.meta[SPATIAL_SHAPE]]
        for key in self.key_iterator(item):
            if item[key].shape[1:] != image.shape[1:]:
                raise InputError(
                    f"'{key}' of {file} has the shape {tuple(item[key].shape)}, the image {tuple(image.shape)}: both "
                    "must lie on the preprocessed grid. NativeLabelsd is the first step of the postprocessing."
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
    """Start and stop along each axis of the voxels in which background does not win; None where it wins everywhere."""
    planes: list[list[torch.Tensor]] = [[], [], []]
    for part in probabilities.split(8, dim=1):  # a few slices at a time: no volume of working memory
        organs = (part[1:] > part[:1]).any(0)
        for axis in range(3):
            planes[axis].append(organs.any(dim=[other for other in range(3) if other != axis]))
    ends = []
    for along in (torch.cat(planes[0]), *(torch.stack(seen).any(0) for seen in planes[1:])):
        found = along.nonzero()[:, 0]
        if len(found) == 0:
            return None
        ends.append((int(found[0]), int(found[-1]) + 1))
    return ends


def _covered_box(to_model: np.ndarray, box: Sequence[tuple[int, int]], shape: Sequence[int]) -> list[tuple[int, int]]:
    """Return start and stop along each native axis of the voxels that lie less than a voxel outside of ``box``."""
    corners = np.array([[*corner, 1] for corner in product(*((first - 1, stop) for first, stop in box))])
    native = np.linalg.solve(to_model, corners.T)[:3]
    return [
        (max(0, math.floor(low)), min(n, math.ceil(high) + 1))
        for low, high, n in zip(native.min(1), native.max(1), shape, strict=True)
    ]
