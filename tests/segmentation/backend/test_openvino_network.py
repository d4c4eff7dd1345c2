# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""OpenVINO computes PyTorch's numbers, in fp32, and reports nothing to anybody."""

from __future__ import annotations

import sys

import pytest
import torch

from bundles.common.errors import InputError
from bundles.segmentation.backend.openvino_network import OpenVinoNetwork, convert, load_openvino

from .conftest import CLASSES, ROI, build, needs_openvino, smooth_scan


@needs_openvino
@pytest.mark.parametrize("change", [{"fast": False}, {"merging": "legacy", "in_channels": 2}])
def test_windows_have_the_logits_of_pytorch_one_or_several_at_once(change):
    network = build(**change)
    scan = smooth_scan(*(3 * size for size in ROI))
    channels = network.swinViT.patch_embed.proj.in_channels
    windows = torch.cat([scan[..., i : i + ROI[0], i : i + ROI[1], i : i + ROI[2]] for i in (0, 30, 60)])
    windows = torch.cat([windows, windows.flip(2)], 1)[:, :channels]
    converted = OpenVinoNetwork(convert(network, channels=channels, roi_size=ROI))
    logits = converted(windows)
    assert logits.shape == (3, CLASSES, *ROI) and logits.dtype == torch.float32
    torch.testing.assert_close(logits, network(windows), rtol=0, atol=1e-3)
    assert torch.equal(logits[1:2], converted(windows[1:2]))
    assert (logits[0] - logits[1]).abs().max() > 0.1  # the next window does not overwrite a result


@needs_openvino
def test_memory_that_is_released_is_taken_anew_for_the_next_windows():
    network = build()
    windows = smooth_scan(*ROI)
    converted = OpenVinoNetwork(convert(network, channels=1, roi_size=ROI))
    before = converted(windows)
    kept = before.clone()
    converted.release_memory()
    assert torch.equal(converted(windows), kept) and torch.equal(before, kept)


@needs_openvino
def test_openvino_is_loaded_without_what_reports_its_use():
    load_openvino()
    assert sys.modules["openvino_telemetry"] is None
    assert "stub" in sys.modules["openvino.tools.ovc.telemetry_utils"].tm.__name__


def test_without_openvino_the_cure_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(InputError, match=r"--backend openvino needs the package openvino.*EXTRAS=openvino"):
        load_openvino()
