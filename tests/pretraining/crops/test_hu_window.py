# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Intensities are those of MONAI's transform to the bit, and a window that is none is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.transforms import ScaleIntensityRange

from bundles.common.errors import InputError
from bundles.pretraining.crops.hu_window import body_threshold, check_window, intensities

WINDOWS = [(-1000.0, 1000.0), (-1000, 1000), (-175.3, 250.7), (-160.0, 240.0), (-0.1, 2999.9)]


@pytest.mark.parametrize("window", WINDOWS)
def test_intensities_are_those_of_the_transform_to_the_bit(window):
    whole = torch.arange(-32768, 32768, dtype=torch.int16)
    real = torch.as_tensor(np.random.default_rng(0).uniform(-2000, 4000, 50_000).astype(np.float32))
    transform = ScaleIntensityRange(*window, 0.0, 1.0, clip=True)
    for hu in (whole, real):
        scaled = intensities(hu, window)
        assert scaled.dtype == torch.float32
        assert torch.equal(scaled, transform(hu.float()).as_tensor())


def test_the_crops_are_not_changed():
    hu = torch.tensor([-3000.0, 0.0, 3000.0])
    assert intensities(hu, (-1000.0, 1000.0)).tolist() == [0.0, 0.5, 1.0]
    assert hu.tolist() == [-3000.0, 0.0, 3000.0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU")
@pytest.mark.parametrize("window", WINDOWS)
def test_a_gpu_gives_the_same_bits(window):
    hu = torch.arange(-32768, 32768, dtype=torch.int16)
    assert torch.equal(intensities(hu.cuda(), window).cpu(), intensities(hu, window))


@pytest.mark.parametrize("window", [1000.0, [0.0], [1000.0, -1000.0], [5.0, 5.0], [-1.0, 0.0, 1.0], "wide"])
def test_what_is_no_window_is_refused(window):
    with pytest.raises(InputError, match=r"--hu_window .* must be two values in HU"):
        check_window(window)


@pytest.mark.parametrize(("window", "hu", "threshold"), [([-1000, 1000], -500, 0.25), ([-175.0, 250.0], -175.0, 0.0)])
def test_the_threshold_of_the_body_is_an_intensity_of_the_window(window, hu, threshold):
    assert body_threshold(window, hu) == threshold


@pytest.mark.parametrize(
    ("window", "hu", "words"),
    [
        (
            [-175.0, 250.0],
            -500.0,
            r"--foreground_hu -500 is outside of --hu_window \[-175, 250\]: every voxel would count",
        ),
        ([-1000.0, 1000.0], 1500.0, r"\[-1000, 1000\]: no voxel would count as body. Set it inside"),
        ([-1000.0, 1000.0], 1000.0, "no voxel would count as body"),
    ],
)
def test_a_window_without_the_threshold_of_the_body_is_refused(window, hu, words):
    with pytest.raises(InputError, match=words):
        body_threshold(window, hu)
