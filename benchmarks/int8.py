# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Convolutions in 8-bit integers, calibrated by NNCF, to measure what they gain and cost. No bundle uses them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch

from bundles.common.errors import InputError

#: Operations with weights or several inputs that keep their precision: all but `Convolution`.
KEPT = ("MatMul", "ScaledDotProductAttention", "Add", "Multiply", "ConvolutionBackpropData", "MVN", "Concat")


def load_nncf() -> ModuleType:
    """Import NNCF, which is not a dependency of this project.

    Raises:
        InputError: it is not installed.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # as `load_openvino`
    try:
        import nncf
    except ImportError as error:
        raise InputError(
            f"int8 needs the package nncf ({error}): .venv/bin/python -m pip install nncf==3.4.0"
        ) from error
    logging.getLogger("nncf").setLevel(logging.ERROR)
    return nncf


def quantized(model: Any, windows: Sequence[torch.Tensor]) -> Any:
    """Return a copy of an ``openvino.Model`` whose convolutions compute in 8-bit integers.

    Args:
        model: the model from `convert`.
        windows: (1, C, *roi_size) each, by which the range of every input is found.
    """
    nncf = load_nncf()
    there = {operation.get_type_name() for operation in model.get_ops()}
    return nncf.quantize(
        model,
        nncf.Dataset([window.numpy() for window in windows]),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(windows),
        ignored_scope=nncf.IgnoredScope(types=[name for name in KEPT if name in there]),
    )


def draw_windows(image: torch.Tensor, roi_size: Sequence[int], *, number: int, seed: int) -> list[torch.Tensor]:
    """Draw windows (1, C, *roi_size) anywhere in an image (C, X, Y, Z) that is at least as large."""
    draw = np.random.default_rng(seed)
    windows = []
    for _ in range(number):
        starts = [int(draw.integers(0, side - size + 1)) for side, size in zip(image.shape[1:], roi_size, strict=True)]
        box = tuple(slice(start, start + size) for start, size in zip(starts, roi_size, strict=True))
        windows.append(image[(slice(None), *box)][None].contiguous())
    return windows
