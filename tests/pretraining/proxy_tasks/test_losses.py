# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The loss is the weighted sum of the tasks in use, each against numpy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from monai.losses import ContrastiveLoss

from bundles.common.errors import InputError
from bundles.pretraining.proxy_tasks.losses import ProxyTaskLoss
from bundles.pretraining.proxy_tasks.tasks import PAPER_TASKS as TASKS
from bundles.pretraining.proxy_tasks.tasks import check_tasks


@pytest.fixture
def outputs():
    torch.manual_seed(0)
    return {"inpainting": torch.rand(4, 2, 3, 4, 5), "contrast": torch.randn(4, 8), "rotation": torch.randn(4, 4)}


@pytest.fixture
def targets():
    torch.manual_seed(1)
    mask = torch.rand(4, 1, 3, 4, 5) < 0.3
    return {"crop": torch.rand(4, 2, 3, 4, 5), "mask": mask, "turns": torch.tensor([0, 3, 1, 1])}


def expected_parts(outputs, targets):
    """Each task by numpy (contrast by MONAI: tests of its own in test_contrast.py)."""
    error = np.abs(outputs["inpainting"].numpy() - targets["crop"].numpy())
    logits = outputs["rotation"].double().numpy()
    probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return {
        "inpainting": float(error.mean()),
        "contrast": float(ContrastiveLoss(temperature=0.5)(outputs["contrast"][:2], outputs["contrast"][2:])),
        "rotation": float(-np.log(probability[range(4), targets["turns"].numpy()]).mean()),
    }


@pytest.mark.parametrize("tasks", [c for n in (1, 2, 3) for c in itertools.combinations(TASKS, n)])
def test_the_loss_is_the_sum_of_the_tasks_in_use(outputs, targets, tasks):
    loss = ProxyTaskLoss(tasks=tasks)
    used = {task: outputs[task] for task in tasks}  # the network gives no others
    expected = expected_parts(outputs, targets)
    assert loss(used, targets).item() == pytest.approx(sum(expected[task] for task in tasks), rel=1e-5)
    assert {name: value.item() for name, value in loss.parts.items()} == pytest.approx(
        {task: expected[task] for task in tasks}, rel=1e-5
    )


def test_weights_count_in_the_sum_and_not_in_the_parts(outputs, targets):
    loss = ProxyTaskLoss(tasks=TASKS, weights={"inpainting": 10.0, "rotation": 0.5})
    expected = expected_parts(outputs, targets)
    total = 10 * expected["inpainting"] + expected["contrast"] + 0.5 * expected["rotation"]
    assert loss(outputs, targets).item() == pytest.approx(total, rel=1e-5)
    assert loss.parts["inpainting"].item() == pytest.approx(expected["inpainting"], rel=1e-5)


def test_a_weight_of_zero_stops_the_gradient_of_its_task(outputs, targets):
    outputs = {task: value.requires_grad_() for task, value in outputs.items()}
    loss = ProxyTaskLoss(tasks=TASKS, weights={"contrast": 0})
    loss(outputs, targets).backward()
    assert not outputs["contrast"].grad.any()
    assert outputs["rotation"].grad.any() and outputs["inpainting"].grad.any()
    assert not any(part.requires_grad for part in loss.parts.values())


def test_masked_only_is_the_error_of_the_masked_voxels_alone(outputs, targets):
    error = np.abs(outputs["inpainting"].numpy() - targets["crop"].numpy())
    hidden = np.broadcast_to(targets["mask"].numpy(), error.shape)
    loss = ProxyTaskLoss(tasks=["inpainting"], masked_only=True)
    assert loss(outputs, targets).item() == pytest.approx(float(error[hidden].mean()), rel=1e-5)
    assert float(error[hidden].mean()) != pytest.approx(float(error.mean()), rel=1e-3)


def test_masked_only_without_a_masked_voxel_is_zero_and_not_nan(outputs, targets):
    loss = ProxyTaskLoss(tasks=["inpainting"], masked_only=True)
    assert loss(outputs, targets | {"mask": torch.zeros_like(targets["mask"])}).item() == 0


def test_the_temperature_is_that_of_the_contrast(outputs, targets):
    expected = ContrastiveLoss(temperature=0.1)(outputs["contrast"][:2], outputs["contrast"][2:])
    torch.testing.assert_close(ProxyTaskLoss(tasks="contrast", temperature=0.1)(outputs, targets), expected)


def test_half_precision_outputs_give_a_float32_loss(outputs, targets):
    half = {task: value.half() for task, value in outputs.items()}
    loss = ProxyTaskLoss(tasks=TASKS)(half, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(sum(expected_parts(outputs, targets).values()), rel=1e-2)


def test_tasks_come_in_a_fixed_order():
    assert check_tasks(["rotation", "inpainting"]) == ("inpainting", "rotation")
    assert check_tasks("contrast") == ("contrast",)


@pytest.mark.parametrize("tasks", [[], ["rotation", "jigsaw"], "inpaint"])
def test_unknown_tasks_and_none_at_all_are_refused(tasks):
    with pytest.raises(InputError, match="--tasks .*must name at least one of inpainting, contrast, rotation"):
        ProxyTaskLoss(tasks=tasks)


def test_a_weight_for_no_task_is_refused():
    with pytest.raises(InputError, match="task_weights names rotate; the proxy tasks are inpainting"):
        ProxyTaskLoss(tasks=TASKS, weights={"rotate": 2.0})


def test_a_single_masked_voxel_counts_in_full():
    outputs, targets = torch.zeros(2, 1, 3, 4, 5), {"crop": torch.full((2, 1, 3, 4, 5), 0.75)}
    targets["mask"] = torch.zeros(2, 1, 3, 4, 5, dtype=torch.bool)
    targets["mask"][1, 0, 2, 3, 4] = True
    assert ProxyTaskLoss(tasks=["inpainting"], masked_only=True)({"inpainting": outputs}, targets).item() == 0.75


def test_a_run_in_which_every_task_weighs_nothing_is_refused():
    with pytest.raises(InputError, match="--task_weights rotation: 0.0: every task of this run has the weight 0"):
        ProxyTaskLoss(tasks=["rotation"], weights={"rotation": 0, "contrast": 1})
    ProxyTaskLoss(tasks=["rotation", "contrast"], weights={"rotation": 0})
