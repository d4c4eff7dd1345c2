# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The gradient of the bias without the Triton kernel, and what is said where it cannot be used."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bundles.common.networks.fast import bias_gradient as module
from bundles.common.networks.fast.bias_gradient import bias_gradient, why_no_kernel
from tests.common.networks.fast.attention_cases import SHAPES, drawn_case, exact_bias_gradient


@pytest.mark.parametrize("kinds", [1, 8], ids=["plain", "shifted"])
@pytest.mark.parametrize(("tokens", "heads", "width"), SHAPES)
def test_it_is_that_of_autograd_in_float64(tokens, heads, width, kinds, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 2 * heads * tokens * tokens)
    case = drawn_case(tokens=tokens, heads=heads, width=width, kinds=kinds)
    found, again = (bias_gradient(*case.arguments) for _ in range(2))
    exact = exact_bias_gradient(case)
    assert found.dtype == torch.float32 and (found - exact).abs().max() < 1e-6 * exact.abs().max()
    assert torch.equal(found, again)


class Largest(TorchDispatchMode):
    """The largest tensor that an operation makes, in elements."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() // t.element_size() for t in tree_leaves(out) if torch.is_tensor(t)]
        self.elements = max([self.elements, *sizes])
        return out


def test_scores_of_a_few_windows_are_in_memory_at_a_time(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 3 * 2 * 64 * 64)
    case = drawn_case(tokens=64, heads=2, width=8, kinds=1, windows=40)
    with Largest() as largest:
        bias_gradient(*case.arguments)
    assert case.qkv.numel() <= largest.elements < 40 * 2 * 64 * 64 / 2


def test_a_reason_is_told_once(caplog):
    module._tell.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            bias_gradient(*drawn_case(tokens=8, heads=1, width=8, kinds=1).arguments)
    assert [record.getMessage() for record in caplog.records] == [
        "The gradient of the attention bias is computed by PyTorch, more slowly, not by the Triton kernel: "
        "it is for GPUs, not for cpu."
    ]


def test_without_triton_the_reason_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    why_no_kernel.cache_clear()
    reason = why_no_kernel(torch.device("cuda"), torch.bfloat16, 16)
    assert reason == "this Python has no Triton (pip install triton)"
    why_no_kernel.cache_clear()


@pytest.fixture
def kernel(monkeypatch):
    """Stands in for the module of the Triton kernel, which this machine may not have."""
    built = []
    standin = SimpleNamespace(LARGEST_WIDTH=64, build=lambda *arguments: built.append(arguments), built=built)
    monkeypatch.setitem(sys.modules, "bundles.common.networks.fast.bias_gradient_kernel", standin)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object())
    why_no_kernel.cache_clear()
    yield standin
    why_no_kernel.cache_clear()


def test_what_the_kernel_takes_is_tried_once(kernel):
    cuda = torch.device("cuda")
    assert [why_no_kernel(cuda, torch.bfloat16, 64) for _ in range(2)] == [None, None]
    assert kernel.built == [(cuda, torch.bfloat16, 64)]
    assert why_no_kernel(cuda, torch.bfloat16, 65) == "it takes heads of up to 64 channels, and these have 65"
    assert why_no_kernel(cuda, torch.float64, 16) == "it does not compute in float64"
    assert len(kernel.built) == 1


def test_a_build_that_fails_is_a_reason(kernel):
    def build(*_):
        raise RuntimeError("no C compiler\nin any folder")

    kernel.build = build
    reason = why_no_kernel(torch.device("cuda"), torch.float16, 16)
    assert reason == "Triton cannot build it here (RuntimeError: no C compiler)"


def test_the_kernel_gets_the_sums_of_output_and_gradient(kernel, monkeypatch):
    case = drawn_case(tokens=8, heads=2, width=4, kinds=1)
    asked, given = [], []
    monkeypatch.setattr(module, "why_no_kernel", lambda *arguments: asked.append(arguments))
    kernel.bias_gradient_by_kernel = lambda *arguments: given.append(arguments) or "the result"
    qkv, grad, out, logsumexp, folded, bounds, _, scale = case.arguments
    assert bias_gradient(*case.arguments) == "the result"
    assert asked == [(qkv.device, qkv.dtype, 4)]
    torch.testing.assert_close(given[0][3], (grad * out).sum(dim=3).transpose(1, 2))
    for part, expected in zip(
        (*given[0][:3], *given[0][4:]), (qkv, grad, logsumexp, folded, bounds, scale), strict=True
    ):
        assert part is expected
