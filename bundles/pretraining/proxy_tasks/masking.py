# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Inpainting masks: boxes of a crop are masked, and the network restores them (Tang et al., CVPR 2022, section 3.2).

Drawing (`draw_boxes`, `draw_partners`) is separate from applying (`box_mask`, `noise_of_boxes`, `paste_partners`). Both
are vectorised over the batch and run on the device of the crops without synchronisation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from ...common.errors import InputError
from .draws import draw

FILLS = ("noise", "zero", "sample")
RULES = ("official", "covered")


class Boxes(NamedTuple):
    """Axis-aligned boxes of a batch: ``start`` and ``stop`` (B, K, 3) in voxels; the first ``number`` (B,) are used."""

    start: torch.Tensor
    stop: torch.Tensor
    number: torch.Tensor

    @property
    def used(self) -> torch.Tensor:
        """Which boxes are used: bool (B, K)."""
        return torch.arange(self.start.shape[1], device=self.start.device) < self.number[:, None]

    @property
    def volume(self) -> torch.Tensor:
        """Voxels of each box, (B, K), as floating-point numbers."""
        return (self.stop - self.start).prod(dim=2)


class _Corners(NamedTuple):
    """Eight corners of each box, where `_sum_over_boxes` adds: ``index`` (B, 8K) into (X + 1, Y + 1, Z + 1), flat."""

    index: torch.Tensor
    shape: tuple[int, int, int]


def _corners(boxes: Boxes, shape: Sequence[int]) -> _Corners:
    """Return the corners of boxes in a crop of ``shape``; start corners come before stop corners along each axis."""
    x, y, z = torch.stack([boxes.start, boxes.stop]).long().unbind(-1)  # (2, B, K) each
    flat = (x[:, None, None] * (shape[1] + 1) + y[:, None]) * (shape[2] + 1) + z  # (2, 2, 2, B, K)
    return _Corners(flat.flatten(0, 2).transpose(0, 1).flatten(1), tuple(shape))


@lru_cache
def _signs(device: torch.device) -> torch.Tensor:
    """Return the signs of the eight corners, (8, 1) int32; cached, since copies synchronise."""
    signs = [(-1) ** sum(corner) for corner in itertools.product((0, 1), repeat=3)]
    return torch.tensor(signs, dtype=torch.int32, device=device)[:, None]


def _sum_over_boxes(corners: _Corners, value: torch.Tensor) -> torch.Tensor:
    """Return, for each voxel, the sum of ``value`` (B, K) int32 over the boxes that contain it: int32 (B, X, Y, Z).

    Each box adds its value with a sign at its eight corners. Cumulative sums along the three axes then give the sums:
    one pass over the crop for any number of boxes.
    """
    batch = len(value)
    x, y, z = (size + 1 for size in corners.shape)
    sums = torch.zeros(batch, x * y * z, dtype=torch.int32, device=value.device)
    sums.scatter_add_(1, corners.index, (value[:, None] * _signs(value.device)).flatten(1))
    for axis in (1, 2, 3):
        sums = sums.view(batch, x, y, z).cumsum(axis, dtype=torch.int32)
    return sums[:, :-1, :-1, :-1]


def _count(boxes: Boxes, corners: _Corners) -> torch.Tensor:
    """Return the number of used boxes that contain each voxel: int32 (B, X, Y, Z)."""
    return _sum_over_boxes(corners, boxes.used.int())


def side_bounds(side: int, block: tuple[float, float], rule: str) -> tuple[int, int]:
    """Return the smallest and largest side of a box, in voxels, along an axis of ``side`` voxels.

    The released code rounds both bounds down and never reaches the upper one.
    """
    if rule == "official":
        low = max(1, int(side * block[0]))
        return low, max(low, int(side * block[1]) - 1)
    low = max(1, round(side * block[0]))
    return low, max(low, round(side * block[1]))


def _starts(side: int, size: int, low: int, rule: str) -> int:
    """Return the number of places at which a box of ``size`` voxels may start: 0 to this number, exclusive."""
    return max(1, side - low) if rule == "official" else side - size + 1


@lru_cache
def _sides(
    shape: tuple[int, ...], block: tuple[float, float], rule: str, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """Return the sides of a crop and the bounds of the sides of a box, (3,) each; cached, since copies synchronise."""
    low, high = zip(*(side_bounds(side, block, rule) for side in shape), strict=True)
    return tuple(torch.tensor(numbers, device=device) for numbers in (shape, low, high))


@lru_cache
def _enough_boxes(shape: tuple[int, ...], ratio: float, block: tuple[float, float], rule: str) -> int:
    """Return the number of boxes that reach the fraction ``ratio`` on average, times 1.5, plus 16."""
    hits = []  # per axis and voxel: the probability that a box covers it
    for side in shape:
        low, high = side_bounds(side, block, rule)
        index, covered = torch.arange(side), torch.zeros(side)
        for size in range(low, high + 1):
            starts = _starts(side, size, low, rule)
            first, last = (index - size + 1).clamp(min=0), index.clamp(max=starts - 1)
            covered += (last - first + 1).clamp(min=0) / starts
        hits.append(covered / (high - low + 1))
    if rule == "official":  # sizes add up
        number = math.ceil(ratio / math.prod(float(hit.mean()) for hit in hits))
    else:  # K boxes miss a voxel with probability (1 - p)^K if one box covers it with probability p
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


def check_blocks_fit(roi_size: Sequence[int], block: Sequence[float]) -> None:
    """Check that the smallest box has at least one voxel along each axis of a crop.

    Raises:
        InputError: the crop is too small for the boxes.
    """
    if min(roi_size) * block[0] < 1:
        raise InputError(
            f"--roi_size {list(roi_size)} is too small for --mask_block {list(block)}: the smallest block would have "
            f"{min(roi_size) * block[0]:.2f} voxels a side. Use a larger roi_size or larger blocks."
        )


def draw_boxes(
    each: int,
    shape: Sequence[int],
    *,
    ratio: tuple[float, float],
    block: tuple[float, float],
    generators: Sequence[torch.Generator],
    rule: str = "official",
) -> Boxes:
    """Draw boxes until they reach a fraction of each crop.

    Args:
        each: number of crops for each generator.
        shape: (X, Y, Z) of a crop.
        ratio: bounds of the fraction, drawn from U(low, high) per crop; equal bounds fix it (paper: 0.3; official code:
            0 to 0.3).
        block: bounds of the side of a box as a fraction of the side of the crop, drawn per box and axis (official code:
            0.05 to 0.25).
        generators: random generators, one or more; their device is the device of the result. A crop's boxes depend only
            on its generator.
        rule: ``official``, as in the released code: a box starts anywhere but in the last ``low`` of an axis, and is
            cut off at the end of the crop; the sizes of the boxes are added up, although boxes overlap. So less is
            hidden than the fraction says: 12% instead of 15% on average for 0 to 0.3. ``covered``: boxes are inside the
            crop, and their union covers the fraction.

    Returns:
        The fewest boxes, in the order drawn, that reach the fraction; no boxes for a fraction of 0. Crops are in the
        order of the generators.

    Raises:
        InputError: bounds are out of order or out of range.
    """
    check_bounds(ratio, block)
    device = generators[0].device
    low_ratio, high_ratio = ratio
    target = low_ratio + (high_ratio - low_ratio) * draw(
        generators, lambda generator: torch.rand(each, generator=generator, device=device)
    )
    sides, low, high = _sides(tuple(shape), tuple(block), rule, device)
    number = _enough_boxes(tuple(shape), high_ratio, tuple(block), rule)
    uniform = draw(generators, lambda generator: torch.rand(each, 2, number, 3, generator=generator, device=device))
    size = low + torch.floor(uniform[:, 0] * (high - low + 1))
    places = (sides - low).clamp(min=1) if rule == "official" else sides - size + 1
    start = torch.floor(uniform[:, 1] * places)
    stop = torch.minimum(start + size, sides)
    boxes = Boxes(start, stop, torch.full((len(target),), number, device=device, dtype=torch.long))
    if rule == "official":
        before = boxes.volume.cumsum(dim=1) - boxes.volume  # a box is added while the sizes are below the target
        return boxes._replace(number=(before < target[:, None] * math.prod(shape)).sum(dim=1))

    # Coverage grows with the number of boxes: bisection finds the fewest that reach the target, for all crops at once.
    corners = _corners(boxes, shape)
    enough, too_few = boxes.number, torch.full_like(boxes.number, -1)
    for _ in range(math.ceil(math.log2(number + 1))):
        middle = torch.maximum((enough + too_few) // 2, too_few + 1)
        covered = (_count(boxes._replace(number=middle), corners) > 0).float().mean(dim=(1, 2, 3))
        reached = covered >= target
        enough = torch.where(reached, middle, enough)
        too_few = torch.where(reached, too_few, middle)
    return boxes._replace(number=enough)


def draw_partners(each: int, batch: int, *, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Draw the crop whose voxels each crop gets, any of the ``batch`` including itself, uniformly: int64 (B,)."""
    device = generators[0].device
    return draw(generators, lambda generator: torch.randint(batch, (each,), generator=generator, device=device))


def box_mask(boxes: Boxes, shape: Sequence[int]) -> torch.Tensor:
    """Return the voxels that boxes mask: bool (B, 1, X, Y, Z)."""
    return (_count(boxes, _corners(boxes, shape)) > 0)[:, None]


def noise_of_boxes(
    boxes: Boxes, shape: Sequence[int], *, channels: int, generators: Sequence[torch.Generator]
) -> torch.Tensor:
    """Return normal noise that spans [0, 1] in each box, as in the released code: float32 (B, C, X, Y, Z).

    There, the noise of a box is scaled by its own minimum and maximum. Here, minimum and maximum of n normal numbers
    are drawn for each box of n voxels from their joint distribution, and the noise of its voxels is scaled by them and
    cut off there; so about one voxel of a box is 0 and one is 1. Where boxes overlap, the scale is that of some box of
    the crop.

    Args:
        boxes: the boxes; what is returned outside of them has no meaning.
        shape: (X, Y, Z).
        channels: C.
        generators: as in `draw_boxes`.
    """
    each, device = len(boxes.start) // len(generators), boxes.start.device
    number = boxes.start.shape[1]
    uniform = draw(
        generators,
        lambda g: torch.rand(each, 2, number, generator=g, device=device, dtype=torch.float64).clamp_(1e-12, 1 - 1e-12),
    )
    voxels = (channels * boxes.volume.double()).clamp(min=2)
    top = uniform[:, 0] ** (1 / voxels)  # largest of the uniform numbers; the others are uniform below it
    bottom = top * -torch.expm1(torch.log(uniform[:, 1]) / (voxels - 1))
    low, high = (torch.special.ndtri(end).float() for end in (bottom, top))
    corners, used = _corners(boxes, shape), boxes.used.int()
    count = _sum_over_boxes(corners, used).clamp(min=1)
    index = torch.arange(number, device=device, dtype=torch.int32) * used
    owner = (_sum_over_boxes(corners, index) // count).flatten(1).long()  # one box: its index; several: their mean
    low, high = (end.gather(1, owner).view(-1, 1, *shape) for end in (low, high))
    noise = draw(generators, lambda g: torch.randn(each, channels, *shape, generator=g, device=device))
    return ((noise - low) / (high - low)).clamp_(0, 1)


def paste_partners(
    crops: torch.Tensor, mask: torch.Tensor, *, partners: torch.Tensor, unmasked: torch.Tensor
) -> torch.Tensor:
    """Replace the masked voxels of each crop by the same voxels of its partner, crop by crop, as in the released code.

    A partner that comes earlier in the batch already has its own masks, a later one has none yet.

    Args:
        crops: (V, N, C, X, Y, Z): V sets of N crops, after the passes before this one.
        mask: bool (V, N, 1, X, Y, Z).
        partners: int64 (V, N), index of the partner within the set. A crop that is its own partner stays as it is.
        unmasked: the crops before any pass.
    """
    pasted = list(crops.unbind(1))
    for i in range(len(pasted)):
        done = torch.stack(pasted[:i] + list(unmasked[:, i:].unbind(1)), dim=1)
        index = partners[:, i].view(-1, *[1] * (done.ndim - 1)).expand(-1, 1, *done.shape[2:])
        pasted[i] = torch.where(mask[:, i], done.gather(1, index)[:, 0], pasted[i])
    return torch.stack(pasted, dim=1)
