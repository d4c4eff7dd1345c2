# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The Dice of features that hold the classes is 1, of others low; two processes measure what one does."""

from __future__ import annotations

import logging

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged

from bundles.common.errors import InputError
from bundles.pretraining.probe.features import intensities
from bundles.pretraining.probe.probe import Probe

CLASSES = {0: "background", 1: "liver", 5: "left_kidney"}
SHAPES = [(20, 9, 12), (8, 8, 4), (17, 16, 5), (11, 6, 9)]  # larger and smaller than a window, and not multiples
ROI = (8, 8, 4)


def write_scans(folder, *, without=()):
    """Scans of balls of three classes; the intensity is 0, 0.5 or 1 by class."""
    items = []
    for number, shape in enumerate(SHAPES):
        generator = np.random.default_rng(number)
        label = np.zeros(shape, np.uint8)
        for value in (1, 5):
            if (number, value) not in without:
                places = generator.integers(0, shape, (40, 3))
                label[tuple(places.T)] = value
        image = np.select([label == 1, label == 5], [0.5, 1.0], 0.0).astype(np.float32)
        item = {name: str(folder / f"{name}{number}.nii.gz") for name in ("image", "label")}
        nib.save(nib.Nifti1Image(image, np.eye(4)), item["image"])
        nib.save(nib.Nifti1Image(label, np.eye(4)), item["label"])
        items.append(item)
    return items


def probe_of(items, *, classes=CLASSES, batch_size=3, split=2, voxels=60, seed=0, ignore_label=None):
    preprocessing = Compose([LoadImaged(keys="image", image_only=True), EnsureChannelFirstd(keys="image")])
    return Probe(
        training=items[:split],
        validation=items[split:],
        classes=classes,
        preprocessing=preprocessing,
        roi_size=ROI,
        batch_size=batch_size,
        voxels=voxels,
        seed=seed,
        device="cpu",
        ignore_label=ignore_label,
    )


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    return write_scans(tmp_path_factory.mktemp("scans"))


def one_hot(windows):
    """Features that hold the classes: half of them at once, the rest as a second tensor."""
    return [(windows == 0.5).float(), (windows == 1.0).float()]


def noise(windows):
    """Features that depend on the voxel's place in the window alone."""
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(1, 4, *ROI, generator=generator).expand(len(windows), -1, -1, -1, -1)]


def coarse(windows):
    """Means over 2^3 voxels: something of the classes, not all."""
    return [torch.nn.functional.avg_pool3d(one, 2) for one in one_hot(windows)]


def test_features_that_hold_the_classes_score_1_and_noise_does_not(items):
    probe = probe_of(items)
    measured = probe.measure(one_hot)
    assert measured == {"probe_dice": 1.0, "probe_dice_liver": 1.0, "probe_dice_left_kidney": 1.0}
    assert probe.measure(noise)["probe_dice"] < 0.2
    assert probe.measure(noise)["probe_dice"] < probe.measure(coarse)["probe_dice"] < 0.95


def test_the_mean_is_over_classes_and_each_over_the_scans_that_have_it(tmp_path):
    """Validation scans 2 and 3 are predicted by hand: class 1 right in one scan, class 5 nowhere, and not in scan 3."""
    items = write_scans(tmp_path, without={(3, 5)})
    probe = probe_of(items)
    rows = {2: [0.8, 0.4], 3: [0.6, float("nan")]}
    scans = {id(scan): number for number, scan in probe.validation.items()}
    probe._dice = lambda scan, decoder, extract: rows[[2, 3][scans[id(scan)]]]
    assert probe.measure(one_hot) == pytest.approx(
        {"probe_dice": 0.55, "probe_dice_liver": 0.7, "probe_dice_left_kidney": 0.4}
    )


def test_whole_scans_are_scored_by_the_definition_of_dice(items):
    """All voxels are called liver: its Dice is 2 n / (n + all) in each scan, that of the kidney is 0."""
    probe = probe_of(items)

    def nothing(windows):
        return [windows * 0]

    from bundles.pretraining.probe.decoder import LinearDecoder

    always = LinearDecoder(torch.zeros(3, 1, dtype=torch.float64), torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))
    for scan in probe.validation.values():
        liver, voxels = int((scan.classes == 1).sum()), scan.classes.numel()
        assert probe._dice(scan, always, nothing) == pytest.approx([2 * liver / (liver + voxels), 0.0])


def test_unknown_voxels_are_in_no_score(tmp_path):
    """The features lie about the kidney; where the label does not know it, this costs nothing."""
    items = write_scans(tmp_path)
    classes = {value: name for value, name in CLASSES.items() if value != 5}

    def lies(windows):
        return [torch.where(windows == 1.0, 0.5, windows)]

    known = probe_of(items, classes=classes, ignore_label=5)
    assert known.measure(lies) == {"probe_dice": 1.0, "probe_dice_liver": 1.0}
    assert probe_of(items).measure(lies)["probe_dice_liver"] < 0.9


def test_the_size_of_a_batch_of_windows_changes_nothing(items):
    measured = [probe_of(items, batch_size=size).measure(coarse) for size in (1, 2, 100)]
    assert measured[0] == measured[1] == measured[2]


def test_measuring_twice_gives_the_same_and_draws_nothing(items):
    torch.manual_seed(0)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    probe = probe_of(items)
    assert probe.measure(coarse) == probe.measure(coarse) == probe_of(items).measure(coarse)
    assert torch.equal(states[0], torch.get_rng_state()) and (states[1] == np.random.get_state()[1]).all()


def test_training_voxels_are_those_that_were_asked_for(items):
    """Half of each class from each of two scans, ten times as much background; no more than a scan has."""
    drawn = [torch.bincount(kinds).tolist() for _, _, kinds in probe_of(items, voxels=20).training.values()]
    assert drawn == [[100, 10, 10], [100, 10, 10]]
    drawn = [torch.bincount(kinds).tolist() for _, _, kinds in probe_of(items, voxels=10_000).training.values()]
    scans = [np.asarray(nib.load(item["label"]).dataobj) for item in items[:2]]
    assert drawn == [[int((scan == value).sum()) for value in CLASSES] for scan in scans]


def test_a_class_that_only_one_training_scan_has_gets_all_voxels_there(tmp_path):
    items = write_scans(tmp_path, without={(0, 5)})
    drawn = [torch.bincount(k, minlength=3).tolist() for *_, k in probe_of(items, voxels=20).training.values()]
    assert drawn == [[100, 10, 0], [100, 10, 20]]


def test_a_class_in_no_training_scan_is_refused(tmp_path):
    items = write_scans(tmp_path, without={(0, 5), (1, 5)})
    with pytest.raises(InputError, match="none of its 2 training scans has a voxel of left_kidney.*move one there"):
        probe_of(items)


def test_validation_scans_without_any_structure_are_refused(tmp_path):
    items = write_scans(tmp_path, without={(2, 1), (2, 5), (3, 1), (3, 5)})
    with pytest.raises(InputError, match="2 validation scans hold nothing but background.*liver, left_kidney"):
        probe_of(items)


def test_a_class_in_no_validation_scan_is_left_out_with_a_warning(tmp_path, caplog):
    items = write_scans(tmp_path, without={(2, 5), (3, 5)})
    with caplog.at_level(logging.WARNING):
        measured = probe_of(items).measure(one_hot)
    assert measured == {"probe_dice": 1.0, "probe_dice_liver": 1.0}
    assert "no validation scan has left_kidney" in caplog.text


def two_processes(rank, folder, items):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    probe = probe_of(items, split=3)
    measured = [probe.measure(extract) for extract in (coarse, noise, intensities)]
    torch.save([len(probe.training), len(probe.validation), measured], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_share_the_scans_and_measure_what_one_does(tmp_path, items):
    """Three training scans and one validation scan: rank 1 has nothing to score."""
    multiprocessing.spawn(two_processes, (str(tmp_path), items), nprocs=2)
    alone = probe_of(items, split=3)
    expected = [alone.measure(extract) for extract in (coarse, noise, intensities)]
    shares = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert [share[:2] for share in shares] == [[2, 1], [1, 0]]
    assert shares[0][2] == shares[1][2] == expected
