# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Weights of the classes in the cross entropy: small organs count for more, as far as one asks for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from .label_presence import label_volumes


def class_weights(
    scans: Sequence[Mapping[str, str]], *, classes: int, balance: float, background: float
) -> torch.Tensor:
    """Weight ``(volume / largest volume) ** -balance`` per foreground class, volumes summed over the training labels.

    Args:
        scans: items with ``label`` files.
        classes: number of classes, background included.
        balance: 0 weighs all foreground classes 1 and reads no file; 1 is the inverse volume.
        background: weight of class 0.

    Returns:
        float32 (classes,). A class that no training label holds keeps weight 1: it has no voxel to be weighed.
    """
    weights = np.ones(classes)
    if balance > 0:
        volumes = label_volumes(scans, classes=classes).sum(axis=0)[1:]
        present = volumes > 0
        weights[1:][present] = (volumes[present] / volumes.max()) ** -balance
    weights[0] = background
    return torch.tensor(weights, dtype=torch.float32)
