# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Transforms that leave unknown voxels out of the choice of crops, of the loss and of the validation metric."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
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


class KnownLabelMapsd(MapTransform):
    """Label map and predicted label map in which what the label does not know is background, for a metric without it.

    Overlap metrics such as Dice then count only known voxels. A label keeps only the classes that its case shows
    (``"labelled"``, see `partial_labels`), so MONAI's Dice of the others is NaN, which counts in no mean. Label maps need
    a fraction of the memory of the one-hot form.

    Args:
        label_key: key of the label (1, X, Y, Z). It is moved to the device of the prediction.
        pred_key: key of the predicted label map (1, X, Y, Z).
        classes: number of classes, background included.
        ignore_label: value of unknown voxels; None: there are none.
    """

    def __init__(self, *, label_key: str, pred_key: str, classes: int, ignore_label: int | None) -> None:
        super().__init__([label_key, pred_key])
        self.classes = classes
        self.ignore_label = ignore_label

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item with both maps."""
        label_key, pred_key = self.keys
        prediction = data[pred_key]
        label = data[label_key].to(prediction.device)
        if self.ignore_label is not None:
            known = label != self.ignore_label
            label, prediction = torch.where(known, label, 0), torch.where(known, prediction, 0)
        if LABELLED in data:
            shown = shown_classes(data, classes=self.classes).to(prediction.device)
            label = torch.where(shown[label.long()], label, 0)
        return {**data, label_key: label, pred_key: prediction}
