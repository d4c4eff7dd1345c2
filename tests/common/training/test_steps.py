# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
from __future__ import annotations

import torch
from monai.engines import SupervisedTrainer
from monai.handlers import from_engine

from bundles.common.training.steps import StepOutput


def test_monais_handlers_read_the_loss_of_a_step_that_is_not_decollated():
    network = torch.nn.Linear(3, 1)
    batches = [{"image": torch.ones(2, 3), "label": torch.zeros(2, 1)}]
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=batches,
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.0),
        loss_function=torch.nn.MSELoss(),
        train_handlers=[StepOutput()],
        decollate=False,
    )
    trainer.run()
    loss = from_engine(["loss"], first=True)(trainer.state.output)
    torch.testing.assert_close(loss, network(batches[0]["image"]).square().mean().detach())
    assert set(trainer.state.output[0]) == {"loss"}
