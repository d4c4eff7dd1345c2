# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Boxes cover what was drawn and no box too many, lie in the crop, and hide voxels without touching the others."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bundles.common.errors import InputError
from bundles.pretraining.proxy_tasks.masking import (
    Boxes,
    box_mask,
    draw_boxes,
    draw_partners,
    noise_of_boxes,
    paste_partners,
    side_bounds,
)

SHAPE = (32, 24, 16)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(batch=6, shape=SHAPE, ratio=(0.3, 0.3), block=(0.1, 0.25), seed=0, rule="covered"):
    return draw_boxes(batch, shape, ratio=ratio, block=block, generators=[generator(seed)], rule=rule)


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


@pytest.mark.parametrize("rule", ["official", "covered"])
def test_sides_and_places_of_a_box_are_drawn_independently(rule):
    """A cube would have the same side along every axis."""
    shape = (40, 40, 40)
    boxes = draw(batch=50, shape=shape, block=(0.05, 0.25), ratio=(0.3, 0.3), rule=rule)
    place = boxes.start / (37 if rule == "official" else 40 - (boxes.stop - boxes.start))
    whole = (boxes.start < 30).all(dim=2) | (rule == "covered")  # not cut off at the end of the crop
    numbers = torch.cat([boxes.stop - boxes.start, place], dim=2)[whole]
    assert len(numbers) > 2000
    assert (torch.corrcoef(numbers.T) - torch.eye(6)).abs().max() < 0.1


def test_sides_are_at_least_one_voxel():
    sides = (lambda boxes: boxes.stop - boxes.start)(draw(shape=(4, 4, 4), block=(0.01, 0.01)))
    assert sides.unique().tolist() == [1]


def test_a_ratio_of_zero_is_the_identity():
    boxes = draw(ratio=(0.0, 0.0))
    assert boxes.number.tolist() == [0] * 6
    mask = box_mask(boxes, SHAPE)
    assert not mask.any()
    assert draw(ratio=(0.0, 0.0), rule="official").number.tolist() == [0] * 6


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


def as_released(shape, crops, random, noise=True):
    """What the released code does to a batch of crops that hold their index: the share of each that no longer does.

    Written anew from its description, crop by crop and block by block.
    """
    batch = [np.full(shape, float(index)) for index in range(crops)]
    sides, blocks = [], []

    def one_pass(volume, source):
        target, total = random.uniform(0, 0.3) * volume.size, 0
        while total < target:
            start = [random.integers(0, side - int(0.05 * side)) for side in shape]
            size = [random.integers(int(0.05 * side), int(0.25 * side)) for side in shape]
            place = tuple(slice(a, min(a + b, side)) for a, b, side in zip(start, size, shape, strict=True))
            sides.extend(part.stop - part.start for part in place)
            block = volume[place]
            if source is None:
                values = random.standard_normal(block.shape)
                values = (values - values.min()) / max(np.ptp(values), 1e-9)
                blocks.append(values)
                block[...] = 100 + values
            else:
                block[...] = source[place]
            total += block.size

    hidden = []
    for index, volume in enumerate(batch):
        one_pass(volume, None)
        partner = random.integers(0, crops)
        if partner != index:
            one_pass(volume, batch[partner])
        hidden.append((volume != index).mean())
    return hidden, sides, blocks


def test_the_official_rule_hides_what_the_released_code_hides():
    """22.5% of a crop is hidden by both passes (all of it but what is pasted from the crop itself)."""
    shape, random = (48, 48, 48), np.random.default_rng(0)
    released = np.concatenate([as_released(shape, 4, random)[0] for _ in range(60)])
    ours = []
    for seed in range(60):
        generators = [generator(1000 + seed)]
        options = {"ratio": (0.0, 0.3), "block": (0.05, 0.25), "generators": generators, "rule": "official"}
        hidden = box_mask(draw_boxes(4, shape, **options), shape)
        partners = draw_partners(4, 4, generators=generators)
        pasted = box_mask(draw_boxes(4, shape, **options), shape)
        pasted &= (partners != torch.arange(4)).view(4, 1, 1, 1, 1)
        ours += (hidden | pasted).float().mean(dim=(1, 2, 3, 4)).tolist()
    error = (np.var(released) / len(released) + np.var(ours) / len(ours)) ** 0.5
    assert abs(np.mean(ours) - np.mean(released)) < 3 * error
    assert np.mean(ours) == pytest.approx(0.225, abs=0.02) and np.std(ours) == pytest.approx(np.std(released), rel=0.2)


@pytest.mark.parametrize("side", [96, 64, 48])
def test_official_sides_are_those_of_the_released_code(side):
    # the upper bound is never reached: 4 to 23 of 96 voxels
    _, sides, _ = as_released((side, side, side), 4, np.random.default_rng(1))
    low, high = side_bounds(side, (0.05, 0.25), "official")
    assert (low, high) == (int(0.05 * side), int(0.25 * side) - 1) and max(sides) == high
    boxes = draw(batch=20, shape=(side, side, side), ratio=(0.3, 0.3), block=(0.05, 0.25), rule="official")
    ours = (boxes.stop - boxes.start)[boxes.used].int()
    assert ours.max() == high and ours.min() == low == min(sides)
    assert boxes.start[boxes.used].max() == side - low - 1 and boxes.stop.max() == side
    # some are cut off at the end of the crop, so the mean is lower than that of the sides drawn
    assert ours.float().mean() == pytest.approx(np.mean(sides), rel=0.05) and np.mean(sides) < (low + high) / 2 - 0.3


def test_official_boxes_are_added_while_their_sizes_are_below_the_fraction():
    shape = (40, 40, 40)
    boxes = draw(batch=30, shape=shape, ratio=(0.1, 0.3), block=(0.05, 0.25), rule="official")
    sizes = boxes.volume * boxes.used
    total, last = sizes.sum(dim=1), sizes.gather(1, (boxes.number - 1)[:, None])[:, 0]
    share, without = total / 40**3, (total - last) / 40**3
    assert ((share >= 0.1) & (without < 0.3)).all() and (without < share).all()
    assert share.mean() == pytest.approx(0.2, abs=0.03)
    assert (box_mask(boxes, shape).float().mean(dim=(1, 2, 3, 4)) <= share + 1e-6).all()


def test_boxes_of_a_generator_do_not_depend_on_the_others():
    options = {"ratio": (0.1, 0.3), "block": (0.1, 0.25)}
    for rule in ("official", "covered"):
        both = draw_boxes(3, SHAPE, generators=[generator(1), generator(2)], rule=rule, **options)
        alone = draw_boxes(3, SHAPE, generators=[generator(2)], rule=rule, **options)
        assert all(torch.equal(a[3:], b) for a, b in zip(both, alone, strict=True))


def test_partners_are_uniform_and_may_be_the_crop_itself():
    partners = draw_partners(4000, 4, generators=[generator(5)])
    counts = torch.bincount(partners, minlength=4)
    assert (counts - 1000).abs().max() < 150


def disjoint(sides, rows=4):
    """Boxes of these sides, one after the other along x, in each row of a batch."""
    start = torch.tensor([[[float(sum(sides[:i])), 0.0, 0.0] for i in range(len(sides))]]).expand(rows, -1, -1)
    size = torch.tensor([[[float(side), 8.0, 8.0] for side in sides]])
    return Boxes(start, start + size, torch.full((rows,), len(sides))), (sum(sides), 8, 8)


def test_noise_is_normal_and_spans_0_to_1_in_each_box():
    """As in the released code, where each block is scaled by its own extremes: a third stronger than by the crop's."""
    boxes, shape = disjoint([2, 6, 20])
    noise = noise_of_boxes(boxes, shape, channels=1, generators=[generator(s) for s in range(4)])
    random, first = np.random.default_rng(0), 0
    for side in (2, 6, 20):
        values = noise[:, :, first : first + side].flatten(1)
        expected = random.standard_normal((400, side * 64))
        low, high = expected.min(axis=1, keepdims=True), expected.max(axis=1, keepdims=True)
        expected = (expected - low) / (high - low)
        assert values.min() >= 0 and values.max() <= 1
        assert values.std() == pytest.approx(expected.std(), rel=0.12) and values.mean() == pytest.approx(0.5, abs=0.05)
        first += side
    many, shape = disjoint([4] * 200, rows=1)
    values = noise_of_boxes(many, shape, channels=1, generators=[generator(9)])[0, 0].reshape(200, -1)
    ends = ((values == 0) | (values == 1)).sum(dim=1).float()
    assert ends.mean() == pytest.approx(2, abs=0.4)  # on average one voxel of a box at either end


@pytest.mark.parametrize("voxels", [1, 2, 3, 8])
def test_a_voxel_of_a_small_box_is_the_least_of_its_box_as_often_as_of_that_many_others(voxels):
    """The least of n uniform numbers is 1 / (n + 1) on average. Extremes need two voxels, so one counts as two."""
    start = torch.arange(0.0, 3000 * voxels, voxels)[None, :, None] * torch.tensor([1.0, 0, 0])
    boxes = Boxes(start, start + torch.tensor([voxels, 1.0, 1.0]), torch.tensor([3000]))
    noise = noise_of_boxes(boxes, (3000 * voxels, 1, 1), channels=1, generators=[generator(3)])
    for end in (0, 1):
        assert (noise == end).float().mean() == pytest.approx(1 / (max(voxels, 2) + 1), abs=0.02)


def test_the_noise_of_a_generator_does_not_depend_on_the_others():
    boxes, shape = disjoint([4, 6])
    both = noise_of_boxes(boxes, shape, channels=2, generators=[generator(1), generator(2)])
    half = Boxes(*(part[2:] for part in boxes))
    assert both.shape == (4, 2, *shape)
    assert torch.equal(both[2:], noise_of_boxes(half, shape, channels=2, generators=[generator(2)]))


def test_crops_get_voxels_of_their_partners_one_after_the_other():
    # three crops of one voxel each; all voxels are masked, so each shows what it was given
    before = torch.tensor([10.0, 20.0, 30.0, 1.0, 2.0, 3.0]).view(2, 3, 1, 1, 1, 1)
    now = before + 100  # after an earlier pass
    mask = torch.ones(2, 3, 1, 1, 1, 1, dtype=torch.bool)
    pasted = paste_partners(now, mask, partners=torch.tensor([[1, 0, 0], [2, 2, 1]]), unmasked=before)
    # a later partner is as before any pass; an earlier one has what it was given
    assert pasted.flatten().tolist() == [20.0, 20.0, 20.0, 3.0, 3.0, 3.0]
    mask[0, 1] = False
    pasted = paste_partners(now, mask, partners=torch.tensor([[1, 0, 1], [2, 2, 1]]), unmasked=before)
    assert pasted[0].flatten().tolist() == [20.0, 120.0, 120.0]
