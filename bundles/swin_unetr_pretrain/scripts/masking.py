# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Masked volume inpainting: boxes of a crop are hidden, and the network paints them in (paper section 3.2).

Drawing (`draw_boxes`) is apart from applying (`box_mask`, `fill_mask`). All of it is vectorised over the batch and runs on the
device of the crops without waiting for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .common.input_error import InputError

FILLS = ("noise", "zero", "sample")


class Boxes(NamedTuple):
    """Axis-aligned boxes of a batch: ``start`` and ``stop`` (B, K, 3) in voxels, of which the first ``number`` (B,) count."""

    start: torch.Tensor
    stop: torch.Tensor
    number: torch.Tensor


def _inside(boxes: Boxes, shape: Sequence[int]) -> list[torch.Tensor]:
    """Per axis, whether a voxel's index lies in a box: three float tensors (B, K, X), (B, K, Y), (B, K, Z)."""
    indicators = []
    for axis, size in enumerate(shape):
        index = torch.arange(size, device=boxes.start.device)
        inside = (index >= boxes.start[..., axis, None]) & (index < boxes.stop[..., axis, None])
        indicators.append(inside.float())
    return indicators


def _union(indicators: list[torch.Tensor], number: torch.Tensor) -> torch.Tensor:
    """Voxels in any of the first ``number`` boxes: bool (B, X, Y, Z). A box is an outer product, so their sum is one matmul."""
    x, y, z = indicators
    used = (torch.arange(x.shape[1], device=number.device) < number[:, None]).float()
    return torch.einsum("bkx,bky,bkz->bxyz", x * used[..., None], y, z) > 0.5


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
        ratio: the fraction to cover is drawn from U(low, high) per crop; equal bounds fix it (paper: 0.3; official code: 0 to 0.3).
        block: bounds of a box's side as a fraction of the crop's side, drawn per box and axis (official code: 0.05 to 0.25).
        generator: source of the draws; its device is the device of the result.

    Returns:
        Boxes whose union is at least the drawn fraction, and below it without its last box. Where the ratio is 0, none.

    Raises:
        InputError: if a bound is out of order or out of range.
    """
    if not 0 <= ratio[0] <= ratio[1] < 1:
        raise InputError(f"mask_ratio {list(ratio)} must be [low, high] with 0 <= low <= high < 1.")
    if not 0 < block[0] <= block[1] <= 1:
        raise InputError(f"mask_block {list(block)} must be [low, high] with 0 < low <= high <= 1.")
    device = generator.device
    target = ratio[0] + (ratio[1] - ratio[0]) * torch.rand(batch, generator=generator, device=device)
    sides = torch.tensor(shape, device=device)
    low = (sides * block[0]).round().clamp(min=1)
    high = torch.maximum((sides * block[1]).round(), low)
    # Independent boxes of relative volume v leave (1 - v)^K uncovered; half as many again are enough.
    volume = ((block[0] + block[1]) / 2) ** 3
    number = max(1, math.ceil(1.5 * math.log(1 / (1 - ratio[1])) / volume)) + 8
    size = low + torch.floor(torch.rand(batch, number, 3, generator=generator, device=device) * (high - low + 1))
    start = torch.floor(torch.rand(batch, number, 3, generator=generator, device=device) * (sides - size + 1))
    boxes = Boxes(start, start + size, torch.full((batch,), number, device=device, dtype=torch.long))

    # Coverage grows with the number of boxes: bisect for the fewest that reach the target, all crops at once.
    indicators = _inside(boxes, shape)
    enough, too_few = boxes.number, torch.full_like(boxes.number, -1)
    for _ in range(math.ceil(math.log2(number + 1))):
        middle = torch.maximum((enough + too_few) // 2, too_few + 1)
        covered = _union(indicators, middle).float().mean(dim=(1, 2, 3))
        reached = covered >= target
        enough = torch.where(reached, middle, enough)
        too_few = torch.where(reached, too_few, middle)
    return boxes._replace(number=enough)


def box_mask(boxes: Boxes, shape: Sequence[int]) -> torch.Tensor:
    """The voxels that boxes hide: bool (B, 1, X, Y, Z)."""
    return _union(_inside(boxes, shape), boxes.number)[:, None]


def fill_mask(crops: torch.Tensor, mask: torch.Tensor, *, fill: str, generator: torch.Generator) -> torch.Tensor:
    """Replace masked voxels; voxels outside the mask are left as they are.

    Args:
        crops: (B, C, X, Y, Z), intensities in [0, 1].
        mask: bool (B, 1, X, Y, Z).
        fill: ``noise`` (normal, scaled to [0, 1] by its minimum and maximum, as the official code), ``zero``, or ``sample`` (the same voxels
            of the next crop of the batch).
        generator: source of the noise, on the device of the crops.

    Raises:
        InputError: for another fill, or ``sample`` with a single crop, which has no other one.
    """
    if fill not in FILLS:
        raise InputError(f"mask_fill {fill!r} is not one of {', '.join(FILLS)}.")
    if fill == "sample" and len(crops) < 2:
        raise InputError(
            "mask_fill 'sample' takes voxels of another crop, but the batch has one crop. Use 'noise' or 'zero', or more crops per step."
        )
    if fill == "noise":
        noise = torch.randn(crops.shape, generator=generator, device=crops.device, dtype=crops.dtype)
        low, high = noise.amin(dim=(1, 2, 3, 4), keepdim=True), noise.amax(dim=(1, 2, 3, 4), keepdim=True)
        return torch.where(mask, (noise - low) / (high - low), crops)
    return torch.where(mask, torch.zeros_like(crops) if fill == "zero" else crops.roll(1, dims=0), crops)
