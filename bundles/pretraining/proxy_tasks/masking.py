# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Inpainting masks: boxes of a crop are masked, and the network restores them (Tang et al., CVPR 2022, section 3.2).

Drawing (`draw_boxes`) is separate from applying (`box_mask`, `fill_mask`). Both are vectorised over the batch and run
on the device of the crops without synchronisation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from ...common.errors import InputError

FILLS = ("noise", "zero", "sample")


class Boxes(NamedTuple):
    """Axis-aligned boxes of a batch: ``start`` and ``stop`` (B, K, 3) in voxels; the first ``number`` (B,) are used."""

    start: torch.Tensor
    stop: torch.Tensor
    number: torch.Tensor


def _union(boxes: Boxes, shape: Sequence[int]) -> torch.Tensor:
    """Return the voxels in any of the used boxes: bool (B, X, Y, Z).

    Each box adds +1 or -1 at its eight corners. Cumulative sums along the three axes then give the number of boxes that
    contain each voxel: one pass over the crop for any number of boxes.
    """
    batch, number = boxes.start.shape[:2]
    x, y, z = (size + 1 for size in shape)
    counts = torch.zeros(batch, x * y * z, dtype=torch.int32, device=boxes.start.device)
    used = (torch.arange(number, device=counts.device) < boxes.number[:, None]).int()
    for corner in itertools.product((0, 1), repeat=3):
        at = torch.stack([(boxes.stop if end else boxes.start)[..., axis] for axis, end in enumerate(corner)]).long()
        counts.scatter_add_(1, (at[0] * y + at[1]) * z + at[2], used * (-1) ** sum(corner))
    for axis in (1, 2, 3):
        counts = counts.view(batch, x, y, z).cumsum(axis, dtype=torch.int32)
    return counts[:, :-1, :-1, :-1] > 0


def _side_bounds(side: int, block: tuple[float, float]) -> tuple[int, int]:
    """Return the smallest and largest side of a box, in voxels, along one axis of a crop."""
    low = max(1, round(side * block[0]))
    return low, max(low, round(side * block[1]))


@lru_cache
def _sides(shape: tuple[int, ...], block: tuple[float, float], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return the sides of a crop and the bounds of the sides of a box, (3,) each; cached, since copies synchronise."""
    low, high = zip(*(_side_bounds(side, block) for side in shape), strict=True)
    return tuple(torch.tensor(numbers, device=device) for numbers in (shape, low, high))


@lru_cache
def _enough_boxes(shape: tuple[int, ...], ratio: float, block: tuple[float, float]) -> int:
    """Return the number of boxes that cover the fraction ``ratio`` on average, times 1.5, plus 16.

    Boxes are inside the crop, so its corners are hit far less often than its middle: K boxes miss a voxel with
    probability (1 - p)^K if one box hits it with probability p.
    """
    hits = []
    for side in shape:
        index, sizes = torch.arange(side), range(_side_bounds(side, block)[0], _side_bounds(side, block)[1] + 1)
        # Number of starts for which the box contains the voxel.
        starts = [index.clamp(max=side - size) - (index - size + 1).clamp(min=0) + 1 for size in sizes]
        hits.append(torch.stack([n / (side - size + 1) for n, size in zip(starts, sizes, strict=True)]).mean(dim=0))
    missed = 1 - torch.einsum("x,y,z->xyz", *hits)
    number = 1
    while (missed**number).mean() > 1 - ratio:
        number = math.ceil(1.1 * number)
    return math.ceil(1.5 * number) + 16


def check_bounds(ratio: tuple[float, float], block: tuple[float, float]) -> None:
    """Check the bounds of masks.

    Raises:
        InputError: bounds are out of order or out of range; the message names them.
    """
    if not 0 <= ratio[0] <= ratio[1] < 1:
        raise InputError(f"mask_ratio {list(ratio)} must be [low, high] with 0 <= low <= high < 1.")
    if not 0 < block[0] <= block[1] <= 1:
        raise InputError(f"mask_block {list(block)} must be [low, high] with 0 < low <= high <= 1.")


def draw_boxes(
    batch: int,
    shape: Sequence[int],
    *,
    ratio: tuple[float, float],
    block: tuple[float, float],
    generator: torch.Generator,
) -> Boxes:
    """Draw boxes until they cover a fraction of each crop.

    Args:
        batch: number of crops.
        shape: (X, Y, Z) of a crop.
        ratio: bounds of the fraction to cover, drawn from U(low, high) per crop; equal bounds fix it (paper: 0.3;
            official code: 0 to 0.3).
        block: bounds of the side of a box as a fraction of the side of the crop, drawn per box and axis (official code:
            0.05 to 0.25).
        generator: random generator; its device is the device of the result.

    Returns:
        The fewest boxes, in the order drawn, whose union covers at least the drawn fraction; no boxes for a fraction of
        0.

    Raises:
        InputError: bounds are out of order or out of range.
    """
    check_bounds(ratio, block)
    device = generator.device
    target = ratio[0] + (ratio[1] - ratio[0]) * torch.rand(batch, generator=generator, device=device)
    sides, low, high = _sides(tuple(shape), tuple(block), device)
    number = _enough_boxes(tuple(shape), ratio[1], tuple(block))
    size = low + torch.floor(torch.rand(batch, number, 3, generator=generator, device=device) * (high - low + 1))
    start = torch.floor(torch.rand(batch, number, 3, generator=generator, device=device) * (sides - size + 1))
    boxes = Boxes(start, start + size, torch.full((batch,), number, device=device, dtype=torch.long))

    # Coverage grows with the number of boxes: bisection finds the fewest that reach the target, for all crops at once.
    enough, too_few = boxes.number, torch.full_like(boxes.number, -1)
    for _ in range(math.ceil(math.log2(number + 1))):
        middle = torch.maximum((enough + too_few) // 2, too_few + 1)
        covered = _union(boxes._replace(number=middle), shape).float().mean(dim=(1, 2, 3))
        reached = covered >= target
        enough = torch.where(reached, middle, enough)
        too_few = torch.where(reached, too_few, middle)
    return boxes._replace(number=enough)


def box_mask(boxes: Boxes, shape: Sequence[int]) -> torch.Tensor:
    """Return the voxels that boxes mask: bool (B, 1, X, Y, Z)."""
    return _union(boxes, shape)[:, None]


def fill_mask(crops: torch.Tensor, mask: torch.Tensor, *, fill: str, generator: torch.Generator) -> torch.Tensor:
    """Replace masked voxels; other voxels are not changed.

    Args:
        crops: (B, C, X, Y, Z), intensities in [0, 1].
        mask: bool (B, 1, X, Y, Z).
        fill: ``noise`` (normal, scaled to [0, 1] by its minimum and maximum, as in the official code), ``zero``, or
            ``sample`` (the same voxels of the next crop of the batch).
        generator: random generator of the noise, on the device of the crops.

    Raises:
        InputError: the fill is unknown, or it is ``sample`` and there is only one crop.
    """
    if fill not in FILLS:
        raise InputError(f"mask_fill {fill!r} is not one of {', '.join(FILLS)}.")
    if fill == "sample" and len(crops) < 2:
        raise InputError(
            "mask_fill 'sample' takes voxels of another crop, but the batch has only one. Use 'noise' or 'zero', or "
            "more crops per step."
        )
    if fill == "noise":
        noise = torch.randn(crops.shape, generator=generator, device=crops.device, dtype=crops.dtype)
        low, high = noise.amin(dim=(1, 2, 3, 4), keepdim=True), noise.amax(dim=(1, 2, 3, 4), keepdim=True)
        return torch.where(mask, (noise - low) / (high - low), crops)
    return torch.where(mask, torch.zeros_like(crops) if fill == "zero" else crops.roll(-1, dims=0), crops)
