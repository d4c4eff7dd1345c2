# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
from __future__ import annotations

import pytest
import torch
from monai.engines import SupervisedTrainer
from monai.handlers import StatsHandler

import bundles.common.training.trainer as module
from bundles.common.errors import InputError
from bundles.common.training.trainer import supervised_evaluator, supervised_trainer


def arguments(network: torch.nn.Module) -> dict:
    batches = [{"image": torch.full((1, 2), float(i)), "label": torch.zeros(1, 1)} for i in (1, 2)]
    return {
        "device": torch.device("cpu"),
        "max_epochs": 1,
        "train_data_loader": batches,
        "network": network,
        "optimizer": torch.optim.SGD(network.parameters(), lr=0.1),
        "loss_function": torch.nn.MSELoss(),
        "decollate": False,
    }


class Older(SupervisedTrainer):
    """As MONAI 1.5 has it: the option is unknown, and nothing of the name is kept."""

    def __init__(self, device, max_epochs, train_data_loader, network, optimizer, loss_function, decollate):
        super().__init__(
            device,
            max_epochs,
            train_data_loader,
            network,
            optimizer,
            loss_function,
            decollate=decollate,
            accumulation_steps=1,
        )
        self.older = True


def weights_after(trainer: SupervisedTrainer, network: torch.nn.Module) -> torch.Tensor:
    trainer.run()
    return network.weight.detach().clone()


def linear() -> torch.nn.Linear:
    network = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.constant_(network.weight, 0.5)
    return network


def test_steps_are_accumulated_where_monai_can():
    network = linear()
    # outputs 1 and 2 against 0: gradients 2·y·x = (2, 2) and (8, 8), their mean 5, one step of 0.1
    after = weights_after(supervised_trainer(accumulation_steps=2, **arguments(network)), network)
    torch.testing.assert_close(after, torch.zeros(1, 2))


def test_an_older_monai_trains_without_accumulation(monkeypatch):
    monkeypatch.setattr(module, "SupervisedTrainer", Older)
    network = linear()
    trainer = supervised_trainer(accumulation_steps=1, **arguments(network))
    assert trainer.older and trainer.accumulation_steps == 1
    # 0.5 - 0.2 = 0.3, then output 1.2, gradient 4.8: 0.3 - 0.48
    torch.testing.assert_close(weights_after(trainer, network), torch.full((1, 2), -0.18))


def test_an_older_monai_refuses_to_accumulate(monkeypatch):
    monkeypatch.setattr(module, "SupervisedTrainer", Older)
    with pytest.raises(InputError, match=r"--accumulation_steps 3 .* MONAI .* cannot accumulate gradients"):
        supervised_trainer(accumulation_steps=3, **arguments(linear()))


def test_an_evaluator_lets_go_of_its_last_case():
    """Its volumes would stay on the GPU until the next validation."""
    seen = []
    evaluator = supervised_evaluator(
        device=torch.device("cpu"),
        val_data_loader=[{"image": torch.ones(1, 2), "label": torch.zeros(1, 1)}],
        network=linear(),
        decollate=False,
        val_handlers=[
            StatsHandler(
                iteration_log=False, epoch_print_logger=lambda engine: seen.append(engine.state.output["pred"].item())
            )
        ],
    )
    for _ in range(2):
        evaluator.run()
        assert evaluator.state.output is None and evaluator.state.batch is None
    assert seen == [1.0, 1.0]
