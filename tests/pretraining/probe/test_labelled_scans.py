# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The label goes where the preprocessing puts the image, and the same voxels are drawn every time."""

from __future__ import annotations

from functools import partial

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import (
    Compose,
    CropForegroundd,
    EnsureChannelFirstd,
    LoadImaged,
    Orientationd,
    ScaleIntensityRanged,
    Spacingd,
)

from bundles.common.data.foreground import above_or_all
from bundles.common.errors import InputError
from bundles.pretraining.probe.labelled_scans import (
    UNKNOWN,
    LabelledScan,
    class_counts,
    load_labelled_scan,
    sample_voxels,
)

VALUES = [0, 2, 7]


def preprocessing(keys, spacing):
    """That of train.yaml, for the image alone or, as in the segmentation bundles, for both."""
    mode = ["bilinear", "nearest"][: len(keys)]
    return Compose(
        [
            LoadImaged(keys=keys, image_only=True),
            EnsureChannelFirstd(keys=keys),
            Orientationd(keys=keys, axcodes="RAS", labels=None),
            Spacingd(keys=keys, pixdim=spacing, mode=mode),
            CropForegroundd(
                keys=keys, source_key="image", select_fn=partial(above_or_all, other=-500), allow_smaller=True
            ),
            ScaleIntensityRanged(keys="image", a_min=-1000, a_max=1000, b_min=0, b_max=1, clip=True),
        ]
    )


@pytest.fixture
def item(tmp_path):
    """A scan in LPS with air around the body, and a label of random blocks."""
    generator = np.random.default_rng(0)
    image = np.full((22, 18, 12), -1000, np.int16)
    image[3:20, 2:15, 1:11] = generator.integers(-200, 300, (17, 13, 10))
    label = np.kron(generator.choice(VALUES, (11, 9, 6)), np.ones((2, 2, 2))).astype(np.uint8)
    affine = np.diag([-1.3, -1.3, 2.7, 1])
    affine[:3, 3] = (30.0, 20.0, -7.0)
    paths = {name: str(tmp_path / f"{name}.nii.gz") for name in ("image", "label")}
    nib.save(nib.Nifti1Image(image, affine), paths["image"])
    nib.save(nib.Nifti1Image(label, affine), paths["label"])
    return paths


@pytest.mark.parametrize("spacing", [(1.3, 1.3, 2.7), (2.0, 1.0, 3.1)])
def test_image_and_label_are_those_of_the_segmentation_bundles(item, spacing):
    scan = load_labelled_scan(item, preprocessing=preprocessing(["image"], spacing), values=VALUES)
    both = preprocessing(["image", "label"], spacing)(item)
    torch.testing.assert_close(scan.image, both["image"].as_tensor())
    assert scan.classes.dtype == torch.int16 and scan.classes.shape == scan.image.shape[1:]
    values = torch.tensor(VALUES)[scan.classes.long()]
    assert torch.equal(values, both["label"][0].as_tensor().long())
    assert class_counts(scan, 3).tolist() == [int((values == value).sum()) for value in VALUES]
    assert min(class_counts(scan, 3)) > 50


@pytest.mark.parametrize("values", [[0, 2], [0, 7], [0, 2, 6]])
def test_a_value_that_is_not_declared_is_named(item, values):
    lacking = ({2, 7} - set(values)).pop()
    with pytest.raises(InputError, match=rf"label.nii.gz holds the label value {lacking}; .* declares"):
        load_labelled_scan(item, preprocessing=preprocessing(["image"], (1.3, 1.3, 2.7)), values=values)


def scan_of(classes):
    classes = torch.as_tensor(classes, dtype=torch.int16)
    return LabelledScan(torch.zeros(1, *classes.shape), classes)


def test_a_sample_has_the_wanted_number_of_each_class_or_all_there_are():
    classes = torch.zeros(5, 6, 7)
    classes[1, 2, 3:6], classes[4] = 1, 2
    scan = scan_of(classes)
    voxels, kinds = sample_voxels(scan, wanted=[10, 10, 10], seed=[3])
    assert torch.bincount(kinds).tolist() == [10, 3, 10]
    assert torch.equal(classes[tuple(voxels.T)].long(), kinds)
    assert len(set(map(tuple, voxels.tolist()))) == 23  # none twice


def test_the_seed_decides_the_sample_and_global_generators_do_not():
    scan = scan_of(np.random.default_rng(0).integers(0, 3, (6, 6, 6)))
    samples = []
    for seed in ([0, 1], [0, 1], [0, 2]):
        np.random.seed(len(samples))
        before = np.random.get_state()[1].copy()
        samples.append(sample_voxels(scan, wanted=[8] * 3, seed=seed)[0])
        assert (np.random.get_state()[1] == before).all()
    assert torch.equal(samples[0], samples[1]) and not torch.equal(samples[0], samples[2])


def test_unknown_voxels_are_in_no_count_and_no_sample(item):
    known = load_labelled_scan(item, preprocessing=preprocessing(["image"], (1.3, 1.3, 2.7)), values=VALUES)
    scan = load_labelled_scan(
        item, preprocessing=preprocessing(["image"], (1.3, 1.3, 2.7)), values=[0, 2], ignore_label=7
    )
    assert torch.equal(scan.classes == UNKNOWN, known.classes == VALUES.index(7))
    counts = class_counts(known, 3).tolist()
    del counts[VALUES.index(7)]
    assert class_counts(scan, 2).tolist() == counts
    voxels, _ = sample_voxels(scan, wanted=[10_000, 10_000], seed=[0])
    assert len(voxels) == sum(counts) and (scan.classes[tuple(voxels.T)] != UNKNOWN).all()
