# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Norm, residual and activation in one equal PyTorch's one after the other, and keep less."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from bundles.common.networks.fast import norm_act as instance_norm_act
from bundles.common.networks.fast.norm_act import norm_act, residual_norm_act

SLOPE = 0.01


def drawn(seed, *, batch=2, channels=3, size=(4, 5, 6), dtype=torch.float64, channels_last=True):
    """Far from mean 0 and standard deviation 1."""
    generator = torch.Generator().manual_seed(seed)
    x = 3 + 5 * torch.randn(batch, channels, *size, generator=generator, dtype=torch.float64)
    return x.to(dtype, memory_format=torch.channels_last_3d if channels_last else torch.contiguous_format)


def run(function, *inputs):
    """Value and gradients; inputs are not used up."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*[leaf * 1 for leaf in leaves])
    grad = drawn(9, batch=out.shape[0], channels=out.shape[1], size=out.shape[2:], dtype=out.dtype)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("chunk", [3, 7 * 3, 2**20], ids=["row by row", "some rows", "all rows"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_norm_and_activation(chunk, channels_last, monkeypatch):
    monkeypatch.setattr(instance_norm_act, "CHUNK", chunk)
    x = drawn(0, channels_last=channels_last)
    ours = run(lambda t: norm_act(t, slope=SLOPE), x)
    theirs = run(lambda t: F.leaky_relu(F.instance_norm(t), SLOPE), x)
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() < 1e-10
    assert ours[0].is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("chunk", [7 * 3, 2**20], ids=["some rows", "all rows"])
@pytest.mark.parametrize("norm_residual", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_norm_residual_and_activation(chunk, norm_residual, channels_last, monkeypatch):
    monkeypatch.setattr(instance_norm_act, "CHUNK", chunk)
    x, residual = drawn(0, channels_last=channels_last), drawn(1, channels_last=channels_last)

    def plain(t, r):
        return F.leaky_relu(F.instance_norm(t) + (F.instance_norm(r) if norm_residual else r), SLOPE)

    ours = run(lambda t, r: residual_norm_act(t, r, norm_residual=norm_residual, slope=SLOPE), x, residual)
    for one, other in zip(ours, run(plain, x, residual), strict=True):
        assert (one - other).abs().max() < 1e-10


def test_a_residual_without_a_norm_is_left_as_it_is():
    residual = drawn(1)
    before = residual.clone()
    residual_norm_act(drawn(0), residual, norm_residual=False, slope=SLOPE)
    assert torch.equal(residual, before)


def test_a_mean_far_from_zero_costs_no_digits():
    x = (1000 + torch.randn(1, 2, 8, 8, 8, generator=torch.Generator().manual_seed(0))).double()
    exact = F.leaky_relu(F.instance_norm(x), SLOPE)
    single = x.float()
    error = (norm_act(single.clone(), slope=SLOPE) - exact).abs().max()
    assert error < 2 * (F.leaky_relu(F.instance_norm(single), SLOPE) - exact).abs().max() + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_no_further_from_float64_than_pytorch(dtype):
    x, residual = drawn(0, dtype=dtype, size=(8, 8, 8)), drawn(1, dtype=dtype, size=(8, 8, 8))

    def plain(t, r):
        return F.leaky_relu(F.instance_norm(t) + F.instance_norm(r), SLOPE)

    exact = run(plain, x.double(), residual.double())
    theirs = run(plain, x, residual)
    ours = run(lambda t, r: residual_norm_act(t, r, norm_residual=True, slope=SLOPE), x, residual)
    for one, other, truth in zip(ours, theirs, exact, strict=True):
        assert one.dtype == dtype
        assert (one - truth).norm() < 1.1 * (other - truth).norm()


@pytest.mark.parametrize(("function", "kept"), [("norm", 1), ("residual", 2)])
def test_one_tensor_is_kept_and_two_with_a_residual(function, kept):
    x, residual = drawn(0).requires_grad_(), drawn(1).requires_grad_()
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        if function == "norm":
            norm_act(x * 1, slope=SLOPE)
        else:
            residual_norm_act(x * 1, residual * 1, norm_residual=True, slope=SLOPE)
    assert sum(size for size in sizes if size == x.numel()) == kept * x.numel()
