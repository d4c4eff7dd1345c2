# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Two views of every crop: each turned and masked on its own, drawn on the device from the seed and the number of the draw."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ...common.errors import InputError
from ...common.run.option_checks import check_choice
from ..crops.hu_window import check_window, intensities
from .masking import FILLS, box_mask, check_bounds, draw_boxes, fill_mask
from .rotation import draw_turns, plane_axes, rotate

logger = logging.getLogger(__name__)


class TwoViews:
    """``prepare_batch`` of the engines: batch of crops to (views, targets).

    Args:
        seed: seed of the run. The draws depend on it and on the first draw of the batch (`common.seeded_crops`) alone, so that
            validation sees the same views every time and a resumed run the ones it would have seen.
        plane: plane of the rotation.
        mask_fill: fills of one masking pass each, in order.
        mask_ratio, mask_block: see `masking.draw_boxes`.
        hu_window: ``[low, high]`` that becomes [0, 1], for crops in HU (`stored_crops`); None: they are in [0, 1] already.
    """

    def __init__(
        self,
        *,
        seed: int,
        plane: str,
        mask_fill: Sequence[str],
        mask_ratio: Sequence[float],
        mask_block: Sequence[float],
        hu_window: Sequence[float] | None = None,
    ) -> None:
        self.seed = seed
        self.hu_window = None if hu_window is None else check_window(hu_window)
        self.plane = plane
        plane_axes(plane)
        self.mask_fill = [mask_fill] if isinstance(mask_fill, str) else list(mask_fill)
        for name, bounds in (("mask_ratio", mask_ratio), ("mask_block", mask_block)):
            if not isinstance(bounds, (list, tuple)) or len(bounds) != 2:
                raise InputError(f"--{name} {bounds!r} must be two numbers [low, high]; equal ones fix it.")
        for fill in self.mask_fill:
            check_choice(name="mask_fill", value=fill, choices=FILLS)
        if not self.mask_fill:
            raise InputError(
                "--mask_fill [] hides nothing: name at least one fill. To leave inpainting out, use --tasks."
            )
        check_bounds(tuple(mask_ratio), tuple(mask_block))
        self.mask_ratio = tuple(mask_ratio)
        self.mask_block = tuple(mask_block)

    def generator(self, draw: int, device: torch.device) -> torch.Generator:
        """The generator of one batch."""
        state = np.random.SeedSequence([self.seed, draw]).generate_state(1, dtype=np.uint64)[0]
        return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))

    def mask(self, crops: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Masked crops and the voxels that were hidden, bool (B, 1, X, Y, Z)."""
        hidden = torch.zeros_like(crops[:, :1], dtype=torch.bool)
        for fill in self.mask_fill:
            shape = crops.shape[2:]
            boxes = draw_boxes(len(crops), shape, ratio=self.mask_ratio, block=self.mask_block, generator=generator)
            mask = box_mask(boxes, shape)
            crops = fill_mask(crops, mask, fill=fill, generator=generator)
            hidden |= mask
        return crops, hidden

    def __call__(
        self, batch: Mapping[str, Any], device: torch.device | str, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Views (2B, C, X, Y, Z), first views before second ones, and the targets of `losses.ProxyTaskLoss`."""
        device = torch.device(device)
        crops = batch["image"].to(device, non_blocking=non_blocking, **kwargs)
        if self.hu_window is not None:
            crops = intensities(crops, self.hu_window)
        if "sample" in self.mask_fill and len(crops) < 2:
            raise InputError(
                "mask_fill 'sample' takes voxels of another crop, but each step has one: its own other view would give the answer away. "
                "Use 'noise' or 'zero', or a larger batch_size or crops_per_volume."
            )
        generator = self.generator(int(batch["draw"][0]), device)
        both = torch.cat([crops, crops])
        turns = draw_turns(len(both), generator=generator)
        target = rotate(both, turns, plane=self.plane)
        views, hidden = self.mask(target, generator)
        return views, {"crop": target, "mask": hidden, "turns": turns}


def check_crops(*, tasks: Sequence[str], mask_fill: Sequence[str], crops: int, where: str) -> None:
    """Before a run: whether the crops of a batch suffice for what is done between them.

    Args:
        tasks: proxy tasks in use.
        mask_fill: fills of the masks.
        crops: crops of the smallest batch.
        where: ``training`` or ``validation``.

    Raises:
        InputError: if masks are to be filled from another crop and there is none.
    """
    if crops > 1:
        return
    if "sample" in mask_fill:
        raise InputError(
            f"mask_fill 'sample' takes voxels of another crop, but a batch of the {where} has one. Use \"['noise']\" or \"['zero']\", or a larger "
            "batch_size or crops_per_volume."
        )
    if "contrast" in tasks:
        logger.warning(
            "a batch of the %s has one crop on each process: contrast has nothing to tell it from there", where
        )
