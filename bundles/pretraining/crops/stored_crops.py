# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The crops of `SeededCrops`, to the bit, from stored scans of which only the crops are read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ...common.data.seeded_crops import Draws
from ...common.errors import InputError
from .body_crops import RandBodyCropsd
from .hu_window import check_window, intensities
from .patch_store import StoredScan


class StoredCrops(Dataset):
    """Map-style dataset over draws: ``dataset[i]`` is a list of crops (dicts) of the scan that draw ``i`` chose.

    The image of a crop, (1, X, Y, Z), is in HU; `hu_window.intensities` turns it into what `common.seeded_crops` gives
    for the same seed and draw. It is int16, or float32 if any of the scans is, as a batch has one type. Beside it are
    ``"draw"`` and the counts of `RandBodyCropsd`.

    Args:
        data: items of the data list, ``{"image": file of common.patch_store}``. Each file is opened once here, so that
            a bad one is found before the run.
        cropping: draws the crops from the body box of the scan.
        hu_window: ``[low, high]`` in HU that becomes [0, 1].
        seed: seed of the run.
        shuffle: False visits scan ``i`` at draw ``i``, for validation on crops that are the same every time.

    Raises:
        InputError: if a file is missing or no stored scan, or the window begins below what an int16 holds.
    """

    def __init__(
        self,
        *,
        data: Sequence[dict],
        cropping: RandBodyCropsd,
        hu_window: Sequence[float],
        seed: int,
        shuffle: bool = True,
    ) -> None:
        self.hu_window = check_window(hu_window)
        self.scans = [StoredScan(item["image"]) for item in data]
        self.dtype = np.result_type(np.int16, *{scan.dtype for scan in self.scans})
        self.air = math.floor(self.hu_window[0])  # of the padding; 0 when scaled, as the window clips
        if self.air < np.iinfo(np.int16).min:
            raise InputError(
                f"--hu_window {list(self.hu_window)} begins below {np.iinfo(np.int16).min} HU, the least that a stored "
                "scan can be padded with: air is -1000 HU."
            )
        self.cropping = cropping
        self.draws = Draws(volumes=len(self.scans), seed=seed, shuffle=shuffle)

    def __len__(self) -> int:
        """Number of scans, so one pass; draws go on beyond it."""
        return len(self.scans)

    def volume_of(self, draw: int) -> int:
        """Index of the scan that a draw reads."""
        return self.draws.volume_of(draw)

    def _read(self, scan: StoredScan, corner: np.ndarray, box: tuple[slice, ...]) -> torch.Tensor:
        """A box of the padded body box, which begins at voxel ``corner`` of the scan; around the body box is air."""
        low, high = np.array(scan.body_box).T
        start = corner + [each.start for each in box]
        stop = corner + [each.stop for each in box]
        first, last = np.clip(start, low, high), np.clip(stop, low, high)
        crop = np.full(stop - start, self.air, dtype=self.dtype)
        crop[tuple(map(slice, first - start, last - start))] = scan.read(tuple(map(slice, first, last)))
        return torch.from_numpy(crop)[None]

    def __getitem__(self, draw: int) -> list[dict[str, Any]]:
        scan = self.scans[self.volume_of(draw)]
        low, high = np.array(scan.body_box).T
        margins = np.array(self.cropping.pad.compute_pad_width(high - low)[1:])
        self.cropping.set_random_state(seed=self.draws.seed_of(draw))
        drawn = self.cropping.draw(
            (high - low + margins.sum(axis=1)).tolist(),
            partial(self._read, scan, low - margins[:, 0]),
            intensities=partial(intensities, hu_window=self.hu_window),
        )
        padded = int(margins.any())
        return [{"image": crop, "draw": draw, "padded": padded, **counts} for crop, counts in drawn]
