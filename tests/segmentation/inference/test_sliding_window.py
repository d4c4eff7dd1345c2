# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Windows are blended exactly as in MONAI, and skipping windows of air does not change the result."""

from __future__ import annotations

import logging
import math
from itertools import product

import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference
from torch import nn

from bundles.common.run import progress
from bundles.segmentation.inference import sliding_window
from bundles.segmentation.inference.sliding_window import blend_windows, importance_map, window_places

ROI = (16, 12, 8)
CLASSES = 4


class Network(nn.Module):
    """Has a large receptive field; records the windows that it gets."""

    def __init__(self, channels: int = 1, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv3d(channels, 3, 3, padding=1), nn.Tanh(), nn.Conv3d(3, CLASSES, 3, padding=1)
        )
        self.requires_grad_(False)
        self.dtype, self.batches = dtype, []

    def forward(self, x):
        self.batches.append(len(x))
        return self.layers(x).to(self.dtype)


def scan(*shape: int, scans: int = 1, channels: int = 1) -> torch.Tensor:
    return torch.rand((scans, channels, *shape), generator=torch.Generator().manual_seed(0))


def blend(images, network, **change) -> torch.Tensor:
    return blend_windows(images, network, **({"roi_size": ROI, "sw_batch_size": 4, "overlap": 0.5} | change))


def slow_blend(images, network, *, overlap, left_out=()) -> np.ndarray:
    """Window by window, in float64: the network's outputs, weighted by an explicit Gaussian."""
    images = images.numpy()
    gaussian = np.ones(ROI)
    for axis, size in enumerate(ROI):
        away = (np.arange(size) - (size - 1) / 2) / (size / 8)
        gaussian = gaussian * np.exp(-(away**2) / 2).reshape([-1 if other == axis else 1 for other in range(3)])
    gaussian = np.maximum(gaussian, max(gaussian.min(), 1e-3))
    room = [max(0, roi - size) for roi, size in zip(ROI, images.shape[2:], strict=True)]
    padded = np.pad(images, [(0, 0), (0, 0), *((gap // 2, gap - gap // 2) for gap in room)])
    sums, weights = np.zeros((len(images), CLASSES, *padded.shape[2:])), np.zeros(padded.shape[2:])
    starts = []
    for size, roi, share in zip(padded.shape[2:], ROI, overlap, strict=True):
        step, places = max(1, int(roi * (1 - share))), [0]
        while places[-1] + roi < size:
            places.append(min(places[-1] + step, size - roi))
        starts.append(places)
    for number, start in enumerate(product(*starts)):
        if number in left_out:
            continue
        window = tuple(slice(first, first + roi) for first, roi in zip(start, ROI, strict=True))
        output = network(torch.from_numpy(padded[(..., *window)].copy())).double().numpy()
        sums[(..., *window)] += output * gaussian
        weights[window] += gaussian
    with np.errstate(invalid="ignore"):
        blended = sums / weights
    return blended[(..., *(slice(g // 2, g // 2 + n) for g, n in zip(room, images.shape[2:], strict=True)))]


# Shapes with a remainder, of one window, smaller than a window, and one voxel larger.
@pytest.mark.parametrize("shape", [(37, 21, 19), (16, 12, 8), (9, 30, 5), (17, 13, 9)])
@pytest.mark.parametrize("overlap", [0.5, 0.0, (0.25, 0.7, 0.9)])
def test_blending_is_the_weighted_mean_of_all_windows(shape, overlap):
    images, network = scan(*shape, scans=2), Network()
    result = blend(images, network, overlap=overlap)
    shares = overlap if isinstance(overlap, tuple) else [overlap] * 3
    np.testing.assert_allclose(result.numpy(), slow_blend(images, network, overlap=shares), atol=1e-6)
    monai = sliding_window_inference(images, ROI, 4, network, overlap, mode="gaussian")
    torch.testing.assert_close(result, monai, rtol=0, atol=1e-6)
    assert result.dtype == torch.float32


@pytest.mark.parametrize("windows", [1, 3, 1000])
def test_any_number_of_windows_at_once_gives_the_same(windows):
    images, network = scan(30, 20, 16, scans=2), Network()
    result = blend(images, network, sw_batch_size=windows)
    number = 2 * len(window_places((30, 20, 16), roi_size=ROI, overlap=0.5))
    assert sum(network.batches) == number and max(network.batches) == min(windows, number)
    torch.testing.assert_close(result, blend(images, network), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_keep_float32_whatever_the_network_computes_in(dtype):
    images, network = scan(37, 21, 19), Network(dtype=dtype)
    exact = slow_blend(images, network, overlap=[0.75] * 3)  # of the outputs as rounded by the network
    windows_over_a_voxel, largest = 4**3, 1.5 * np.abs(exact).max()  # of a window: means are smaller
    bound = (windows_over_a_voxel + 1) * 2**-23 * largest
    result = blend(
        images, network, overlap=0.75, sw_batch_size=1
    )  # with larger batches the network itself rounds differently
    assert np.abs(result.numpy() - exact).max() < bound
    if dtype != torch.float32:  # the error of sums in half precision
        rounded = torch.from_numpy(exact).to(dtype).double().numpy()
        assert np.abs(rounded - exact).max() > 10 * bound


def test_weights_are_computed_once_for_a_size_and_a_device(monkeypatch):
    calls, compute = [], sliding_window.compute_importance_map

    def count(*args, **kwargs):
        calls.append(args)
        return compute(*args, **kwargs)

    monkeypatch.setattr(sliding_window, "compute_importance_map", count)
    importance_map.cache_clear()
    before = importance_map(ROI, torch.device("cpu")).clone()
    for _ in range(3):
        blend(scan(30, 20, 16), Network())
        blend(scan(30, 20, 16), Network(), roi_size=list(ROI))
    assert len(calls) == 1
    assert torch.equal(importance_map(ROI, torch.device("cpu")), before)  # it was not modified
    blend(scan(30, 20, 16), Network(), roi_size=(8, 8, 8))
    assert len(calls) == 2


# ---- air ----


def with_body(*shape: int, channels: int = 1) -> torch.Tensor:
    """Something in the first third of each axis, and a single voxel at the far end."""
    images = torch.zeros(1, channels, *shape)
    body = tuple(slice(0, size // 3) for size in shape)
    images[(..., *body)] = scan(*(size // 3 for size in shape), channels=channels) + 0.1
    images[0, -1, -1, -1, -1] = -0.5
    return images


def test_windows_of_air_are_not_computed_and_what_only_they_cover_is_background():
    images, network = with_body(48, 36, 24), Network()
    windows = window_places(images.shape[2:], roi_size=ROI, overlap=0.5)
    air = [number for number, window in enumerate(windows) if not images[(..., *window)].any()]
    result = blend(images, network, skip_air=True, sw_batch_size=3)
    assert 0 < len(air) and sum(network.batches) == len(windows) - len(air)
    assert network.batches[:-1] == [3] * (len(network.batches) - 1)  # all but the last are full

    expected = slow_blend(images, network, overlap=[0.5] * 3, left_out=air)
    unseen = np.isnan(expected[0, 0])
    assert 0.3 < unseen.mean() < 0.9 and not images[0, 0].numpy()[unseen].any()
    np.testing.assert_allclose(result.numpy()[..., ~unseen], expected[..., ~unseen], atol=1e-6)
    assert (result[0, 0].numpy()[unseen] == 0).all() and (result[0, 1:].numpy()[:, unseen] == -math.inf).all()
    probabilities = result.softmax(1).numpy()
    assert (probabilities[0, 0][unseen] == 1).all() and (probabilities[0, 1:][:, unseen] == 0).all()


def test_a_window_with_anything_in_any_channel_is_computed():
    images, network = torch.zeros(1, 2, 16, 12, 24), Network(channels=2)
    images[0, 1, 3, 4, 20] = -1e-6
    result = blend(images, network, overlap=0.0, skip_air=True)
    assert network.batches == [1] and result[0, 1, 0, 0].isinf().tolist() == [True] * 16 + [False] * 8


def test_a_scan_of_air_alone_keeps_its_windows_whatever_lies_beside_it():
    both, network = torch.cat([with_body(48, 36, 24), torch.zeros(1, 1, 48, 36, 24)]), Network()
    result = blend(both, network, skip_air=True)
    for number in range(2):
        alone = blend(both[number : number + 1], Network(), skip_air=True)
        torch.testing.assert_close(result[number : number + 1], alone, rtol=0, atol=1e-6)
    torch.testing.assert_close(result[1:], blend(both[1:], network), rtol=0, atol=1e-6)


def test_without_skipping_every_window_is_computed():
    images, network = with_body(48, 36, 24), Network()
    result = blend(images, network)
    assert sum(network.batches) == len(window_places(images.shape[2:], roi_size=ROI, overlap=0.5))
    assert torch.isfinite(result).all()


def test_a_slow_scan_tells_its_windows_and_a_quick_one_nothing(monkeypatch, caplog):
    images, network = scan(32, 12, 8), Network()
    windows = len(window_places(images.shape[2:], roi_size=ROI, overlap=0.5))
    assert windows == 3
    with caplog.at_level(logging.INFO):
        blend(images, network)
        assert not caplog.records
        monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1.0)
        blend(images, network, sw_batch_size=2)
    assert [message.split(",")[0] for message in caplog.messages] == [
        "segmenting: 1 of 3 windows",
        "segmenting: 2 of 3 windows",
    ]
