# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Unknown voxels are at no centre of a crop, set the flag for the loss, and are left out of the metric."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.metrics import compute_dice
from monai.transforms import AsDiscreted, Compose, RandCropByLabelClassesd, RandCropByPosNegLabeld

from bundles.segmentation.training.unknown_voxels import CropByKnownLabeld, FlagUnknownd, KnownLabelMapsd

SHAPE = (12, 11, 10)
OPTIONS = {
    "keys": ["image", "label"],
    "label_key": "label",
    "spatial_size": (1, 1, 1),  # so that a crop is its centre
    "pos": 1,
    "neg": 1,
    "num_samples": 200,
}


def volume():
    """The first half is unknown, a block of the rest is class 2. The image numbers the voxels; half of it is air."""
    label = torch.zeros(1, *SHAPE)
    label[:, 8:10, :4] = 2
    label[:, :6] = 255
    image = torch.arange(1.0, label.numel() + 1).reshape(1, *SHAPE)
    image[..., 5:] *= -1
    return {"image": MetaTensor(image), "label": MetaTensor(label)}


def crops(transform, seed=0, item=None):
    transform.set_random_state(seed=seed)
    return transform(volume() if item is None else item)


@pytest.mark.parametrize("image_key", [None, "image"])
def test_crops_are_centred_on_known_voxels_half_of_them_on_structures(image_key):
    drawn = crops(CropByKnownLabeld(ignore_label=255, image_key=image_key, image_threshold=0, **OPTIONS))
    values = torch.stack([crop["label"].flatten()[0] for crop in drawn])
    assert set(values.tolist()) == {0, 2}
    assert 0.4 < (values == 2).float().mean() < 0.6
    background = torch.stack([crop["image"].flatten()[0] for crop in drawn])[values == 0]
    assert ((background > 0).all()) == (image_key is not None)  # only with an image is air avoided


def test_monai_alone_would_take_unknown_voxels_for_structures():
    drawn = crops(RandCropByPosNegLabeld(**OPTIONS))
    assert 255 in {float(crop["label"]) for crop in drawn}


@pytest.mark.parametrize("image_key", [None, "image"])
@pytest.mark.parametrize("ignore_label", [None, 255])
def test_known_labels_give_the_crops_of_monai(image_key, ignore_label):
    item = volume()
    item["label"][item["label"] == 255] = 0
    options = {**OPTIONS, "image_key": image_key, "spatial_size": (3, 3, 3)}
    ours, theirs = (
        crops(transform, seed=3, item=item)
        for transform in (CropByKnownLabeld(ignore_label=ignore_label, **options), RandCropByPosNegLabeld(**options))
    )
    assert len(ours) == len(theirs) == 200
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one["image"], other["image"]) and torch.equal(one["label"], other["label"])


def test_a_label_without_known_background_is_cropped_at_its_structures():
    item = volume()
    item["label"][item["label"] == 0] = 255
    drawn = crops(CropByKnownLabeld(ignore_label=255, **OPTIONS), item=item)
    assert {float(crop["label"]) for crop in drawn} == {2}


def test_a_label_without_known_voxels_has_no_place_for_a_crop():
    item = volume()
    item["label"][:] = 255
    with pytest.raises(ValueError, match="sampling location"):
        crops(CropByKnownLabeld(ignore_label=255, **OPTIONS), item=item)


def test_drawing_by_class_never_draws_unknown_voxels():
    transform = RandCropByLabelClassesd(
        keys=["image", "label"],
        label_key="label",
        spatial_size=(1, 1, 1),
        ratios=[1, 1, 1],
        num_classes=3,
        num_samples=200,
        warn=False,
    )
    assert {float(crop["label"]) for crop in crops(transform)} == {0, 2}


def test_the_flag_says_whether_a_crop_has_unknown_voxels():
    flag = FlagUnknownd(label_key="label", ignore_label=255)
    unknown = volume()
    known = {**unknown, "label": unknown["label"][:, 6:]}
    assert flag(unknown)["unknown"] is True and flag(known)["unknown"] is False
    assert [crop["unknown"] for crop in Compose([flag])([known, unknown])] == [False, True]
    assert "unknown" not in FlagUnknownd(label_key="label", ignore_label=None)(unknown)


def maps(seed=0):
    generator = np.random.default_rng(seed)
    label = torch.from_numpy(generator.integers(0, 3, (1, *SHAPE))).float()
    label[torch.from_numpy(generator.random((1, *SHAPE)) < 0.4)] = 255
    return torch.from_numpy(generator.normal(size=(3, *SHAPE))), label


def dice_of(item, **options):
    maps = AsDiscreted("pred", argmax=True)(item)
    known = KnownLabelMapsd(label_key="label", pred_key="pred", classes=3, **options)(maps)
    return compute_dice(known["pred"][None], known["label"][None], include_background=False, num_classes=3)[0]


def test_dice_of_the_metric_counts_known_voxels_only():
    prediction, label = maps()
    dice = dice_of({"pred": prediction, "label": label}, ignore_label=255)
    predicted, truth = prediction.argmax(0).numpy(), label[0].numpy()
    for value in (1, 2):
        predicted_here, true_here = ((array == value) & (truth != 255) for array in (predicted, truth))
        expected = 2 * (predicted_here & true_here).sum() / (predicted_here.sum() + true_here.sum())
        assert dice[value - 1].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("ignore_label", [None, 255])
def test_a_known_label_has_the_dice_of_monais_one_hot_form(ignore_label):
    prediction, label = maps()
    label[label == 255] = 1
    item = {"pred": prediction, "label": label}
    hot = AsDiscreted(["pred", "label"], argmax=[True, False], to_onehot=3)(item)
    expected = compute_dice(hot["pred"][None], hot["label"][None], include_background=False)[0]
    assert torch.allclose(dice_of(item, ignore_label=ignore_label), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("ignore_label", [None, 255])
def test_classes_that_a_case_does_not_show_have_no_dice_and_change_no_other(ignore_label):
    prediction, label = maps()
    label[label == 255] = 0
    item = {"pred": prediction, "label": label}
    whole = dice_of(item, ignore_label=ignore_label)
    partial = dice_of({**item, "labelled": [torch.tensor([2])]}, ignore_label=ignore_label)
    assert torch.isnan(partial[0]) and partial[1] == whole[1] and not torch.isnan(whole).any()
