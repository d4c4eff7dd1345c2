# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Contrastive loss (NT-Xent): the two views of a crop attract, all other crops repel.

Tang et al., CVPR 2022, section 3.2, equation 2.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ...common.run.distributed import gather, rank


class NTXentLoss(torch.nn.Module):
    """Normalised temperature-scaled cross entropy in float32, for any batch size.

    Each of the 2N embeddings picks its partner among the other 2N - 1. In a distributed run, the negatives come from
    all ranks, with gradients: the mean over ranks, which DDP computes, equals the loss of one process with the joined
    batch. On one process it equals MONAI's `ContrastiveLoss`, but the batch size need not be known in advance.

    Args:
        temperature: divides the cosine similarities (official code: 0.5).
        across_ranks: use negatives from all ranks. All ranks must then call the loss together, with the same number of
            embeddings.
    """

    def __init__(self, temperature: float = 0.5, *, across_ranks: bool = True) -> None:
        super().__init__()
        self.temperature = temperature
        self.across_ranks = across_ranks

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Return the loss of two views, (N, D) each; row i of one is the partner of row i of the other."""
        return F.cross_entropy(*self.logits(first, second))

    def logits(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return similarities divided by temperature, (2N, 2N x ranks), and the column of each row's partner.

        The similarity of an embedding with itself is -inf.
        """
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
