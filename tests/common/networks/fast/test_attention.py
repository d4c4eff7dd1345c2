# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Window attention equals MONAI's in values and in gradients of all parameters, and keeps no table of scores."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from monai.networks.nets.swin_unetr import SwinTransformerBlock, WindowAttention, compute_mask, get_window_size
from torch.nn import functional as F

from bundles.common.networks.fast import attention as window_attention
from bundles.common.networks.fast import bias_gradient
from bundles.common.networks.fast.attention import (
    FastWindowAttention,
    attend_by_kind,
    chunked_attention,
    is_exporting,
)
from bundles.common.networks.fast.fused_attention import fold, fused_attention, fused_inference
from bundles.common.networks.fast.swin import make_fast
from bundles.common.networks.fast.windows import window_plan

CPU = torch.device("cpu")
WINDOW, SHIFT, NONE = (7, 7, 7), (3, 3, 3), (0, 0, 0)


def block_pair(*, dim, heads, shift, window=WINDOW, dtype=torch.float64, **options):
    """MONAI's block and the same on its fast path; the bias is made large, so that an error in it would show."""
    torch.manual_seed(0)
    stock = SwinTransformerBlock(dim, heads, window, shift, **options).to(dtype)
    with torch.no_grad():
        stock.attn.relative_position_bias_table.normal_()
    return stock, make_fast(copy.deepcopy(stock))


def stock_mask(grid, window=WINDOW, shift=SHIFT):
    size, moved = get_window_size(grid, window, shift)
    return compute_mask([-(-g // w) * w for g, w in zip(grid, size, strict=True)], size, moved, "cpu")


def assert_same_gradients(stock, fast, tolerance=1e-8):
    for (name, theirs), ours in zip(stock.named_parameters(), fast.parameters(), strict=True):
        assert (theirs.grad is None) == (ours.grad is None), name
        if theirs.grad is not None:
            scale = max(1.0, theirs.grad.abs().max().item())
            assert (ours.grad - theirs.grad).abs().max() < tolerance * scale, name


def assert_same(stock, fast, x, mask):
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = fast(ours, None), stock(theirs, mask)
    assert (out - expected).abs().max() < 1e-10
    grad = torch.randn_like(expected)
    out.backward(grad)
    expected.backward(grad)
    assert (ours.grad - theirs.grad).abs().max() < 1e-8
    assert_same_gradients(stock, fast)


ROIS = [(64, 64, 64), (96, 96, 96), (128, 128, 128), (96, 64, 160)]
SHAPES = [
    pytest.param(tuple(r // 2**stage for r in roi), id=f"{roi[0]}x{roi[1]}x{roi[2]}, stage {stage}")
    for roi in ROIS
    for stage in (1, 2, 3, 4)
    if not (stage == 1 and roi[2] > 64)
]
LARGE = [
    pytest.param(tuple(r // 2 for r in roi), id=f"{roi[0]}x{roi[1]}x{roi[2]}, stage 1") for roi in ROIS if roi[2] > 64
]


@pytest.mark.parametrize("shift", [NONE, SHIFT], ids=["plain", "shifted"])
@pytest.mark.parametrize("grid", SHAPES)
def test_every_stage_equals_monai_in_values_and_gradients(grid, shift):
    stock, fast = block_pair(dim=4, heads=2 if max(grid) < 20 else 1, shift=shift)
    assert_same(stock, fast, torch.randn(1, *grid, 4, dtype=torch.float64), stock_mask(grid))


@pytest.mark.slow
@pytest.mark.parametrize("shift", [NONE, SHIFT], ids=["plain", "shifted"])
@pytest.mark.parametrize("grid", LARGE)
def test_the_first_stage_of_large_rois_equals_monai(grid, shift):
    stock, fast = block_pair(dim=3, heads=1, shift=shift)
    assert_same(stock, fast, torch.randn(1, *grid, 3, dtype=torch.float64), stock_mask(grid))


@pytest.mark.parametrize("batch", [2, 3])
def test_a_batch_and_a_grid_with_one_window_along_an_axis(batch):
    grid = (9, 5, 13)
    stock, fast = block_pair(dim=6, heads=3, shift=(2, 2, 2), window=(5, 5, 5))
    mask = stock_mask(grid, (5, 5, 5), (2, 2, 2))
    assert_same(stock, fast, torch.randn(batch, *grid, 6, dtype=torch.float64), mask)


def test_a_window_below_the_full_size_reads_the_corner_of_the_full_index():
    """Not its own index, but what every published checkpoint was trained with."""
    stock, fast = block_pair(dim=2, heads=1, shift=NONE)
    attn = fast.attn
    expected = attn.relative_position_bias_table[attn.relative_position_index[:216, :216].flatten(), 0].view(216, 216)
    assert torch.equal(attn.position_bias(216)[0], expected)
    own = WindowAttention(2, 1, (6, 6, 6)).relative_position_index
    assert (own != attn.relative_position_index[:216, :216]).float().mean() > 0.9
    assert_same(stock, fast, torch.randn(2, 6, 6, 6, 2, dtype=torch.float64), None)


def test_rows_of_the_bias_lie_a_multiple_of_8_apart():
    attn = block_pair(dim=2, heads=1, shift=NONE)[1].attn
    masks = window_plan((14, 14, 14), WINDOW, SHIFT, CPU).masks
    for folded in (
        fold(attn.position_bias(343), None, torch.float32),
        fold(attn.position_bias(343), masks, torch.bfloat16),
    ):
        assert folded.shape[-1] == 343 and folded.stride(-2) == 344 and folded.stride(-1) == 1


def drawn(grid=(5, 4, 6), window=(3, 3, 3), shift=(1, 1, 1), heads=2, width=4, batch=2, dtype=torch.float64):
    plan = window_plan(grid, window, shift, CPU, batch)
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(plan.windows, 27, 3, heads, width, generator=generator, dtype=dtype)
    return plan, qkv, torch.randn(heads, 27, 27, generator=generator, dtype=dtype)


def slow_attention(qkv, bias, plan, scale):
    """softmax(scale q k^T + bias + mask) v, one window and head at a time."""
    masks = plan.dense_mask()
    rows = []
    for window, one in enumerate(qkv):
        for head in range(qkv.shape[3]):
            q, k, v = one[:, :, head].unbind(1)
            scores = scale * q @ k.T + bias[head] + (0 if masks is None else masks[window])
            rows.append(torch.softmax(scores, dim=-1) @ v)
    return torch.stack(rows).view(len(qkv), qkv.shape[3], 27, -1).transpose(1, 2).flatten(-2)


@pytest.mark.parametrize("shift", [(1, 1, 1), (0, 1, 0), (0, 0, 0)])
@pytest.mark.parametrize(
    "needs", [(True, True), (True, False), (False, True)], ids=["all", "bias frozen", "bias alone"]
)
@pytest.mark.parametrize("path", ["cpu", "gpu", "gpu without the kernel"])
def test_all_paths_equal_the_formula_whatever_needs_a_gradient(path, needs, shift, monkeypatch, request):
    for module in (window_attention, bias_gradient):
        monkeypatch.setattr(module, "CHUNK", 3 * 2 * 27 * 27)  # three windows at a time
    if path == "gpu":
        request.getfixturevalue("gpu_kernel")
    plan, qkv, bias = drawn(shift=shift)
    results = []
    for kind in (path, "formula"):
        one, other = qkv.clone().requires_grad_(needs[0]), bias.clone().requires_grad_(needs[1])
        if kind == "cpu":
            out = chunked_attention(one, other, plan.masks, plan.runs, 0.5)
        elif kind == path:
            out = fused_attention(one, F.pad(other, (0, 5)), plan, 0.5)
        else:
            out = slow_attention(one, other, plan, 0.5)
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
        results.append((out.detach(), one.grad, other.grad))
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or (ours - theirs).abs().max() < 1e-10


@pytest.mark.parametrize("shift", [(1, 1, 1), (0, 0, 0)])
@pytest.mark.parametrize("width", [3, 4])
def test_without_gradients_it_is_the_formula_too(width, shift, request):
    plan, qkv, bias = drawn(shift=shift, width=width)
    folded = fold(F.pad(bias, (0, 5)), plan.masks, qkv.dtype)
    expected = slow_attention(qkv, bias, plan, 0.5)
    assert (attend_by_kind(qkv, folded, plan.runs, 0.5) - expected).abs().max() < 1e-10
    assert (fused_inference(qkv, folded, plan.runs, 0.5) - expected).abs().max() < 1e-10
    request.getfixturevalue("gpu_kernel")
    assert (fused_inference(qkv, folded, plan.runs, 0.5) - expected).abs().max() < 1e-10


@pytest.mark.parametrize("frozen", ["all", "table", "all but the table"])
def test_a_frozen_encoder(frozen):
    stock, fast = block_pair(dim=6, heads=2, shift=(1, 1, 1), window=(3, 3, 3))
    for block in (stock, fast):
        for name, parameter in block.named_parameters():
            table = name.endswith("bias_table")
            parameter.requires_grad_({"all": False, "table": not table, "all but the table": table}[frozen])
    x = torch.randn(2, 5, 4, 6, 6, dtype=torch.float64)
    mask = stock_mask((5, 4, 6), (3, 3, 3), (1, 1, 1))
    assert_same(stock, fast, x, mask)  # what comes before the block is trained
    stock.zero_grad()
    fast.zero_grad()
    expected, out = stock(x, mask), fast(x, None)  # nothing comes before
    assert (out - expected).abs().max() < 1e-10 and out.requires_grad == (frozen != "all")
    if frozen != "all":
        expected.square().sum().backward()
        out.square().sum().backward()
        assert_same_gradients(stock, fast)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", ["cpu", "gpu", "gpu without the kernel"])
def test_low_precision_is_no_further_from_float64_than_stock(dtype, path, monkeypatch, request):
    grid, window, shift = (8, 8, 4), (4, 4, 4), (2, 2, 2)
    if path == "gpu":
        request.getfixturevalue("gpu_kernel")
    if path != "cpu":
        monkeypatch.setattr(
            window_attention,
            "chunked_attention",
            lambda qkv, bias, masks, runs, scale: fused_attention(qkv, bias, plan, scale),
        )
    plan = window_plan(grid, window, (2, 2, 0), CPU, 2)
    exact = block_pair(dim=48, heads=3, shift=shift, window=window)[0].attn
    stock, fast = block_pair(dim=48, heads=3, shift=shift, window=window, dtype=torch.float32)
    x = torch.randn(plan.windows, 64, 48)
    grad = torch.randn(plan.windows, 64, 48)
    exact_in = x.double().requires_grad_()
    exact(exact_in, plan.dense_mask().double()).backward(grad.double())
    truth = [exact_in.grad] + [p.grad for p in exact.parameters()]
    errors = []
    for attn, mask in ((stock.attn, plan.dense_mask()), (fast.attn, plan)):
        inputs = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            out = attn(inputs, mask)
        out.backward(grad.to(out.dtype))
        grads = [inputs.grad] + [p.grad for p in attn.parameters()]
        assert out.dtype == dtype
        errors.append([((g - t).norm() / t.norm()).item() for g, t in zip(grads, truth, strict=True)])
    for theirs, ours in zip(*errors, strict=True):
        assert ours < 1.1 * theirs


def test_what_is_folded_for_inference_follows_the_weights():
    _, fast = block_pair(dim=6, heads=2, shift=(1, 1, 1), window=(3, 3, 3), dtype=torch.float32)
    attn = fast.attn
    plan = window_plan((6, 6, 6), (3, 3, 3), (1, 1, 1), CPU)
    x = torch.randn(plan.windows, 27, 6)

    def check():
        with torch.no_grad():
            out = attn(x.to(attn.qkv.weight.dtype), plan)
            expected = WindowAttention.forward(attn, x.to(out.dtype), plan.dense_mask().to(out.dtype))
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        return attn._kept

    kept = check()
    assert check() is kept, "nothing changed: nothing is folded again"
    for fused in (False, True):  # a fused optimiser does not count the version of the weights up
        optimizer = torch.optim.AdamW(attn.parameters(), lr=0.5, fused=fused, foreach=not fused)
        optimizer.zero_grad()
        attn(x, plan).square().sum().backward()
        optimizer.step()
        assert check() is not kept
    attn.relative_position_bias_table.data.mul_(2)  # nor does this
    attn.eval()
    check()
    kept = check()
    attn.load_state_dict({k: v * 2 if v.is_floating_point() else v for k, v in attn.state_dict().items()})
    assert check() is not kept
    kept = check()
    attn.to(torch.float64)
    assert check()[1].dtype == torch.float64
    attn.to(torch.float32)
    with torch.inference_mode():
        attn.relative_position_bias_table.mul_(2)
    check()
    attn(x, plan).sum().backward()
    assert attn._kept is None, "training does not hold what inference has folded"


def test_what_is_folded_belongs_to_one_table_one_mask_and_one_window():
    attn = block_pair(dim=6, heads=2, shift=NONE, window=(3, 3, 3), dtype=torch.float32)[1].attn
    plans = [
        window_plan(grid, window, shift, CPU)
        for grid, window, shift in (
            ((6, 6, 6), (3, 3, 3), (1, 1, 1)),
            ((6, 6, 6), (3, 3, 3), (1, 0, 0)),
            ((6, 6, 6), (3, 3, 3), (0, 0, 0)),
            ((6, 6, 6), (2, 2, 2), (0, 0, 0)),
        )
    ]

    def check(plan):
        x = torch.randn(plan.windows, math.prod(plan.window), 6)
        expected = WindowAttention.forward(attn, x, plan.dense_mask())
        torch.testing.assert_close(attn(x, plan), expected, atol=1e-5, rtol=1e-5)

    with torch.no_grad():
        for plan in (*plans, *plans):
            check(plan)
            _, _, table, masks = attn._kept
            # held, so that no other tensor can come to their addresses
            assert table.data_ptr() == attn.relative_position_bias_table.data_ptr() and masks is plan.masks
        for _ in range(2):  # each new, of the same version
            attn.relative_position_bias_table = torch.nn.Parameter(torch.randn(125, 2))
            check(plans[0])
    with torch.inference_mode():
        for _ in range(2):  # such a tensor has no version
            attn.relative_position_bias_table = torch.nn.Parameter(torch.randn(125, 2))
            check(plans[0])


def test_what_is_folded_travels_neither_with_the_weights_nor_with_the_module():
    _, fast = block_pair(dim=6, heads=2, shift=(1, 1, 1), window=(3, 3, 3), dtype=torch.float32)
    names = set(fast.state_dict())
    with torch.no_grad():
        fast(torch.randn(1, 6, 6, 6, 6), None)
    assert fast.attn._kept is not None and set(fast.state_dict()) == names
    assert copy.deepcopy(fast).attn._kept is None
    assert pickle.loads(pickle.dumps(fast)).attn._kept is None


def test_no_table_of_scores_is_kept_for_the_backward():
    plan, qkv, bias = drawn(grid=(12, 12, 12))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        chunked_attention(qkv.requires_grad_(), bias.requires_grad_(), plan.masks, plan.runs, 0.5)
    assert sum(sizes) == qkv.numel() + bias.numel() < plan.windows * bias.numel()


def test_dropout_of_the_attention_and_masks_of_monai_go_the_way_of_monai():
    _, fast = block_pair(dim=6, heads=2, shift=(1, 1, 1), window=(3, 3, 3), attn_drop=0.5)
    attn = fast.attn
    assert type(attn) is FastWindowAttention and isinstance(attn, WindowAttention)
    plan = window_plan((6, 6, 6), (3, 3, 3), (1, 1, 1), CPU)
    x = torch.randn(plan.windows, 27, 6, dtype=torch.float64)
    outs = []
    for mask in (plan, plan.dense_mask()):
        torch.manual_seed(3)
        outs.append(attn(x, mask))
    assert torch.equal(*outs)
    attn.eval()
    assert (attn(x, plan) - attn(x, plan.dense_mask())).abs().max() < 1e-10


def test_a_trace_is_an_export_and_what_comes_after_is_not():
    seen = []
    torch.jit.trace(lambda x: (seen.append(is_exporting()), x + 1)[1], torch.ones(1))
    assert seen[0] is True and is_exporting() is False
