# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
from __future__ import annotations

from functools import partial

import torch
from monai.transforms import CropForeground

from bundles.common.data.foreground import above_or_all


def test_the_box_is_drawn_around_what_is_above_the_threshold():
    image = torch.full((1, 8, 9, 10), -1000.0)
    image[0, 2:5, 3:4, 6:9] = -400.0
    crop = CropForeground(select_fn=partial(above_or_all, other=-500.0), allow_smaller=True)
    assert torch.equal(crop(image), image[:, 2:5, 3:4, 6:9])


def test_a_scan_of_air_is_kept_whole():
    image = torch.zeros(1, 8, 9, 10)
    assert CropForeground(select_fn=above_or_all, allow_smaller=True)(image).shape == image.shape
