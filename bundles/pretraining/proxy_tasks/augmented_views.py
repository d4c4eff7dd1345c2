# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Make the views of every crop on the device: two rotated and masked ones, and one for position.

All random numbers follow from the seed and the number of the draw, that is, of the scan (`draws.generator`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...common.errors import InputError
from ...common.networks.positions import positions
from ...common.value_rules import check_choice
from ..crops.hu_window import check_window, intensities
from .draws import generator
from .masking import (
    FILLS,
    RULES,
    box_mask,
    check_blocks_fit,
    check_bounds,
    draw_boxes,
    draw_partners,
    noise_of_boxes,
    paste_partners,
)
from .position import change_intensities
from .rotation import draw_turns, plane_axes, rotate
from .tasks import check_tasks, reads_masked_views

logger = logging.getLogger(__name__)


class AugmentedViews:
    """``prepare_batch`` of the engines: turns a batch of crops into (views, targets).

    Args:
        seed: seed of the run. The views of a scan depend only on it and on the number of the scan's draw
            (`common.data.seeded_crops`), so that validation always has the same views, a resumed run those of an
            uninterrupted one, and several processes those of one. (But ``sample`` pastes voxels of the same process.)
        tasks: proxy tasks in use; they decide which views are made (`tasks`).
        plane: plane of the rotation.
        mask_fill: one or several fills. Each is one pass of masking, in this order.
        mask_ratio, mask_block, mask_rule: see `masking.draw_boxes`.
        intensity_change: see `position.change_intensities`.
        body_above: intensity above which a voxel belongs to the body, for position.
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
        mask_rule: str = "official",
        tasks: Sequence[str] = ("inpainting", "contrast", "rotation"),
        intensity_change: float = 0.0,
        body_above: float = 0.0,
        hu_window: Sequence[float] | None = None,
    ) -> None:
        self.seed = seed
        self.tasks = check_tasks(tasks)
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
        check_choice(name="mask_rule", value=mask_rule, choices=RULES)
        check_bounds(tuple(mask_ratio), tuple(mask_block))
        self.mask_rule = mask_rule
        self.mask_ratio = tuple(mask_ratio)
        self.mask_block = tuple(mask_block)
        self.intensity_change = intensity_change
        self.body_above = body_above

    def mask(
        self, crops: torch.Tensor, generators: Sequence[torch.Generator], *, sets: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the masked crops and the masked voxels, bool (B, 1, X, Y, Z).

        Args:
            crops: (B, C, X, Y, Z): ``sets`` sets of views, one after the other.
            generators: one per scan and set, in the order of the crops.
            sets: a crop gets voxels only of crops of its own set.
        """
        unmasked, (channels, *shape) = crops, crops.shape[1:]
        each, in_set = len(crops) // len(generators), len(crops) // sets
        hidden = torch.zeros_like(crops[:, :1], dtype=torch.bool)
        for fill in self.mask_fill:
            boxes = draw_boxes(
                each,
                shape,
                ratio=self.mask_ratio,
                block=self.mask_block,
                rule=self.mask_rule,
                generators=generators,
            )
            mask = box_mask(boxes, shape)
            if fill == "sample":
                partners = draw_partners(each, in_set, generators=generators).view(sets, in_set)
                itself = torch.arange(in_set, device=crops.device).expand(sets, -1)
                mask &= (partners != itself).view(-1, 1, 1, 1, 1)
                crops, unmasked, mask = (volumes.unflatten(0, (sets, in_set)) for volumes in (crops, unmasked, mask))
                crops = paste_partners(crops, mask, partners=partners, unmasked=unmasked)
                crops, unmasked, mask = (volumes.flatten(0, 1) for volumes in (crops, unmasked, mask))
            elif fill == "noise":
                noise = noise_of_boxes(boxes, shape, channels=channels, generators=generators)
                crops = torch.where(mask, noise.to(crops.dtype), crops)
            else:
                crops = torch.where(mask, torch.zeros_like(crops), crops)
            hidden |= mask
        return crops, hidden

    def __call__(
        self, batch: Mapping[str, Any], device: torch.device | str, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Return the views (V, C, X, Y, Z) in the order of `tasks`, and the targets of `losses.ProxyTaskLoss`.

        The crops of a scan must follow each other in the batch.
        """
        device = torch.device(device)
        crops = batch["image"].to(device, non_blocking=non_blocking, **kwargs)
        if self.hu_window is not None:
            crops = intensities(crops, self.hu_window)
        scans = list(dict.fromkeys(batch["draw"].tolist()))
        each = len(crops) // len(scans)
        generators = [generator(self.seed, number, device) for number in scans]
        views, targets = [], {}
        if reads_masked_views(self.tasks):
            if "sample" in self.mask_fill and len(crops) < 2:
                raise InputError(
                    "mask_fill 'sample' takes voxels of another crop, but each step has only one crop, whose other view "
                    "would give the answer away. Use 'noise' or 'zero', or a larger batch_size or crops_per_volume."
                )
            twice = generators * 2
            turns = draw_turns(each, generators=twice)
            target = rotate(torch.cat([crops, crops]), turns, plane=self.plane)
            masked, hidden = self.mask(target, twice, sets=2)
            views.append(masked)
            targets |= {"crop": target, "mask": hidden, "turns": turns}
        if "position" in self.tasks:
            views.append(change_intensities(crops, by=self.intensity_change, each=each, generators=generators))
            affine = batch["affine"].to(device, non_blocking=non_blocking)
            targets |= {
                "position": positions(affine, crops.shape[2:]),
                "body": crops.amax(dim=1, keepdim=True) > self.body_above,
                "crops_per_scan": each,
            }
        return views[0] if len(views) == 1 else torch.cat(views), targets


def check_crops(
    *,
    tasks: Sequence[str],
    mask_fill: Sequence[str],
    mask_block: Sequence[float],
    roi_size: Sequence[int],
    volumes: int,
    crops_per_volume: int,
    where: str,
    mask_ratio: Sequence[float] | None = None,
) -> None:
    """Check before a run that batches have enough crops for the tasks; warn if contrast has too few.

    Args:
        tasks: proxy tasks in use.
        mask_fill: fills of the masks.
        mask_block: bounds of the side of a block, as a fraction of the side of a crop.
        roi_size: size of a crop in voxels.
        volumes: number of volumes in the smallest batch.
        crops_per_volume: crops of each.
        where: ``training`` or ``validation``.
        mask_ratio: bounds of the share of a crop that is masked; None: not checked.

    Raises:
        InputError: inpainting has nothing to restore; masks are filled from another crop, but batches have only one;
            blocks are smaller than a voxel; or position has only one crop of a scan.
    """
    tasks = check_tasks(tasks)
    if reads_masked_views(tasks):
        check_blocks_fit(roi_size, mask_block)
    if "inpainting" in tasks and mask_ratio is not None and mask_ratio[1] == 0:
        raise InputError(
            f"--mask_ratio {list(mask_ratio)} masks nothing, so inpainting has nothing to restore. Use a high bound above 0, "
            "or leave inpainting out of --tasks."
        )
    if "position" in tasks and crops_per_volume < 2:
        raise InputError(
            f"--crops_per_volume {crops_per_volume}: the task position compares crops of one scan, so each volume needs "
            "at least 2."
        )
    if volumes * crops_per_volume > 1:
        return
    if "sample" in mask_fill and reads_masked_views(tasks):
        raise InputError(
            f"mask_fill 'sample' takes voxels of another crop, but a batch of the {where} has only one. Use "
            "\"['noise']\" or \"['zero']\", or a larger batch_size or crops_per_volume."
        )
    if "contrast" in tasks:
        logger.warning("a batch of the %s has only one crop on each process: contrast has no negatives there", where)
