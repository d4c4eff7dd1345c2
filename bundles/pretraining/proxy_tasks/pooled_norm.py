# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Normalise pooled features over the views of a step, so that heads see how crops differ."""

from __future__ import annotations

import torch
from torch import nn

from ...common.run.distributed import gather


class PooledNorm(nn.Module):
    """Subtract each channel's mean and divide by its standard deviation, over the views of a step.

    At the start of a pre-training nearly all of a pooled vector is common to all crops. Contrast and rotation then see
    little else, and at a high learning rate the encoder may give up the rest: it collapses. What all crops share is
    subtracted here. It is batch normalisation (Ioffe and Szegedy, 2015; before the contrast: SimCLR, Chen et al., 2020)
    without scale, shift and running means. (The shared part moves faster than a running mean follows: with one,
    validation was worse than chance while training recognised the rotation.)

    In training the views are those of all processes, with gradients, so that processes together equal one with the
    joined batch. In eval mode they are those of the call, so that figures do not depend on the number of processes.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return normalised features in float32, (V, channels) like ``x``, for two views or more."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            everyone = gather(x).flatten(0, 1) if self.training else x
            return (x - everyone.mean(dim=0)) * (everyone.var(dim=0, correction=0) + 1e-5).rsqrt()
