# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Where crops come from: whole scans that are decoded and cached, or a patch store; the crops are the same."""

from __future__ import annotations

from collections.abc import Sequence

from monai.transforms import Compose

from ...common.data.seeded_crops import SeededCrops
from ...common.errors import InputError
from ...common.run.option_checks import check_choice
from .body_crops import RandBodyCropsd
from .stored_crops import StoredCrops


def crop_dataset(
    *,
    data: str,
    scans: Sequence[dict],
    preprocessing: Compose,
    cropping: RandBodyCropsd,
    hu_window: Sequence[float],
    foreground_hu: float,
    spacing: Sequence[float] | None,
    seed: int,
    cache_num: int = 0,
    shuffle: bool = True,
) -> SeededCrops | StoredCrops:
    """Crops by the number of their draw.

    Args:
        data: ``nifti`` reads the scans and applies ``preprocessing``; ``store`` reads crops in HU out of a patch store, to which `prepare` has applied
            all of it but the window.
        scans: items ``{"image": file}``; of the store with ``store``.
        preprocessing: deterministic transforms, with ``nifti``.
        cropping: draws the crops.
        hu_window: with ``store``, see `StoredCrops`.
        foreground_hu, spacing: what a store must have been prepared with.
        seed, shuffle: see `SeededCrops`.
        cache_num: preprocessed volumes kept in memory, with ``nifti``.

    Raises:
        InputError: ``data`` is neither; a stored scan was prepared with another ``foreground_hu`` or ``spacing``.
    """
    check_choice(name="data", value=data, choices=("nifti", "store"))
    if data == "nifti":
        return SeededCrops(
            data=scans,
            preprocessing=preprocessing,
            augmentation=cropping,
            seed=seed,
            cache_num=cache_num,
            shuffle=shuffle,
        )
    crops = StoredCrops(data=scans, cropping=cropping, hu_window=hu_window, seed=seed, shuffle=shuffle)
    asked = {"foreground_hu": foreground_hu, "spacing": None if spacing is None else list(spacing)}
    for scan, item in zip(crops.scans, scans, strict=True):
        for name, value in asked.items():
            if scan.details.get(name) != value:
                theirs, ours = ("'$None'" if one is None else one for one in (scan.details.get(name), value))
                raise InputError(
                    f"{item['image']} was prepared with {name} {scan.details.get(name)}, this run has {value}. Give --{name} {theirs}, or run "
                    f"configs/prepare.yaml with --{name} {ours}."
                )
    return crops
