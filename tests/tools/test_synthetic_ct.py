# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Data sets of synthetic patients are in the layout of BTCV, continue where they stopped, and overwrite nothing else."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest

from bundles.common.errors import InputError
from tools import synthetic_ct
from tools.synthetic_ct import main, stamp, write_dataset
from tools.synthetic_patient import ORGANS, draw_patient, render


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    return folder, write_dataset(folder, unlabelled=3, training=3, validation=1, test=1, seed=5, progress=False)


def mean_dice(one, other):
    """Mean over the organs, after cropping or padding to the same grid."""
    other = stamp(other, one.shape)
    return np.mean([2 * ((one == o) & (other == o)).sum() / ((one == o).sum() + (other == o).sum()) for o in ORGANS])


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


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
