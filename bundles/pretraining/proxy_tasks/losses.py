# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Weighted sum of the proxy tasks' losses: inpainting, contrast, rotation (Tang et al., CVPR 2022, eq. 4), position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from ...common.errors import InputError
from ...common.run.distributed import sum_over_ranks
from ...common.words import shown
from .contrast import NTXentLoss
from .position import position_loss, residuals
from .tasks import TASKS, check_tasks


class ProxyTaskLoss(torch.nn.Module):
    """Weighted sum of the losses of the proxy tasks. ``parts`` has the unweighted losses of the last call.

    Inpainting is the mean absolute error to the unmasked crop, contrast is NT-Xent between the two views, rotation is
    cross entropy, position is the mean absolute error in units of 100 mm (`position.position_loss`).

    Args:
        tasks: proxy tasks in use.
        weights: weight per task, 1 if not named (paper and official code: 1 each).
        temperature: temperature of NT-Xent.
        masked_only: compute the inpainting loss only over the masked voxels; by default over the whole crop, as in the
            official code.
        across_ranks: negatives of the contrast, masked voxels and body voxels are those of all ranks, so that the mean
            over ranks equals the loss of one process with the joined batch. False in validation, so that its metrics do
            not depend on the number of processes.
    """

    def __init__(
        self,
        *,
        tasks: Sequence[str],
        weights: Mapping[str, float] | None = None,
        temperature: float = 0.5,
        masked_only: bool = False,
        across_ranks: bool = True,
    ) -> None:
        super().__init__()
        self.tasks = check_tasks(tasks)
        self.weights = {task: float((weights or {}).get(task, 1.0)) for task in self.tasks}
        if unknown := sorted(set(weights or {}) - set(TASKS)):
            raise InputError(f"task_weights names {', '.join(unknown)}; the proxy tasks are {', '.join(TASKS)}.")
        if not any(self.weights.values()):
            raise InputError(
                f"--task_weights {shown(self.weights)}: every task of this run has the weight 0, so nothing would be learnt. "
                "Give at least one of --tasks a weight above 0."
            )
        self.contrast = NTXentLoss(temperature, across_ranks=across_ranks)
        self.masked_only = masked_only
        self.across_ranks = across_ranks
        self.parts: dict[str, torch.Tensor] = {}

    def forward(self, outputs: Mapping[str, torch.Tensor], targets: Mapping[str, Any]) -> torch.Tensor:
        """Return the loss of all views together.

        Args:
            outputs: outputs of `SwinPretrainer` for the views of `tasks`.
            targets: ``crop`` (2B, C, X, Y, Z) rotated but not masked, ``mask`` bool (2B, 1, X, Y, Z), ``turns`` (2B,);
                for position, ``position`` (B, 3, X, Y, Z) in mm, ``body`` bool (B, 1, X, Y, Z) and ``crops_per_scan``.
        """
        parts = {}
        if "inpainting" in self.tasks:
            error = (outputs["inpainting"].float() - targets["crop"].float()).abs()
            if self.masked_only:
                hidden = targets["mask"].expand_as(error)
                number = hidden.sum().float()
                if self.across_ranks:
                    number = sum_over_ranks(number, mean=True)
                parts["inpainting"] = (error * hidden).sum() / number.clamp(min=1)
            else:
                parts["inpainting"] = error.mean()
        if "contrast" in self.tasks:
            parts["contrast"] = self.contrast(*outputs["contrast"].chunk(2))
        if "rotation" in self.tasks:
            parts["rotation"] = F.cross_entropy(outputs["rotation"].float(), targets["turns"])
        if "position" in self.tasks:
            error = residuals(outputs["position"], targets["position"], targets["body"], targets["crops_per_scan"])
            parts["position"] = position_loss(error, targets["body"], across_ranks=self.across_ranks)
        self.parts = {name: value.detach() for name, value in parts.items()}
        return sum(self.weights[name] * value for name, value in parts.items())
