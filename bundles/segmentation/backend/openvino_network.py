# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A network that OpenVINO computes on the CPU, in fp32 or bf16: conversion from PyTorch, and a module that runs it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from ...common.extras import import_extra
from .fused_network import fused_copy

EXTRA = "openvino"
PRECISIONS = {"fp32": "f32", "bf16": "bf16"}  # by OpenVINO's names


def load_openvino() -> ModuleType:
    """Import OpenVINO without the package that reports each use of it to its makers.

    OpenVINO's import sends an event to a web service unless the user has declined (2026.4, ``openvino.tools.ovc``);
    where `openvino_telemetry` is not installed, it sends nothing.

    Raises:
        InputError: OpenVINO is not installed.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # an import of it fails as if it were not installed
    return import_extra("openvino", extra=EXTRA, use="--backend openvino")


def convert(network: torch.nn.Module, *, channels: int, roi_size: Sequence[int]) -> Any:
    """Convert a Swin UNETR to an ``openvino.Model`` for one window at a time: (1, C, *roi_size) to (1, K, *roi_size).

    The batch is fixed because more windows at once gain nothing on a CPU, and take more memory.
    """
    openvino = load_openvino()
    shape = [1, channels, *roi_size]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # sizes and plans are meant to be constants
        warnings.simplefilter("ignore", DeprecationWarning)  # from torch.jit, which OpenVINO reads
        traced = torch.jit.trace(fused_copy(network), torch.zeros(shape), check_trace=False)
        return openvino.convert_model(traced, example_input=torch.zeros(shape), input=shape)


class OpenVinoNetwork(torch.nn.Module):
    """A converted network that maps windows (N, C, *roi_size) to logits (N, K, *roi_size), float32, on the CPU.

    It computes with as many threads as PyTorch.

    Args:
        model: from `convert`, or one that was saved.
        precision: ``fp32``, also on processors on which OpenVINO by itself would choose bfloat16, or ``bf16``.
    """

    windows_at_once = 1  # it computes one after the other: more at once only take memory

    def __init__(self, model: Any, *, precision: str = "fp32") -> None:
        super().__init__()
        compiled = (
            load_openvino()
            .Core()
            .compile_model(
                model,
                "CPU",
                {
                    "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
                    "PERFORMANCE_HINT": "LATENCY",
                    "NUM_STREAMS": 1,
                    "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                    "ENABLE_CPU_PINNING": False,  # on a shared machine, a pinned thread waits for its one core
                },
            )
        )
        self._compiled = compiled
        self._request = compiled.create_infer_request()
        self.computed_by = f"OpenVINO {version()} in {precision}"

    @torch.no_grad()
    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """Compute the windows one after the other."""
        tensor = load_openvino().Tensor
        logits = windows.new_empty((len(windows), *self._compiled.output().shape[1:]), dtype=torch.float32)
        for window, result in zip(windows.float().split(1), logits.split(1), strict=True):
            self._request.set_output_tensor(tensor(result.numpy(), shared_memory=True))  # written to without a copy
            self._request.infer([window.contiguous().numpy()], share_inputs=True)
        return logits

    def release_memory(self) -> None:
        """Free what is between the layers, 700 MiB for windows of 96^3 at base size, until the next windows."""
        self._compiled.release_memory()


def version() -> str:
    """Return the version of OpenVINO without its build."""
    return load_openvino().get_version().partition("-")[0]


def processor() -> str:
    """Return the processor's name and the number types that OpenVINO has fast code for on it."""
    return f"{load_openvino().Core().get_property('CPU', 'FULL_DEVICE_NAME')} ({', '.join(fast_types())})"


def fast_types() -> list[str]:
    """Return the number types that OpenVINO has fast code for on this processor, such as ``BF16``."""
    return sorted(load_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
