# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The plan of windows says what MONAI's padding, rolling, cutting and 27-step mask say, and is made once."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets.swin_unetr import compute_mask, get_window_size, window_partition, window_reverse
from torch.nn import functional as F

from bundles.common.networks.fast.windows import (
    export_from_windows,
    export_plan,
    export_to_windows,
    from_windows,
    to_windows,
    window_plan,
)

CPU = torch.device("cpu")
CASES = [  # grid, window, shift
    ((4, 4, 4), (2, 2, 2), (1, 1, 1)),
    ((5, 7, 6), (3, 3, 3), (1, 1, 1)),
    ((9, 4, 11), (4, 4, 4), (2, 0, 2)),  # one window along the second axis: no shift there
    ((3, 3, 10), (3, 3, 4), (0, 0, 2)),
    ((6, 5, 4), (3, 3, 3), (0, 0, 0)),
    ((8, 7), (3, 3), (1, 1)),
]


def monai_windows(x, window, shift):
    """Padded, rolled and cut as MONAI's block does it."""
    pad = [n for g, w in zip(reversed(x.shape[1:-1]), reversed(window), strict=True) for n in (0, -g % w)]
    padded = F.pad(x, (0, 0, *pad))
    axes = tuple(range(1, x.dim() - 1))
    return window_partition(padded.roll([-s for s in shift], dims=axes), window), padded.shape[1:-1]


def order_of(plan, grid, window, shift):
    """Which of MONAI's windows stands at each place of the plan, found by the tokens inside."""
    tokens = torch.arange(1.0, 1 + torch.Size(grid).numel()).reshape(1, *grid, 1)
    theirs, _ = monai_windows(tokens, window, shift)
    ours = to_windows(tokens, plan)
    matches = (ours[:, None, :, 0] == theirs[None, :, :, 0]).all(dim=-1)
    assert (matches.sum(dim=1) == 1).all() and (matches.sum(dim=0) == 1).all()
    return matches.long().argmax(dim=1)


@pytest.mark.parametrize(("grid", "window", "shift"), CASES)
def test_windows_and_masks_are_those_of_monai_in_another_order(grid, window, shift):
    plan = window_plan(grid, window, shift, CPU)
    order = order_of(plan, grid, window, shift)
    x = torch.rand(2, *grid, 5)
    theirs, padded = monai_windows(x, window, shift)
    both = window_plan(grid, window, shift, CPU, 2)
    windows = to_windows(x, both)
    assert torch.equal(windows.unflatten(0, (-1, 2)).transpose(0, 1), theirs.unflatten(0, (2, -1))[:, order])
    if any(shift):
        assert torch.equal(plan.dense_mask(), compute_mask(list(padded), window, shift, "cpu")[order])
        assert torch.equal(both.dense_mask(), plan.dense_mask().repeat_interleave(2, dim=0))
    else:
        assert plan.masks is None and plan.dense_mask() is None and both.dense_mask() is None
    # what attention has made of the windows goes back to where the tokens came from
    back = window_reverse(theirs, window, [2, *padded]).roll(shift, dims=tuple(range(1, x.dim() - 1)))
    back = back[(slice(None), *(slice(g) for g in grid))]
    assert torch.equal(from_windows(windows, both, grid), back)
    assert torch.equal(back, x)


@pytest.mark.parametrize(("grid", "window", "shift"), CASES)
def test_gradients_come_back_by_the_inverse_index(grid, window, shift):
    plan = window_plan(grid, window, shift, CPU, 2)
    x = torch.rand(2, *grid, 3, requires_grad=True)
    windows = to_windows(x, plan)
    grad = torch.rand_like(windows)
    windows.backward(grad)
    assert torch.equal(x.grad, from_windows(grad, plan, grid))
    windows = windows.detach().requires_grad_()
    grad = torch.rand_like(x)
    from_windows(windows, plan, grid).backward(grad)
    assert torch.equal(windows.grad, to_windows(grad, plan))  # nothing for the padding


@pytest.mark.parametrize("samples", [1, 3])
def test_runs_are_all_windows_in_order_each_with_the_mask_of_its_kind(samples):
    plan = window_plan((9, 9, 9), (4, 4, 4), (2, 2, 2), CPU, samples)
    assert len(plan.masks) == 8
    assert [run[1] for run in plan.runs] + [plan.windows] == [0] + [run[2] for run in plan.runs]
    for kind, first, last in plan.runs:
        assert (plan.kind[first:last] == kind).all()
        assert plan.bounds[kind : kind + 2].tolist() == [first, last]
    # 3 windows an axis: 8 without a seam, 4 on each of 3 faces, 2 on each of 3 edges, 1 in the corner
    assert sorted(last - first for _, first, last in plan.runs) == [samples * n for n in (1, 2, 2, 2, 4, 4, 4, 8)]


def test_the_bounds_of_a_kind_without_windows_are_equal():
    plan = window_plan((9, 4, 9), (4, 4, 4), (2, 0, 2), CPU)
    assert [run[0] for run in plan.runs] == [0, 1, 4, 5]
    assert plan.bounds.tolist() == [0, 4, 6, 6, 6, 8, 9, 9, 9] and plan.bounds.dtype == torch.int32
    assert window_plan((4, 4, 4), (2, 2, 2), (0, 0, 0), CPU, 3).bounds.tolist() == [0, 24]


def test_a_plan_is_made_once_per_shape_and_the_cache_is_bounded():
    one = window_plan((10, 10, 10), (5, 5, 5), (2, 2, 2), CPU)
    assert window_plan((10, 10, 10), (5, 5, 5), (2, 2, 2), torch.device("cpu")) is one
    assert window_plan.cache_info().maxsize == 64


def test_a_plan_made_in_inference_mode_serves_training_afterwards():
    with torch.inference_mode():
        plan = window_plan((11, 3, 4), (3, 3, 3), (1, 0, 1), CPU)
    x = torch.rand(1, 11, 3, 4, 2, requires_grad=True)
    (to_windows(x, plan).sum() + plan.dense_mask().sum()).backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_a_window_of_the_whole_grid_is_left_as_it_is():
    window, shift = get_window_size((3, 3, 3), (7, 7, 7), (3, 3, 3))
    plan = window_plan((3, 3, 3), window, shift, CPU, 2)
    x = torch.rand(2, 3, 3, 3, 4)
    assert plan.masks is None and plan.runs == ((0, 0, 2),)
    assert torch.equal(to_windows(x, plan), x.flatten(1, 3))


@pytest.mark.parametrize(("grid", "window", "shift"), CASES)
def test_the_operations_of_an_export_give_the_same_windows(grid, window, shift):
    plan, exported = window_plan(grid, window, shift, CPU), export_plan(grid, window, shift, CPU)
    x = torch.rand(2, *grid, 3)
    both = torch.cat([to_windows(one[None], plan) for one in x])
    windows = export_to_windows(x, exported)
    assert torch.equal(windows, both)
    assert torch.equal(export_from_windows(windows, exported, grid), x)
    assert (exported.real is not None) == any(g % w for g, w in zip(grid, window, strict=True))
    if any(shift):
        assert torch.equal(exported.masks, plan.dense_mask())
    else:
        assert exported.masks is None
