# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A small network with shifted windows and padding, and a smooth scan for it."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bundles.common.networks.swin_unetr import build_swin_unetr

from ...conftest import TINY_ENCODER

ROI = (64, 32, 32)
ENCODER = TINY_ENCODER | {"depths": [2, 1, 1, 1], "window_size": 7}
CLASSES = 4
needs_openvino = pytest.mark.skipif(
    find_spec("openvino") is None, reason="needs openvino: make install EXTRAS=openvino"
)


def build(seed: int = 0, *, fast: bool = True, **encoder) -> nn.Module:
    torch.manual_seed(seed)
    return build_swin_unetr(ENCODER | encoder, out_channels=CLASSES, fast=fast).eval().requires_grad_(False)


def smooth_scan(*shape: int) -> torch.Tensor:
    noise = torch.rand((1, 1, *(size // 8 for size in shape)), generator=torch.Generator().manual_seed(0))
    return F.interpolate(noise, size=shape, mode="trilinear")


@pytest.fixture(scope="package")
def network() -> nn.Module:
    return build()
