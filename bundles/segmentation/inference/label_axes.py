# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Bring a true label map onto the axes of its scan's file, before it is compared with a mask."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import convert_to_numpy

from ...common.scans.headers.axes import turned
from .mask_on_scan_grid import AFFINE, ORIGINAL_AFFINE, SPATIAL_SHAPE


class OnAxesOfScand(MapTransform):
    """Swap and flip the axes of label maps so that they run as in the file of the image.

    Checks accept a label whose file is turned against that of its scan, since training turns both to RAS.

    Args:
        keys: keys of label maps, each a `MetaTensor` (1, X, Y, Z) of the label file's own voxels.
        image_key: key of the image, a `MetaTensor` loaded by `LoadScand`, preprocessed or not.
        allow_missing_keys: ignore missing keys.
    """

    def __init__(self, keys: KeysCollection, *, image_key: str = "image", allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item; label maps on the axes of the image are unchanged."""
        item = dict(data)
        like = convert_to_numpy(item[self.image_key].meta[ORIGINAL_AFFINE]).astype(float)
        for key in self.key_iterator(item):
            label = item[key]
            voxels = label.as_tensor()[0].numpy()
            result, affine = turned(voxels, convert_to_numpy(label.affine).astype(float), like=like)
            if result is voxels:
                continue
            placing = {AFFINE: torch.as_tensor(affine), ORIGINAL_AFFINE: affine, SPATIAL_SHAPE: np.array(result.shape)}
            item[key] = MetaTensor(torch.from_numpy(np.ascontiguousarray(result))[None], meta={**label.meta, **placing})
        return item
