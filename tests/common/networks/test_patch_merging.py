# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The legacy merging equals a slow loop over MONAI 1.4's order, and is not what MONAI computes today."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets.swin_unetr import PatchMerging

from bundles.common.networks.patch_merging import LegacyPatchMerging


def slow_legacy(x, norm_weight, norm_bias, reduction):
    """Voxel by voxel, in the order that MONAI 0.9 to 1.4 wrote out: x0..x7 with (0,1,0) and (0,0,1) read twice."""
    order = ["000", "100", "010", "001", "101", "010", "001", "111"]
    batch, depth, height, width, channels = x.shape
    half = [-(-side // 2) for side in (depth, height, width)]
    result = torch.zeros(batch, *half, 2 * channels, dtype=x.dtype)
    for b in range(batch):
        for i in range(half[0]):
            for j in range(half[1]):
                for k in range(half[2]):
                    joined = []
                    for offset in order:
                        d, h, w = (2 * place + int(bit) for place, bit in zip((i, j, k), offset, strict=True))
                        inside = d < depth and h < height and w < width
                        joined += x[b, d, h, w].tolist() if inside else [0.0] * channels
                    v = torch.tensor(joined, dtype=x.dtype)
                    v = (v - v.mean()) / torch.sqrt(((v - v.mean()) ** 2).mean() + 1e-5) * norm_weight + norm_bias
                    result[b, i, j, k] = reduction @ v
    return result


def pair(channels):
    torch.manual_seed(0)
    legacy, today = (kind(channels, spatial_dims=3).double() for kind in (LegacyPatchMerging, PatchMerging))
    with torch.no_grad():
        legacy.norm.weight.uniform_(0.5, 2.0)
        legacy.norm.bias.normal_()
    today.load_state_dict(legacy.state_dict())
    return legacy, today


@pytest.mark.parametrize("shape", [(4, 4, 4), (4, 2, 6), (3, 4, 4), (2, 3, 4), (2, 2, 5), (1, 3, 3)])
def test_legacy_equals_a_slow_loop_over_voxels(shape):
    legacy, _ = pair(3)
    x = torch.randn(2, *shape, 3, dtype=torch.float64)
    expected = slow_legacy(x, legacy.norm.weight, legacy.norm.bias, legacy.reduction.weight)
    torch.testing.assert_close(legacy(x), expected, rtol=1e-12, atol=1e-12)


def test_legacy_differs_from_monai_of_today_under_the_same_weights():
    legacy, today = pair(4)
    x = torch.randn(1, 4, 4, 4, 4, dtype=torch.float64)
    assert legacy(x).shape == today(x).shape
    assert (legacy(x) - today(x)).abs().max() > 0.1


def test_legacy_never_reads_the_two_forgotten_sub_lattices():
    legacy, today = pair(2)
    x = torch.randn(1, 2, 2, 2, 2, dtype=torch.float64)
    changed = x.clone()
    changed[:, 1, 1, 0] += 1.0
    changed[:, 0, 1, 1] -= 1.0
    assert torch.equal(legacy(x), legacy(changed))
    assert not torch.allclose(today(x), today(changed))


def test_names_and_shapes_are_those_of_monai():
    legacy, today = pair(5)
    assert {k: v.shape for k, v in legacy.state_dict().items()} == {k: v.shape for k, v in today.state_dict().items()}
