# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The Triton kernel of the bias's gradient, by Triton's interpreter on the CPU and compiled for cards: make test-triton."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: make test-triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs with TRITON_INTERPRET=1: make test-triton", allow_module_level=True)

from bundles.common.networks.fast import bias_gradient as module
from bundles.common.networks.fast import bias_gradient_kernel as kernel
from bundles.common.networks.fast.bias_gradient import bias_gradient, why_no_kernel
from bundles.common.networks.fast.fused_attention import fused_attention
from bundles.common.networks.fast.windows import window_plan
from tests.common.networks.fast.attention_cases import SHAPES, drawn_case, exact_bias_gradient


@pytest.fixture
def with_kernel(monkeypatch):
    """The kernel in its place, though this is no GPU; the path without it fails."""
    monkeypatch.setattr(module, "why_no_kernel", lambda *_: None)
    monkeypatch.setattr(module, "_by_chunks", None)


@pytest.mark.parametrize("kinds", [1, 8], ids=["plain", "shifted"])
@pytest.mark.parametrize(("tokens", "heads", "width"), SHAPES)
def test_it_is_that_of_autograd_in_float64(tokens, heads, width, kinds, with_kernel):
    case = drawn_case(tokens=tokens, heads=heads, width=width, kinds=kinds)
    found = bias_gradient(*case.arguments)
    exact = exact_bias_gradient(case)
    assert found.dtype == torch.float32 and (found - exact).abs().max() < 1e-6 * exact.abs().max()
    if tokens <= 64:
        assert torch.equal(found, bias_gradient(*case.arguments))


@pytest.mark.parametrize("width", [4, 32])
def test_a_trial_builds_it(width):
    assert torch.equal(kernel.build(torch.device("cpu"), torch.float32, width), torch.zeros(1, 16, 16))


def test_in_float16(with_kernel):
    case = drawn_case(tokens=144, heads=2, width=16, kinds=8, dtype=torch.float16)
    exact = exact_bias_gradient(case)
    assert (bias_gradient(*case.arguments) - exact).abs().max() < 1e-6 * exact.abs().max()


def test_windows_divided_between_programs_give_the_same_sum(with_kernel, monkeypatch):
    case = drawn_case(tokens=27, heads=2, width=8, kinds=8, windows=70)
    assert kernel.splits_of(windows=70, programs=2) == 2
    exact = exact_bias_gradient(case)
    for least in (8, 32, 100):  # 8, 2 and 1 programs for each tile
        monkeypatch.setattr(kernel, "LEAST_WINDOWS", least)
        found, again = (bias_gradient(*case.arguments) for _ in range(2))
        assert (found - exact).abs().max() < 1e-6 * exact.abs().max() and torch.equal(found, again)


def test_into_how_many_parts_the_windows_are_divided():
    for windows, programs, parts in ((1372, 108, 8), (1372, 400, 2), (40, 108, 1), (1, 1, 1), (10**6, 5000, 1)):
        assert kernel.splits_of(windows=windows, programs=programs) == parts


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shift", [(2, 2, 2), (0, 0, 0)])
def test_attention_with_it_equals_attention_without_it(shift, frozen, gpu_kernel, with_kernel, monkeypatch):
    plan = window_plan((8, 5, 4), (4, 4, 4), (*shift[:2], 0), torch.device("cpu"), 2)
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(plan.windows, 64, 3, 2, 12, generator=generator)
    bias = torch.randn(2, 64, 64, generator=generator)
    grad = torch.randn(plan.windows, 64, 24, generator=generator)
    results = []
    for device_of_kernel in (True, False):
        if not device_of_kernel:
            monkeypatch.undo()  # the plain formula under autograd
        leaves = qkv.clone().requires_grad_(), bias.clone().requires_grad_(not frozen)
        out = fused_attention(*leaves, plan, 0.3)
        out.backward(grad)
        results.append((out.detach(), *(leaf.grad for leaf in leaves)))
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or (ours - theirs).abs().max() < 2e-6 * theirs.abs().max()
    assert frozen == (results[0][2] is None)


def test_it_allocates_the_gradient_and_nothing_of_the_size_of_the_scores(with_kernel, monkeypatch):
    case = drawn_case(tokens=64, heads=2, width=8, kinds=1, windows=40)
    made = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: made.append(size) or empty(*size, **options))
    bias_gradient(*case.arguments)
    assert [size for size in made if len(size) == 4] == [(1, 2, 64, 64)]


def test_wide_heads_and_other_types_are_refused_in_a_line():
    why_no_kernel.cache_clear()
    device = torch.device("cuda")
    assert why_no_kernel(device, torch.float32, 96) == "it takes heads of up to 64 channels, and these have 96"
    assert why_no_kernel(device, torch.float64, 16) == "it does not compute in float64"
    reason = why_no_kernel(device, torch.float32, 16)  # this PyTorch has no CUDA: as on a machine whose driver is old
    assert reason.startswith("Triton cannot build it here (") and "\n" not in reason
    why_no_kernel.cache_clear()


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bundles.common.networks.fast.bias_gradient_kernel import _sum_over_windows

for card, kind, block, width in (
    (80, "bf16", 64, 16),
    (80, "fp32", 32, 16),
    (80, "fp32", 32, 64),
    (90, "bf16", 64, 16),
    (90, "bf16", 64, 64),
    (90, "fp16", 64, 8),
    (100, "bf16", 64, 16),
):
    data = dict.fromkeys(("qkv", "grad", "folded"), f"*{kind}") | dict.fromkeys(("logsumexp", "delta", "out"), "*fp32")
    numbers = dict.fromkeys(("row", "sums", "windows", "kinds", "heads"), "i32") | {"scale": "fp32", "bounds": "*i32"}
    fixed = {"TOKENS": 343, "WIDTH": width, "SPLITS": 8, "BLOCK": block, "BLOCK_WIDTH": max(16, width)}
    known = data | numbers | dict.fromkeys(fixed, "constexpr")
    source = ASTSource(
        fn=_sum_over_windows,
        signature={name: known[name] for name in _sum_over_windows.arg_names},
        constexprs=fixed,
    )
    target, options = GPUTarget("cuda", card, 32), {"num_warps": 4, "num_stages": 2}
    made = triton.compile(source, target=target, options=options)
    assert len(made.asm["cubin"]) > 1000 and "atom" not in made.asm["ptx"]
    print(card, kind, width, made.metadata.shared)
"""


def test_it_compiles_for_cards_without_one():
    """The interpreter neither knows bfloat16's products nor registers and shared memory."""
    import subprocess
    import sys

    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 7 and all(int(shared) <= 65536 for *_, shared in lines)
