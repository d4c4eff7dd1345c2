# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The gradient norm is bounded before the optimiser steps, on unscaled gradients."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from monai.data import DataLoader
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents

from bundles.common.gradient_clipping import GradientClipping


def network_with_gradient(*values):
    network = torch.nn.Linear(2, 1, bias=False)
    network.weight.grad = torch.tensor([values])
    return network


def test_a_gradient_above_the_bound_is_scaled_to_it_and_keeps_its_direction():
    network = network_with_gradient(3.0, 4.0)
    GradientClipping(max_norm=1.0)(SimpleNamespace(scaler=None, network=network, optimizer=None))
    torch.testing.assert_close(network.weight.grad, torch.tensor([[0.6, 0.8]]))


def test_a_gradient_below_the_bound_is_left_alone():
    network = network_with_gradient(0.3, 0.4)
    GradientClipping(max_norm=1.0)(SimpleNamespace(scaler=None, network=network, optimizer=None))
    assert torch.equal(network.weight.grad, torch.tensor([[0.3, 0.4]]))


def test_scaled_gradients_are_unscaled_before_they_are_measured():
    # a true gradient of norm 0.5 under a loss scale of 1024: clipped before unscaling it would end at norm 1/1024
    network = network_with_gradient(0.3 * 1024, 0.4 * 1024)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)

    class Scaler:
        def unscale_(self, given):
            assert given is optimizer
            network.weight.grad /= 1024

    GradientClipping(max_norm=1.0)(SimpleNamespace(scaler=Scaler(), network=network, optimizer=optimizer))
    torch.testing.assert_close(network.weight.grad, torch.tensor([[0.3, 0.4]]))


@pytest.mark.parametrize(("max_norm", "moved_by"), [(0.5, 0.5), (None, 30.0)])
def test_a_step_of_the_trainer_moves_no_further_than_the_bound(max_norm, moved_by):
    network = torch.nn.Linear(1, 1, bias=False)
    before = network.weight.item()
    SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=DataLoader([{"image": torch.tensor([30.0]), "label": torch.tensor([0.0])}], batch_size=1),
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
        loss_function=lambda output, label: output.sum(),
        train_handlers=[GradientClipping(max_norm=max_norm)],
        decollate=False,
    ).run()
    assert before - network.weight.item() == pytest.approx(moved_by, rel=1e-5)


def test_nothing_is_attached_without_a_bound():
    attached = []
    engine = SimpleNamespace(add_event_handler=lambda event, handler: attached.append(event))
    GradientClipping(max_norm=None).attach(engine)
    assert attached == []
    GradientClipping(max_norm=1.0).attach(engine)
    assert attached == [IterationEvents.BACKWARD_COMPLETED]
