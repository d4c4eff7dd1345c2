# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Synthetic patients are plausible, different from each other, reproducible, and in the layout of BTCV."""

from __future__ import annotations

import json
from itertools import combinations

import nibabel as nib
import numpy as np
import pytest

from bundles.common.errors import InputError
from tools import synthetic_ct
from tools.synthetic_ct import ORGANS, draw_patient, main, render, stamp, write_dataset

# Allowed volumes in millilitres. Wider than the range in adults where the shapes are generous (adrenal glands).
VOLUME = {
    "spleen": (60, 350),
    "right_kidney": (70, 300),
    "left_kidney": (70, 300),
    "gallbladder": (15, 100),
    "esophagus": (8, 70),
    "liver": (600, 2300),
    "stomach": (120, 700),
    "aorta": (40, 250),
    "inferior_vena_cava": (40, 250),
    "portal_and_splenic_veins": (12, 90),
    "pancreas": (25, 150),
    "right_adrenal_gland": (3, 14),
    "left_adrenal_gland": (3, 14),
}


@pytest.fixture(scope="module")
def patients():
    return [(seed, *render(draw_patient(seed))) for seed in range(12)]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    return folder, write_dataset(folder, unlabelled=3, training=3, validation=1, test=1, seed=5, progress=False)


def centre_mm(label, affine, name):
    organ = next(organ for organ, its_name in ORGANS.items() if its_name == name)
    return affine[:3, :3] @ np.argwhere(label == organ).mean(0) + affine[:3, 3]


def mean_dice(one, other):
    """Mean over the organs, after cropping or padding to the same grid."""
    other = stamp(other, one.shape)
    return np.mean([2 * ((one == o) & (other == o)).sum() / ((one == o).sum() + (other == o).sum()) for o in ORGANS])


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_organs_have_the_ids_of_btcv():
    assert list(ORGANS) == list(range(1, 14))
    assert [ORGANS[i] for i in (1, 2, 6, 8, 11, 13)] == [
        "spleen",
        "right_kidney",
        "liver",
        "aorta",
        "pancreas",
        "left_adrenal_gland",
    ]


def test_types_and_grid_are_those_of_a_ct(patients):
    for _, image, label, affine in patients:
        assert image.dtype == np.int16 and label.dtype == np.uint8 and image.shape == label.shape
        assert all(low <= n <= high for n, low, high in zip(image.shape, (88, 72, 52), (104, 88, 64), strict=True))
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        assert 3.5 <= spacing[0] <= 4.5 and 4.5 <= spacing[2] <= 5.5
        assert spacing[0] == pytest.approx(spacing[1])
        assert nib.aff2axcodes(affine) == ("L", "P", "S")
        assert np.abs(affine[:3, 3]).min() > 1
        assert image.min() >= -1024 and np.percentile(image, 5) == pytest.approx(-1000, abs=45) and image.max() > 250


def test_about_one_grid_in_four_is_oblique():
    oblique = [bool(np.any(draw_patient(seed).oblique)) for seed in range(400)]
    assert 0.17 < np.mean(oblique) < 0.33


def test_same_seed_gives_the_same_voxels_and_another_seed_does_not(patients):
    image, label, affine = render(draw_patient(3))
    assert np.array_equal(image, patients[3][1])
    assert np.array_equal(label, patients[3][2])
    assert np.array_equal(affine, patients[3][3])
    assert image.shape != patients[4][1].shape or not np.array_equal(image, patients[4][1])


def test_every_organ_is_there_with_a_plausible_volume(patients):
    for seed, _, label, affine in patients:
        millilitres = abs(np.linalg.det(affine[:3, :3])) / 1000
        assert set(np.unique(label)) == set(range(14))
        for organ, name in ORGANS.items():
            low, high = VOLUME[name]
            assert low < (label == organ).sum() * millilitres < high, f"{name} of patient {seed}"


def test_organs_stay_off_the_border_but_for_the_vessels_that_run_on(patients):
    for seed, _, label, _ in patients:
        inner = label[1:-1, 1:-1, 1:-1]
        for organ, name in ORGANS.items():
            if name not in ("esophagus", "aorta", "inferior_vena_cava"):
                assert (inner == organ).sum() == (label == organ).sum(), f"{name} of patient {seed}"


def test_organs_lie_on_the_right_side_in_scanner_coordinates(patients):
    """RAS: x grows to the patient's right, y to the front, z to the head."""
    for _, _, label, affine in patients:
        at = {name: centre_mm(label, affine, name) for name in ORGANS.values()}
        middle = at["aorta"][0]
        assert min(at[name][0] for name in ("liver", "right_kidney", "gallbladder", "inferior_vena_cava")) > middle
        assert max(at[name][0] for name in ("spleen", "left_kidney", "stomach", "left_adrenal_gland")) < middle
        assert at["stomach"][1] > at["left_kidney"][1] and at["gallbladder"][1] > at["right_kidney"][1]
        assert at["right_adrenal_gland"][2] > at["right_kidney"][2] and at["esophagus"][2] > at["pancreas"][2]


def test_label_and_image_agree(patients):
    """The mean HU inside uniform organs is the drawn value, so image and label have the same geometry."""
    for seed, image, label, _ in patients:
        for organ in (1, 6, 8):
            inside = label == organ
            for axis in range(3):
                inside &= np.roll(label == organ, 1, axis) & np.roll(label == organ, -1, axis)
            assert image[inside].mean() == pytest.approx(draw_patient(seed).organ_hu[organ], abs=12)


def test_one_threshold_does_not_find_the_liver(patients):
    for _, image, label, _ in patients:
        liver = image[label == 6]
        band = (image > np.percentile(liver, 5)) & (image < np.percentile(liver, 95))
        dice = 2 * (band & (label == 6)).sum() / (band.sum() + (label == 6).sum())
        assert dice < 0.75


def test_label_map_of_one_patient_does_not_fit_another(patients):
    scores = [mean_dice(one, other) for (_, _, one, _), (_, _, other, _) in combinations(patients, 2)]
    assert np.mean(scores) < 0.15 and np.max(scores) < 0.5


def test_stamp_crops_and_pads_about_the_middle():
    label = np.arange(1, 6, dtype=np.uint8).reshape(5, 1, 1)
    assert stamp(label, (3, 1, 1)).ravel().tolist() == [2, 3, 4]
    assert stamp(label, (7, 1, 3))[:, 0, 1].tolist() == [0, 1, 2, 3, 4, 5, 0]
    assert stamp(label, (7, 1, 3))[:, 0, 0].sum() == 0


def test_layout_is_that_of_btcv(small):
    folder, lists = small
    names = {name for name in contents(folder) if name.endswith(".gz")}
    assert names == (
        {f"unlabelled/imagesTr/img{i:04d}.nii.gz" for i in (1, 2, 3)}
        | {f"labelled/imagesTr/img{i:04d}.nii.gz" for i in (1, 2, 3, 4)}
        | {f"labelled/labelsTr/label{i:04d}.nii.gz" for i in (1, 2, 3, 4)}
        | {f"labelled/labelsShuffled/label{i:04d}.nii.gz" for i in (1, 2, 3)}
        | {"labelled/imagesTs/img0005.nii.gz", "labelled/labelsTs/label0005.nii.gz"}
    )
    found = json.loads(lists.labelled.read_text())
    assert found["labels"] == {"0": "background"} | {str(i): name for i, name in ORGANS.items()}
    assert found["modality"] == {"0": "CT"}
    assert (found["numTraining"], found["numTest"]) == (3, 1)
    assert found["training"][0] == {"image": "./imagesTr/img0001.nii.gz", "label": "./labelsTr/label0001.nii.gz"}
    assert found["validation"] == [{"image": "./imagesTr/img0004.nii.gz", "label": "./labelsTr/label0004.nii.gz"}]
    assert found["test"] == [{"image": "./imagesTs/img0005.nii.gz", "label": "./labelsTs/label0005.nii.gz"}]
    scans = json.loads(lists.unlabelled.read_text())
    assert "labels" not in scans
    assert scans["training"] + scans["validation"] == [{"image": f"./imagesTr/img{i:04d}.nii.gz"} for i in (1, 2, 3)]
    assert len(scans["validation"]) == 1


def test_files_hold_the_voxels_and_geometry_of_the_patient(small):
    _, lists = small
    case = json.loads(lists.labelled.read_text())["validation"][0]
    image, label = (nib.load(lists.labelled.parent / case[key]) for key in ("image", "label"))
    assert image.get_data_dtype() == np.int16 and label.get_data_dtype() == np.uint8
    assert image.header.get_xyzt_units()[0] == "mm"
    for volume in (image, label):
        assert int(volume.header["sform_code"]) == int(volume.header["qform_code"]) == 1
        assert np.allclose(volume.get_qform(), volume.get_sform(), atol=1e-3)
    seed = int(str(image.header["descrip"].item().decode()).rsplit(" ", 1)[1])
    voxels, organs, affine = render(draw_patient(seed))
    assert np.array_equal(np.asanyarray(image.dataobj), voxels)
    assert np.array_equal(np.asanyarray(label.dataobj), organs)
    assert np.allclose(image.affine, affine, atol=1e-4)


def test_no_scan_is_used_for_two_purposes(small):
    folder, _ = small
    scans = [path.read_bytes() for path in folder.rglob("img*.nii.gz")]
    assert len(scans) == len(set(scans)) == 8


def test_shuffled_labels_fit_the_grid_but_not_the_patient(small):
    _, lists = small
    true = json.loads(lists.labelled.read_text())
    shuffled = json.loads(lists.shuffled.read_text())
    assert shuffled["validation"] == true["validation"] and shuffled["test"] == true["test"]
    root = lists.labelled.parent
    maps = [np.asanyarray(nib.load(root / case["label"]).dataobj) for case in true["training"]]
    for i, (case, swapped) in enumerate(zip(true["training"], shuffled["training"], strict=True)):
        assert swapped["image"] == case["image"]
        image, label = nib.load(root / case["image"]), nib.load(root / swapped["label"])
        assert label.shape == image.shape and np.array_equal(label.affine, image.affine)
        voxels = np.asanyarray(label.dataobj)
        assert np.array_equal(voxels, stamp(maps[(i + 1) % 3], image.shape))
        assert mean_dice(maps[i], voxels) < 0.35


def test_second_call_makes_only_what_is_missing(small, monkeypatch):
    folder, lists = small
    before = contents(folder)
    lost = folder / "labelled" / "imagesTr" / "img0002.nii.gz"
    lost.unlink()
    torn = folder / "unlabelled" / "imagesTr" / "img0001.nii.gz"
    torn.write_bytes(torn.read_bytes()[:5000])
    made = []
    monkeypatch.setattr(synthetic_ct, "render", lambda patient: made.append(patient.seed) or render(patient))
    write_dataset(folder, unlabelled=3, training=3, validation=1, test=1, seed=5, progress=False)
    assert made == [50000, 52001]
    assert contents(folder) == before


def test_killed_run_leaves_no_list_and_the_next_run_ends_as_if_never_killed(tmp_path, monkeypatch):
    numbers = dict(unlabelled=1, training=2, validation=0, test=1, seed=1, progress=False)
    write_dataset(tmp_path / "whole", **numbers)
    calls = []

    def killed(volume, path):
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"half a file")
            raise KeyboardInterrupt
        nib_save(volume, path)

    nib_save = nib.save
    monkeypatch.setattr(nib, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "killed", **numbers)
    assert not list((tmp_path / "killed").rglob("dataset*.json"))
    monkeypatch.undo()
    write_dataset(tmp_path / "killed", **numbers)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_other_parameters_replace_the_old_data(tmp_path):
    numbers = dict(unlabelled=0, validation=0, test=0, shuffled=False, progress=False)
    write_dataset(tmp_path / "twice", training=3, seed=1, **numbers)
    write_dataset(tmp_path / "twice", training=2, seed=2, **numbers)
    write_dataset(tmp_path / "once", training=2, seed=2, **numbers)
    assert contents(tmp_path / "twice") == contents(tmp_path / "once")


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"training": -1}, "training=-1"),
        ({"test": 1001}, "test=1001.*between 0 and 1000"),
        ({"seed": -3}, "seed=-3"),
        ({"training": 1}, "training=1.*two or more"),
    ],
)
def test_impossible_numbers_are_refused(tmp_path, numbers, words):
    with pytest.raises(InputError, match=words):
        write_dataset(tmp_path, **numbers)
    assert not list(tmp_path.iterdir())


def test_real_data_are_never_overwritten(tmp_path):
    numbers = dict(unlabelled=0, training=2, validation=0, test=0, progress=False)
    scan = tmp_path / "a" / "labelled" / "imagesTr" / "img0001.nii.gz"
    scan.parent.mkdir(parents=True)
    nib.save(nib.Nifti1Image(np.ones((2, 2, 2), np.int16), np.eye(4)), scan)
    before = scan.read_bytes()
    with pytest.raises(InputError, match="img0001.*another folder"):
        write_dataset(tmp_path / "a", **numbers)
    assert scan.read_bytes() == before
    own = tmp_path / "b" / "labelled" / "dataset.json"
    own.parent.mkdir(parents=True)
    own.write_text('{"training": []}')
    with pytest.raises(InputError, match="dataset.json.*another folder"):
        write_dataset(tmp_path / "b", **numbers)
    assert own.read_text() == '{"training": []}'


def test_command_line_writes_the_lists_and_prints_where(tmp_path, capsys):
    main(["--out", str(tmp_path / "d"), "--unlabelled", "1", "--training", "2", "--validation", "0", "--test", "0"])
    printed = capsys.readouterr().out
    assert str(tmp_path / "d" / "labelled" / "dataset_shuffled.json") in printed
    with pytest.raises(SystemExit) as stopped:
        main(["--out", str(tmp_path / "d"), "--training", "1"])
    assert stopped.value.code == 1 and "training=1" in capsys.readouterr().err
