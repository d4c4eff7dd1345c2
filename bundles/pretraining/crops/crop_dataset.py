# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Read crops from whole scans, which are decoded and cached, or from a patch store. The crops are the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.transforms import Compose

from ...common.data.device_prefetch import faster_loading
from ...common.data.seeded_crops import SeededCrops
from ...common.errors import InputError
from ...common.run.command_line import next_command
from ...common.value_rules import check_choice
from .body_crops import RandBodyCropsd
from .resident_crops import ResidentCrops, kept_on_device
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
    device: torch.device | str = "cpu",
    store_on_device: float = 0.0,
) -> SeededCrops | StoredCrops | ResidentCrops:
    """Return the dataset of crops, indexed by draw.

    Args:
        data: ``nifti``: read the scans and apply ``preprocessing``. ``store``: read crops in HU from a patch store, to
            which `prepare` has applied all preprocessing except the window.
        scans: items ``{"image": file}``; with ``store``, files of the store.
        preprocessing: deterministic transforms, for ``nifti``.
        cropping: draws the crops.
        hu_window: for ``store``, see `StoredCrops`.
        foreground_hu, spacing: settings with which a store must have been prepared.
        seed, shuffle: see `SeededCrops`.
        cache_num: number of preprocessed volumes to keep in memory, for ``nifti``.
        device, store_on_device: for ``store``, see `resident_crops.kept_on_device`.

    Raises:
        InputError: ``data`` is neither; it is ``nifti`` and ``store_on_device`` is not 0; a stored scan was prepared
            with another ``foreground_hu`` or ``spacing``.
    """
    check_choice(name="data", value=data, choices=("nifti", "store"))
    if data == "nifti":
        if store_on_device:
            raise InputError(
                f"--store_on_device {store_on_device} needs --data store and a folder that configs/prepare.yaml wrote. "
                "Whole scans are decoded on the CPU: leave the option out, or prepare the scans once."
            )
        return SeededCrops(
            data=scans,
            preprocessing=preprocessing,
            augmentation=cropping,
            seed=seed,
            cache_num=cache_num,
            shuffle=shuffle,
        )
    crops = StoredCrops(data=scans, cropping=cropping, hu_window=hu_window, seed=seed, shuffle=shuffle)
    settings = {"foreground_hu": foreground_hu, "spacing": None if spacing is None else list(spacing)}
    for scan, item in zip(crops.scans, scans, strict=True):
        for name, value in settings.items():
            stored = scan.details.get(name)
            if stored != value:
                raise InputError(
                    f"{item['image']} was prepared with {name} {stored}, but this run has {value}. Pass "
                    f"--{name} {_option_text(stored)}, or run configs/prepare.yaml with --{name} {_option_text(value)}."
                )
    return kept_on_device(crops, device=device, share=store_on_device) if store_on_device else crops


def cure_of_slow_loading(
    *, data: str, dataset_dir: str | Sequence[str], volumes: int, cache_num: int, num_workers: int
) -> str:
    """Return what makes the loading of a run faster: a patch store, its command first, or the options of this run.

    Args:
        data, cache_num: see `crop_dataset`.
        dataset_dir: the run's data set.
        volumes: number of scans.
        num_workers: loading processes.
    """
    if data == "store":
        return faster_loading(volumes=0, cache_num=0, num_workers=num_workers)
    command = next_command("prepare.yaml", {"source": dataset_dir, "dataset_dir": "PREPARED"})
    how = f":\n  {command}\n" if command else " with configs/prepare.yaml, "
    options = faster_loading(volumes=volumes, cache_num=cache_num, num_workers=num_workers)
    return f"Decode the scans once{how}then train with --data store --dataset_dir PREPARED. {options}"


def _option_text(value: float | list[float] | None) -> str:
    return "'$None'" if value is None else str(value)


def whole_scan(dataset: SeededCrops | StoredCrops | ResidentCrops, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a scan of the dataset as crops are cut from it: (1, X, Y, Z) in [0, 1], and its affine (4, 4) in mm."""
    if isinstance(dataset, (StoredCrops, ResidentCrops)):
        return dataset.whole_scan(index)
    image = dataset.volumes[index]["image"]
    return image.as_tensor(), image.affine
