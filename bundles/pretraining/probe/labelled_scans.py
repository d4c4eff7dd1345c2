# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A scan and its label on the grid of the pre-training, and a fixed sample of voxels of each class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.transforms import Compose, EnsureChannelFirst, ResampleToMatch

from ...common.errors import InputError
from ...common.scans.decode_once import LoadScand

UNKNOWN = -1  # class of voxels that are in no sample and in no score


@dataclass(frozen=True)
class LabelledScan:
    """A scan after the preprocessing.

    Attributes:
        image: float32 (C, X, Y, Z), intensities in [0, 1].
        classes: int16 (X, Y, Z), the number of each voxel's class; `UNKNOWN` where the label does not know it.
    """

    image: torch.Tensor
    classes: torch.Tensor


def load_labelled_scan(
    item: Mapping, *, preprocessing: Compose, values: Sequence[int], ignore_label: int | None = None
) -> LabelledScan:
    """Preprocess the image, and look up the label at the centres of the voxels that result (nearest neighbour).

    So whatever the preprocessing of the pre-training does to a scan (axes, spacing, crop), the label follows, and there
    is no second preprocessing to keep equal to the first.

    Args:
        item: ``{"image": path or list of paths, "label": path}``.
        preprocessing: that of the pre-training, with the key ``image``.
        values: label value of each class, the background 0 first.
        ignore_label: value of unknown voxels; None: there are none.

    Raises:
        InputError: the label holds another value.
    """
    image = preprocessing({"image": item["image"]})["image"]
    label = LoadScand("label", labels="label", image_only=True)({"label": item["label"]})["label"]
    label = EnsureChannelFirst(channel_dim="no_channel")(label)
    label = ResampleToMatch(mode="nearest", padding_mode="zeros")(label, image)[0].as_tensor().numpy()
    classes = np.searchsorted(values, label).clip(max=len(values) - 1)
    if ignore_label is not None:
        classes[label == ignore_label] = UNKNOWN
    if (strange := (np.asarray(values)[classes] != label) & (classes != UNKNOWN)).any():
        raise InputError(
            f"{item['label']} holds the label value {label[strange][0]:g}; --probe_list declares {list(values)}."
        )
    return LabelledScan(image.as_tensor().float(), torch.from_numpy(classes.astype(np.int16)))


def class_counts(scan: LabelledScan, number: int) -> np.ndarray:
    """Return the number of voxels of each of the classes, int64 (number,)."""
    classes = scan.classes.numpy().ravel()
    return np.bincount(classes[classes != UNKNOWN], minlength=number)


def sample_voxels(
    scan: LabelledScan, *, wanted: Sequence[int], seed: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw voxels of each class, always the same ones for the same seed.

    Args:
        scan: the scan to draw from.
        wanted: number of voxels of each class; a class with fewer gives all it has.
        seed: seed of the draw; global generators are not used.

    Returns:
        Indices (N, 3), and the class of each, int64 (N,).
    """
    flat = scan.classes.numpy().ravel()
    drawn = []
    for each, number in enumerate(wanted):
        places = np.flatnonzero(flat == each)
        generator = np.random.default_rng([*seed, each])
        drawn.append(np.sort(generator.choice(places, size=min(number, len(places)), replace=False)))
    places = np.concatenate(drawn)
    voxels = np.stack(np.unravel_index(places, scan.classes.shape), axis=1)
    return torch.from_numpy(voxels), torch.from_numpy(flat[places].astype(np.int64))
