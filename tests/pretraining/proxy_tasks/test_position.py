# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Only distances within a scan count."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bundles.pretraining.proxy_tasks.losses import ProxyTaskLoss
from bundles.pretraining.proxy_tasks.position import UNIT, change_intensities, position_loss, residuals


@pytest.fixture
def scene():
    torch.manual_seed(0)
    predicted, target = torch.randn(4, 3, 4, 5, 6), 200 * torch.randn(4, 3, 4, 5, 6)
    return predicted, target, torch.rand(4, 1, 4, 5, 6) < 0.4


def test_residuals_and_loss_against_numpy(scene):
    predicted, target, body = scene
    error = residuals(predicted, target, body, 2)
    total, number = 0.0, 0
    for scan in (slice(0, 2), slice(2, 4)):  # two crops each
        inside = body[scan, 0].numpy()
        off = (UNIT * predicted[scan] - target[scan]).movedim(1, -1).numpy()
        expected = off - off[inside].mean(axis=0)
        expected[~inside] = 0
        np.testing.assert_allclose(error[scan].movedim(1, -1).numpy(), expected, atol=2e-3)
        total, number = total + np.abs(expected).sum(), number + inside.sum()
    loss = position_loss(error, body, across_ranks=False)
    assert loss.item() == pytest.approx(total / (3 * number * UNIT), rel=1e-5)
    targets = {"position": target, "body": body, "crops_per_scan": 2}
    whole = ProxyTaskLoss(tasks=["position"], weights={"position": 2.0})
    assert whole({"position": predicted}, targets).item() == pytest.approx(2 * loss.item(), rel=1e-6)
    assert whole.parts["position"].item() == pytest.approx(loss.item(), rel=1e-6)


def test_a_shift_of_a_scan_costs_nothing_and_one_of_a_crop_does(scene):
    _, target, body = scene
    right = target / UNIT

    def loss(predicted):
        return position_loss(residuals(predicted, target, body, 2), body, across_ranks=False).item()

    assert loss(right) == pytest.approx(0, abs=1e-5)
    scan = torch.tensor([1.0, 1.0, -7.0, -7.0]).view(4, 1, 1, 1, 1)
    assert loss(right + scan) == pytest.approx(0, abs=1e-4)
    crop = torch.tensor([1.0, -1.0, 0.0, 0.0]).view(4, 1, 1, 1, 1)
    assert loss(right + crop) > 0.3
    assert loss(0.9 * right) > 0.05  # distances count


def test_voxels_outside_the_body_have_no_influence(scene):
    predicted, target, body = scene
    predicted = predicted.requires_grad_()
    position_loss(residuals(predicted, target, body, 2), body, across_ranks=False).backward()
    assert not predicted.grad[~body.expand_as(predicted)].any()
    assert predicted.grad[body.expand_as(predicted)].any()


def test_crops_without_body_give_no_loss_and_no_nan(scene):
    predicted, target, body = scene
    nothing = torch.zeros_like(body)
    assert position_loss(residuals(predicted, target, nothing, 2), nothing, across_ranks=False).item() == 0


def test_intensities_are_scaled_and_shifted_uniformly_and_independently():
    def changed(value, by=0.2):
        crops = torch.full((3000, 2, 1, 1, 2), value)
        generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
        return change_intensities(crops, by=by, each=1000, generators=generators)

    shift, scale = changed(0.0), changed(1.0) - changed(0.0)
    for drawn, reach in ((shift, 0.1), (scale - 1, 0.2)):
        assert torch.equal(drawn.amin(dim=(1, 2, 3, 4)), drawn.amax(dim=(1, 2, 3, 4)))  # one number for each crop
        drawn = drawn[:, 0, 0, 0, 0]
        assert -reach <= drawn.min() < -0.99 * reach and 0.99 * reach < drawn.max() <= reach
        assert drawn.mean().item() == pytest.approx(0, abs=0.05 * reach)
        assert drawn.std().item() == pytest.approx(reach / 3**0.5, rel=0.05)
    assert torch.corrcoef(torch.stack([shift[:, 0, 0, 0, 0], scale[:, 0, 0, 0, 0]]))[0, 1].abs() < 0.1
    assert torch.equal(changed(0.5, by=0.0), torch.full((3000, 2, 1, 1, 2), 0.5))
