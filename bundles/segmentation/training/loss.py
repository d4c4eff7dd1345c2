# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The loss of the segmentation bundles: soft Dice plus cross entropy. The two parts are logged separately."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from monai.losses import DiceLoss

from .label_presence import label_volumes


class SegmentationLoss(torch.nn.Module):
    """Sum of MONAI's `DiceLoss` and cross entropy; ``parts`` contains the latest value of each.

    With the defaults it equals the official BTCV code's ``DiceCELoss(to_onehot_y=True, softmax=True,
    squared_pred=True)``, except for the smoothing constants.

    Args:
        class_weights: (classes,) weights of the cross entropy; None for equal weights.
        background_in_dice: whether the average of the Dice term includes the background.
        batch_dice: True computes one Dice per class over the whole batch; False one per crop, which pushes the
            prediction of classes that are absent from a crop to zero.
        squared_pred: square the terms in the denominator of the Dice loss (official code).
    """

    def __init__(
        self,
        *,
        class_weights: torch.Tensor | None = None,
        background_in_dice: bool = True,
        batch_dice: bool = False,
        squared_pred: bool = True,
    ) -> None:
        super().__init__()
        self.dice = DiceLoss(
            include_background=background_in_dice,
            to_onehot_y=True,
            softmax=True,
            squared_pred=squared_pred,
            batch=batch_dice,
        )
        self.cross_entropy = torch.nn.CrossEntropyLoss(weight=class_weights)
        self.parts: dict[str, torch.Tensor] = {}

    def forward(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Return the loss of logits (B, classes, X, Y, Z) against label values (B, 1, X, Y, Z)."""
        logits = logits.float()
        dice = self.dice(logits, label)
        cross_entropy = self.cross_entropy(logits, label[:, 0].long())
        self.parts = {"dice": dice.detach(), "cross_entropy": cross_entropy.detach()}
        return dice + cross_entropy


def class_weights(
    scans: Sequence[Mapping[str, str]], *, classes: int, balance: float, background: float
) -> torch.Tensor:
    """Return class weights ``(volume / largest volume) ** -balance`` of the foreground classes.

    Volumes are summed over the training labels.

    Args:
        scans: items with ``label`` files.
        classes: number of classes, background included.
        balance: 0 gives every foreground class weight 1 and reads no file; 1 weights by inverse volume.
        background: weight of class 0.

    Returns:
        float32 (classes,). A class that occurs in no training label gets weight 1, which has no effect.
    """
    weights = np.ones(classes)
    if balance > 0:
        volumes = label_volumes(scans, classes=classes).sum(axis=0)[1:]
        present = volumes > 0
        weights[1:][present] = (volumes[present] / volumes.max()) ** -balance
    weights[0] = background
    return torch.tensor(weights, dtype=torch.float32)
