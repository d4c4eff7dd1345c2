# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""bfloat16 goes unscaled, float16 scaled, and the GPU decides where the user does not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader
from monai.engines import SupervisedTrainer

from bundles.common.errors import InputError
from bundles.common.run.mixed_precision import (
    NoScalingOfBfloat16,
    autocast_arguments,
    autocast_type,
    check_amp,
    is_gpu,
    precision,
)


@pytest.mark.parametrize(("gpu", "expected"), [("new", torch.bfloat16), ("old", torch.float16), (None, torch.float16)])
def test_auto_takes_bf16_where_the_gpu_computes_in_it(monkeypatch, gpu, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    # a GPU before Ampere emulates bf16, slower than fp32: that does not count
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or gpu == "new"
    )
    assert autocast_type("auto") is expected
    assert autocast_arguments("bf16") == {"dtype": torch.bfloat16}
    assert autocast_type("fp16") is torch.float16


@pytest.mark.parametrize("amp_type", ["bf16", "fp16"])
def test_the_precision_has_a_name(amp_type):
    assert precision(amp=True, amp_type=amp_type) == amp_type
    assert precision(amp=False, amp_type=amp_type) == "fp32"


@pytest.mark.filterwarnings("error")  # torch warns of an enabled scaler without a GPU
def test_the_scaler_of_bfloat16_is_disabled_not_only_without_use():
    engine = SimpleNamespace(scaler=torch.amp.GradScaler("cpu"))
    NoScalingOfBfloat16(amp_type="bf16")(engine)
    assert isinstance(engine.scaler, torch.amp.GradScaler) and not engine.scaler.is_enabled()


def test_another_type_is_refused():
    with pytest.raises(InputError, match="--amp_type 'fp8' is not one of auto, bf16, fp16"):
        autocast_type("fp8")


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "mps"])
def test_mixed_precision_without_a_gpu_is_refused(device):
    assert not is_gpu(device)
    with pytest.raises(InputError, match="--amp true needs a GPU, but this run is on (cpu|mps)"):
        check_amp(amp=True, device=device)
    check_amp(amp=False, device=device)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda", 0)])
def test_mixed_precision_is_the_default_on_a_gpu(device):
    assert is_gpu(device)
    check_amp(amp=True, device=device)


class OnCpu:
    """Gives the trainer a scaler that works here; MONAI's own is switched off where there is no GPU."""

    def attach(self, engine):
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine):
        if engine.scaler is not None:
            engine.scaler = torch.amp.GradScaler("cpu")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("amp", "amp_type", "scaling"), [(True, "bf16", False), (True, "fp16", True), (False, "bf16", None)]
)
def test_the_scaler_of_the_trainer(amp, amp_type, scaling):
    network = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(network.weight)
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=DataLoader([{"image": torch.tensor([2.0]), "label": torch.tensor([0.0])}]),
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
        loss_function=lambda output, label: output.sum(),
        train_handlers=[OnCpu(), NoScalingOfBfloat16(amp_type=amp_type)],
        amp=amp,
        amp_kwargs=autocast_arguments(amp_type),
        decollate=False,
    )
    trainer.run()
    assert (trainer.scaler is None) == (scaling is None)
    if scaling is not None:
        assert trainer.scaler.is_enabled() == scaling
    assert network.weight.item() == pytest.approx(-2.0)
