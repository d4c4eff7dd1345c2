# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The first line of a run names what it computes with; a device that is not there is refused with the reason."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from bundles.common.errors import InputError
from bundles.common.run import device as devices
from bundles.common.run.device import checked_device, start_device, unusable_gpu


@pytest.fixture
def no_gpu(monkeypatch):
    """A machine whose PyTorch sees no GPU; returns a function that puts one into it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices.glob, "glob", lambda pattern: [])
    return lambda: monkeypatch.setattr(devices.glob, "glob", lambda pattern: ["/dev/nvidia0"])


def test_the_cpu_its_precision_and_its_threads_are_named(caplog, no_gpu, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    with caplog.at_level(logging.INFO):
        start_device(device="cpu")
    assert caplog.messages == [f"running on cpu in fp32, 3 CPU threads, PyTorch {torch.__version__}"]


def test_the_gpu_its_memory_its_precision_and_the_process_are_named(caplog, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    card = SimpleNamespace(name="NVIDIA H200", total_memory=139 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(devices, "rank", lambda: 1)
    monkeypatch.setattr(devices, "world_size", lambda: 2)
    with caplog.at_level(logging.INFO):
        start_device(device=torch.device("cuda", 1), amp=True)
    (line,) = caplog.messages
    assert line.startswith("running on cuda:1 (NVIDIA H200, 139 GiB) in bf16, 1 CPU thread, PyTorch ")
    assert line.endswith(", process 2 of 2")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    caplog.clear()
    start_device(device=torch.device("cuda", 1), amp=True)
    assert caplog.messages[-1] == "This GPU has no bfloat16: float16 with a gradient scaler is used."


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "", 3.5])
def test_a_word_that_is_no_device_is_refused(name):
    with pytest.raises(InputError, match="is not a device: use cpu, cuda, or cuda:1"):
        checked_device(name)


def test_a_gpu_that_is_not_there_is_refused(no_gpu, monkeypatch):
    with pytest.raises(
        InputError, match="--device cuda: PyTorch has no GPU here: no NVIDIA GPU is visible. Use --device cpu"
    ):
        checked_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match=r"--device cuda:3: this machine has 1 GPU, cuda:0\."):
        checked_device("cuda:3")
    assert checked_device("cuda") == torch.device("cuda")


def test_a_device_without_a_backend_is_refused():
    with pytest.raises(InputError, match="--device xpu cannot be used here"):
        checked_device("xpu")


def test_mixed_precision_on_a_cpu_is_refused(no_gpu):
    with pytest.raises(InputError, match="--amp true needs a GPU"):
        start_device(device="cpu", amp=True)


def raises(message: str):
    def init() -> None:
        raise RuntimeError(message)

    return init


@pytest.mark.parametrize(
    ("cuda", "visible", "init", "reason"),
    [
        (None, None, None, "is a build for CPUs; install one for CUDA"),
        ("13.0", "", None, "CUDA_VISIBLE_DEVICES='' hides it"),
        ("13.0", "-1", None, "CUDA_VISIBLE_DEVICES='-1' hides it"),
        ("13.0", "0", raises("The NVIDIA driver on your system is too old.\nmore"), "is too old (PyTorch"),
        ("13.0", None, lambda: None, "look at nvidia-smi"),
    ],
)
def test_a_gpu_that_pytorch_cannot_use_is_named_with_the_reason(
    caplog, no_gpu, monkeypatch, cuda, visible, init, reason
):
    assert unusable_gpu() is None  # there is none
    no_gpu()
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "init", init)
    assert reason in unusable_gpu()
    start_device(device="cpu")
    assert reason in caplog.messages[-1] and caplog.messages[-1].endswith("The run uses the CPU.")
    with pytest.raises(InputError, match="PyTorch has no GPU here") as error:
        checked_device("cuda")
    assert reason in str(error.value)
