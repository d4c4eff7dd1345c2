# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The loss of the segmentation bundles: soft Dice plus cross entropy. The two parts are logged separately."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from monai.losses import DiceLoss
from monai.networks import one_hot
from torch.nn import functional as F

from ...common.data.partial_labels import LABELLED, shown_classes
from .label_presence import label_volumes


class PartlyKnown(NamedTuple):
    """The target of a batch with unknown voxels, with cases of different weight or with labels of only some classes.

    Attributes:
        label: label values (B, 1, X, Y, Z).
        weight: weight of each crop, float32 (B,); None: 1 for each.
        labelled: the classes that the label of each crop shows, bool (B, classes), the background always; None: all.
    """

    label: torch.Tensor
    weight: torch.Tensor | None = None
    labelled: torch.Tensor | None = None


class SegmentationLoss(torch.nn.Module):
    """Sum of MONAI's `DiceLoss` and cross entropy; ``parts`` contains the latest value of each.

    With the defaults it equals the official BTCV code's ``DiceCELoss(to_onehot_y=True, softmax=True,
    squared_pred=True)``, except for the smoothing constants.

    A `PartlyKnown` target changes three things:

    - Unknown voxels (``ignore_label``) are in no sum: neither of the prediction nor of the truth in Dice, and neither
      above nor below the line of the cross entropy's mean. A batch without a known voxel has cross entropy 0.
    - The loss of a crop is multiplied by its weight. It is not divided by the sum of the weights: a batch whose crops
      all have weight 0.5 has half the loss. With ``batch_dice`` the sums of Dice are weighted, and its loss is
      multiplied by the mean weight.

    - Classes that a crop's label does not show are part of its background, which is then "anything else": their
      probabilities are added to the background's before both terms, so that it does not matter how the network divides
      them (the marginal loss of Shi et al., Medical Image Analysis 2021). The mean of the Dice term is over the classes
      that a crop shows (with ``batch_dice``, that any crop shows). Voxels whose value is a class that is not shown
      count as background.

    Any other target must be known everywhere, and takes MONAI's own path, unless a class weight is 0.

    Args:
        class_weights: (classes,) weights of the cross entropy; None for equal weights.
        background_in_dice: whether the average of the Dice term includes the background.
        batch_dice: True computes one Dice per class over the whole batch; False one per crop, which pushes the
            prediction of classes that are absent from a crop to zero.
        squared_pred: square the terms in the denominator of the Dice loss (official code).
        ignore_label: value of unknown voxels in a `PartlyKnown` target; None: there are none.

    Raises:
        ValueError: from ``forward``, for weighted crops with ``batch_dice`` and without ``squared_pred``.
    """

    def __init__(
        self,
        *,
        class_weights: torch.Tensor | None = None,
        background_in_dice: bool = True,
        batch_dice: bool = False,
        squared_pred: bool = True,
        ignore_label: int | None = None,
    ) -> None:
        super().__init__()
        options = {"include_background": background_in_dice, "squared_pred": squared_pred, "batch": batch_dice}
        self.dice = DiceLoss(to_onehot_y=True, softmax=True, **options)
        self.dice_of_known = DiceLoss(reduction="none", **options)
        self.cross_entropy = torch.nn.CrossEntropyLoss(weight=class_weights)
        self.some_count_nothing = class_weights is not None and bool((class_weights == 0).any())
        self.ignore_label = ignore_label
        self.parts: dict[str, torch.Tensor] = {}

    def forward(self, logits: torch.Tensor, target: torch.Tensor | PartlyKnown) -> torch.Tensor:
        """Return the loss of logits (B, classes, X, Y, Z) against label values (B, 1, X, Y, Z) or a `PartlyKnown`."""
        logits = logits.float()
        if self.some_count_nothing and not isinstance(target, PartlyKnown):
            target = PartlyKnown(target)  # PyTorch's mean over no voxel would be NaN
        if isinstance(target, PartlyKnown):
            dice, cross_entropy = self._of_known(logits, target)
        else:
            dice, cross_entropy = self.dice(logits, target), self.cross_entropy(logits, target[:, 0].long())
        self.parts = {"dice": dice.detach(), "cross_entropy": cross_entropy.detach()}
        return dice + cross_entropy

    def _of_known(self, logits: torch.Tensor, target: PartlyKnown) -> tuple[torch.Tensor, torch.Tensor]:
        """Return Dice loss and cross entropy. No value is read on the host, so the GPU is not waited for."""
        label = target.label.long()
        known = torch.ones_like(label, dtype=torch.bool) if self.ignore_label is None else label != self.ignore_label
        label = torch.where(known, label, 0)
        if target.labelled is not None:
            logits, label = _with_rest_as_background(logits, label, target.labelled)
        weight = logits.new_ones(len(logits)) if target.weight is None else target.weight.to(logits)
        over = weight.view(-1, 1, 1, 1, 1)

        # Dice sums p^2, t^2 and (p - t)^2: with both scaled by sqrt(weight), the sums are weighted.
        scale = known.to(logits.dtype)
        if self.dice.batch and target.weight is not None:
            if not self.dice.squared_pred:
                raise ValueError("Weighted crops need squared_pred with batch_dice: only squared sums can be weighted.")
            scale = scale * over.sqrt()
        terms = self.dice_of_known(
            logits.softmax(1) * scale, one_hot(label, num_classes=logits.shape[1], dtype=logits.dtype) * scale
        )
        dice = self._mean_dice(terms, weight, target.labelled)

        counted = known[:, 0]
        of_voxels = F.cross_entropy(logits, label[:, 0], weight=self.cross_entropy.weight, reduction="none")
        weights = self.cross_entropy.weight
        shares = torch.ones_like(of_voxels) if weights is None else weights[label[:, 0]]
        total = (torch.where(counted, of_voxels, 0.0) * over[:, 0]).sum()
        over_all = (shares * counted).sum()
        return dice, total / torch.where(over_all > 0, over_all, 1.0)

    def _mean_dice(self, terms: torch.Tensor, weight: torch.Tensor, labelled: torch.Tensor | None) -> torch.Tensor:
        """Return the mean of the Dice losses of each class, (B, classes, ...), or (classes, ...) with ``batch``."""
        if labelled is None:
            return terms.mean() * weight.mean() if self.dice.batch else (terms * weight.view(-1, 1, 1, 1, 1)).mean()
        counted = labelled if self.dice.include_background else labelled[:, 1:]
        if self.dice.batch:
            counted = counted.any(0)
            return (terms.flatten() * counted).sum() / counted.sum() * weight.mean()
        of_crops = (terms.flatten(1) * counted).sum(1) / counted.sum(1)
        return (of_crops * weight).mean()


def _with_rest_as_background(
    logits: torch.Tensor, label: torch.Tensor, labelled: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make the classes that a label does not show part of the background.

    Args:
        logits: (B, classes, X, Y, Z).
        label: class of each voxel, (B, 1, X, Y, Z).
        labelled: bool (B, classes).

    Returns:
        Logits whose softmax is 0 for these classes and the sum of theirs for the background; the label without them.
    """
    shown = labelled.view(*labelled.shape, 1, 1, 1)
    background = torch.arange(logits.shape[1], device=logits.device).view(1, -1, 1, 1, 1) == 0
    rest = logits.masked_fill(shown & ~background, -torch.inf).logsumexp(1, keepdim=True)
    merged = torch.where(background, rest, logits.masked_fill(~shown, -torch.inf))
    return merged, torch.where(shown.expand_as(logits).gather(1, label), label, 0)


def class_weights(
    scans: Sequence[Mapping[str, str]], *, classes: int, balance: float, background: float
) -> torch.Tensor:
    """Return class weights ``(volume / largest volume) ** -balance`` of the foreground classes.

    Volumes are summed over the training labels; if some show only some structures, they are means over the labels that
    show the class.

    Args:
        scans: items with ``label`` files.
        classes: number of classes, background included. Other values, such as that of unknown voxels, are not counted.
        balance: 0 gives every foreground class weight 1 and reads no file; 1 weights by inverse volume.
        background: weight of class 0.

    Returns:
        float32 (classes,). A class that occurs in no training label gets weight 1, which has no effect.
    """
    volumes = np.zeros(classes)
    if balance > 0:
        volumes = label_volumes(scans, classes=classes)
        if any(LABELLED in scan for scan in scans):
            shown = np.stack([shown_classes(scan, classes=classes).numpy() for scan in scans])
            volumes = (volumes * shown) / np.maximum(shown.sum(axis=0), 1)
        volumes = volumes.sum(axis=0)
    return balanced_weights(volumes, balance=balance, background=background)


def balanced_weights(volumes: np.ndarray, *, balance: float, background: float) -> torch.Tensor:
    """Return `class_weights` from the volume of each class.

    Args:
        volumes: (classes,), in any unit; that of the background has no effect.
        balance, background: see `class_weights`.
    """
    weights = np.ones(len(volumes))
    foreground = np.asarray(volumes)[1:]
    present = foreground > 0
    weights[1:][present] = (foreground[present] / foreground.max()) ** -balance
    weights[0] = background
    return torch.tensor(weights, dtype=torch.float32)
