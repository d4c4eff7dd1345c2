# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Which kernel of PyTorch a GPU is given, what it is given, and what its backward allocates.

Tensors on the device ``meta`` have shapes and no values, and go through the operations of a GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bundles.common.networks.fast import bias_gradient, fused_attention
from bundles.common.networks.fast.fused_attention import attend_by_formula, fold, fused_inference
from bundles.common.networks.fast.windows import window_plan

aten = torch.ops.aten
META = torch.device("meta")
MIB = 2**20


class Operations(TorchDispatchMode):
    """The operations with their arguments, and the largest tensor that one makes, in bytes."""

    def __init__(self):
        super().__init__()
        self.calls, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func.overloadpacket, args, kwargs or {}))
        if func.overloadpacket is aten._efficient_attention_backward:  # PyTorch's own for ``meta`` lacks an argument
            out = tuple(torch.empty_like(t) for t in args[1:4]) + (None,)
        else:
            out = func(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() for t in tree_leaves(out) if torch.is_tensor(t)]
        self.largest = max(self.largest, *sizes, 0)
        return out

    def of(self, packet):
        return [(args, kwargs) for called, args, kwargs in self.calls if called is packet]


def on_meta(plan):
    tensors = {name: getattr(plan, name) for name in ("masks", "bounds")}
    return plan._replace(**{name: None if t is None else t.to(META) for name, t in tensors.items()})


def drawn(grid, window, shift, *, heads=3, width=16, samples=4, dtype=torch.bfloat16):
    plan = on_meta(window_plan(grid, window, shift, torch.device("cpu"), samples))
    tokens = plan.take.numel() // plan.windows
    qkv = torch.empty(plan.windows, tokens, 3, heads, width, dtype=dtype, device=META, requires_grad=True)
    bias = torch.empty(heads, tokens, tokens + -tokens % 8, device=META, requires_grad=True)
    return plan, qkv, bias


@pytest.fixture
def meta_gpu(monkeypatch):
    monkeypatch.setattr(fused_attention, "has_efficient_kernel", lambda device, dtype: True)
    kernel = torch.empty_like
    monkeypatch.setattr(
        fused_attention, "bias_gradient", lambda qkv, grad, out, sums, folded, *_: kernel(folded[0], dtype=torch.float)
    )


@pytest.mark.parametrize("width", [4, 12, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("grid", "window"), [((16, 16, 16), (4, 4, 4)), ((48, 48, 48), (7, 7, 7))])
def test_the_efficient_kernel_is_called_once_for_each_mask_and_given_what_it_takes(
    grid, window, dtype, width, meta_gpu
):
    """Also for 64 tokens, and under no_grad: cuDNN's attention is never chosen. Bias and mask have the queries' type."""
    plan, qkv, bias = drawn(grid, window, tuple(w // 2 for w in window), width=width, dtype=dtype)
    with Operations() as trained:
        out = fused_attention.fused_attention(qkv, bias, plan, 0.25)
        out.backward(torch.empty_like(out))
    with torch.no_grad(), Operations() as inferred:
        again = fused_inference(qkv, fold(bias, plan.masks, dtype), plan.runs, 0.25)
    assert out.shape == again.shape == (plan.windows, qkv.shape[1], 3 * width) and out.dtype == dtype
    assert qkv.grad.shape == qkv.shape and bias.grad.shape == bias.shape and bias.grad.dtype == torch.float32
    for seen in (trained, inferred):
        assert not any("scaled_dot_product_attention" in str(packet) for packet, *_ in seen.calls)
        calls = seen.of(aten._scaled_dot_product_efficient_attention)
        assert [len(args[0]) for args, _ in calls] == [last - first for _, first, last in plan.runs]
        for (q, k, v, mask, *_), options in calls:
            assert q.shape == k.shape == v.shape and q.shape[-1] * q.element_size() % 16 == 0
            assert mask.dtype == q.dtype and mask.shape == (*q.shape[:3], q.shape[2])
            assert mask.stride(0) == 0 and mask.stride(2) % 8 == 0 and options == {"scale": 0.25}
    assert [args[4] for args, _ in trained.of(aten._scaled_dot_product_efficient_attention)] == [True] * 8
    assert all(args[4] is False for args, _ in inferred.of(aten._scaled_dot_product_efficient_attention))
    for args, options in trained.of(aten._efficient_attention_backward):
        assert options == {"scale": 0.25, "num_splits_key": 1}  # in a fixed order
        assert args[-1] is False  # it makes no gradient of the bias


def test_the_backward_has_no_table_of_scores(meta_gpu):
    """The first stage for four crops of 96^3 in bf16: PyTorch's backward makes 948 MiB, ours nothing near."""
    plan, qkv, bias = drawn((48, 48, 48), (7, 7, 7), (0, 0, 0))
    out = fused_attention.fused_attention(qkv, bias, plan, 0.25)
    with Operations() as ours:
        out.backward(torch.empty_like(out))
    q, k, v = qkv.detach().permute(2, 0, 3, 1, 4)
    table = fold(bias.detach(), None, qkv.dtype).expand(len(q), -1, -1, -1)
    attended, sums, *generator = aten._scaled_dot_product_efficient_attention(q, k, v, table, True)
    with Operations() as theirs:
        aten._scaled_dot_product_efficient_attention_backward(
            *(torch.empty_like(attended), q, k, v, table, attended, sums, *generator, 0.0, [True] * 4)
        )
    assert theirs.largest > 920 * MIB
    assert ours.largest == qkv.numel() * 2 < 140 * MIB


def test_a_frozen_bias_costs_nothing(meta_gpu, monkeypatch):
    monkeypatch.setattr(fused_attention, "bias_gradient", None)
    plan, qkv, bias = drawn((8, 8, 8), (4, 4, 4), (2, 2, 2))
    with Operations():
        fused_attention.fused_attention(qkv, bias.requires_grad_(False), plan, 0.25).sum().backward()
    assert qkv.grad is not None and bias.grad is None


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_where_that_kernel_cannot_be_used_cudnn_is_still_not_chosen(needs_gradient, monkeypatch):
    allowed = []
    formula = F.scaled_dot_product_attention

    def seen(*args, **options):
        cuda = torch.backends.cuda
        allowed.append((cuda.cudnn_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()))
        return formula(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", seen)
    plan = window_plan((8, 4, 4), (4, 4, 4), (2, 0, 0), torch.device("cpu"))
    qkv = torch.randn(plan.windows, 64, 3, 1, 8, requires_grad=needs_gradient)
    attend_by_formula(qkv, fold(torch.randn(1, 64, 64), plan.masks, torch.float32), plan.runs, 0.25)
    assert allowed == [(False, True, True)] * 2
    assert torch.backends.cuda.cudnn_sdp_enabled()  # others' attention is left as it was


def test_a_card_without_bfloat16_goes_by_the_formula(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    device = torch.device("cuda")
    types = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    assert [fused_attention.has_efficient_kernel(device, one) for one in types] == [True, True, False, False]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert [fused_attention.has_efficient_kernel(device, one) for one in types] == [True, True, True, False]
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert not fused_attention.has_efficient_kernel(device, torch.float32)
    assert not fused_attention.has_efficient_kernel(torch.device("cpu"), torch.float32)


def test_the_kernel_of_the_bias_gradient_is_asked_for_by_device_type_and_width(gpu_kernel, monkeypatch):
    asked = []
    monkeypatch.setattr(bias_gradient, "why_no_kernel", lambda *key: asked.append(key) or "it is a test")
    plan = window_plan((4, 4, 4), (4, 4, 4), (0, 0, 0), torch.device("cpu"))
    qkv = torch.randn(1, 64, 3, 2, 12, dtype=torch.bfloat16)
    bias = torch.randn(2, 64, 64, requires_grad=True)
    fused_attention.fused_attention(qkv, bias, plan, 0.25).sum().backward()
    assert asked == [(torch.device("cpu"), torch.bfloat16, 16)]  # the width with its padding


def test_heads_are_padded_only_where_the_kernel_needs_it():
    aligned = torch.rand(2, 8, 3, 2, 8)
    assert fused_attention._aligned(aligned).data_ptr() == aligned.data_ptr()  # not copied
    padded = fused_attention._aligned(torch.ones(2, 8, 3, 2, 6))
    assert padded.shape[-1] == 8 and padded[..., :6].all() and not padded[..., 6:].any()
