# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Dice, surface Dice (NSD) and HD95 of one case."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from monai.metrics import compute_dice, compute_surface_dice, get_mask_edges, get_surface_distance
from monai.utils import convert_to_numpy
from scipy import ndimage

from ...common.errors import InputError
from ...common.value_rules import ZERO_OR_ABOVE

DEFAULT_TOLERANCE = 1.0  # mm

OTHERWISE = "otherwise"  # key of the tolerance for organs that are not named


def score_case(
    prediction: np.ndarray | torch.Tensor,
    truth: np.ndarray | torch.Tensor,
    *,
    labels: Mapping[int, str],
    spacing: Sequence[float],
    tolerance: float | Mapping[str, float],
    ignore_label: int | None = None,
    labelled: Collection[int] | None = None,
) -> dict[str, dict[str, float]]:
    """Return Dice, NSD and HD95 of each organ of one case.

    - NSD (Nikolov et al., arXiv 1809.04430) is the share of both masks' surface area that is within the tolerance of
      the other surface. Surface elements are at the corners of the voxels, as in DeepMind's surface-distance, which the
      Medical Segmentation Decathlon (MSD) uses; the results are equal. (MONAI's default counts surface voxels instead.
      On random blobs its values were up to 0.1 lower at a tolerance of one voxel.)
    - HD95 is the larger of two 95th percentiles: of the distances from one mask to the other, and back. Distances are
      between the centres of surface voxels (those with a face to the outside), as in
      `monai.metrics.compute_hausdorff_distance(percentile=95)`. MedPy, and with it nnU-Net v1, takes one percentile
      over the distances of both directions, which is between the two.

    A mask also has a surface where it touches the border of the volume.

    An organ in neither mask scores NaN and is not counted in any mean. An organ in only one mask has Dice 0, NSD 0 and
    no HD95 (NaN). nnU-Net v1 has NaN here too; MONAI and surface-distance have infinity, which makes every mean
    infinite. `summarise` counts such cases, because without them a mean HD95 looks better than it is. For NSD, MONAI
    and surface-distance follow the same rules. MONAI's Dice differs: with ``ignore_empty=True`` an organ in the
    prediction only is NaN, which ignores false positives; with ``ignore_empty=False`` an organ in neither mask is 1,
    which rewards absent organs.

    Voxels that the truth calls unknown are background in both masks, whatever the prediction. Dice then counts only
    known voxels. Both masks end where the unknown begins and have a surface there: where both reach it, these surfaces
    coincide and count as equal in NSD and HD95; where only one reaches it, its distance to the other counts.

    Each organ is scored in the bounding box of its two masks, so that memory depends on the organ, not on the scan.

    Args:
        prediction: label map, integers (or floats that are whole numbers), of shape (X, Y, Z).
        truth: label map of the same shape and geometry.
        labels: organ name of each label value; other values are ignored. The background 0 cannot be scored.
        spacing: voxel size along X, Y, Z in mm.
        tolerance: NSD tolerance in mm, one for all organs or by organ name. Organs that are not named get that of
            ``otherwise``, or 1 mm.
        ignore_label: value of unknown voxels in the truth; None: there are none.
        labelled: label values of the organs that the truth shows; the others score NaN. None: all.

    Returns:
        ``{organ: {"dice": float, "nsd": float, "hd95": float}}`` in the order of ``labels``.

    Raises:
        InputError: the shapes differ, the maps are not 3D label maps, or a label, spacing or tolerance is invalid.
    """
    prediction, truth = _label_map(prediction, "prediction"), _label_map(truth, "truth")
    if prediction.shape != truth.shape:
        raise InputError(
            f"The prediction has the shape {prediction.shape}, the truth {truth.shape}: they must be equal."
        )
    if len(spacing) != 3 or not all(math.isfinite(s) and s > 0 for s in spacing):
        raise InputError(f"spacing is {list(spacing)}: it must be three voxel sizes in mm, each above 0.")
    if not labels or min(labels) < 1:
        raise InputError(f"labels is {dict(labels)}: name at least one organ, by label values from 1 up.")
    if ignore_label is not None and (unknown := truth == ignore_label).any():
        prediction, truth = (np.where(unknown, 0, array).astype(array.dtype) for array in (prediction, truth))

    boxes_of_prediction = ndimage.find_objects(prediction, max_label=max(labels))
    boxes_of_truth = ndimage.find_objects(truth, max_label=max(labels))
    scores = {}
    for value, organ in labels.items():
        limit = _tolerance_of(organ, tolerance)
        if labelled is not None and value not in labelled:
            scores[organ] = {"dice": math.nan, "nsd": math.nan, "hd95": math.nan}
            continue
        boxes = [box for box in (boxes_of_prediction[value - 1], boxes_of_truth[value - 1]) if box is not None]
        if len(boxes) < 2:
            score = 0.0 if boxes else math.nan
            scores[organ] = {"dice": score, "nsd": score, "hd95": math.nan}
            continue
        joint = tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(*boxes, strict=True))
        masks = [array[joint] == value for array in (prediction, truth)]
        # Padding closes the surface at the border of the box or volume.
        tensors = [torch.from_numpy(np.pad(mask, 1))[None, None] for mask in masks]
        nsd = compute_surface_dice(
            *tensors,
            class_thresholds=[limit],
            include_background=True,
            spacing=[float(size) for size in spacing],
            use_subvoxels=True,
        )
        # Not compute_hausdorff_distance: it fails with more than 2^24 surface voxels (torch.quantile).
        edges = get_mask_edges(*masks)
        distances = (get_surface_distance(*pair, spacing=spacing) for pair in (edges, edges[::-1]))
        scores[organ] = {
            "dice": compute_dice(*tensors).item(),
            "nsd": nsd.item(),
            "hd95": float(max(np.percentile(one_way, 95) for one_way in distances)),
        }
    return scores


def _label_map(array: np.ndarray | torch.Tensor, role: str) -> np.ndarray:
    array = convert_to_numpy(array)
    if array.ndim != 3:
        raise InputError(f"The {role} has the shape {array.shape}: it must be one label map of shape (X, Y, Z).")
    if array.dtype == bool:
        return array.view(np.uint8)
    if np.issubdtype(array.dtype, np.integer):
        return array
    whole = array.astype(np.int32)
    if not np.array_equal(whole, array):
        raise InputError(f"The {role} is no label map: it contains values such as {array[whole != array][0]}.")
    return whole


def _tolerance_of(organ: str, tolerance: float | Mapping[str, float]) -> float:
    if isinstance(tolerance, Mapping):
        tolerance = tolerance.get(organ, tolerance.get(OTHERWISE, DEFAULT_TOLERANCE))
    if not ZERO_OR_ABOVE.holds(tolerance):
        raise InputError(f"The NSD tolerance of '{organ}' is {tolerance}: it must be a number of mm, 0 or above.")
    return float(tolerance)
