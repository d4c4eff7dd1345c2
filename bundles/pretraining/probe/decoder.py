# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The decoder of the probe: multinomial logistic regression on the features of single voxels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class LinearDecoder:
    """Scores of K classes as a linear function of F features.

    Attributes:
        weight: float64 (K, F), for features as they come, not standardised.
        bias: float64 (K,).
    """

    weight: torch.Tensor
    bias: torch.Tensor


def fit_decoder(
    features: torch.Tensor, classes: torch.Tensor, *, number: int, decay: float = 0.01, max_iterations: int = 200
) -> LinearDecoder:
    """Fit a multinomial logistic regression with an L2 penalty.

    It minimises ``mean over classes of (mean cross-entropy of the class's voxels) + decay / 2 * |weight|^2`` over
    standardised features with L-BFGS, from zero and in float64 on the CPU. The problem is convex, so the result depends
    on the features alone: nothing is drawn, and there is no learning rate to tune at each step of the pre-training.

    Args:
        features: (N, F).
        classes: int64 (N,), values 0 to ``number`` - 1.
        number: number of classes K. A class without voxels gets a weight of zero.
        decay: strength of the penalty.
        max_iterations: iterations of L-BFGS; it stops sooner where the gradient vanishes.
    """
    features = features.detach().cpu().double()
    classes = classes.cpu()
    mean, scale = features.mean(dim=0), features.std(dim=0, correction=0)
    # a feature that is constant, but for rounding, says nothing: it must not be blown up
    scale = torch.where(scale > 1e-6 * features.abs().amax(dim=0).clamp(min=1e-12), scale, torch.inf)
    standard = (features - mean) / scale
    counts = torch.bincount(classes, minlength=number)
    share = (1 / counts.double() / (counts > 0).sum())[
        classes
    ]  # of each voxel in the mean; every class weighs the same
    weight = torch.zeros(number, features.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(number, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iterations,
        history_size=20,
        tolerance_grad=1e-6,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        entropy = F.cross_entropy(F.linear(standard, weight, bias), classes, reduction="none")
        value = (share * entropy).sum() + decay / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(objective)
    raw = weight.detach() / scale
    return LinearDecoder(raw, bias.detach() - raw @ mean)
