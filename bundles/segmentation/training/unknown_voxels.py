# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Transforms that leave unknown voxels out of the choice of crops, of the loss and of the validation metric."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.networks import one_hot
from monai.transforms import MapTransform, RandCropByPosNegLabeld
from monai.transforms.utils import map_binary_to_indices

from ...common.data.partial_labels import LABELLED, shown_classes


class CropByKnownLabeld(RandCropByPosNegLabeld):
    """MONAI's `RandCropByPosNegLabeld`, whose crops are never centred on an unknown voxel.

    MONAI treats every value above 0 as foreground. Labels without unknown voxels give the same crops as there.

    Args:
        ignore_label: value of unknown voxels in the label; None: there are none.
        options: see `RandCropByPosNegLabeld`.
    """

    def __init__(self, *, ignore_label: int | None, **options: Any) -> None:
        super().__init__(**options)
        self.ignore_label = ignore_label

    def randomize(
        self,
        label: torch.Tensor | None = None,
        fg_indices: Any = None,
        bg_indices: Any = None,
        image: torch.Tensor | None = None,
    ) -> None:
        """Draw the centres of the crops."""
        unknown = None if self.ignore_label is None or label is None else label == self.ignore_label
        if unknown is not None and unknown.any():
            # MONAI calls voxels background that are not in the label and, with an image, above its threshold.
            foreground, not_foreground = map_binary_to_indices(
                torch.where(unknown, 0, label), image, self.cropper.image_threshold
            )
            fg_indices, bg_indices = foreground, not_foreground[~unknown.flatten()[not_foreground]]
        super().randomize(label, fg_indices, bg_indices, image)


class FlagUnknownd(MapTransform):
    """Adds ``"unknown"``: whether a label has unknown voxels. The loss then need not look for them on the GPU.

    Args:
        label_key: key of the label.
        ignore_label: value of unknown voxels; None: adds nothing.
    """

    def __init__(self, *, label_key: str, ignore_label: int | None) -> None:
        super().__init__(label_key)
        self.ignore_label = ignore_label

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add the flag."""
        if self.ignore_label is None:
            return dict(data)
        return {**data, "unknown": bool((data[self.first_key(data)] == self.ignore_label).any())}


class OneHotOfKnownd(MapTransform):
    """One-hot form of a label map; unknown voxels are 0 in all channels, in the one-hot prediction, too.

    Overlap metrics such as Dice then count only known voxels. Classes that a case does not show (``"labelled"``, see
    `partial_labels`) are 0 everywhere in both, and so MONAI's Dice is NaN for them, which counts in no mean.

    Args:
        label_key: key of the label (1, X, Y, Z), which becomes (classes, X, Y, Z).
        pred_key: key of the prediction (classes, X, Y, Z), already one-hot.
        classes: number of classes, background included.
        ignore_label: value of unknown voxels; None: there are none.
    """

    def __init__(self, *, label_key: str, pred_key: str, classes: int, ignore_label: int | None) -> None:
        super().__init__([label_key, pred_key])
        self.classes = classes
        self.ignore_label = ignore_label

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item with both in one-hot form."""
        label_key, pred_key = self.keys
        label, prediction = data[label_key], data[pred_key]
        if self.ignore_label is None:
            truth = one_hot(label, num_classes=self.classes, dim=0)
        else:
            known = (label != self.ignore_label).to(prediction.device)
            truth = one_hot(torch.where(known, label, 0), num_classes=self.classes, dim=0) * known
            prediction = prediction * known
        if LABELLED in data:
            shown = shown_classes(data, classes=self.classes).to(prediction.device).view(-1, 1, 1, 1)
            truth, prediction = truth * shown, prediction * shown
        return {**data, label_key: truth, pred_key: prediction}
