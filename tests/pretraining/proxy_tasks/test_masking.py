# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Boxes cover what was drawn and no box too many, lie in the crop, and hide voxels without touching the others."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bundles.common.errors import InputError
from bundles.pretraining.proxy_tasks.masking import Boxes, box_mask, draw_boxes, fill_mask

SHAPE = (32, 24, 16)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(batch=6, shape=SHAPE, ratio=(0.3, 0.3), block=(0.1, 0.25), seed=0):
    return draw_boxes(batch, shape, ratio=ratio, block=block, generator=generator(seed))


def slow_mask(boxes, shape, number=None):
    """Paint the boxes one by one."""
    masks = np.zeros((len(boxes.start), 1, *shape), dtype=bool)
    for b, count in enumerate(boxes.number.tolist() if number is None else number):
        for start, stop in zip(
            boxes.start[b, :count].int().tolist(), boxes.stop[b, :count].int().tolist(), strict=True
        ):
            masks[b, 0, start[0] : stop[0], start[1] : stop[1], start[2] : stop[2]] = True
    return masks


def test_the_mask_equals_boxes_painted_one_by_one():
    boxes = draw(ratio=(0.0, 0.6))
    mask = box_mask(boxes, SHAPE)
    assert mask.dtype == torch.bool and mask.shape == (6, 1, *SHAPE)
    assert np.array_equal(mask.numpy(), slow_mask(boxes, SHAPE))


def test_a_hand_made_mask():
    start, stop = torch.tensor([[[0, 0, 0], [1, 1, 1], [0, 0, 0]]]), torch.tensor([[[1, 2, 1], [2, 3, 2], [2, 3, 2]]])
    mask = box_mask(Boxes(start, stop, torch.tensor([2])), (2, 3, 2))
    assert mask[0, 0].nonzero().tolist() == [[0, 0, 0], [0, 1, 0], [1, 1, 1], [1, 2, 1]]


@pytest.mark.parametrize("ratio", [0.02, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("block", [(0.05, 0.25), (0.25, 0.25), (0.5, 0.5), (0.4, 0.9)])
@pytest.mark.parametrize("shape", [(32, 32, 32), (20, 20, 10)])
def test_the_fraction_is_reached_and_would_not_be_without_the_last_box(ratio, block, shape):
    boxes = draw(batch=12, shape=shape, ratio=(ratio, ratio), block=block)
    number = boxes.number.tolist()
    covered = slow_mask(boxes, shape).mean(axis=(1, 2, 3, 4))
    without_last = slow_mask(boxes, shape, [count - 1 for count in number]).mean(axis=(1, 2, 3, 4))
    assert min(number) >= 1
    assert (covered >= ratio - 1e-6).all()
    assert (without_last < ratio).all()


def test_the_fraction_is_reached_by_boxes_whose_side_is_rounded_down():
    # 0.14 of 10 voxels is 1 voxel: boxes of a third of the volume that the fraction speaks of
    boxes = draw(batch=4, shape=(10, 10, 10), ratio=(0.3, 0.3), block=(0.14, 0.14))
    assert (slow_mask(boxes, (10, 10, 10)).mean(axis=(1, 2, 3, 4)) >= 0.3 - 1e-6).all()


def test_a_range_of_ratios_is_drawn_uniformly_per_crop():
    shape = (16, 16, 16)
    covered = (
        box_mask(draw(batch=400, shape=shape, ratio=(0.1, 0.5), block=(0.05, 0.15)), shape)
        .float()
        .mean(dim=(1, 2, 3, 4))
    )
    assert 0.1 <= covered.min() < 0.12 and 0.48 < covered.max() < 0.51
    assert covered.mean() == pytest.approx(0.3, abs=0.02)
    assert covered.std() == pytest.approx(0.4 / 12**0.5, abs=0.01)


def test_sides_keep_their_bounds_and_reach_them_and_boxes_lie_inside_the_crop():
    boxes = draw(batch=50, shape=(40, 20, 10), block=(0.1, 0.25), ratio=(0.3, 0.3))
    sides = (boxes.stop - boxes.start).flatten(0, 1).int()
    assert sides.amin(0).tolist() == [4, 2, 1] and sides.amax(0).tolist() == [10, 5, 2]
    assert boxes.start.flatten(0, 1).amin(0).tolist() == [0, 0, 0]
    assert boxes.stop.flatten(0, 1).amax(0).tolist() == [40, 20, 10]


def test_sides_are_at_least_one_voxel():
    sides = (lambda boxes: boxes.stop - boxes.start)(draw(shape=(4, 4, 4), block=(0.01, 0.01)))
    assert sides.unique().tolist() == [1]


def test_a_ratio_of_zero_is_the_identity():
    boxes = draw(ratio=(0.0, 0.0))
    assert boxes.number.tolist() == [0] * 6
    mask = box_mask(boxes, SHAPE)
    crops = torch.rand(6, 1, *SHAPE)
    assert not mask.any()
    assert torch.equal(fill_mask(crops, mask, fill="noise", generator=generator()), crops)


def test_the_seed_fixes_the_boxes():
    assert all(torch.equal(a, b) for a, b in zip(draw(seed=1), draw(seed=1), strict=True))
    assert not torch.equal(draw(seed=1).start, draw(seed=2).start)


def test_crops_of_a_batch_are_masked_differently():
    masks = box_mask(draw(), SHAPE)
    assert all(not torch.equal(masks[i], masks[j]) for i in range(6) for j in range(i))


def test_a_batch_of_one():
    mask = box_mask(draw(batch=1), SHAPE)
    assert mask.shape == (1, 1, *SHAPE) and mask.float().mean() >= 0.3 - 1e-6


@pytest.mark.parametrize("ratio", [(-0.1, 0.3), (0.4, 0.3), (0.3, 1.0), (1.2, 1.3)])
def test_bad_ratios_are_refused_with_their_value(ratio):
    with pytest.raises(InputError, match="mask_ratio") as caught:
        draw(ratio=ratio)
    assert str(list(ratio)) in str(caught.value)


@pytest.mark.parametrize("block", [(0.0, 0.3), (0.4, 0.3), (0.3, 1.1)])
def test_bad_blocks_are_refused_with_their_value(block):
    with pytest.raises(InputError, match="mask_block") as caught:
        draw(block=block)
    assert str(list(block)) in str(caught.value)


@pytest.fixture
def crops():
    return 5 + torch.rand(4, 2, *SHAPE, generator=generator(7))


@pytest.fixture
def mask():
    return box_mask(draw(batch=4), SHAPE)


@pytest.mark.parametrize("fill", ["noise", "zero", "sample"])
def test_voxels_outside_the_mask_are_untouched_and_the_crops_are_not_changed_in_place(crops, mask, fill):
    before = crops.clone()
    filled = fill_mask(crops, mask, fill=fill, generator=generator())
    assert torch.equal(crops, before)
    outside = ~mask.expand_as(crops)
    assert torch.equal(filled[outside], crops[outside])
    assert (filled != crops)[~outside].all()


def test_noise_is_normal_and_spans_0_to_1():
    crops = torch.full((3, 1, 32, 32, 32), 9.0)
    noise = fill_mask(crops, torch.ones_like(crops, dtype=torch.bool), fill="noise", generator=generator())
    for one in noise:
        assert one.min() == 0 and one.max() == 1
        # between -4 and 4 or so standard deviations, a normal has its mean in the middle and a deviation of about 1/8
        assert one.mean() == pytest.approx(0.5, abs=0.05) and one.std() == pytest.approx(0.12, abs=0.02)
        within = ((one - one.mean()).abs() < one.std()).float().mean()
        assert within == pytest.approx(0.683, abs=0.01)
    assert not torch.equal(noise[0], noise[1])


def test_the_seed_fixes_the_noise(crops, mask):
    one, again, other = (fill_mask(crops, mask, fill="noise", generator=generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_zero_fills_zeros(crops, mask):
    filled = fill_mask(crops, mask, fill="zero", generator=generator())
    assert (filled[mask.expand_as(crops)] == 0).all()


def test_sample_fills_the_same_voxels_of_the_next_crop(crops, mask):
    filled = fill_mask(crops, mask, fill="sample", generator=generator())
    for i in range(4):
        hidden = mask[i].expand_as(crops[i])
        assert torch.equal(filled[i][hidden], crops[(i + 1) % 4][hidden])


def test_sample_with_a_single_crop_is_refused(crops, mask):
    with pytest.raises(InputError, match="'sample' takes voxels of another crop, but the batch has only one"):
        fill_mask(crops[:1], mask[:1], fill="sample", generator=generator())
    fill_mask(crops[:1], mask[:1], fill="zero", generator=generator())


def test_an_unknown_fill_is_refused_with_the_known_ones(crops, mask):
    with pytest.raises(InputError, match="mask_fill 'gauss' is not one of noise, zero, sample"):
        fill_mask(crops, mask, fill="gauss", generator=generator())
