# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The copy that is traced computes the same, with few operations for any number of windows."""

from __future__ import annotations

import pytest
import torch

from bundles.segmentation.backend.fused_network import FusedWindowAttention, fused_copy

from .conftest import ROI, build, smooth_scan


@pytest.mark.parametrize("change", [{}, {"fast": False}, {"merging": "legacy"}, {"use_v2": True}])
def test_the_copy_gives_the_networks_logits_and_leaves_it_alone(change):
    network, window = build(**change), smooth_scan(*ROI)
    classes = [type(module) for module in network.modules()]
    expected = network(window)
    torch.testing.assert_close(fused_copy(network)(window), expected, rtol=0, atol=2e-5)
    assert [type(module) for module in network.modules()] == classes and FusedWindowAttention not in classes


def test_a_trace_has_an_operation_per_kind_of_windows_however_many_there_are(network):
    sizes = []
    for roi in (ROI, (64, 64, 64)):
        copied, window = fused_copy(network), smooth_scan(*roi)
        with torch.no_grad():
            copied(window)  # makes the plans of the windows, which are kept
            traced = torch.jit.trace(copied, window, check_trace=False)
        attention = [node for node in traced.inlined_graph.nodes() if "scaled_dot_product" in node.kind()]
        assert len(attention) == 1 + 8 + 1 + 1 + 1  # one shifted block, with 2^3 kinds of windows
        sizes.append(len(list(traced.inlined_graph.nodes())))
    assert sizes[1] - sizes[0] <= 1 and sizes[1] < 2000  # the larger one has a mask of padding more


def test_weights_written_to_the_network_later_do_not_reach_the_copy(network):
    copied, window = fused_copy(network), smooth_scan(*ROI)
    before = copied(window)
    other = build(seed=1)
    assert not torch.allclose(before, other(window), atol=1e-2)
    assert torch.equal(copied(window), before)
