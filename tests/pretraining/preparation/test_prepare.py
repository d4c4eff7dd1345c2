# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""From raw scans to data list, audit, sheets and store: every scan accounted for, nothing done twice, nothing half-written."""

from __future__ import annotations

import csv
import errno
import fcntl
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Spacing

from bundles.common.data.data_list import segmentation_scans, unlabelled_scans
from bundles.common.errors import InputError, RefusedScan
from bundles.pretraining.crops.patch_store import StoredScan
from bundles.pretraining.preparation import one_scan as one_scan
from bundles.pretraining.preparation import results as prepared_results
from bundles.pretraining.preparation.one_scan import Outputs, Recipe
from bundles.pretraining.preparation.prepare import STATUS_LEFT_OUT, Summary, exit_if_scans_were_left_out, prepare

from ...common.scans.raw_scans import (
    MIN_BODY,
    contents,
    phantom,
    ras,
    read_list,
    write_bad,
    write_dicom,
    write_good,
    write_nifti,
)
from ...common.scans.test_meta_image import write as write_meta_image
from ...workflows.command_line import BUNDLES

COLLECTIONS = BUNDLES / "swin_unetr_pretrain" / "configs" / "collections.yaml"


def run(source, out: Path, *, recipe: dict | None = None, **options) -> Summary:
    chosen = Recipe(**{"min_body": MIN_BODY, **(recipe or {})})
    return prepare(source=source, dataset_dir=str(out), recipe=chosen, **{"workers": 0, **options})


def audit(out: Path) -> dict[str, dict]:
    with open(out / "audit.csv", encoding="utf-8", newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def entries(out: Path) -> list[dict]:
    content = read_list(out)
    return [entry for section in ("training", "validation", "test") for entry in content.get(section, [])]


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The scans that were read since the list was last cleared."""
    names, real = [], one_scan.read_scan
    monkeypatch.setattr(
        one_scan, "read_scan", lambda candidate, **how: (names.append(candidate.name), real(candidate, **how))[1]
    )
    return names


@pytest.fixture
def good(tmp_path) -> Path:
    write_good(tmp_path / "raw")
    return tmp_path / "raw"


# ---- what is written -----------------------------------------------------------------------------------------------


def test_good_scans_are_stored_bit_for_bit(tmp_path):
    seeds = write_good(tmp_path / "raw")
    out = tmp_path / "out"
    assert run(tmp_path / "raw", out) == Summary(used=4, left_out=0, reasons={})
    assert set(audit(out)) == set(seeds)
    for entry in entries(out):
        image = out / entry["image"]
        name = Path(entry["store"]).stem
        stored, (voxels, affine) = StoredScan(out / entry["store"]), ras(image)
        assert stored.dtype == voxels.dtype == np.int16
        np.testing.assert_array_equal(stored.read((slice(None),) * 3), voxels)
        np.testing.assert_allclose(stored.affine, affine, atol=1e-4)
        np.testing.assert_array_equal(voxels, phantom(seeds[name])[::-1, ::-1])  # written in LPS
        assert stored.body_box == [[4, 20], [4, 17], [2, 19]]


def test_dicom_becomes_nifti_with_its_grid(tmp_path, good):
    run(good, tmp_path / "out")
    image = nib.load(tmp_path / "out" / "nifti" / "raw__pacs__a.nii.gz")
    np.testing.assert_array_equal(np.asanyarray(image.dataobj), phantom(3))
    assert image.get_data_dtype() == np.int16
    assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (1, 1)
    np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-3)
    np.testing.assert_allclose(nib.affines.voxel_sizes(image.affine), (0.8, 0.9, 2.5))
    assert len(list((tmp_path / "out" / "nifti").iterdir())) == 2  # none of the scans that are NIfTI already


def test_metaimage_becomes_nifti_with_its_grid(tmp_path):
    (tmp_path / "LUNA").mkdir()
    write_meta_image(tmp_path / "LUNA" / "1.3.6.mha", phantom(5), local=True)
    run(tmp_path / "LUNA", tmp_path / "out")
    image = nib.load(tmp_path / "out" / "nifti" / "LUNA__1.3.6.nii.gz")
    np.testing.assert_array_equal(np.asanyarray(image.dataobj), phantom(5))
    np.testing.assert_allclose(image.affine, [[-0.7, 0, 0, 10.5], [0, -0.8, 0, -20], [0, 0, 2.5, 30.25], [0, 0, 0, 1]])
    stored = StoredScan(tmp_path / "out" / "store" / "LUNA__1.3.6.b2nd")
    np.testing.assert_array_equal(stored.read((slice(None),) * 3), phantom(5)[::-1, ::-1])


def test_the_data_list_feeds_the_bundles(tmp_path, good):
    run(good, tmp_path / "out", folds=4)
    training = unlabelled_scans(tmp_path / "out", section="training")
    validation = unlabelled_scans(tmp_path / "out", section="validation")
    assert (len(training), len(validation)) == (3, 1)
    assert {entry["fold"] for entry in entries(tmp_path / "out")} == {0, 1, 2, 3}
    assert read_list(tmp_path / "out")["modality"] == {"0": "CT"}


def test_paths_are_relative_below_the_output_and_absolute_elsewhere(tmp_path, good):
    run(good, tmp_path / "out")
    images = {Path(entry["store"]).stem: entry["image"] for entry in entries(tmp_path / "out")}
    assert images["raw__pacs__a"] == "nifti/raw__pacs__a.nii.gz"
    assert images["raw__site_2__scan"] == str(good / "site 2" / "scan.nii")


def test_labels_of_a_source_list_are_carried_along(tmp_path):
    folder = tmp_path / "T"
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        write_nifti(folder / "im" / f"{name}.nii.gz", seed)
        write_nifti(folder / "labelsTr" / f"{name}.nii.gz", 0, np.zeros((24, 22, 20), np.uint8))
    pairs = [{"image": f"im/{name}.nii.gz", "label": f"labelsTr/{name}.nii.gz"} for name in "ab"]
    content = {"labels": {"0": "background", "1": "liver"}, "training": pairs, "test": ["im/c.nii.gz"]}
    (folder / "dataset.json").write_text(json.dumps(content))
    run(folder, tmp_path / "out", folds=2)
    written = read_list(tmp_path / "out")
    assert written["labels"] == content["labels"]
    assert [Path(entry["image"]).name for entry in written["test"]] == ["c.nii.gz"]
    scans = segmentation_scans(tmp_path / "out", section="all")
    assert [scan["label"] for scan in scans] == [str(folder / pair["label"]) for pair in pairs]


def test_what_is_said_of_a_label_is_carried_along(tmp_path):
    folder = tmp_path / "T"
    for seed, name in enumerate("abc"):
        write_nifti(folder / "im" / f"{name}.nii.gz", seed)
        write_nifti(folder / "labelsTr" / f"{name}.nii.gz", 0, np.zeros((24, 22, 20), np.uint8))
    notes = {"a": {"labelled": ["liver"], "weight": 0.5}, "b": {"carried": True}, "c": {}}
    pairs = [{"image": f"im/{name}.nii.gz", "label": f"labelsTr/{name}.nii.gz", **notes[name]} for name in notes]
    content = {"labels": {"0": "background", "1": "liver"}, "ignore_label": 9, "training": pairs}
    (folder / "dataset.json").write_text(json.dumps(content))
    run(folder, tmp_path / "out", validation_share=0.34, folds=0, seed=1)
    written = read_list(tmp_path / "out")
    assert written["ignore_label"] == 9
    known = {Path(entry["image"]).name[0]: entry for entry in entries(tmp_path / "out")}
    assert (known["a"]["labelled"], known["a"]["weight"]) == (["liver"], 0.5) and "carried" not in known["c"]
    (held_out,) = written["validation"]
    carried_is_held_out = Path(held_out["image"]).name == "b.nii.gz"
    assert ("label" not in known["b"]) == carried_is_held_out and known["b"].get(
        "carried", False
    ) != carried_is_held_out
    unlabelled_scans(tmp_path / "out", section="training")  # the list can be read


LEFT_OUT = {
    "a folder of masks": ("masks/liver.nii.gz", "masks", "is a folder of masks by its name (1 files, such as"),
    "masks of a case": ("s1/segmentations/liver.nii.gz", "segmentations", "is a folder of masks by its name"),
    "a result": ("scan_seg.nii.gz", "scan_seg.nii.gz", "is named like a mask or another result"),
    "an archive": ("site/study.zip", "study.zip", "is packed: if it holds scans, unpack it"),
    "a packed slice": ("x.dcm.gz", "x.dcm.gz", "is packed"),
    "an earlier output": ("old/.prepared/lock", "old", "is the output of an earlier run"),
    "another format": ("x.nrrd", "x.nrrd", "unsupported format"),
}


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_what_is_left_out_by_its_name_has_a_row_a_warning_and_status_3(tmp_path, caplog, kind):
    file, name, reason = LEFT_OUT[kind]
    write_nifti(tmp_path / "raw" / "a.nii.gz", 1)
    (tmp_path / "raw" / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "raw" / file).write_bytes(b"x")
    summary = run(tmp_path / "raw", tmp_path / "out")
    assert (summary.used, summary.left_out) == (1, 1)
    (row,) = (row for row in audit(tmp_path / "out").values() if row["verdict"] == "left_out")
    assert Path(row["source"]).name == name and reason in row["reason"] and row["kind"] == "file"
    with pytest.raises(SystemExit) as status:
        exit_if_scans_were_left_out(summary)
    assert status.value.code == STATUS_LEFT_OUT
    if kind != "another format":
        assert "1 file or folder is left out" in caplog.text
    again = run(tmp_path / "raw", tmp_path / "out")
    assert again == summary


SCANS_OF_ODD_NAMES = [
    ["labelled/a.nii.gz", "Segeberg/a.nii.gz", "maskenball/a.nii.gz"],
    ["s0001/ct.nii.gz", "s0002/ct.nii.gz"],
    ["SCAN.NII.GZ", "Scan2.nii.GZ"],
    ["a.nii", "a.nii.gz"],
    ["A.nii.gz", "a.nii.gz"],
    ["a/labels.nii.gz", "b/x.nii.gz"],
]


@pytest.mark.parametrize("files", SCANS_OF_ODD_NAMES, ids=lambda files: files[0])
def test_scans_of_odd_names_are_all_used(tmp_path, files):
    for seed, file in enumerate(files):
        plain = tmp_path / "made.nii.gz" if file.lower().endswith("gz") else tmp_path / "made.nii"
        write_nifti(plain, seed)
        path = Path(os.path.normpath(tmp_path / "raw" / file))
        path.parent.mkdir(parents=True, exist_ok=True)
        plain.rename(path)
    assert run(tmp_path / "raw", tmp_path / "out") == Summary(used=len(files), left_out=0, reasons={})
    stores = [Path(entry["store"]).name for entry in entries(tmp_path / "out")]
    assert len(set(stores)) == len(files) and not any("nii" in name.lower() for name in stores)


def test_the_audit_has_a_row_a_scan_with_its_numbers(tmp_path, good):
    run(good, tmp_path / "out")
    row = audit(tmp_path / "out")["raw__pacs__a"]
    assert row["verdict"] == "used" and row["reason"] == ""
    assert (row["shape"], row["spacing"], row["orientation"]) == ("24x22x20", "0.8x0.9x2.5", "LPS")
    assert (row["hu_min"], row["hu_max"]) == (str(phantom(3).min()), str(phantom(3).max()))
    assert row["body_box"] == "4:20 4:17 2:19" and row["body_mm"] == "12.8x11.7x42.5"
    assert float(row["body_share"]) == pytest.approx((phantom(3) > -500).mean(), rel=1e-5)
    assert row["modality"] == "CT" and row["series_uid"]
    assert row["source"] == str(good / "pacs" / "a")


def test_patients_are_pseudonyms_unless_asked_otherwise(tmp_path, good):
    run(good, tmp_path / "out")
    patient = audit(tmp_path / "out")["raw__pacs__a"]["patient"]
    assert patient.startswith("p") and patient != "A" and len(patient) == 13
    everything = b"".join(data for name, data in contents(tmp_path / "out").items() if name.endswith((".json", ".csv")))
    assert b"Doe" not in everything and b'"A"' not in everything
    run(good, tmp_path / "out", recipe={"keep_patient_ids": True})
    assert audit(tmp_path / "out")["raw__pacs__a"]["patient"] == "A"


def test_patients_are_read_from_paths_by_a_pattern(tmp_path, good):
    run(good, tmp_path / "out", recipe={"keep_patient_ids": True}, patient_pattern=r"site (\d)")
    patients = {name: row["patient"] for name, row in audit(tmp_path / "out").items()}
    assert patients == {
        "raw__site_1__Müller__scan": "1",
        "raw__site_2__scan": "2",
        "raw__pacs__a": "A",
        "raw__pacs__b": "B",
    }
    with pytest.raises(InputError, match="matches none of the paths"):
        run(good, tmp_path / "out", patient_pattern="LIDC")
    with pytest.raises(InputError, match="regular expression"):
        run(good, tmp_path / "out", patient_pattern="(")


def test_store_without_nifti_and_nifti_without_store(tmp_path, good):
    run(good, tmp_path / "stored", recipe={"write_nifti": False})
    assert not (tmp_path / "stored" / "nifti").exists()
    images = {entry["image"] for entry in entries(tmp_path / "stored")}
    assert "store/raw__pacs__a.b2nd" in images and str(good / "site 2" / "scan.nii") in images
    run(good, tmp_path / "listed", recipe={"write_store": False})
    assert not (tmp_path / "listed" / "store").exists()
    assert all("store" not in entry for entry in entries(tmp_path / "listed"))
    with pytest.raises(InputError, match="--write_store"):
        run(good, tmp_path / "neither", recipe={"write_store": False, "write_nifti": False})


def test_the_store_alone_is_resampled_as_train_yaml_does(tmp_path, good):
    run(good, tmp_path / "out", recipe={"spacing": 2.0})
    stored = StoredScan(tmp_path / "out" / "store" / "raw__pacs__a.b2nd")
    voxels, affine = ras(tmp_path / "out" / "nifti" / "raw__pacs__a.nii.gz")
    assert voxels.shape == (24, 22, 20)
    expected = Spacing((2.0, 2.0, 2.0), mode="bilinear")(
        MetaTensor(torch.from_numpy(voxels[None].astype(np.float32)), affine=affine)
    )
    got = stored.read((slice(None),) * 3)
    assert got.dtype == np.int16 and stored.spacing == pytest.approx((2, 2, 2))
    assert np.abs(got - expected[0].numpy()).max() < 0.51  # rounded to whole HU
    body = np.argwhere(got > -500)
    assert stored.body_box == [[int(low), int(high) + 1] for low, high in zip(body.min(0), body.max(0), strict=True)]


# ---- bad scans -----------------------------------------------------------------------------------------------------


def test_bad_scans_are_left_out_by_reason_and_stop_no_other(tmp_path):
    good, bad = write_good(tmp_path / "raw"), write_bad(tmp_path / "raw")
    summary = run(tmp_path / "raw", tmp_path / "out")
    rows = audit(tmp_path / "out")
    assert summary.used == len(good) + 1  # one of the twins
    assert summary.left_out == len(bad) == sum(summary.reasons.values())
    assert {name for name, row in rows.items() if row["verdict"] == "used"} == {*good, "raw__twin"}
    for end, words in bad.items():
        (name,) = [name for name in rows if name.endswith((f"__{end}", f"/{end}"))]
        assert rows[name]["verdict"] == "left_out" and words in rows[name]["reason"], rows[name]["reason"]
    assert "raw__twin" in rows["raw__twin_again"]["reason"]
    assert not (tmp_path / "out" / "store" / "raw__twin_again.b2nd").exists()
    assert len(list((tmp_path / "out" / "store").iterdir())) == len(good) + 1
    assert (tmp_path / "out" / "contact_sheet_001.png").is_file()
    assert (tmp_path / "out" / "left_out_001.png").is_file()


def test_suspects_can_be_kept(tmp_path, good):
    write_nifti(good / "windowed.nii.gz", 0, phantom(16).clip(-175, 250))
    run(good, tmp_path / "out")
    assert audit(tmp_path / "out")["raw__windowed"]["verdict"] == "left_out"
    run(good, tmp_path / "out", recipe={"keep_suspect": True})
    row = audit(tmp_path / "out")["raw__windowed"]
    assert row["verdict"] == "used" and "--keep_suspect" in row["reason"]


def test_a_tilted_series_is_straightened_on_request(tmp_path):
    write_dicom(tmp_path / "raw" / "upright", 3, PatientID="A")
    write_dicom(tmp_path / "raw" / "leaning", 4, PatientID="B", tilt=12.0)
    assert run(tmp_path / "raw", tmp_path / "out").left_out == 1
    assert "--straighten_tilt true" in audit(tmp_path / "out")["raw__leaning"]["reason"]
    assert run(tmp_path / "raw", tmp_path / "out", recipe={"straighten_tilt": True}).left_out == 0
    axes = nib.load(tmp_path / "out" / "nifti" / "raw__leaning.nii.gz").affine[:3, :3]
    np.testing.assert_allclose(axes.T @ axes, np.diag(np.square((0.8, 0.9, 2.5))), atol=1e-3)
    stored = StoredScan(tmp_path / "out" / "store" / "raw__leaning.b2nd").read((slice(None),) * 3)
    assert stored.shape[1] == phantom(4).shape[1] + 12  # 19 slices of 2.5 mm, tan 12 degrees, pixels of 0.9 mm
    assert stored.min() == phantom(4).min()


def test_a_run_whose_scans_are_all_left_out_says_so(tmp_path):
    write_nifti(tmp_path / "raw" / "mr.nii.gz", 0, (phantom(15) + 1024).astype(np.uint16))
    assert run(tmp_path / "raw", tmp_path / "out") == Summary(used=0, left_out=1, reasons={"not CT in HU": 1})
    assert entries(tmp_path / "out") == []


def test_an_error_in_one_scan_stops_no_other(tmp_path, good, monkeypatch):
    real = one_scan.audit_scan

    def odd(volume, **options):
        if volume.voxels.min() == phantom(2).min() and np.array_equal(volume.voxels, phantom(2)):
            raise ZeroDivisionError("nobody thought of it")
        return real(volume, **options)

    monkeypatch.setattr(one_scan, "audit_scan", odd)
    assert run(good, tmp_path / "out").left_out == 1
    assert "nobody thought of it" in audit(tmp_path / "out")["raw__site_2__scan"]["reason"]


def test_exit_status():
    exit_if_scans_were_left_out(Summary(3, 0, {}))
    with pytest.raises(SystemExit) as left:
        exit_if_scans_were_left_out(Summary(3, 2, {"not CT": 2}))
    assert left.value.code == STATUS_LEFT_OUT == 3


# ---- stopped and started again -------------------------------------------------------------------------------------


def test_a_second_run_reads_nothing_and_changes_nothing(tmp_path, good, read):
    run(good, tmp_path / "out")
    first = contents(tmp_path / "out")
    assert len(read) == 4
    read.clear()
    run(good, tmp_path / "out")
    assert read == []
    assert contents(tmp_path / "out") == first


@pytest.mark.parametrize("after", [0, 1, 2, 3])
@pytest.mark.parametrize("in_the_middle_of", ["read_scan", "write_scan", "thumbnail", "write_text"])
def test_a_run_stopped_anywhere_ends_as_an_unbroken_one(tmp_path, good, monkeypatch, after, in_the_middle_of):
    write_nifti(good / "twin.nii.gz", 1)
    run(good, tmp_path / "unbroken")
    calls, real = [], getattr(one_scan, in_the_middle_of)

    def stop(*arguments, **options):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(one_scan, in_the_middle_of, stop)
        run(good, tmp_path / "out")
    (tmp_path / "out" / "store").mkdir(exist_ok=True)
    (tmp_path / "out" / "store" / ".0a1b2c3d.raw__pacs__a.b2nd").write_bytes(b"half")  # as kill -9 leaves it
    run(good, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")


def test_changed_options_give_what_a_fresh_run_gives(tmp_path, good):
    write_nifti(good / "windowed.nii.gz", 0, phantom(16).clip(-175, 250))
    run(good, tmp_path / "out", recipe={"keep_suspect": True, "spacing": 3.0})
    run(good, tmp_path / "out")
    run(good, tmp_path / "fresh")
    changed = contents(tmp_path / "out")
    aside = {name for name in changed if "set_aside" in name}
    assert {name.rpartition("/")[2] for name in aside} >= {"raw__windowed.b2nd", "raw__windowed.json"}
    assert {name: changed[name] for name in changed.keys() - aside} == contents(tmp_path / "fresh")


def test_a_record_from_before_an_option_existed_still_counts(tmp_path, good, read):
    """Its default is what was done then; any other value prepares the scan again."""
    run(good, tmp_path / "out")
    for path in (tmp_path / "out").rglob("*.json"):
        record = json.loads(path.read_text())
        if "made_from" in record:
            del record["made_from"]["recipe"]["straighten_tilt"]
            path.write_text(json.dumps(record))
    read.clear()
    run(good, tmp_path / "out")
    assert read == []
    run(good, tmp_path / "out", recipe={"straighten_tilt": True})
    assert len(read) == 4


def test_only_what_is_new_or_changed_is_read(tmp_path, good, read):
    run(good, tmp_path / "out")
    read.clear()
    write_nifti(good / "new.nii.gz", 5)
    write_nifti(good / "site 2" / "scan.nii", 6)
    os.utime(good / "site 2" / "scan.nii", ns=(1, 1))
    (good / "pacs" / "b" / "image0000.dcm").touch()
    run(good, tmp_path / "out")
    assert sorted(read) == ["raw__new", "raw__pacs__b", "raw__site_2__scan"]
    stored = StoredScan(tmp_path / "out" / "store" / "raw__site_2__scan.b2nd")
    np.testing.assert_array_equal(stored.read((slice(None),) * 3), phantom(6)[::-1, ::-1])


def test_files_that_were_deleted_are_made_again(tmp_path, good, read):
    run(good, tmp_path / "out")
    first = contents(tmp_path / "out")
    (tmp_path / "out" / "store" / "raw__pacs__a.b2nd").unlink()
    (tmp_path / "out" / "nifti" / "raw__pacs__b.nii.gz").unlink()
    read.clear()
    run(good, tmp_path / "out")
    assert sorted(read) == ["raw__pacs__a", "raw__pacs__b"]
    assert contents(tmp_path / "out") == first


def test_scans_that_are_gone_are_removed(tmp_path, good):
    write_nifti(good / "gone.nii.gz", 5)
    run(good, tmp_path / "out")
    (good / "gone.nii.gz").unlink()
    run(good, tmp_path / "out")
    assert not [name for name in contents(tmp_path / "out") if "gone" in name]
    run(good, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_the_twin_of_a_scan_that_is_gone_takes_its_place(tmp_path, good):
    write_nifti(good / "a first.nii.gz", 1)
    run(good, tmp_path / "out")
    assert audit(tmp_path / "out")["raw__site_1__Müller__scan"]["verdict"] == "left_out"
    (good / "a first.nii.gz").unlink()
    run(good, tmp_path / "out")
    assert audit(tmp_path / "out")["raw__site_1__Müller__scan"]["verdict"] == "used"
    assert (tmp_path / "out" / "store" / "raw__site_1__Müller__scan.b2nd").is_file()


def test_a_scan_that_could_not_be_read_is_tried_again(tmp_path, good, monkeypatch):
    real = nib.load

    def denied(path, *arguments, **options):
        if str(path).endswith("scan.nii"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(nib, "load", denied)
        assert run(good, tmp_path / "out").left_out == 1
    assert "Permission denied" in audit(tmp_path / "out")["raw__site_2__scan"]["reason"]
    assert run(good, tmp_path / "out").left_out == 0


# ---- the output folder ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["write_scan", "write_text", "write_nifti"])
def test_a_full_disk_stops_the_run_with_advice_and_nothing_half_written(tmp_path, good, monkeypatch, failing):
    real, calls = getattr(one_scan, failing), []

    def full(path, *arguments, **options):
        calls.append(path)
        if len(calls) > 1:
            Path(path).with_name(f".01234567.{Path(path).name}").write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(InputError) as stopped:
        patch.setattr(one_scan, failing, full)
        run(good, tmp_path / "out")
    message = str(stopped.value)
    assert "No space left on device" in message and str(tmp_path / "out") in message and "same command" in message
    assert not [name for name in contents(tmp_path / "out") if Path(name).name.startswith(".")]
    assert not (tmp_path / "out" / "audit.csv").exists()
    run(good, tmp_path / "out")
    run(good, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_disk_that_is_full_at_the_end_is_told_too(tmp_path, good, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(prepared_results, "write_sheets", full)
    with pytest.raises(InputError, match="No space left on device"):
        run(good, tmp_path / "out")


def test_two_runs_do_not_share_an_output(tmp_path, good):
    run(good, tmp_path / "out")
    with open(tmp_path / "out" / ".prepared" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="Another run"):
            run(good, tmp_path / "out")


def test_a_data_set_of_somebody_else_is_not_overwritten(tmp_path, good):
    (good / "dataset.json").write_text('{"training": []}')
    with pytest.raises(InputError, match="another --dataset_dir"):
        run(good, good)
    assert (good / "dataset.json").read_text() == '{"training": []}'


def test_results_of_other_sources_are_not_removed(tmp_path, good):
    run(good, tmp_path / "out")
    before = contents(tmp_path / "out")
    write_nifti(tmp_path / "other" / "scan.nii.gz", 9)
    with pytest.raises(InputError, match="4 scans of other sources"):
        run(tmp_path / "other", tmp_path / "out")
    assert contents(tmp_path / "out") == before
    assert run([good, tmp_path / "other"], tmp_path / "out").used == 5


def test_an_output_inside_the_source_is_not_a_source(tmp_path, good):
    run(good, good / "prepared")
    first = contents(good / "prepared")
    assert run(good, good / "prepared").used == 4
    assert contents(good / "prepared") == first


# ---- patients, collections, progress -------------------------------------------------------------------------------


def test_luna16_and_lidc_in_one_run(tmp_path, caplog):
    """The same scans under other names: each is used once, and no patient trains and validates."""
    for number in range(4):
        write_dicom(tmp_path / "LIDC" / f"{number}", number, PatientID=f"LIDC-{number // 2}")
    for number in range(2):
        write_nifti(tmp_path / "LUNA" / f"1.3.6.{number}.nii.gz", number)
    (tmp_path / "LUNA" / "dataset.json").write_text(
        json.dumps({"validation": ["1.3.6.0.nii.gz"], "training": ["1.3.6.1.nii.gz"]})
    )
    with caplog.at_level("INFO"):
        summary = run(
            [tmp_path / "LUNA", tmp_path / "LIDC"], tmp_path / "out", collection="LIDC", collections_file=COLLECTIONS
        )
    assert summary == Summary(used=4, left_out=2, reasons={"equal to another scan": 2})
    sections = Counter(
        (entry["patient"], section)
        for section in ("training", "validation")
        for entry in read_list(tmp_path / "out")[section]
    )
    assert sorted(section for _, section in sections) == ["training", "validation"]
    assert "is in 2 sections" in caplog.text
    assert "LIDC: 4 scans used, the authors' lists have 450 + 24 (-470)" in caplog.text
    assert "4 of 6 scans used, 2 left out" in caplog.text


@pytest.mark.parametrize("options", [{"folds": 1}, {"validation_share": 1.5}])
def test_impossible_splits_are_refused_before_the_work(tmp_path, good, read, options):
    with pytest.raises(InputError, match=f"--{next(iter(options))}"):
        run(good, tmp_path / "out", **options)
    assert read == [] and not (tmp_path / "out").exists()


def test_an_unknown_collection_is_refused_before_the_work(tmp_path, good, read):
    with pytest.raises(InputError, match="'LUNA15' is not one of LUNA16"):
        run(good, tmp_path / "out", collection="LUNA15", collections_file=COLLECTIONS)
    assert read == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("recipe", "words"),
    [({"spacing": [1, 2]}, "--spacing"), ({"spacing": 0}, "--spacing"), ({"sheet_window": [5, 5]}, "--sheet_window")],
)
def test_options_out_of_range(recipe, words):
    with pytest.raises(InputError, match=words):
        Recipe(**recipe)


def test_outputs_lie_where_the_documents_say(tmp_path):
    outputs = Outputs(tmp_path, "a.b")
    assert outputs.store == tmp_path / "store" / "a.b.b2nd"
    assert outputs.nifti == tmp_path / "nifti" / "a.b.nii.gz"


# ---- mistakes that must leave no trace, and traces that must stay ----------------------------------------------------


def test_a_mistaken_source_leaves_the_raw_folder_usable(tmp_path, good):
    with pytest.raises(InputError, match="typo does not exist"):
        run(tmp_path / "typo", good)
    assert run(good, tmp_path / "out").used == 4


@pytest.mark.parametrize("out", ["raw", "raw/site 2", "raw/pacs"])
def test_an_output_among_raw_scans_is_refused(tmp_path, good, out):
    before = contents(good)
    with pytest.raises(InputError, match="another --dataset_dir"):
        run(good, tmp_path / out)
    assert contents(good) == before and not (tmp_path / out / ".prepared").exists()


def test_an_output_above_its_source_is_taken(tmp_path, good):
    assert run(good, tmp_path).used == 4
    assert run(good, tmp_path).used == 4


def test_an_output_that_cannot_be_made_is_told(tmp_path, good):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="Cannot write in .*file/out"):
        run(good, tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"workers": -1}, "--workers -1"),
        ({"workers": 1.5}, "--workers 1.5"),
        ({"patient_pattern": "(a"}, r"--patient_pattern '\(a'"),
        ({"patient_pattern": 7}, "--patient_pattern 7"),
    ],
)
def test_values_that_make_no_sense_are_refused_before_the_work(tmp_path, good, options, words):
    with pytest.raises(InputError, match=words):
        run(good, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "recipe",
    [
        {"sheet_window": 5},
        {"sheet_window": None},
        {"keep_patient_ids": "no"},
        {"write_store": None},
        {"straighten_tilt": 1},
        {"sheet_window": "ab"},
        {"spacing": "big"},
        {"max_spacing": 0},
        {"min_body": "x"},
        {"foreground_hu": "x"},
    ],
)
def test_values_of_the_wrong_kind_are_refused(recipe):
    with pytest.raises(InputError, match=f"--{next(iter(recipe))}"):
        Recipe(**recipe)


def test_of_a_pattern_with_alternatives_the_group_that_matched_counts(tmp_path, good):
    run(good, tmp_path / "out", recipe={"keep_patient_ids": True}, patient_pattern=r"(site 1)|pacs/(\w)")
    patients = {name: row["patient"] for name, row in audit(tmp_path / "out").items()}
    assert (patients["raw__site_1__Müller__scan"], patients["raw__pacs__b"]) == ("site 1", "b")


def test_a_series_beside_a_lost_slice_is_left_out(tmp_path, good):
    (good / "pacs" / "a" / "image0000.dcm").write_bytes(b"")
    assert run(good, tmp_path / "out").used == 3
    row = audit(tmp_path / "out")["raw__pacs__a"]
    assert row["verdict"] == "left_out" and "perhaps slices" in row["reason"] and row["patient"]


def test_a_refused_scan_links_the_patient_of_others(tmp_path):
    gap = [z * 2.5 + (z > 9) * 2.5 for z in range(20)]
    write_dicom(tmp_path / "LIDC" / "1", 18, PatientID="P", SeriesInstanceUID="1.3.6.1.4.1.1", offsets=gap)
    write_dicom(tmp_path / "LIDC" / "2", 19, PatientID="P", SeriesInstanceUID="1.3.6.1.4.1.2")
    write_nifti(tmp_path / "LUNA" / "1.3.6.1.4.1.1.nii.gz", 18)
    run([tmp_path / "LIDC", tmp_path / "LUNA"], tmp_path / "out")
    rows = audit(tmp_path / "out").values()
    assert [row["verdict"] for row in rows] == ["left_out", "used", "used"]
    assert len({row["patient"] for row in rows}) == 1


def test_a_folder_that_cannot_be_read_for_once_loses_nothing(tmp_path, good, read, monkeypatch, caplog):
    run(good, tmp_path / "out")
    first, real = contents(tmp_path / "out"), os.scandir

    def failing(path):
        if str(path).endswith("pacs"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", failing)
        assert run(good, tmp_path / "out").used == 2
    assert "2 scans prepared earlier" in caplog.text and "they are kept" in caplog.text
    assert len(entries(tmp_path / "out")) == 2
    read.clear()
    run(good, tmp_path / "out")
    assert read == [] and contents(tmp_path / "out") == first


def test_two_files_that_were_swapped_are_noticed(tmp_path, good, read):
    files = [good / "u" / name for name in ("a.nii", "b.nii")]
    for seed, file in enumerate(files, 30):
        write_nifti(file, seed)
        os.utime(file, ns=(1, 1))
    run(good, tmp_path / "out")
    read.clear()
    files[0].rename(good / "u" / "c")
    files[1].rename(files[0])
    (good / "u" / "c").rename(files[1])
    run(good, tmp_path / "out")
    assert read == ["raw__u__a", "raw__u__b"]


def test_a_copy_of_the_data_set_is_known(tmp_path, good, read):
    run(good, tmp_path / "out")
    read.clear()
    shutil.copytree(tmp_path, tmp_path / "copy", ignore=shutil.ignore_patterns("copy"))
    run(tmp_path / "copy" / "raw", tmp_path / "copy" / "out")
    assert read == []


def test_what_the_recipe_does_not_want_any_more_is_removed(tmp_path, good):
    run(good, tmp_path / "out")
    run(good, tmp_path / "out", recipe={"write_store": False})
    assert not list((tmp_path / "out" / "store").iterdir())
    run(good, tmp_path / "out", recipe={"write_nifti": False})
    assert not list((tmp_path / "out" / "nifti").iterdir())
    assert len(list((tmp_path / "out" / "store").iterdir())) == 4


def test_a_twin_is_made_again_when_the_scan_before_it_fails(tmp_path, good, monkeypatch):
    for name in "abc":
        write_nifti(good / "twins" / f"{name}.nii.gz", 40)
    run(good, tmp_path / "out")
    (tmp_path / "out" / "store" / "raw__twins__a.b2nd").unlink()
    real = one_scan.read_scan

    def damaged(candidate, **how):
        if candidate.name.endswith(("__a", "__b")) and "twins" in candidate.name:
            raise OSError(errno.EIO, "Input/output error")
        return real(candidate, **how)

    monkeypatch.setattr(one_scan, "read_scan", damaged)
    run(good, tmp_path / "out")
    listed = entries(tmp_path / "out")
    assert "store/raw__twins__c.b2nd" in {entry["store"] for entry in listed}
    assert all((tmp_path / "out" / entry["store"]).is_file() for entry in listed)


def test_a_label_that_is_not_there_is_told_in_the_row(tmp_path, good, caplog):
    listed = [{"image": "site 2/scan.nii", "label": "gone.nii.gz"}]
    (good / "dataset.json").write_text(json.dumps({"training": listed}))
    run(good, tmp_path / "out")
    row = audit(tmp_path / "out")["raw__site_2__scan"]
    assert (row["verdict"], row["label"]) == ("used", "") and "gone.nii.gz does not exist" in row["reason"]
    assert "1 label of" in caplog.text


# ---- nothing is lost -----------------------------------------------------------------------------------------------


def test_a_scan_that_cannot_be_read_for_once_loses_nothing(tmp_path, good, read, monkeypatch):
    run(good, tmp_path / "out")
    first, real = contents(tmp_path / "out"), one_scan.read_scan

    def failing(candidate, **how):
        raise RefusedScan("cannot be read: Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(one_scan, "file_stamp", lambda path: (_ for _ in ()).throw(OSError("gone for a moment")))
        patch.setattr(one_scan, "read_scan", failing)
        assert run(good, tmp_path / "out").used == 0
    assert entries(tmp_path / "out") == [] and not list((tmp_path / "out" / "store").glob("*"))
    assert one_scan.read_scan is real
    read.clear()
    assert run(good, tmp_path / "out").used == 4
    assert read == [] and contents(tmp_path / "out") == first


def test_a_mistyped_option_deletes_no_store(tmp_path, good, read):
    run(good, tmp_path / "out")
    first = contents(tmp_path / "out")
    assert run(good, tmp_path / "out", recipe={"max_spacing": 0.1}).used == 0
    assert not list((tmp_path / "out" / "store").glob("*"))
    read.clear()
    assert run(good, tmp_path / "out").used == 4
    assert read == [] and contents(tmp_path / "out") == first


def test_what_was_set_aside_is_forgotten_once_there_is_a_newer_scan(tmp_path, good):
    run(good, tmp_path / "out")
    run(good, tmp_path / "out", recipe={"max_spacing": 0.1})
    run(good, tmp_path / "out", recipe={"foreground_hu": -400.0})
    assert not list((tmp_path / "out" / ".prepared" / "set_aside").glob("*"))


@pytest.mark.parametrize("left", [0, 0.8])
def test_a_file_that_was_cut_is_made_again(tmp_path, good, read, left):
    run(good, tmp_path / "out")
    first = contents(tmp_path / "out")
    cut = [tmp_path / "out" / "store" / "raw__pacs__a.b2nd", tmp_path / "out" / "nifti" / "raw__pacs__b.nii.gz"]
    cut.append(next((tmp_path / "out" / ".prepared").glob("raw__site_1*.npy")))
    for file in cut:
        file.write_bytes(file.read_bytes()[: int(left * file.stat().st_size)])
    read.clear()
    run(good, tmp_path / "out")
    assert sorted(read) == ["raw__pacs__a", "raw__pacs__b", cut[2].stem] and contents(tmp_path / "out") == first


def test_a_series_without_a_readable_slice_is_kept(tmp_path, good, read, monkeypatch, caplog):
    run(good, tmp_path / "out")
    first = contents(tmp_path / "out")
    slices = sorted((good / "pacs" / "a").iterdir())
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in slices}
    for path in slices:
        path.write_bytes(b"")
        path.chmod(0o000)
    real = open

    def denied(path, *arguments, **options):
        if str(path).startswith(str(good / "pacs" / "a")):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", denied)
        run(good, tmp_path / "out")
    for path, (content, time) in before.items():
        path.chmod(0o600)
        path.write_bytes(content)
        os.utime(path, ns=(time, time))
    read.clear()
    run(good, tmp_path / "out")
    assert read == [] and contents(tmp_path / "out") == first


def test_a_source_without_any_scan_is_no_reason_to_remove_its_scans(tmp_path, good):
    other = tmp_path / "disk"
    write_nifti(other / "scan.nii.gz", 7)
    run([good, other], tmp_path / "out")
    first = contents(tmp_path / "out")
    (other / "scan.nii.gz").rename(tmp_path / "unmounted.nii.gz")
    with pytest.raises(InputError, match="disk holds no scan now, and 1 scan in .* not mounted"):
        run([good, other], tmp_path / "out")
    assert contents(tmp_path / "out") == first
    run([good], tmp_path / "out")  # left out of --source: it is meant
    assert not [name for name in contents(tmp_path / "out") if "disk" in name]
