# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, Orientationd, Spacingd

from bundles.common.errors import InputError
from bundles.segmentation.training.label_presence import (
    check_label_presence,
    check_validation_presence,
    label_volumes,
    resampled_away,
)
from bundles.segmentation.training.loss import class_weights

LABELS = {"0": "background", "1": "spleen", "2": "liver", "3": "aorta"}


def label_file(path, spacing=(1, 1, 1), **counts):
    label = np.zeros((10, 10, 10), np.uint8)
    start = 0
    for name, count in counts.items():
        value = next(int(value) for value, organ in LABELS.items() if organ == name)
        label.ravel()[start : start + count] = value
        start += count
    nib.save(nib.Nifti1Image(label, np.diag([*spacing, 1])), path)
    return {"image": "unread", "label": str(path)}


@pytest.fixture
def scans(tmp_path):
    return [
        label_file(tmp_path / "a.nii.gz", spacing=(2, 2, 3), spleen=10, liver=100),
        label_file(tmp_path / "b.nii.gz", liver=50),
    ]


def test_volumes_are_in_cubic_millimetres(scans):
    np.testing.assert_allclose(
        label_volumes(scans, classes=4), [[890 * 12, 10 * 12, 100 * 12, 0], [950, 0, 50, 0]], rtol=1e-6
    )


def test_weights_grow_as_the_volume_shrinks(scans):
    weights = class_weights(scans, classes=4, balance=0.5, background=0.1)
    np.testing.assert_allclose(weights, [0.1, (1250 / 120) ** 0.5, 1, 1], rtol=1e-6)


def test_no_balance_reads_no_file():
    assert class_weights([{"label": "absent"}], classes=3, balance=0, background=1).tolist() == [1, 1, 1]


def test_an_organ_in_no_training_case_is_named(scans, caplog):
    caplog.set_level("INFO")
    check_label_presence(scans=scans, labels=LABELS)
    warning, remark = caplog.messages
    assert "no training case contains aorta" in warning
    assert "not all of the 2 training cases contain spleen (1)" in remark


def test_labels_of_background_alone_are_refused(tmp_path):
    scans = [label_file(tmp_path / "empty.nii.gz")]
    with pytest.raises(InputError, match=r"contain only background, such as .*empty\.nii\.gz"):
        check_label_presence(scans=scans, labels=LABELS)


def test_no_scan_at_all_is_refused_with_what_to_do():
    with pytest.raises(InputError, match="no labelled training scan.*store a label first"):
        check_label_presence(scans=[], labels=LABELS)


def partly_known(path, unknown, **counts):
    scan = label_file(path, **counts)
    label = np.asarray(nib.load(scan["label"]).dataobj).copy()
    label.ravel()[-unknown:] = 255
    nib.save(nib.Nifti1Image(label, np.eye(4)), scan["label"])
    return scan


def test_unknown_voxels_are_no_class_and_no_background(tmp_path, caplog):
    caplog.set_level("INFO")
    scans = [
        partly_known(tmp_path / "a.nii.gz", 400, spleen=10, liver=100, aorta=5),
        partly_known(tmp_path / "b.nii.gz", 200, liver=50, spleen=1, aorta=5),
        label_file(tmp_path / "c.nii.gz", liver=50, spleen=1, aorta=5),
    ]
    expected = [[485, 10, 100, 5, 400], [744, 1, 50, 5, 200], [944, 1, 50, 5, 0]]
    assert label_volumes(scans, classes=4, ignore_label=255).tolist() == expected
    assert label_volumes(scans, classes=4).tolist() == [row[:4] for row in expected]
    weights = class_weights(scans, classes=4, balance=1, background=0.1)
    np.testing.assert_allclose(weights, [0.1, 200 / 12, 1, 200 / 15], rtol=1e-6)
    check_label_presence(scans=scans, labels=LABELS, ignore_label=255)
    (line,) = caplog.messages
    assert "2 of the 3 training cases have unknown voxels (value 255): 30% of these scans" in line


def test_a_label_that_may_mark_its_structure_by_255_is_named(tmp_path, caplog):
    scans = [
        partly_known(tmp_path / "mask.nii.gz", 100),
        label_file(tmp_path / "b.nii.gz", liver=1, spleen=1, aorta=1),
    ]
    check_label_presence(scans=scans, labels=LABELS, ignore_label=255)
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "1 label with unknown voxels contains no structure, such as" in line and "mask.nii.gz" in line


def test_a_label_without_a_known_voxel_is_refused(tmp_path):
    scans = [label_file(tmp_path / "b.nii.gz", liver=1), partly_known(tmp_path / "a.nii.gz", 1000)]
    with pytest.raises(InputError, match=r"a\.nii\.gz has no known voxel: all are 255"):
        check_label_presence(scans=scans, labels=LABELS, ignore_label=255)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SAR"])
def test_structures_that_resampling_loses_are_those_that_monai_loses(tmp_path, axes, caplog):
    rng = np.random.default_rng(3)
    affine = np.diag([0.9, 1.1, 2.0, 1.0])
    affine[:3, 3] = -20, 30, 7
    new, scans, lost = (2.0, 2.0, 4.0), [], []
    for number in range(6):
        label = np.zeros((21, 18, 13), np.uint8)
        label[2:9, 2:9, 2:9] = 2
        label[tuple(rng.integers(9, size, 1)[0] for size in label.shape)] = 1
        image = nib.Nifti1Image(label, affine)
        turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(axes))
        nib.save(image.as_reoriented(turn), tmp_path / f"{number}.nii.gz")
        scans.append({"label": str(tmp_path / f"{number}.nii.gz")})
        load = [LoadImaged("label"), EnsureChannelFirstd("label"), Orientationd("label", axcodes="RAS", labels=None)]
        loaded = Compose([*load, Spacingd("label", pixdim=new, mode="nearest")])(scans[-1])["label"]
        lost.append([False, not (loaded == 1).any(), False, False])
    volumes = label_volumes(scans, classes=4)
    np.testing.assert_allclose(volumes[:, 1], 0.9 * 1.1 * 2.0, rtol=1e-6)
    found = resampled_away(scans, volumes=volumes, spacing=new)
    np.testing.assert_array_equal(found, lost)
    assert 0 < found.sum() < 6  # the test tests something
    check_label_presence(scans=scans, labels=LABELS, spacing=new)
    (warning,) = [each for each in caplog.messages if "no voxel of it is left" in each]
    first = scans[int(found[:, 1].argmax())]["label"]
    assert f"spleen is so small in {found.sum()} of its 6 training cases" in warning and first in warning


def test_a_validation_without_any_structure_is_refused(tmp_path):
    scans = [label_file(tmp_path / "a.nii.gz"), partly_known(tmp_path / "b.nii.gz", 5)]
    with pytest.raises(InputError, match=r"all 2 validation cases hold no structure, such as .*a\.nii\.gz.*--fold all"):
        check_validation_presence(scans=scans, labels=LABELS, ignore_label=255)
    check_validation_presence(scans=[], labels=LABELS)


def test_structures_that_no_validation_label_holds_are_named(tmp_path, caplog):
    scans = [
        label_file(tmp_path / "a.nii.gz", liver=3),
        {**label_file(tmp_path / "b.nii.gz", liver=3, aorta=2), "labelled": [2]},
    ]
    check_validation_presence(scans=scans, labels={int(value): name for value, name in LABELS.items()})
    (line,) = caplog.messages
    assert line.startswith("no validation case contains spleen, aorta")
    caplog.clear()
    check_validation_presence(scans=[label_file(tmp_path / "c.nii.gz", spleen=1, liver=3, aorta=1)], labels=LABELS)
    assert not caplog.messages


def test_rounding_errors_of_labels_are_no_other_class(tmp_path):
    label = np.zeros((4, 4, 4), np.float32)
    label[0, 0] = 0.9999999
    nib.save(nib.Nifti1Image(label, np.eye(4)), tmp_path / "l.nii.gz")
    assert label_volumes([{"label": str(tmp_path / "l.nii.gz")}], classes=2).tolist() == [[60, 4]]


def test_structures_that_a_case_does_not_show_are_not_missed_there(tmp_path, caplog):
    caplog.set_level("INFO")
    scans = [
        label_file(tmp_path / "a.nii.gz", spleen=10, liver=100, aorta=5),
        {**label_file(tmp_path / "b.nii.gz", liver=50), "labelled": [2]},
        {**label_file(tmp_path / "c.nii.gz"), "labelled": [1]},
    ]
    check_label_presence(scans=scans, labels=LABELS)
    partial, remark = caplog.messages
    assert (
        "2 of the 3 training cases show some structures only. Cases that show each: spleen 2, liver 2, aorta 1"
        in partial
    )
    assert remark == "not all of the 3 training cases contain spleen (1 of 2 that show it)"


def test_a_structure_that_an_entry_does_not_name_is_told(tmp_path, caplog):
    scans = [
        {**label_file(tmp_path / "a.nii.gz", spleen=10, liver=100, aorta=2), "labelled": [2]},
        {**label_file(tmp_path / "c.nii.gz", liver=100, aorta=2), "labelled": [2]},
        label_file(tmp_path / "b.nii.gz", liver=5, aorta=3),
    ]
    check_label_presence(scans=scans, labels=LABELS)
    contains, absent = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert "a.nii.gz contains spleen, aorta, which its entry does not name under 'labelled'" in contains
    assert contains.endswith("Cases of this kind: spleen 1, aorta 2.")
    assert "no training case contains spleen" in absent
