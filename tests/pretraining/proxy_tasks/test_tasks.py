# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Which views each task reads."""

from __future__ import annotations

import pytest
import torch

from bundles.common.errors import InputError
from bundles.pretraining.proxy_tasks.tasks import TASKS, check_tasks, reads_masked_views, split_views


@pytest.mark.parametrize(
    ("tasks", "masked", "for_position"),
    [(["position"], 0, 6), (["rotation"], 6, 0), (["inpainting", "contrast"], 6, 0), (TASKS, 4, 2)],
)
def test_views_are_split_by_the_tasks_in_use(tasks, masked, for_position):
    views = torch.arange(6)
    first, last = split_views(views, tasks)
    assert first.tolist() == list(range(masked)) and last.tolist() == list(range(masked, 6))
    assert len(last) == for_position and reads_masked_views(tasks) == bool(masked)


def test_tasks_come_in_a_fixed_order():
    assert check_tasks(["position", "rotation", "inpainting"]) == ("inpainting", "rotation", "position")
    assert check_tasks("position") == ("position",)


@pytest.mark.parametrize("tasks", [[], ["rotation", "jigsaw"], "inpaint"])
def test_unknown_tasks_and_none_at_all_are_refused(tasks):
    with pytest.raises(
        InputError, match="--tasks .*must name at least one of inpainting, contrast, rotation, position"
    ):
        check_tasks(tasks)
