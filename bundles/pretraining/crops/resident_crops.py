# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Crops bit-identical to those of `StoredCrops`, from a small store whose scans are on the training device.

Drawing a crop then reads no file and copies nothing to the device. The host keeps a byte for each voxel, body or not,
so that telling air from body never waits for the device.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ...common.run.distributed import rank
from ...common.words import counted
from .hu_window import intensities
from .stored_crops import StoredCrops

logger = logging.getLogger(__name__)


class ResidentCrops(Dataset):
    """Map-style dataset over draws, as `StoredCrops`, with images on the device. Loading processes cannot read it.

    Args:
        stored: the crops; the body boxes of all its scans are read once, here.
        device: where their voxels are kept.
    """

    resident = True

    def __init__(self, stored: StoredCrops, *, device: torch.device | str) -> None:
        self.stored = stored
        self.voxels: list[torch.Tensor] = []
        self.body: list[torch.Tensor] = []
        for scan in stored.scans:
            corner, size = stored.padded_box(scan)
            padded = stored.read(scan, corner, tuple(slice(0, each) for each in size.tolist()))
            self.body.append(intensities(padded, stored.hu_window) > stored.cropping.threshold)
            self.voxels.append(padded.to(device))

    def __len__(self) -> int:
        """Return the number of scans, which is one pass; draws continue beyond it."""
        return len(self.stored)

    def volume_of(self, draw: int) -> int:
        """Return the index of the scan that a draw reads."""
        return self.stored.volume_of(draw)

    def __getitem__(self, draw: int) -> list[dict[str, Any]]:
        index = self.volume_of(draw)
        voxels, body = self.voxels[index], self.body[index]
        return self.stored.drawn(
            draw,
            lambda box: body[(slice(None), *box)],
            intensities=lambda is_body: torch.where(is_body, torch.inf, -torch.inf),  # above any threshold, or below
            image=lambda _, box: voxels[(slice(None), *box)],
        )

    def whole_scan(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `StoredCrops.whole_scan`."""
        return self.stored.whole_scan(index)


def kept_on_device(stored: StoredCrops, *, device: torch.device | str, share: float) -> StoredCrops | ResidentCrops:
    """Keep the scans of a store on the device if they fit; log how much memory they take, or would take.

    Args:
        stored: the crops.
        device: the training device.
        share: the part of its free memory that they may fill.

    Returns:
        `ResidentCrops`, or ``stored`` itself if they do not fit.
    """
    voxels = sum(int(np.prod(stored.padded_box(scan)[1])) for scan in stored.scans)
    needed, free = voxels * stored.dtype.itemsize, free_memory(device)
    scans, mib = counted(len(stored.scans), "scan"), 2**20
    if needed > share * free:
        if rank() == 0:
            logger.warning(
                "The %s of the store take %.1f MiB, more than the share %g (--store_on_device) of the %.1f MiB that are free "
                "on %s: crops are read from the disk. Raise the share, or leave the option out.",
                *(scans, needed / mib, share, free / mib, device),
            )
        return stored
    if rank() == 0:
        logger.info(
            "%s of the store kept on %s: %.1f MiB, %.2g%% of its free memory",
            *(scans, device, needed / mib, 100 * needed / free),
        )
    return ResidentCrops(stored, device=device)


def free_memory(device: torch.device | str) -> int:
    """Return the free memory of a GPU in bytes; of any other device, that of the host."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
