# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Which blocks take the fused path and with which numbers: the results of both paths are equal, so the path is watched."""

from __future__ import annotations

import pytest
import torch
from monai.networks.blocks.dynunet_block import UnetResBlock
from torch import nn

from bundles.common.networks.fast import unet_blocks
from bundles.common.networks.fast.unet_blocks import FastUnetOutBlock, FastUnetResBlock, can_fuse, conv_norm_act

SHAPE = (1, 2, 4, 5, 6)


def image(*, scale=1.0):
    return scale * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(
    ("norm", "act", "fuses"),
    [
        (nn.InstanceNorm3d(2), nn.LeakyReLU(0.01), True),
        (nn.InstanceNorm3d(2, affine=True), nn.LeakyReLU(0.01), False),
        (nn.InstanceNorm3d(2, track_running_stats=True), nn.LeakyReLU(0.01), False),
        (nn.BatchNorm3d(2), nn.LeakyReLU(0.01), False),
        (nn.BatchNorm3d(2, affine=False, track_running_stats=False), nn.LeakyReLU(0.01), False),
        (nn.InstanceNorm3d(2), nn.LeakyReLU(0.0), False),  # has no inverse
        (nn.InstanceNorm3d(2), nn.PReLU(), False),
    ],
)
def test_only_what_monai_builds_is_fused(norm, act, fuses):
    assert can_fuse(torch.zeros(SHAPE), norm, act) is fuses


def test_nothing_is_fused_off_the_cpu():
    assert not can_fuse(torch.zeros(SHAPE, device="meta"), nn.InstanceNorm3d(2), nn.LeakyReLU(0.01))


@pytest.fixture
def fused(monkeypatch):
    """Names of the fused functions that are called."""
    called = []

    def watch(name):
        function = getattr(unet_blocks, name)
        monkeypatch.setattr(unet_blocks, name, lambda *a, **k: called.append(name) or function(*a, **k))

    watch("norm_act")
    watch("residual_norm_act")
    return called


@pytest.mark.parametrize("channels", [2, 3], ids=["residual as it is", "residual with a norm"])
def test_a_block_takes_the_fused_path_and_its_own_slope_and_epsilon(fused, channels):
    """An epsilon of the size of the variance shows in the result; the default would not be noticed."""
    options = {"kernel_size": 3, "stride": 1, "norm_name": ("instance", {"eps": 0.5})}
    options["act_name"] = ("leakyrelu", {"negative_slope": 0.3})
    stock, fast = (block(3, 2, channels, **options).double() for block in (UnetResBlock, FastUnetResBlock))
    fast.load_state_dict(stock.state_dict())
    x = image()
    assert (fast(x) - stock(x)).abs().max() < 1e-10
    assert fused == ["norm_act", "residual_norm_act"]


def test_a_convolution_with_norm_and_activation_takes_their_slope_and_epsilon(fused):
    conv, norm, act = nn.Conv3d(2, 3, 3, dtype=torch.float64), nn.InstanceNorm3d(3, eps=0.5), nn.LeakyReLU(0.3)
    out = conv_norm_act(conv, norm, act, image())
    assert (out - act(norm(conv(image())))).abs().max() < 1e-10
    assert fused == ["norm_act"]


@pytest.mark.parametrize("norm", [nn.InstanceNorm3d(2), nn.InstanceNorm3d(2, affine=True)])
def test_a_single_voxel_is_refused(norm):
    with pytest.raises(ValueError, match="Expected more than 1 spatial element when training"):
        conv_norm_act(nn.Identity(), norm, nn.LeakyReLU(0.01), torch.zeros(1, 2, 1, 1, 1))


def test_the_last_convolution_is_a_contiguous_matrix_product():
    block = FastUnetOutBlock(3, 2, 4).double()
    out = block(image())
    assert (out - block.conv(image())).abs().max() < 1e-12 and out.is_contiguous()
