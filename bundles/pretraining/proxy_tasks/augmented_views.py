# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Make two views of every crop on the device, rotated and masked independently, from the seed and the draw number."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ...common.errors import InputError
from ...common.run.options import check_choice
from ..crops.hu_window import check_window, intensities
from .masking import FILLS, box_mask, check_bounds, draw_boxes, fill_mask
from .rotation import draw_turns, plane_axes, rotate

logger = logging.getLogger(__name__)


class TwoViews:
    """``prepare_batch`` of the engines: turns a batch of crops into (views, targets).

    Args:
        seed: seed of the run. The views depend only on it and on the first draw of the batch
            (`common.data.seeded_crops`), so that validation always has the same views, and a resumed run those of an
            uninterrupted one.
        plane: plane of the rotation.
        mask_fill: one or several fills. Each is one pass of masking, in this order.
        mask_ratio, mask_block: see `masking.draw_boxes`.
        hu_window: ``[low, high]`` that is mapped to [0, 1], for crops in HU (`stored_crops`); None: crops are in [0,
            1].
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
                raise InputError(
                    f"--{name} {bounds!r} must be two numbers [low, high]; use equal numbers for a fixed value."
                )
        for fill in self.mask_fill:
            check_choice(name="mask_fill", value=fill, choices=FILLS)
        if not self.mask_fill:
            raise InputError(
                "--mask_fill [] masks nothing: pass at least one fill. To train without inpainting, use --tasks."
            )
        check_bounds(tuple(mask_ratio), tuple(mask_block))
        self.mask_ratio = tuple(mask_ratio)
        self.mask_block = tuple(mask_block)

    def generator(self, draw: int, device: torch.device) -> torch.Generator:
        """Return the random generator of one batch."""
        state = np.random.SeedSequence([self.seed, draw]).generate_state(1, dtype=np.uint64)[0]
        return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))

    def mask(self, crops: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the masked crops and the masked voxels, bool (B, 1, X, Y, Z)."""
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
        """Return views (2B, C, X, Y, Z), first views before second ones, and the targets of `losses.ProxyTaskLoss`."""
        device = torch.device(device)
        crops = batch["image"].to(device, non_blocking=non_blocking, **kwargs)
        if self.hu_window is not None:
            crops = intensities(crops, self.hu_window)
        if "sample" in self.mask_fill and len(crops) < 2:
            raise InputError(
                "mask_fill 'sample' takes voxels of another crop, but each step has only one crop, whose other view "
                "would give the answer away. Use 'noise' or 'zero', or a larger batch_size or crops_per_volume."
            )
        generator = self.generator(int(batch["draw"][0]), device)
        both = torch.cat([crops, crops])
        turns = draw_turns(len(both), generator=generator)
        target = rotate(both, turns, plane=self.plane)
        views, hidden = self.mask(target, generator)
        return views, {"crop": target, "mask": hidden, "turns": turns}


def check_crops(*, tasks: Sequence[str], mask_fill: Sequence[str], crops: int, where: str) -> None:
    """Check before a run that batches have enough crops for masks and for contrast; warn if contrast has too few.

    Args:
        tasks: proxy tasks in use.
        mask_fill: fills of the masks.
        crops: number of crops in the smallest batch.
        where: ``training`` or ``validation``.

    Raises:
        InputError: masks are filled from another crop, but batches have only one.
    """
    if crops > 1:
        return
    if "sample" in mask_fill:
        raise InputError(
            f"mask_fill 'sample' takes voxels of another crop, but a batch of the {where} has only one. Use "
            "\"['noise']\" or \"['zero']\", or a larger batch_size or crops_per_volume."
        )
    if "contrast" in tasks:
        logger.warning("a batch of the %s has only one crop on each process: contrast has no negatives there", where)
