# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The GPU's way through attention, on a CPU: the CPU's flash kernel in the place of the memory-efficient one."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from bundles.common.networks.fast import bias_gradient, fused_attention


@pytest.fixture
def gpu_kernel(monkeypatch):
    """Has the same results as the kernel of a GPU, and refuses what that refuses. It gives no gradient of the bias."""
    aten = torch.ops.aten

    def check(qkv, bias):
        assert qkv.shape[-1] * qkv.element_size() % 16 == 0, "width of a head"
        assert bias.dtype == qkv.dtype and bias.stride(-1) == 1 and bias.stride(-2) % 8 == 0

    def attend(qkv, bias, scale, *, for_backward):
        check(qkv, bias)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=bias[None], scale=scale
        )
        padded = F.pad(logsumexp, (0, -qkv.shape[1] % 32), value=float("inf")).contiguous()
        return out.transpose(1, 2), padded, (torch.empty(0), torch.empty(0))

    def attend_backward(grad, qkv, bias, out, logsumexp, generator, scale):
        check(qkv, bias)
        assert grad.is_contiguous() and grad.dtype == qkv.dtype and logsumexp.stride(1) % 32 == 0
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        saved = out.transpose(1, 2), logsumexp[..., : qkv.shape[1]]
        parts = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad.transpose(1, 2), q, k, v, *saved, 0.0, False, attn_mask=bias[None], scale=scale
        )
        return tuple(part.transpose(1, 2) for part in parts)

    monkeypatch.setattr(fused_attention, "has_efficient_kernel", lambda device, dtype: True)
    monkeypatch.setattr(fused_attention, "attend", attend)
    monkeypatch.setattr(fused_attention, "attend_backward", attend_backward)
    bias_gradient._tell.cache_clear()
