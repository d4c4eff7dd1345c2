# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""What counts as a copy into another layout; on a PyTorch for CUDA, the figures of the documentation."""

from __future__ import annotations

import pytest
import torch

from benchmarks.layout_copies import CASES, LayoutCopies, copies, layout, main

LAST = torch.channels_last_3d


def test_layouts_are_told_apart():
    tensor = torch.empty(2, 3, 4, 5, 6)
    assert layout(tensor) == "first" and layout(tensor.contiguous(memory_format=LAST)) == "last"
    assert layout(torch.empty(2, 1, 4, 5, 6)) == "both" and layout(tensor.transpose(2, 4)) == ""


def test_only_copies_from_one_layout_into_the_other_count():
    first = torch.rand(2, 3, 4, 5, 6)
    last = first.contiguous(memory_format=LAST)
    with LayoutCopies() as counted:
        last.contiguous()  # the norm of a tensor that is channels-last
        assert counted.copied == [first.numel()]
        first.contiguous(memory_format=LAST)
        first.clone(), last.clone(), first.transpose(2, 4).contiguous(), torch.rand(2, 1, 4, 5, 6).contiguous()
    assert counted.copied == [first.numel()] * 2


@pytest.mark.skipif(torch.version.cuda is None, reason="needs a PyTorch for CUDA")
def test_the_figures_of_the_documentation():
    found = [copies(encoder_last=e, weights_last=w, feature_size=48) for e, w in CASES.values()]
    assert [len(each) for each in found] == [4, 0, 25]


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a PyTorch without CUDA")
def test_without_cuda_it_says_why_it_cannot_count(capsys):
    assert main([]) == 1
    assert "is built without CUDA and knows no layouts of a GPU" in capsys.readouterr().err
