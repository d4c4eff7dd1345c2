# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Contrastive coding: the two views of a crop attract, all other crops repel (NT-Xent; paper section 3.2, equation 2)."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ...common.run.distributed import gather, rank


class NTXentLoss(torch.nn.Module):
    """Normalised temperature-scaled cross entropy in float32, for any batch size.

    Each of the 2N embeddings picks its partner among the other 2N - 1. In a distributed run the negatives come from all ranks, with
    gradients: the mean over ranks, which DDP takes, equals one process with the joined batch. On one process it equals MONAI's
    `ContrastiveLoss`, whose batch size need not be known here in advance (traps.md 11).

    Args:
        temperature: divides the cosine similarities (official code: 0.5).
        across_ranks: take negatives from all ranks; all of them must then call the loss together, with as many embeddings each.
    """

    def __init__(self, temperature: float = 0.5, *, across_ranks: bool = True) -> None:
        super().__init__()
        self.temperature = temperature
        self.across_ranks = across_ranks

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Loss of two views (N, D) each; row i of one belongs to row i of the other."""
        return F.cross_entropy(*self.logits(first, second))

    def logits(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Similarities (2N, 2N x ranks) over temperature, an embedding's own at -inf, and the column of each row's partner."""
        with torch.autocast(first.device.type, enabled=False):
            local = F.normalize(torch.stack([first, second]).float(), dim=-1)  # (2, N, D)
            everyone = (
                (gather(local) if self.across_ranks else local[None]).transpose(0, 1).flatten(1, 2)
            )  # (2, all N, D)
            number, total = local.shape[1], everyone.shape[1]
            # i: own embeddings, j: everyone's, d: features
            similarity = torch.einsum("id,jd->ij", local.flatten(0, 1), everyone.flatten(0, 1)) / self.temperature
            own = torch.arange(number, device=first.device) + (rank() * number if self.across_ranks else 0)
            itself = torch.cat([own, own + total])
            similarity = similarity.scatter(1, itself[:, None], float("-inf"))
            return similarity, torch.cat([own + total, own])
