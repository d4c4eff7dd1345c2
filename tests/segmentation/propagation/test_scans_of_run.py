# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""No scan that is measured later gets a label for training, under whatever name; labelled scans get none."""

from __future__ import annotations

import json
import os

import nibabel as nib
import numpy as np
import pytest

from bundles.common.errors import InputError
from bundles.common.scans.nifti_writing import write_nifti
from bundles.segmentation.propagation.scans_of_run import scans_of_run

LABELS = {"0": "background", "1": "liver"}


def write(folder, name: str, number: int) -> str:
    voxels = np.random.default_rng(number).integers(-100, 100, (6, 5, 4)).astype(np.int16)
    write_nifti(folder / f"{name}.nii.gz", voxels=voxels, affine=np.eye(4))
    return f"./{name}.nii.gz"


@pytest.fixture
def data(tmp_path):
    """Labelled a and b, unlabelled c and d, validation v, test t."""
    for number, name in enumerate("abcdvt"):
        write(tmp_path, name, number)
        write_nifti(tmp_path / f"{name}_label.nii.gz", voxels=np.ones((6, 5, 4), np.uint8), affine=np.eye(4))
    write_list(tmp_path)
    return tmp_path


def entry(name: str, **more) -> dict:
    return {"image": f"./{name}.nii.gz", "label": f"./{name}_label.nii.gz", **more}


def write_list(folder, **sections) -> None:
    content = {
        "labels": LABELS,
        "training": [entry("a"), entry("b")],
        "unlabelled": ["./c.nii.gz", "./d.nii.gz"],
        "validation": [entry("v")],
        "test": [entry("t")],
    }
    (folder / "dataset.json").write_text(json.dumps({**content, **sections}))


def run(data, **options):
    return scans_of_run(dataset_dir=str(data), output_dir=str(data / "out"), **options)


def names(scans) -> list[str]:
    return [scan.name for scan in scans]


def test_sections_of_the_list(data):
    scans = run(data)
    assert names(scans.labelled) == ["a", "b"] and names(scans.targets) == ["c", "d"]
    assert scans.labelled[0].label.endswith("a_label.nii.gz") and scans.targets[0].label == ""
    assert {section: len(entries) for section, entries in scans.held_out.items()} == {"validation": 1, "test": 1}


def test_cases_with_carried_labels_give_none(data):
    write_list(data, training=[entry("a"), entry("b", carried=True)])
    assert names(run(data).labelled) == ["a"]
    write_list(data, training=[entry("a", carried=True)])
    with pytest.raises(InputError, match="no training case with a label of its own"):
        run(data)


def test_labelled_scans_among_the_unlabelled_are_not_labelled_again(data):
    os.symlink(data / "a.nii.gz", data / "link.nii.gz")
    write_list(data, unlabelled=["./a.nii.gz", "./link.nii.gz", "./c.nii.gz", "./c.nii.gz"])
    assert names(run(data).targets) == ["c"]
    write_list(data, unlabelled=["./a.nii.gz"])
    with pytest.raises(InputError, match="there is nothing to label"):
        run(data)


def test_other_sources(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("more")
    write(folder, "x", 8)
    write(folder, "a", 9)  # another scan of the same name
    assert names(run(data, unlabelled=str(folder)).targets) == [f"{folder.name}/a", "x"]
    (folder / "dataset.json").write_text(json.dumps({"training": [{"image": "./x.nii.gz"}]}))
    assert names(run(data, unlabelled=[str(folder), str(data / "c.nii.gz")]).targets) == ["c", "x"]
    write_list(data, unlabelled=[])
    with pytest.raises(InputError, match="no section 'unlabelled'"):
        run(data)


def test_what_cannot_be_read_is_told_and_costs_no_other(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("more")
    write(folder, "x", 8)
    (folder / "y.mha").write_bytes(b"no scan")
    scans = run(data, unlabelled=str(folder))
    assert names(scans.targets) == ["x"] and list(scans.unreadable) == [str(folder / "y.mha")]
    (folder / "y.mha").unlink()
    assert run(data, unlabelled=str(folder)).unreadable == {} and not (data / "out" / "failed.csv").exists()


def test_fewer_scans_are_a_seeded_part_of_more(data, caplog):
    scans = [f"s{index}" for index in range(8)]
    for seed, name in enumerate(scans):
        write(data, name, 30 + seed)
    write_list(data, unlabelled=[f"./{name}.nii.gz" for name in reversed(scans)])
    assert names(run(data).targets) == names(run(data, max_scans=8).targets) == scans
    with caplog.at_level("INFO"):
        three = names(run(data, max_scans=3, seed=1).targets)
    assert "labels are carried to 3 of the 8 unlabelled scans" in caplog.text
    assert len(three) == 3 and three == sorted(three) and three == names(run(data, max_scans=3, seed=1).targets)
    assert set(three) < set(names(run(data, max_scans=6, seed=1).targets))
    assert any(names(run(data, max_scans=3, seed=seed).targets) != three for seed in range(2, 6))
    for wrong in (0, 2.5, True, "3"):
        with pytest.raises(InputError, match=r"--max_scans .* must be a whole number"):
            run(data, max_scans=wrong)


def test_a_held_out_scan_is_refused_whether_drawn_or_not(data):
    write_list(data, unlabelled=["./c.nii.gz", "./d.nii.gz", "./v.nii.gz"])
    for seed in range(4):
        with pytest.raises(InputError, match="validation scans or patients"):
            run(data, max_scans=1, seed=seed)


def copy_of_v(data, name: str) -> str:
    """Validation scan v under another name, with its axes in another order, compressed again."""
    image = nib.load(data / "v.nii.gz")
    flipped = image.as_reoriented(nib.orientations.axcodes2ornt(("S", "A", "L")))
    nib.save(flipped, data / f"{name}.nii")
    return f"./{name}.nii"


@pytest.mark.parametrize("how", ["itself", "link", "copy", "fourth axis", "patient", "test"])
def test_scans_that_are_measured_are_refused(data, how):
    held_out = {"validation": [entry("v", patient="7")]}
    if how == "itself":
        write_list(data, unlabelled=["./c.nii.gz", "./v.nii.gz"])
    elif how == "link":
        os.symlink(data / "v.nii.gz", data / "other.nii.gz")
        write_list(data, unlabelled=["./c.nii.gz", "./other.nii.gz"])
    elif how == "copy":
        write_list(data, unlabelled=["./c.nii.gz", copy_of_v(data, "other")])
    elif how == "fourth axis":
        image = nib.load(data / "v.nii.gz")
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[..., None], image.affine), data / "other.nii.gz")
        write_list(data, unlabelled=["./c.nii.gz", "./other.nii.gz"])
    elif how == "patient":
        write_list(data, unlabelled=[{"image": "./c.nii.gz", "patient": "7"}], **held_out)
    else:
        write_list(data, unlabelled=["./t.nii.gz"])
    with pytest.raises(
        InputError, match=rf"1 of the \d unlabelled scans are {'test' if how == 'test' else 'validation'}"
    ):
        run(data)
    assert run(data, purpose="masks").targets  # only to look at


def test_a_damaged_file_is_reported_later_and_refuses_nothing(data):
    (data / "c.nii.gz").write_bytes(b"no scan")
    assert names(run(data).targets) == ["c", "d"]


def test_several_channels_are_refused(data):
    write_list(data, unlabelled=[{"image": ["./c.nii.gz", "./d.nii.gz"]}])
    with pytest.raises(InputError, match="one of several channels"):
        run(data)


def test_without_validation_section_and_folds_every_label_is_carried(data):
    write_list(data, validation=[])
    assert names(run(data).labelled) == ["a", "b"]
    write_list(data, validation=[], training=[entry("a")])
    assert names(run(data).labelled) == ["a"]
    write_list(data, validation=[], training=[entry("a", fold=0), entry("b", fold=1)])
    assert names(run(data).labelled) == ["b"]  # as in a training: fold 0 is held out


def test_folds_hold_cases_out_also_without_a_fold(data):
    write_list(data, validation=[])
    scans = run(data, folds=2)
    assert len(scans.labelled) == 1 and len(scans.held_out["validation"]) == 1


def test_another_value_of_unknown_voxels_is_refused(data):
    write_list(data, ignore_label=6)
    with pytest.raises(InputError, match="declares 6 as the value of unknown voxels, and carried labels use 255"):
        run(data)
    write_list(data, ignore_label=255)
    assert names(run(data).labelled) == ["a", "b"]


def test_weights_of_labelled_scans_are_kept(data):
    write_list(data, training=[entry("a", weight=2.5), entry("b")])
    assert [scan.weight for scan in run(data).labelled] == [2.5, 1.0]
