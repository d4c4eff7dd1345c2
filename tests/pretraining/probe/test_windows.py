# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Windows cover a scan, and every voxel has one owner, the window that is written last."""

from __future__ import annotations

import pytest
import torch

from bundles.pretraining.probe.windows import owners, padded, windows_of

ROI = (4, 4, 2)


def test_short_axes_are_padded_with_air_at_their_upper_end():
    image = torch.ones(2, 3, 6, 1)
    result = padded(image, ROI)
    assert result.shape == (2, 4, 6, 2) and result.sum() == image.sum()
    assert torch.equal(result[:, :3, :, :1], image)


@pytest.mark.parametrize("shape", [(4, 4, 2), (9, 4, 3), (8, 8, 4)])
def test_the_owner_of_a_voxel_is_the_window_that_writes_it_last(shape):
    windows = windows_of(shape, ROI)
    assert all(part.stop - part.start == side for window in windows for part, side in zip(window, ROI, strict=True))
    written = torch.full(shape, -1)
    for number, window in enumerate(windows):
        written[window] = number
    voxels = torch.cartesian_prod(*(torch.arange(side) for side in shape))
    assert torch.equal(owners(voxels, windows), written.flatten())
    assert (written >= 0).all()
