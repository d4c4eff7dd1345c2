# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The proxy tasks, and which views of a batch each of them reads.

A batch of B crops becomes, in this order: B first and B second masked and rotated views, if any of inpainting, contrast
and rotation is in use; and B unmasked, unrotated ones for position, if that is in use.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...common.errors import InputError

PAPER_TASKS = ("inpainting", "contrast", "rotation")  # Tang et al., CVPR 2022, section 3.2
TASKS = (*PAPER_TASKS, "position")


def check_tasks(tasks: Sequence[str]) -> tuple[str, ...]:
    """Return the tasks in a fixed order.

    Raises:
        InputError: there is no task, or an unknown one.
    """
    tasks = [tasks] if isinstance(tasks, str) else list(tasks)
    if not tasks or set(tasks) - set(TASKS):
        raise InputError(f"--tasks {tasks} must name at least one of {', '.join(TASKS)}, and nothing else.")
    return tuple(task for task in TASKS if task in tasks)


def reads_masked_views(tasks: Sequence[str]) -> bool:
    """Return whether a task reads the masked and rotated views."""
    return bool(set(tasks) & set(PAPER_TASKS))


def split_views(views: torch.Tensor, tasks: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Split a batch's views, or what belongs to them, along the first dimension into (masked, for position)."""
    masked = reads_masked_views(tasks) * (2 if "position" in tasks else 3)  # masked parts, of three
    number = len(views) * masked // 3
    return views[:number], views[number:]
