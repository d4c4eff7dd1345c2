# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The augmentation of a crop depends on its draw only, and equals that of MONAI's transforms with the same parameters."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from monai.transforms import AdjustContrast, Affine, Flip, Rotate90, ScaleIntensity, ShiftIntensity

from bundles.common.errors import InputError
from bundles.segmentation.training.augmentation import (
    KINDS,
    Change,
    CropAugmentation,
    Ranges,
    augmentation_probabilities,
    change_crop,
    draw_change,
)

RANGES = Ranges(turn=(0.3, 0.12, 0.26), zoom=0.15, noise=0.05, gamma=(0.7, 1.5), scale=0.1, shift=0.2)
ALWAYS = augmentation_probabilities(dict.fromkeys(KINDS, 1.0))


def augmentation(seed=0, **probabilities):
    return CropAugmentation(
        seed=seed,
        probabilities=augmentation_probabilities(probabilities),
        turn=RANGES.turn,
        zoom=RANGES.zoom,
        noise=RANGES.noise,
        gamma=RANGES.gamma,
        scale=RANGES.scale,
        shift=RANGES.shift,
    )


def crop(shape=(9, 9, 7), channels=1):
    """Smooth intensities, and blocks of labels."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, channels, 3, 3, 3, generator=generator)
    image = torch.nn.functional.interpolate(coarse, size=shape, mode="trilinear")[0]
    label = torch.nn.functional.interpolate(coarse[:, :1].mul(5).floor(), size=shape)[0]
    return image, label


def drawn(number=4000, probabilities=ALWAYS, square=True):
    generator = np.random.default_rng(0)
    return [
        draw_change(probabilities=probabilities, ranges=RANGES, square=square, generator=generator)
        for _ in range(number)
    ]


def test_a_flipped_crop_is_the_flip_and_so_is_its_label():
    image, label = crop()
    changed, changed_label = change_crop(image, label, Change(flips=(0, 2)))
    assert torch.equal(changed, Flip([0, 2])(image).as_tensor())
    assert torch.equal(changed_label, torch.from_numpy(label.numpy()[:, ::-1, :, ::-1].copy()))


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_turned_crop_is_the_turn_in_the_axial_plane(quarters):
    image, label = crop()
    changed, changed_label = change_crop(image, label, Change(quarter_turns=quarters))
    assert torch.equal(changed, Rotate90(k=quarters, spatial_axes=(0, 1))(image).as_tensor())
    assert torch.equal(changed_label, torch.rot90(label, quarters, (1, 2)))


@pytest.mark.parametrize(
    "affine",
    [
        (0.0, 0.0, 0.2, 1.0, 1.0, 1.0),
        (0.0, 0.0, 0.0, 0.9, 1.1, 1.15),
        (0.0, 0.0, -0.25, 1.1, 0.88, 0.97),
        (0.3, -0.2, 0.15, 0.9, 1.1, 1.05),
    ],
)
@pytest.mark.parametrize("shape", [(17, 17, 17), (20, 12, 8)])
def test_an_affine_change_is_monais_linear_in_the_image_and_nearest_in_the_label(affine, shape):
    image, label = crop(shape, channels=2)
    turn, zoom = affine[:3], affine[3:]
    monai = {"rotate_params": turn, "scale_params": zoom, "padding_mode": "zeros", "image_only": True}
    changed, changed_label = change_crop(image, label, Change(affine=affine))
    torch.testing.assert_close(changed, Affine(**monai, mode="bilinear")(image).as_tensor(), atol=1e-4, rtol=0)
    assert (changed - image).abs().max() > 0.05
    assert set(changed_label.unique().tolist()) <= {0.0, *label.unique().tolist()}
    assert changed_label.dtype == label.dtype
    assert (changed_label == Affine(**monai, mode="nearest")(label).as_tensor()).float().mean() > 0.99


def test_label_and_image_stay_together():
    label = torch.zeros(1, 16, 16, 8)
    label[:, 3:9, 2:8, 1:5] = 1
    for change in drawn(20, ALWAYS | dict.fromkeys(("noise", "contrast", "scale_intensity", "shift_intensity"), 0.0)):
        image, changed = change_crop(label, label.to(torch.uint8), change)
        assert not torch.equal(changed.float(), label)
        # where the interpolated label is unambiguous, the label is equal
        assert (changed[image > 0.9] == 1).all() and (changed[image < 0.1] == 0).all()
        assert ((image > 0.5) != changed.bool()).float().mean() < 0.04


def test_intensities_change_as_monais_transforms_change_them_and_labels_do_not():
    image, label = crop()
    for change, monai in (
        (Change(gamma=0.7), AdjustContrast(gamma=0.7)),
        (Change(gamma=1.5), AdjustContrast(gamma=1.5)),
        (Change(scale=-0.1), ScaleIntensity(minv=None, maxv=None, factor=-0.1)),
        (Change(shift=0.2), ShiftIntensity(offset=0.2)),
    ):
        changed, same = change_crop(image, label, change)
        torch.testing.assert_close(changed, torch.as_tensor(monai(image)), atol=1e-6, rtol=1e-5)
        assert torch.equal(same, label)
    noisy, _ = change_crop(image, label, Change(noise=0.05), noise=torch.Generator().manual_seed(0))
    assert float((noisy - image).std()) == pytest.approx(0.05, rel=0.1)
    assert float((noisy - image).mean()) == pytest.approx(0.0, abs=0.01)


def test_nothing_drawn_is_nothing_done_and_the_crops_given_stay_as_they_are():
    image, label = crop()
    before = image.clone(), label.clone()
    for change in [Change(), *drawn(20)]:
        change_crop(image, label, change, noise=torch.Generator())
    assert torch.equal(image, before[0]) and torch.equal(label, before[1])
    same, same_label = augmentation()({"image": image[None], "label": label[None], "draw": torch.tensor([3])}, "cpu")
    assert torch.equal(same[0], image) and torch.equal(same_label[0], label)


@pytest.mark.parametrize("chance", [0.2, 0.5])
def test_every_kind_happens_as_often_as_asked_for(chance):
    changes = drawn(probabilities=augmentation_probabilities(dict.fromkeys(KINDS, chance)))
    happened = {
        "affine": [c.affine is not None for c in changes],
        **{f"flip {axis}": [axis in c.flips for c in changes] for axis in range(3)},
        "rot90": [c.quarter_turns > 0 for c in changes],
        "noise": [c.noise > 0 for c in changes],
        "contrast": [c.gamma is not None for c in changes],
        "scale": [c.scale != 0 for c in changes],
        "shift": [c.shift != 0 for c in changes],
    }
    error = 4 * math.sqrt(chance * (1 - chance) / len(changes))
    for kind, each in happened.items():
        assert np.mean(each) == pytest.approx(chance, abs=error), kind
    pairs = np.corrcoef([np.array(each, dtype=float) for each in happened.values()])
    assert np.abs(pairs - np.eye(len(pairs))).max() < 0.08  # each independently


def test_an_axis_that_is_not_to_be_flipped_never_is():
    changes = drawn(1000, probabilities=augmentation_probabilities({"flip": [0.5, 0, 0.1]}))
    share = [np.mean([axis in c.flips for c in changes]) for axis in range(3)]
    assert share == [pytest.approx(0.5, abs=0.07), 0, pytest.approx(0.1, abs=0.04)]


def test_draws_are_uniform_within_their_ranges():
    changes = drawn()
    columns = {
        (-0.26, 0.26): [c.affine[2] for c in changes],
        (-0.3, 0.3): [c.affine[0] for c in changes],
        (0.85, 1.15): [c.affine[4] for c in changes],
        (0.0, 0.05): [c.noise for c in changes],
        (0.7, 1.5): [c.gamma for c in changes],
        (-0.1, 0.1): [c.scale for c in changes],
        (-0.2, 0.2): [c.shift for c in changes],
    }
    for (low, high), values in columns.items():
        assert low <= min(values) and max(values) <= high
        counts, _ = np.histogram(values, bins=5, range=(low, high))
        assert np.abs(counts / len(values) - 0.2).max() < 0.03
    assert np.bincount([c.quarter_turns for c in changes])[1:] / len(changes) == pytest.approx([1 / 3] * 3, abs=0.03)


def test_a_crop_that_is_not_square_is_turned_by_half_alone():
    assert {c.quarter_turns for c in drawn(50, square=False)} == {2}
    image, label = crop((8, 6, 4))
    batch = {"image": image[None], "label": label[None], "draw": torch.tensor([0])}
    images, _ = augmentation(rot90=1.0)(batch, "cpu")
    assert torch.equal(images[0], image.flip((1, 2)))


def batch_of(draws):
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(1, 1, 8, 8, 4, generator=generator).expand(len(draws), -1, -1, -1, -1).clone()
    return {"image": image, "label": (image > 0.5).float(), "draw": torch.tensor(draws)}


def test_a_draw_decides_whatever_batch_it_is_in():
    everything = {kind: 0.5 for kind in KINDS}
    together = augmentation(**everything)(batch_of([4, 4, 5, 5]), "cpu")
    apart = [augmentation(**everything)(batch_of([draw, draw]), "cpu") for draw in (4, 5)]
    for key in (0, 1):
        assert torch.equal(together[key], torch.cat([part[key] for part in apart]))
    again = augmentation(**everything)(batch_of([4, 4, 5, 5]), "cpu")
    assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))


def test_crops_draws_and_seeds_differ():
    noise = {"noise": 1.0, "shift_intensity": 1.0}
    images, _ = augmentation(**noise)(batch_of([4, 4, 5, 5]), "cpu")
    other, _ = augmentation(seed=1, **noise)(batch_of([4]), "cpu")
    means = [float(image.mean()) for image in [*images, *other]]
    assert len(set(means)) == 5


def batch_with(**notes):
    crops = [crop() for _ in range(3)]
    images, labels = (torch.stack(parts) for parts in zip(*crops, strict=True))
    return {"image": images, "label": labels, "draw": torch.tensor([4, 4, 5]), **notes}


def test_the_loss_learns_of_weights_and_of_unknown_voxels_only_if_there_are_any():
    augment = augmentation(flip=1.0)
    image, label = augment(batch_with(unknown=torch.tensor([False] * 3)), "cpu")
    assert type(label) is torch.Tensor
    weights = torch.tensor([0.5, 0.5, 1.0])
    for notes, expected in (
        ({"unknown": torch.tensor([False, True, False])}, None),
        ({"weight": weights}, weights),
        ({"weight": weights, "unknown": torch.tensor([True] * 3)}, weights),
    ):
        of_notes, target = augment(batch_with(**notes), "cpu")
        assert torch.equal(of_notes, image) and torch.equal(target.label, label) and target.labelled is None
        assert target.weight is None if expected is None else torch.equal(target.weight, expected)


def test_the_loss_learns_which_classes_are_labelled_only_if_some_are_not():
    augment = augmentation(flip=1.0)
    all_classes = torch.ones(3, 4, dtype=torch.bool)
    assert type(augment(batch_with(labelled=all_classes), "cpu")[1]) is torch.Tensor
    some = all_classes.clone()
    some[1, 2] = False
    _, target = augment(batch_with(labelled=some), "cpu")
    assert torch.equal(target.labelled, some) and target.weight is None


def test_unknown_voxels_stay_unknown_and_padding_is_background():
    image = torch.ones(1, 16, 16, 16)
    label = torch.full((1, 16, 16, 16), 255.0)
    label[:, :, 8:] = 3
    changed, changed_label = change_crop(image, label, Change(affine=(0.2, 0.1, 0.3, 1.1, 0.9, 1.0), flips=(1,)))
    assert set(changed_label.unique().tolist()) == {0, 3, 255}
    assert (changed_label[changed == 1] > 0).all()
    assert (changed[changed_label == 0] < 1).all()


@pytest.mark.parametrize(
    "change",
    [
        *({"turn": 0.3}, {"turn": [0.1, 0.2]}, {"turn": [0.1, -0.2, 0.0]}, {"zoom": 1.5}, {"gamma": [2.0, 0.5]}),
        *({"gamma": 1.0}, {"noise": -1}, {"scale": "a"}, {"shift": None}),
    ],
    ids=str,
)
def test_ranges_of_another_form_are_named(change):
    ((name, value),) = change.items()
    options = {"seed": 0, "probabilities": augmentation_probabilities({}), **vars(RANGES), **change}
    with pytest.raises(InputError, match=rf"--{name} {re.escape(repr(value))} must be"):
        CropAugmentation(**options)
