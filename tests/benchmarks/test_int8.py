# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Calibrated windows are of the image, and quantised convolutions give nearly the same logits."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from benchmarks.int8 import draw_windows, load_nncf, quantized
from bundles.common.errors import InputError
from bundles.common.networks.swin_unetr import build_swin_unetr
from bundles.segmentation.backend.openvino_network import OpenVinoNetwork, convert

from ..conftest import TINY_ENCODER

ROI = (32, 64, 32)


def test_windows_are_cut_from_anywhere_in_the_image():
    image = torch.arange(2 * 40 * 64 * 33.0).view(2, 40, 64, 33)
    windows = draw_windows(image, ROI, number=8, seed=0)
    assert {window.shape for window in windows} == {(1, 2, *ROI)}
    starts = {float(window[0, 0, 0, 0, 0]) for window in windows}
    assert len(starts) > 4 and all(start // (64 * 33) <= 8 and start % 33 <= 1 for start in starts)
    assert torch.equal(windows[0], draw_windows(image, ROI, number=1, seed=0)[0])


def test_without_nncf_the_cure_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(InputError, match=r"int8 needs the package nncf .*pip install nncf"):
        load_nncf()


@pytest.mark.skipif(importlib.util.find_spec("nncf") is None, reason="needs NNCF and OpenVINO: pip install nncf")
def test_quantised_convolutions_give_nearly_the_same_logits():
    torch.manual_seed(0)
    network = build_swin_unetr(TINY_ENCODER, out_channels=3).eval().requires_grad_(False)
    windows = draw_windows(torch.rand(1, 40, 64, 40), ROI, number=4, seed=0)
    model = convert(network, channels=1, roi_size=ROI)
    small = quantized(model, windows)
    assert "FakeQuantize" in {operation.get_type_name() for operation in small.get_ops()}
    expected, found = OpenVinoNetwork(model)(windows[0]), OpenVinoNetwork(small)(windows[0])
    assert 0 < (expected - found).abs().mean() < 0.1 * expected.std()
