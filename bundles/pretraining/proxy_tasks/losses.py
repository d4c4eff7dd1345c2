# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Loss of the proxy tasks: weighted sum of inpainting, contrast and rotation.

Tang et al., CVPR 2022, section 3.2, equation 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional as F

from ...common.errors import InputError
from .contrast import NTXentLoss

TASKS = ("inpainting", "contrast", "rotation")


def check_tasks(tasks: Sequence[str]) -> tuple[str, ...]:
    """Return the tasks in a fixed order.

    Raises:
        InputError: there is no task, or an unknown one.
    """
    tasks = [tasks] if isinstance(tasks, str) else list(tasks)
    if not tasks or set(tasks) - set(TASKS):
        raise InputError(f"--tasks {tasks} must name at least one of {', '.join(TASKS)}, and nothing else.")
    return tuple(task for task in TASKS if task in tasks)


class ProxyTaskLoss(torch.nn.Module):
    """Weighted sum of the losses of the proxy tasks. ``parts`` has the unweighted losses of the last call.

    Inpainting is the mean absolute error to the unmasked crop, contrast is NT-Xent between the two views, rotation is
    cross entropy.

    Args:
        tasks: proxy tasks in use.
        weights: weight per task, 1 if not named (paper and official code: 1 each).
        temperature: temperature of NT-Xent.
        masked_only: compute the inpainting loss only over the masked voxels; by default over the whole crop, as in the
            official code.
        across_ranks: see `NTXentLoss`; False in validation, so that its metrics do not depend on the number of
            processes.
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
        self.contrast = NTXentLoss(temperature, across_ranks=across_ranks)
        self.masked_only = masked_only
        self.parts: dict[str, torch.Tensor] = {}

    def forward(self, outputs: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the loss of both views together.

        Args:
            outputs: outputs of `SwinPretrainer` for 2B views: the first views of B crops, then the second ones.
            targets: ``crop`` (2B, C, X, Y, Z) rotated but not masked, ``mask`` bool (2B, 1, X, Y, Z), ``turns`` (2B,).
        """
        parts = {}
        if "inpainting" in self.tasks:
            error = (outputs["inpainting"].float() - targets["crop"].float()).abs()
            if self.masked_only:
                hidden = targets["mask"].expand_as(error)
                parts["inpainting"] = (error * hidden).sum() / hidden.sum().clamp(min=1)
            else:
                parts["inpainting"] = error.mean()
        if "contrast" in self.tasks:
            parts["contrast"] = self.contrast(*outputs["contrast"].chunk(2))
        if "rotation" in self.tasks:
            parts["rotation"] = F.cross_entropy(outputs["rotation"].float(), targets["turns"])
        self.parts = {name: value.detach() for name, value in parts.items()}
        return sum(self.weights[name] * value for name, value in parts.items())
