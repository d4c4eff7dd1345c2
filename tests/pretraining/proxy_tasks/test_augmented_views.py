# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Two views of each crop, fixed by the seed and the draw, and the targets that belong to them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.transforms import ScaleIntensityRange
from torch.utils._python_dispatch import TorchDispatchMode

from bundles.common.errors import InputError
from bundles.pretraining.proxy_tasks.augmented_views import AugmentedViews, check_crops

CROPS = 3


def two_views(seed=0, **options):
    defaults = {"plane": "official", "mask_fill": ["noise"], "mask_ratio": [0.3, 0.3], "mask_block": [0.1, 0.3]}
    defaults |= {"mask_rule": "covered"}
    return AugmentedViews(seed=seed, **{**defaults, **options})


def batch(draw=5, crops=CROPS):
    """Intensities above 2, where neither noise nor zero comes."""
    image = 2 + torch.rand(crops, 1, 12, 16, 16, generator=torch.Generator().manual_seed(9))
    return {"image": image, "draw": torch.full((crops,), draw)}


def make(seed=0, draw=5, **options):
    return two_views(seed, **options)(batch(draw), "cpu")


class Operations(TorchDispatchMode):
    """Counts the operations, each of which is a launch or so on a GPU; views of tensors count, too."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += 1
        return func(*args, **(kwargs or {}))


def same(one, other):
    return torch.equal(one[0], other[0]) and all(torch.equal(one[1][name], other[1][name]) for name in one[1])


def test_views_are_fixed_by_the_seed_and_the_draw():
    views = two_views()
    first = views(batch(5), "cpu")
    views(batch(6), "cpu")
    torch.rand(7)  # nor do other draws of the process matter
    assert same(first, views(batch(5), "cpu")) and same(first, make())


@pytest.mark.parametrize("change", [{"seed": 1}, {"draw": 6}])
def test_another_seed_or_draw_gives_other_views(change):
    one, other = make(), make(**change)
    assert not torch.equal(one[1]["mask"], other[1]["mask"])
    turns = [make(**{name: value + i for name, value in change.items()})[1]["turns"].tolist() for i in range(6)]
    assert len({tuple(t) for t in turns}) > 3


def test_seed_and_draw_are_not_added_up():
    assert not torch.equal(make(seed=1, draw=2)[1]["mask"], make(seed=2, draw=1)[1]["mask"])


@pytest.mark.parametrize(("plane", "axes"), [("official", (2, 3)), ("axial", (1, 2))])
def test_first_and_second_views_are_of_the_same_crops_and_targets_are_the_turned_crops(plane, axes):
    image = batch()["image"][:, :, :12, :12, :12].contiguous()
    _, targets = two_views(plane=plane)({"image": image, "draw": torch.tensor([5, 5, 5])}, "cpu")
    assert targets["crop"].shape == (2 * CROPS, 1, 12, 12, 12) and targets["turns"].shape == (2 * CROPS,)
    for i, (target, turns) in enumerate(zip(targets["crop"], targets["turns"].tolist(), strict=True)):
        assert np.array_equal(target.numpy(), np.rot90(image[i % CROPS].numpy(), turns, axes=axes))


def test_the_two_views_of_a_crop_are_drawn_apart():
    _, targets = make()
    masks = targets["mask"]
    assert all(not torch.equal(masks[i], masks[j]) for i in range(2 * CROPS) for j in range(i))
    turns = torch.stack([make(draw=draw)[1]["turns"] for draw in range(20)])
    assert (turns[:, :CROPS] != turns[:, CROPS:]).float().mean() == pytest.approx(0.75, abs=0.2)


@pytest.mark.parametrize("fill", [["noise"], "zero", ["sample"], ["noise", "sample"]])
def test_voxels_outside_the_mask_equal_the_target(fill):
    views, targets = make(mask_fill=fill)
    assert views.shape == targets["crop"].shape and targets["mask"].shape == (2 * CROPS, 1, 12, 16, 16)
    assert torch.equal(views[~targets["mask"]], targets["crop"][~targets["mask"]])
    changed = (views != targets["crop"])[targets["mask"]].float().mean()
    assert changed > 0.95  # sample may find the same crop behind the same voxel; noise and zero may not


@pytest.mark.parametrize("fill", ["noise", "zero", "sample"])
def test_all_channels_of_a_voxel_are_masked_together(fill):
    image = batch()["image"].expand(-1, 2, -1, -1, -1) + torch.tensor([0.0, 5.0]).view(2, 1, 1, 1)
    views, targets = two_views(mask_fill=fill)({"image": image, "draw": torch.full((CROPS,), 5)}, "cpu")
    assert targets["mask"].shape == (2 * CROPS, 1, 12, 16, 16) and views.shape == targets["crop"].shape
    changed = (views != targets["crop"]).any(dim=1, keepdim=True)
    assert not (changed & ~targets["mask"]).any() and changed[targets["mask"]].float().mean() > 0.95


@pytest.mark.parametrize(
    ("fill", "ratio", "low", "high"), [("zero", 0.3, 0.3, 0.35), (["zero", "zero"], 0.3, 0.45, 0.6), ("zero", 0, 0, 0)]
)
def test_each_pass_hides_its_share(fill, ratio, low, high):
    views, targets = make(mask_fill=fill, mask_ratio=[ratio, ratio])
    hidden = targets["mask"].float().mean()
    assert low - 1e-6 <= hidden <= high
    assert torch.equal(views == 0, targets["mask"])


def test_the_passes_follow_each_other():
    # what the second pass pastes from an earlier view has the zeros of both passes there, from a later one none
    views, targets = make(mask_fill=["zero", "sample"], mask_ratio=[0.5, 0.5])
    zeros = (views == 0).float().mean()
    assert 0.3 < zeros < 0.6 and zeros < targets["mask"].float().mean() - 0.05


def one_of_two(draw, mask_fill="noise", tasks=("inpainting", "contrast", "rotation", "position")):
    """The views of two scans of two crops each, and of either scan alone."""
    image = torch.rand(4, 1, 12, 16, 16, generator=torch.Generator().manual_seed(9))
    affine = torch.eye(4, dtype=torch.float64).expand(4, 4, 4)
    maker = two_views(mask_fill=[mask_fill], tasks=tasks, intensity_change=0.1)
    parts = (slice(0, 4), slice(0, 2), slice(2, 4))
    return [
        maker({"image": image[p], "affine": affine[p], "draw": torch.tensor([7, 7, 8, 8])[p]}, "cpu") for p in parts
    ]


@pytest.mark.parametrize("fill", ["noise", "zero"])
def test_the_views_of_a_scan_do_not_depend_on_the_others_of_the_batch(fill):
    (both, targets), (first, of_first), (second, of_second) = one_of_two(7, fill)
    masked = lambda views: views[:-2].unflatten(0, (2, 2))  # noqa: E731  two views of two crops
    together = both[:8].unflatten(0, (2, 4))
    assert torch.equal(together, torch.cat([masked(first), masked(second)], dim=1))
    assert torch.equal(both[8:], torch.cat([first[4:], second[4:]]))
    turns = [part["turns"].view(2, -1) for part in (of_first, of_second)]
    assert torch.equal(targets["turns"].view(2, 4), torch.cat(turns, dim=1))


def test_pasted_voxels_come_from_the_same_set_of_views_and_from_no_crop_itself():
    views, targets = make(mask_fill="sample", mask_ratio=[0.6, 0.6], draw=1)
    turned = targets["crop"]
    pasted = 0
    for i in range(2 * CROPS):
        changed = views[i] != turned[i]
        if not targets["mask"][i].any():  # its own partner
            assert not changed.any()
            continue
        pasted += 1
        others = [j for j in range(2 * CROPS) if j != i and j // CROPS == i // CROPS]
        known = torch.stack([views[i] == turned[j] for j in others]).any(dim=0)
        # an earlier partner may itself have pasted voxels of a third crop or of this one
        assert (known | ~changed).float().mean() == 1
    assert 0 < pasted < 2 * CROPS or pasted == 2 * CROPS


def test_position_alone_needs_neither_masks_nor_turns():
    affine = torch.tensor([[2.0, 0, 0, 10], [0, 3, 0, 20], [0, 0, 4, -5], [0, 0, 0, 1]]).expand(2, 4, 4).double()
    image = torch.rand(2, 1, 12, 16, 8)
    image[:, :, :5] = 0.1
    maker = two_views(tasks=["position"], body_above=0.15, intensity_change=0.0)
    views, targets = maker({"image": image, "affine": affine, "draw": torch.tensor([3, 3])}, "cpu")
    assert torch.equal(views, image) and set(targets) == {"position", "body", "crops_per_scan"}
    assert targets["position"][1, :, 1, 2, 3].tolist() == [12.0, 26.0, 7.0]
    assert targets["crops_per_scan"] == 2 and torch.equal(targets["body"], image > 0.15)


def test_intensities_for_position_change_by_crop_and_within_their_bounds():
    image, affine = torch.rand(6, 1, 12, 16, 8), torch.eye(4).expand(6, 4, 4)
    maker = two_views(tasks=["position"], intensity_change=0.2)
    views, _ = maker({"image": image, "affine": affine, "draw": torch.tensor([3, 3, 3, 4, 4, 4])}, "cpu")
    seen = []
    for view, crop in zip(views, image, strict=True):
        design = torch.stack([crop.flatten(), torch.ones(crop.numel())], dim=1)
        scale, shift = torch.linalg.lstsq(design, view.flatten()).solution.tolist()
        assert 0.8 <= scale <= 1.2 and -0.1 <= shift <= 0.1
        torch.testing.assert_close(view, scale * crop + shift, atol=1e-5, rtol=0)
        seen.append(round(scale, 4))
    assert len(set(seen)) == 6


def test_sample_is_refused_where_a_step_has_one_crop_whose_other_view_would_tell_the_answer():
    with pytest.raises(InputError, match="'sample' takes voxels of another crop, but each step has only one crop"):
        two_views(mask_fill="sample")(batch(crops=1), "cpu")


@pytest.mark.parametrize("name", ["mask_ratio", "mask_block"])
def test_bounds_that_are_one_number_are_refused(name):
    with pytest.raises(InputError, match=f"--{name} 0.3 must be two numbers"):
        two_views(**{name: 0.3})


def test_an_unknown_plane_is_refused_when_the_views_are_made_up():
    with pytest.raises(InputError, match="rotation_plane 'coronal'"):
        two_views(plane="coronal")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mask_fill": ["black"]}, "--mask_fill 'black' is not one of noise, zero, sample"),
        ({"mask_fill": []}, r"--mask_fill \[\] masks nothing"),
        ({"mask_ratio": [0.5, 0.2]}, r"mask_ratio \[0.5, 0.2\] must be"),
        ({"mask_block": [0.0, 0.2]}, r"mask_block \[0.0, 0.2\] must be"),
    ],
)
def test_masks_that_cannot_be_drawn_are_refused_when_the_views_are_made_up(change, words):
    options = {"mask_fill": ["noise"], "mask_ratio": [0.0, 0.3], "mask_block": [0.05, 0.25]} | change
    with pytest.raises(InputError, match=words):
        AugmentedViews(seed=0, plane="axial", **options)


def test_crops_in_hu_give_the_views_of_the_same_crops_in_the_window():
    hu = torch.randint(-1500, 1500, (CROPS, 1, 12, 16, 16), generator=torch.Generator().manual_seed(1)).short()
    scaled = ScaleIntensityRange(-175.3, 250.7, 0.0, 1.0, clip=True)(hu.float()).as_tensor()
    draw = torch.tensor([5, 5, 5])
    in_hu = two_views(hu_window=[-175.3, 250.7])({"image": hu, "draw": draw}, "cpu")
    assert same(in_hu, two_views()({"image": scaled, "draw": draw}, "cpu"))
    assert in_hu[1]["crop"].dtype == torch.float32 and hu.dtype == torch.int16


def test_a_window_that_is_none_is_refused_when_the_views_are_made_up():
    with pytest.raises(InputError, match=r"--hu_window \[1000, -1000\] must be two values in HU"):
        two_views(hu_window=[1000, -1000])


def test_a_batch_of_one_crop_is_refused_or_warned_of_before_the_run(caplog):
    blocks = {"mask_block": [0.1, 0.3], "roi_size": [64, 64, 32]}
    one = {"volumes": 1, "crops_per_volume": 1, "where": "validation", **blocks}
    with pytest.raises(
        InputError, match="'sample' takes voxels of another crop, but a batch of the validation has only one"
    ):
        check_crops(tasks=["inpainting"], mask_fill=["noise", "sample"], **one)
    check_crops(tasks=["inpainting"], mask_fill=["noise"], **one)
    assert not caplog.records
    check_crops(tasks=["inpainting", "contrast"], mask_fill=["noise"], **one)
    assert "a batch of the validation has only one crop" in caplog.text
    two = {**one, "where": "training", "crops_per_volume": 2}
    check_crops(tasks=["inpainting", "contrast"], mask_fill=["sample"], **two)
    assert len(caplog.records) == 1


def test_inpainting_without_any_mask_is_refused():
    options = {"mask_fill": ["noise"], "mask_block": [0.1, 0.3], "roi_size": [64, 64, 32], "where": "training"}
    options |= {"volumes": 2, "crops_per_volume": 2}
    with pytest.raises(InputError, match=r"--mask_ratio \[0, 0\] masks nothing, so inpainting has nothing to restore"):
        check_crops(tasks=["inpainting", "rotation"], mask_ratio=[0, 0], **options)
    check_crops(tasks=["contrast", "rotation"], mask_ratio=[0, 0], **options)
    check_crops(tasks=["inpainting"], mask_ratio=[0, 0.1], **options)


def test_position_needs_two_crops_of_a_scan_and_blocks_at_least_a_voxel():
    options = {"mask_fill": ["noise"], "mask_block": [0.1, 0.3], "roi_size": [64, 64, 32], "where": "training"}
    with pytest.raises(InputError, match="--crops_per_volume 1: the task position compares crops of one scan"):
        check_crops(tasks=["position"], volumes=4, crops_per_volume=1, **options)
    check_crops(tasks=["position"], volumes=1, crops_per_volume=2, **options)
    small = {**options, "mask_block": [0.02, 0.3], "volumes": 2, "crops_per_volume": 2}
    with pytest.raises(
        InputError, match=r"--roi_size \[64, 64, 32\] is too small for --mask_block \[0.02, 0.3\].* 0.64"
    ):
        check_crops(tasks=["inpainting"], **small)
    check_crops(tasks=["position"], **small)  # masks nothing


@pytest.mark.parametrize(("rule", "most"), [("official", 400), ("covered", 800)])
def test_making_views_takes_few_operations_for_any_number_of_crops(rule, most):
    """A GPU waits for the processor that launches them. Corner by corner, ``covered`` took 1,460."""
    views = two_views(mask_rule=rule)
    numbers = []
    for crops in (4, 8):
        made = batch(crops=crops)
        views(made, "cpu")  # fills the caches
        with Operations() as operations:
            views(made, "cpu")
        numbers.append(operations.number)
    assert max(numbers) < most and numbers[1] == numbers[0]
