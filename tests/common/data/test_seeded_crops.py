# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The crop of a draw depends on the seed and the number of the draw, and on nothing else."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from monai.data import DataLoader, MetaTensor
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    Lambdad,
    RandFlipd,
    RandGaussianNoised,
    RandRotate90d,
    RandScaleIntensityd,
    RandShiftIntensityd,
    RandSpatialCropSamplesd,
    SpatialPadd,
)

from bundles.common.data import seeded_crops
from bundles.common.data.seeded_crops import BatchShare, DrawSampler, SeededCrops
from bundles.common.errors import InputError

VOLUMES = 5


def as_meta(array):
    return MetaTensor(torch.as_tensor(array), affine=torch.eye(4))


def crops(seed=0, cache_num=VOLUMES, volumes=VOLUMES, **options):
    """Volume i holds the voxels 1000 i, 1000 i + 1, ..., so that a voxel tells where it is from."""
    data = [{"image": np.arange(1000.0, dtype=np.float32).reshape(10, 10, 10) + 1000 * i} for i in range(volumes)]
    preprocessing = Compose([Lambdad("image", as_meta), EnsureChannelFirstd("image", channel_dim="no_channel")])
    augmentation = Compose(
        [
            SpatialPadd("image", 4),
            RandSpatialCropSamplesd("image", 4, num_samples=2, random_size=False),
            RandFlipd("image", prob=0.5, spatial_axis=0),
            RandRotate90d("image", prob=0.5),
            RandGaussianNoised("image", prob=0.5, std=0.01),
            RandScaleIntensityd("image", factors=1e-6, prob=0.5),
            RandShiftIntensityd("image", offsets=0.1, prob=0.5),
        ]
    )
    return SeededCrops(
        data=data,
        preprocessing=preprocessing,
        augmentation=augmentation,
        seed=seed,
        cache_num=cache_num,
        **options,
    )


def batches(dataset, *, steps=6, batch_size=2, first_step=0, workers=0):
    sampler = DrawSampler(iterations=steps, batch_size=batch_size)
    sampler.first = first_step
    return list(DataLoader(dataset, sampler=sampler, batch_size=batch_size, num_workers=workers))


def equal(one, other):
    return len(one) == len(other) and all(
        torch.equal(a["image"], b["image"]) and torch.equal(a["draw"], b["draw"])
        for a, b in zip(one, other, strict=True)
    )


def test_the_same_draw_is_the_same_crop_whenever_it_is_asked_for():
    dataset = crops()
    forward = {draw: dataset[draw] for draw in range(12)}
    for draw in reversed(range(12)):
        for one, other in zip(dataset[draw], forward[draw], strict=True):
            assert torch.equal(one["image"], other["image"])


def test_the_number_of_workers_and_the_cache_change_nothing():
    alone = batches(crops())
    assert equal(alone, batches(crops(), workers=2))
    assert equal(alone, batches(crops(cache_num=0)))
    assert not equal(alone, batches(crops(seed=1)))


def test_two_draws_of_one_volume_differ():
    dataset = crops(volumes=1)
    assert not torch.equal(dataset[0][0]["image"], dataset[1][0]["image"])
    assert not torch.equal(dataset[0][0]["image"], dataset[0][1]["image"])


def test_a_resumed_sampler_gives_the_tail_of_the_unbroken_sequence():
    unbroken = batches(crops(), steps=7)
    assert len(unbroken) == 7
    assert equal(unbroken[3:], batches(crops(), steps=7, first_step=3))


def test_the_seed_changes_the_crops_and_not_only_the_order_of_the_volumes():
    one, other = crops(shuffle=False)[3], crops(shuffle=False, seed=1)[3]
    assert not torch.equal(one[0]["image"], other[0]["image"])


def test_every_pass_visits_every_volume_once_in_a_new_order():
    dataset = crops()
    passes = [[dataset.volume_of(draw) for draw in range(p * VOLUMES, (p + 1) * VOLUMES)] for p in range(20)]
    assert all(sorted(order) == list(range(VOLUMES)) for order in passes)
    assert len({tuple(order) for order in passes}) > 10
    assert [crops(seed=1).volume_of(draw) for draw in range(30)] != [dataset.volume_of(draw) for draw in range(30)]


def test_the_crop_comes_from_the_volume_that_the_draw_chose():
    dataset = crops()
    for draw in range(VOLUMES):
        for crop in dataset[draw]:
            assert crop["draw"] == draw
            # noise, scale and shift move a voxel by less than one
            assert set((crop["image"] // 1000).flatten().tolist()) <= {dataset.volume_of(draw)} | {
                dataset.volume_of(draw) - 1
            }


def test_without_shuffling_volume_i_is_draw_i():
    assert [crops(shuffle=False).volume_of(draw) for draw in range(2 * VOLUMES)] == 2 * list(range(VOLUMES))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_the_draws_without_overlap_and_without_gap(monkeypatch, ranks):
    monkeypatch.setattr(seeded_crops, "world_size", lambda: ranks)
    shares = []
    for rank in range(ranks):
        monkeypatch.setattr(seeded_crops, "rank", lambda rank=rank: rank)
        sampler = DrawSampler(iterations=4, batch_size=2)
        shares.append(list(sampler))
        assert len(shares[-1]) == len(sampler) == 8
    assert sorted(sum(shares, [])) == list(range(4 * 2 * ranks))
    # a step of all ranks together is a contiguous stretch, so that ranks x batch may be traded for each other
    for step in range(4):
        together = sum((share[2 * step : 2 * step + 2] for share in shares), [])
        assert together == list(range(step * 2 * ranks, (step + 1) * 2 * ranks))


def test_cached_volumes_are_not_changed_by_augmentation():
    dataset = crops()
    before = copy.deepcopy([dataset.volumes[i]["image"] for i in range(VOLUMES)])
    for batch in batches(dataset, steps=4 * VOLUMES):
        batch["image"] += 1e6  # what a step does to its batch in place does not reach the cache either
    for i in range(VOLUMES):
        after = dataset.volumes[i]["image"]
        assert torch.equal(after, before[i])
        assert after.applied_operations == before[i].applied_operations
        assert set(dataset.volumes[i]) == {"image"}


def test_crops_are_plain_tensors():
    for crop in crops()[0]:
        assert type(crop["image"]) is torch.Tensor and crop["image"].shape == (1, 4, 4, 4)
        assert set(crop) == {"image", "draw"}


def test_a_transform_that_gives_one_crop_gives_a_list_of_one():
    dataset = crops()
    dataset.augmentation = Compose([RandFlipd("image", prob=1.0, spatial_axis=0)])
    (crop,) = dataset[3]
    volume = dataset.volumes[dataset.volume_of(3)]["image"].as_tensor()
    assert torch.equal(crop["image"], volume.flip(1)) and crop["draw"] == 3


@pytest.mark.parametrize(("number", "ranks"), [(7, 1), (7, 2), (7, 3), (8, 3), (2, 4), (1, 2)])
def test_validation_batches_are_those_of_one_process_and_equally_many_on_every_rank(monkeypatch, number, ranks):
    monkeypatch.setattr(seeded_crops, "world_size", lambda: ranks)
    shares = []
    for rank in range(ranks):
        monkeypatch.setattr(seeded_crops, "rank", lambda rank=rank: rank)
        share = BatchShare(number=number, batch_size=2)
        shares.append(list(share))
        assert len(shares[-1]) == len(share) == {(7, 1): 3, (7, 2): 2, (8, 3): 2}.get((number, ranks), 1)
    assert len({len(share) for share in shares}) == 1
    # a last batch of one, in which nothing could be compared, joins the one before it
    alone = {7: [(0, 1), (2, 3), (4, 5, 6)], 8: [(0, 1), (2, 3), (4, 5), (6, 7)], 2: [(0, 1)], 1: [(0,)]}[number]
    assert sorted({tuple(batch) for share in shares for batch in share}) == alone


def test_voxels_that_are_not_numbers_stop_the_run_with_the_file():
    dataset = crops()
    dataset.data = [{"image": f"scan_{i}.nii.gz"} for i in range(VOLUMES)]
    dataset.volumes[2]["image"][:] = float("nan")
    bad = next(draw for draw in range(VOLUMES) if dataset.volume_of(draw) == 2)
    for draw in range(VOLUMES):
        if draw != bad:
            dataset[draw]
    with pytest.raises(InputError, match="scan_2.nii.gz.*--check_data full"):
        dataset[bad]


def test_crops_know_which_classes_their_label_shows_if_any_shows_some_only():
    def dataset(*labelled, classes=4):
        data = [{"image": torch.zeros(1, 4, 4, 4), **note} for note in labelled]
        return SeededCrops(
            data=data,
            preprocessing=Compose([]),
            augmentation=Compose([RandSpatialCropSamplesd("image", 4, num_samples=2, random_size=False)]),
            seed=0,
            cache_num=0,
            shuffle=False,
            classes=classes,
        )

    partial = dataset({}, {"labelled": [1, 3]})
    assert [crop["labelled"].tolist() for crop in partial[1]] == [[True, True, False, True]] * 2
    assert partial[0][0]["labelled"].tolist() == [True] * 4
    (batch,) = DataLoader(partial, batch_size=2)
    assert batch["labelled"].shape == (4, 4) and batch["labelled"].dtype == torch.bool
    assert "labelled" not in dataset({}, {})[0][0]
    with pytest.raises(ValueError, match="classes is needed"):
        dataset({"labelled": [1]}, classes=None)
