# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The loss equals slow formulas in NumPy with unknown voxels and weights, and MONAI's without."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.losses import DiceLoss

from bundles.segmentation.training.loss import PartlyKnown, SegmentationLoss, class_weights

CLASSES = 4
SHAPE = (5, 4, 6)
WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 3.5])
OPTIONS = [
    {"batch_dice": batch, "background_in_dice": background, "class_weights": weights}
    for batch in (False, True)
    for background in (True, False)
    for weights in (None, WEIGHTS)
]
GOLDEN = (1.9906792640686035, 2.099675416946411)  # loss, and sum of the absolute gradient, of version 6297c95


def drawn(crops=3, unknown=0.3, seed=0):
    """Logits and labels; a share of the voxels is 255."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(crops, CLASSES, *SHAPE, generator=generator).mul_(2).requires_grad_()
    label = torch.randint(0, CLASSES, (crops, 1, *SHAPE), generator=generator).float()
    label[torch.rand(label.shape, generator=generator) < unknown] = 255
    return logits, label


def slow_loss(logits, label, weight, *, batch_dice, background_in_dice, class_weights):
    """Dice and cross entropy, voxel by voxel in float64; unknown voxels are never visited."""
    scores = logits.detach().double().numpy()
    p = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    of_class = np.ones(CLASSES) if class_weights is None else class_weights.double().numpy()
    shape = (len(p), CLASSES)
    overlap, size, above, below = np.zeros(shape), np.zeros(shape), 0.0, 0.0
    for b, *voxel in np.argwhere(label[:, 0].numpy() != 255):
        truth = int(label[(b, 0, *voxel)])
        probabilities = p[(b, slice(None), *voxel)]
        overlap[b, truth] += probabilities[truth]
        size[b] += probabilities**2
        size[b, truth] += 1
        above -= weight[b] * of_class[truth] * np.log(probabilities[truth])
        below += of_class[truth]
    first = 0 if background_in_dice else 1
    weight = np.array(weight)
    if batch_dice:
        dice = 1 - (2 * weight @ overlap + 1e-5) / (weight @ size + 1e-5)
        return dice[first:].mean() * weight.mean(), above / below
    dice = 1 - (2 * overlap + 1e-5) / (size + 1e-5)
    return (dice * weight[:, None])[:, first:].mean(), above / below


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("weight", [[1.0, 1.0, 1.0], [0.25, 1.0, 3.0]])
def test_the_loss_of_known_voxels_equals_the_slow_formula(options, weight):
    logits, label = drawn()
    loss = SegmentationLoss(ignore_label=255, **options)
    value = loss(logits, PartlyKnown(label, torch.tensor(weight)))
    dice, cross_entropy = slow_loss(logits, label, weight, **options)
    assert loss.parts["dice"].item() == pytest.approx(dice, rel=1e-5)
    assert loss.parts["cross_entropy"].item() == pytest.approx(cross_entropy, rel=1e-5)
    assert value.item() == pytest.approx(dice + cross_entropy, rel=1e-5)


@pytest.mark.parametrize("options", OPTIONS)
def test_unknown_voxels_have_no_gradient_and_no_influence(options):
    logits, label = drawn()
    loss = SegmentationLoss(ignore_label=255, **options)
    value = loss(logits, PartlyKnown(label))
    value.backward()
    unknown = (label == 255).expand_as(logits)
    assert torch.count_nonzero(logits.grad[unknown]) == 0
    assert (logits.grad[~unknown] != 0).float().mean() > 0.99
    changed = torch.where(unknown, 30 * torch.randn_like(logits), logits.detach())
    assert loss(changed, PartlyKnown(label)).item() == pytest.approx(value.item(), rel=1e-6)


@pytest.mark.parametrize("options", OPTIONS)
def test_labels_that_are_known_take_monais_path_to_the_bit(options):
    logits, label = drawn(unknown=0)
    value = SegmentationLoss(ignore_label=255, **options)(logits, label)
    (gradient,) = torch.autograd.grad(value, logits)
    dice = DiceLoss(
        include_background=options["background_in_dice"],
        to_onehot_y=True,
        softmax=True,
        squared_pred=True,
        batch=options["batch_dice"],
    )
    expected = dice(logits, label) + torch.nn.CrossEntropyLoss(weight=options["class_weights"])(
        logits, label[:, 0].long()
    )
    assert torch.equal(value, expected)
    assert torch.equal(gradient, torch.autograd.grad(expected, logits)[0])


def test_the_values_are_those_of_the_loss_before_there_were_unknown_voxels():
    grid = torch.arange(2 * CLASSES * 27, dtype=torch.float64).reshape(2, CLASSES, 3, 3, 3)
    logits = (grid * 0.7).sin().float().requires_grad_()
    label = (torch.arange(54).reshape(2, 1, 3, 3, 3) % CLASSES).float()
    value = SegmentationLoss(class_weights=WEIGHTS)(logits, label)
    (gradient,) = torch.autograd.grad(value, logits)
    assert value.item() == pytest.approx(GOLDEN[0], rel=1e-6)
    assert gradient.abs().sum().item() == pytest.approx(GOLDEN[1], rel=1e-5)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_partly_known_target_without_unknown_voxels_gives_the_usual_loss(options):
    logits, label = drawn(unknown=0)
    loss = SegmentationLoss(ignore_label=255, **options)
    usual, special = loss(logits, label), loss(logits, PartlyKnown(label, torch.ones(3)))
    assert special.item() == pytest.approx(usual.item(), rel=1e-6)
    gradients = (torch.autograd.grad(value, logits)[0] for value in (usual, special))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("options", OPTIONS)
def test_one_weight_for_all_crops_scales_loss_and_gradient(options):
    logits, label = drawn()
    loss = SegmentationLoss(ignore_label=255, **options)
    whole, half = (loss(logits, PartlyKnown(label, torch.full((3,), weight))) for weight in (1.0, 0.5))
    assert half.item() == pytest.approx(whole.item() / 2, rel=1e-6)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (whole, half)]
    torch.testing.assert_close(gradients[0] / 2, gradients[1], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_batch_without_a_known_voxel_has_no_loss(options):
    logits, label = drawn(unknown=2.0)
    value = SegmentationLoss(ignore_label=255, **options)(logits, PartlyKnown(label))
    (gradient,) = torch.autograd.grad(value, logits)
    assert value.item() == 0 and torch.count_nonzero(gradient) == 0


@pytest.mark.parametrize("unknown", [False, True])
def test_voxels_of_a_class_of_weight_0_alone_have_no_cross_entropy(unknown):
    loss = SegmentationLoss(class_weights=torch.tensor([0.0, 1.0, 1.0, 1.0]), background_in_dice=False)
    logits, label = drawn(unknown=0)
    label = torch.zeros_like(label)
    loss(logits, PartlyKnown(label) if unknown else label).backward()
    assert loss.parts["cross_entropy"] == 0 and torch.isfinite(logits.grad).all()
    label[:, :, 0] = 1
    loss(logits, PartlyKnown(label) if unknown else label)
    expected = torch.nn.functional.cross_entropy(logits[:, :, 0], label[:, 0, 0].long())
    torch.testing.assert_close(loss.parts["cross_entropy"], expected.detach())


def test_another_value_may_stand_for_unknown():
    logits, label = drawn()
    of_255 = SegmentationLoss(ignore_label=255)(logits, PartlyKnown(label))
    of_9 = SegmentationLoss(ignore_label=9)(logits, PartlyKnown(torch.where(label == 255, 9, label)))
    assert torch.equal(of_255, of_9)


def test_weighted_sums_need_squares():
    logits, label = drawn()
    loss = SegmentationLoss(batch_dice=True, squared_pred=False, ignore_label=255)
    with pytest.raises(ValueError, match="squared_pred"):
        loss(logits, PartlyKnown(label, torch.ones(3)))


# ---- labels that show some classes only ----

SHOWN = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1], [1, 0, 1, 0]], dtype=torch.bool)


def slow_marginal_loss(logits, label, shown, weight, *, batch_dice, background_in_dice, class_weights):
    """Dice and cross entropy over the probabilities of each crop's own classes, voxel by voxel in float64."""
    scores = logits.detach().double().numpy()
    p = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    of_class = np.ones(CLASSES) if class_weights is None else class_weights.double().numpy()
    overlap, size, above, below = np.zeros((len(p), CLASSES)), np.zeros((len(p), CLASSES)), 0.0, 0.0
    for b, *voxel in np.argwhere(label[:, 0].numpy() != 255):
        own = [c for c in range(1, CLASSES) if shown[b, c]]
        q = {c: p[(b, c, *voxel)] for c in own}
        q[0] = 1 - sum(q.values())
        truth = int(label[(b, 0, *voxel)])
        truth = truth if truth in own else 0
        for c, probability in q.items():
            overlap[b, c] += probability * (c == truth)
            size[b, c] += probability**2 + (c == truth)
        above -= weight[b] * of_class[truth] * np.log(q[truth])
        below += of_class[truth]
    counted = shown.numpy() & np.array([background_in_dice, True, True, True])
    if batch_dice:
        dice = 1 - (2 * weight @ overlap + 1e-5) / (weight @ size + 1e-5)
        return dice[counted.any(axis=0)].mean() * weight.mean(), above / below
    dice = 1 - (2 * overlap + 1e-5) / (size + 1e-5)
    return np.mean([weight[b] * dice[b, counted[b]].mean() for b in range(len(p))]), above / below


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("weight", [None, [0.25, 1.0, 3.0]])
def test_the_loss_of_some_classes_equals_the_slow_formula(options, weight):
    logits, label = drawn()  # with unknown voxels, and with values that are not shown
    loss = SegmentationLoss(ignore_label=255, **options)
    loss(logits, PartlyKnown(label, None if weight is None else torch.tensor(weight), SHOWN))
    dice, cross_entropy = slow_marginal_loss(logits, label, SHOWN, np.array(weight or [1.0] * 3), **options)
    assert loss.parts["dice"].item() == pytest.approx(dice, rel=1e-5)
    assert loss.parts["cross_entropy"].item() == pytest.approx(cross_entropy, rel=1e-5)


def test_a_voxel_by_hand():
    """Probabilities 1/2, 1/4, 1/8, 1/8; only class 1 is shown, the voxel is background: its probability is 3/4."""
    logits = torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 8]).log().view(1, 4, 1, 1, 1)
    shown = torch.tensor([[True, True, False, False]])
    loss = SegmentationLoss()
    loss(logits, PartlyKnown(torch.zeros(1, 1, 1, 1, 1), None, shown))
    assert loss.parts["cross_entropy"].item() == pytest.approx(-np.log(0.75), rel=1e-5)
    background, first = 1 - 2 * 0.75 / (0.75**2 + 1), 1 - 0
    assert loss.parts["dice"].item() == pytest.approx((background + first) / 2, rel=1e-3)


@pytest.mark.parametrize("options", OPTIONS)
def test_it_does_not_matter_how_background_and_classes_that_are_not_shown_share_their_probability(options):
    logits, label = drawn()
    loss = SegmentationLoss(ignore_label=255, **options)
    value = loss(logits, PartlyKnown(label, None, SHOWN))
    (gradient,) = torch.autograd.grad(value, logits)
    moved = logits.detach().clone()  # crop 0 does not show class 2: the two change places
    moved[0, [0, 2]] = moved[0, [2, 0]]
    assert loss(moved, PartlyKnown(label, None, SHOWN)).item() == pytest.approx(value.item(), rel=1e-6)
    # Along the direction that moves probability between them, d z_0 / p_0 = -d z_2 / p_2, the loss is flat.
    p = logits.detach().softmax(1)[0]
    slope = gradient[0, 0] / p[0] - gradient[0, 2] / p[2]
    assert slope.abs().max() < 1e-4 * gradient.abs().max() / p[[0, 2]].min()
    other = gradient[1, 0] / p[0] - gradient[1, 2] / p[2]  # crop 1 shows both
    assert other.abs().max() > 100 * slope.abs().max()


@pytest.mark.parametrize("options", OPTIONS)
def test_labels_that_show_all_classes_give_the_usual_loss(options):
    logits, label = drawn()
    loss = SegmentationLoss(ignore_label=255, **options)
    usual, marginal = (loss(logits, PartlyKnown(label, None, shown)) for shown in (None, torch.ones(3, CLASSES).bool()))
    assert marginal.item() == pytest.approx(usual.item(), rel=1e-6)


@pytest.mark.parametrize("background", [True, False])
def test_batches_that_show_other_classes_add_up_to_the_gradient_of_one_batch(background):
    """What accumulation and several processes do: the mean of the batches' gradients. The second batch shows all."""
    logits, label = drawn(crops=2, unknown=0)
    shown = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]], dtype=torch.bool)
    loss = SegmentationLoss(background_in_dice=background)
    (whole,) = torch.autograd.grad(loss(logits, PartlyKnown(label, None, shown)), logits)
    first = loss(logits[:1], PartlyKnown(label[:1], None, shown[:1]))
    second = loss(logits[1:], label[1:])
    (parts,) = torch.autograd.grad((first + second) / 2, logits)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-8)
    (swapped,) = torch.autograd.grad(loss(logits, PartlyKnown(label, None, shown.flip(0))), logits)
    assert (swapped - whole).abs().max() > 0.01 * whole.abs().max()


def test_the_gradient_is_finite_with_classes_of_no_probability():
    logits, label = drawn()
    extreme = (logits.detach() * 1000).requires_grad_()
    (gradient,) = torch.autograd.grad(
        SegmentationLoss(ignore_label=255)(extreme, PartlyKnown(label, None, SHOWN)), extreme
    )
    assert torch.isfinite(gradient).all()
    half = SegmentationLoss(ignore_label=255)(logits.detach().half(), PartlyKnown(label, None, SHOWN))
    assert half.dtype == torch.float32 and torch.isfinite(half)


def test_class_weights_are_means_over_the_labels_that_show_the_class(tmp_path):
    scans = []
    for number, shape in enumerate([(4, 2, 1), (4, 0, 3)]):  # voxels of classes 1, 2, 3
        voxels = np.zeros(20, np.uint8)
        voxels[: sum(shape)] = np.repeat([1, 2, 3], shape)
        nib.save(nib.Nifti1Image(voxels.reshape(5, 2, 2), np.eye(4)), tmp_path / f"{number}.nii")
        scans.append({"label": str(tmp_path / f"{number}.nii")})
    options = {"classes": 4, "balance": 1, "background": 1.0}
    assert class_weights(scans, **options).tolist() == pytest.approx([1, 1, 4, 2])  # sums 8, 2, 4
    scans[1]["labelled"] = [1, 3]
    assert class_weights(scans, **options).tolist() == pytest.approx([1, 1, 2, 2])  # means 4, 2 of one, 2
