# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Crops bit-identical to those of `SeededCrops`, from stored scans; only the crops are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
    """Map-style dataset over draws: ``dataset[i]`` is a list of crops (dicts) of the scan that draw ``i`` selects.

    The image of a crop, (1, X, Y, Z), is in HU; `hu_window.intensities` turns it into the crop of `SeededCrops` for the
    same seed and draw. It is int16, or float32 if any of the scans is, because a batch has one type. Each crop also has
    ``"draw"``, and ``"affine"`` and the counts of `RandBodyCropsd`.

    Args:
        data: items of the data list, ``{"image": file of the patch store}``. Each file is opened once here, to find bad
            files before the run.
        cropping: draws the crops from the body box of the scan.
        hu_window: ``[low, high]`` in HU that is mapped to [0, 1].
        seed: seed of the run.
        shuffle: False: draw ``i`` reads scan ``i``, for validation on the same crops every time.

    Raises:
        InputError: a file is missing or not a stored scan, or the window starts below the range of int16.
    """

    resident = False  # on the training device: `resident_crops`

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
        self.air = math.floor(self.hu_window[0])  # padding value; 0 after scaling, as the window clips
        if self.air < np.iinfo(np.int16).min:
            raise InputError(
                f"--hu_window {list(self.hu_window)} starts below {np.iinfo(np.int16).min} HU, the smallest padding "
                "value of a stored scan. Use a larger value: air is -1000 HU."
            )
        self.cropping = cropping
        self.draws = Draws(volumes=len(self.scans), seed=seed, shuffle=shuffle)

    def __len__(self) -> int:
        """Return the number of scans, which is one pass; draws continue beyond it."""
        return len(self.scans)

    def volume_of(self, draw: int) -> int:
        """Return the index of the scan that a draw reads."""
        return self.draws.volume_of(draw)

    def padded_box(self, scan: StoredScan) -> tuple[np.ndarray, np.ndarray]:
        """Return the body box of a scan, padded to the size of a crop: its first voxel and its size, (3,) each."""
        low, high = np.array(scan.body_box).T
        margins = np.array(self.cropping.pad.compute_pad_width(high - low)[1:])
        return low - margins[:, 0], high - low + margins.sum(axis=1)

    def read(self, scan: StoredScan, corner: np.ndarray, box: tuple[slice, ...]) -> torch.Tensor:
        """Read a box of the padded body box, which starts at voxel ``corner`` of the scan; the padding is air.

        Returns:
            HU, (1, X, Y, Z).
        """
        low, high = np.array(scan.body_box).T
        start = corner + [each.start for each in box]
        stop = corner + [each.stop for each in box]
        first, last = np.clip(start, low, high), np.clip(stop, low, high)
        crop = np.full(stop - start, self.air, dtype=self.dtype)
        crop[tuple(map(slice, first - start, last - start))] = scan.read(tuple(map(slice, first, last)))
        return torch.from_numpy(crop)[None]

    def __getitem__(self, draw: int) -> list[dict[str, Any]]:
        scan = self.scans[self.volume_of(draw)]
        read = partial(self.read, scan, self.padded_box(scan)[0])
        return self.drawn(draw, read, intensities=partial(intensities, hu_window=self.hu_window))

    def drawn(
        self,
        draw: int,
        read: Callable[[tuple[slice, ...]], torch.Tensor],
        *,
        intensities: Callable[[torch.Tensor], torch.Tensor],
        image: Callable[[torch.Tensor, tuple[slice, ...]], torch.Tensor] = lambda crop, box: crop,
    ) -> list[dict[str, Any]]:
        """Return the crops of a draw.

        Args:
            draw: its number.
            read, intensities: see `RandBodyCropsd.draw`; boxes are those of the padded body box.
            image: makes the image from what was read, and its box.
        """
        scan = self.scans[self.volume_of(draw)]
        corner, size = self.padded_box(scan)
        low, high = np.array(scan.body_box).T
        padded = int((size > high - low).any())
        self.cropping.set_random_state(seed=self.draws.seed_of(draw))
        return [
            {"image": image(crop, box), "draw": draw, "affine": self._affine(scan, corner, box), "padded": padded}
            | counts
            for crop, box, counts in self.cropping.draw(size.tolist(), read, intensities=intensities)
        ]

    def whole_scan(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the body box of a scan, (1, X, Y, Z) in [0, 1], and its affine (4, 4) in mm."""
        scan = self.scans[index]
        low, high = np.array(scan.body_box).T
        voxels = torch.from_numpy(scan.read(tuple(map(slice, low, high))))[None]
        return intensities(voxels, self.hu_window), self._affine(scan, low, (slice(0, None),) * 3)

    def _affine(self, scan: StoredScan, corner: np.ndarray, box: tuple[slice, ...]) -> torch.Tensor:
        """Return the affine of a box of the padded body box, which starts at voxel ``corner`` of the scan."""
        affine = scan.affine
        affine[:3, 3] += affine[:3, :3] @ (corner + [each.start for each in box])
        return torch.from_numpy(affine)
