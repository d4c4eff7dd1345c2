# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bundles.common.cases.failures import Failures
from bundles.common.data.case_names import case_name
from bundles.common.errors import InputError
from bundles.common.scans.dicom_series import read_series
from bundles.segmentation.inference import inputs as inputs_module
from bundles.segmentation.inference.inputs import SegmentationInputs, segmentation_inputs
from bundles.segmentation.inference.sources import RecordSources
from bundles.segmentation.results.organ_volumes import COLUMNS

from ...common.scans.dicom_files import POSITION, SPACING, write_series

WIDE = np.arange(12 * 30 * 9, dtype=np.int16).reshape(9, 12, 30).transpose(1, 2, 0)  # above 0; 360 voxels a slice
VOXELS = np.random.default_rng(0).integers(-1000, 1500, (12, 10, 9)).astype(np.int16)
MASK = (VOXELS > 0).astype(np.int16)


def inputs_of(source, *, output_dir: Path, failures: Failures | None = None, **options) -> SegmentationInputs:
    return segmentation_inputs(source, output_dir=output_dir, failures=failures or Failures(output_dir), **options)


def nifti(path: Path, voxels: np.ndarray = VOXELS) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)
    return str(path)


def masks(path: Path, values: np.ndarray = MASK) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, np.eye(4)), path)


def rows_of(failures: Failures) -> list[dict[str, str]]:
    with open(failures.file, newline="") as table:
        return list(csv.DictReader(table))


def already_segmented(output_dir: Path, *images: str) -> None:
    output_dir.mkdir(exist_ok=True)
    rows = [",".join(COLUMNS)] + [f"{case_name(image)},liver,1,1.0,{image}" for image in images]
    (output_dir / "volumes.csv").write_text("\n".join(rows) + "\n")
    for image in images:
        masks(output_dir / f"{case_name(image)}_seg.nii.gz")


def test_nifti_files_are_taken_as_they_are(tmp_path):
    files = [nifti(tmp_path / "scans" / name) for name in ("a.nii.gz", "b.nii")]
    inputs = inputs_of(tmp_path / "scans", output_dir=tmp_path / "out")
    assert (inputs.scans, inputs.series) == ([{"image": file} for file in files], {})
    assert not (tmp_path / "out").exists()


def test_every_ct_series_of_a_study_is_written_on_its_own_grid(tmp_path, caplog):
    caplog.set_level("INFO")
    study = tmp_path / "study"
    order = write_series(study / "ct 1", VOXELS + 1024)
    write_series(study / "ct 2", VOXELS[:, :, ::-1] + 1024)
    write_series(study / "scout", VOXELS[:, :, :1], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    inputs = inputs_of(study, output_dir=tmp_path / "out")
    assert [Path(scan["image"]).name for scan in inputs.scans] == ["study__ct_1.nii.gz", "study__ct_2.nii.gz"]
    first = nib.load(inputs.scans[0]["image"])
    np.testing.assert_array_equal(np.asarray(first.dataobj), VOXELS)
    x, y, z = POSITION
    np.testing.assert_allclose(first.affine, np.diag([-1, -1, 1, 1]) @ np.diag([*SPACING, 1]) + _column(-x, -y, z))
    assert [Path(file).name for file in inputs.series[inputs.scans[0]["image"]]] == [path.name for path in order]
    (line,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert "scout" in line and "localizer" in line
    assert inputs.count == 2 and not (tmp_path / "out" / "failed.csv").exists()


def _column(*origin: float) -> np.ndarray:
    column = np.zeros((4, 4))
    column[:3, 3] = origin
    return column


def test_a_study_without_a_usable_series_is_refused(tmp_path):
    write_series(tmp_path / "study", VOXELS, Modality="MR")
    with pytest.raises(InputError, match="none of its 1 series and files can be segmented"):
        inputs_of(tmp_path / "study", output_dir=tmp_path / "out")


def test_resuming_leaves_out_what_the_table_names(tmp_path, caplog):
    caplog.set_level("INFO")
    done, left = (nifti(tmp_path / "scans" / name) for name in ("a.nii.gz", "b.nii.gz"))
    write_series(tmp_path / "study", VOXELS)
    write_series(tmp_path / "study" / "scout", VOXELS[:, :, :1], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    sources = [tmp_path / "scans", tmp_path / "study"]
    (_, _, of_series) = (scan["image"] for scan in inputs_of(sources, output_dir=tmp_path / "out").scans)
    already_segmented(tmp_path / "out", done, of_series)
    assert inputs_of(sources[1], output_dir=tmp_path / "out", resume=True).scans == []  # only the scout is left
    inputs = inputs_of(sources, output_dir=tmp_path / "out", resume=True)
    assert (inputs.scans, inputs.series) == ([{"image": left}], {})
    assert "2 scans are already segmented" in caplog.text
    assert len(inputs_of(sources, output_dir=tmp_path / "out").scans) == 3
    already_segmented(tmp_path / "out", done, left, of_series)
    assert inputs_of(sources, output_dir=tmp_path / "out", resume=True).scans == []


def test_an_output_among_the_sources_is_not_segmented(tmp_path):
    write_series(tmp_path / "study", VOXELS)
    first = inputs_of(tmp_path / "study", output_dir=tmp_path / "study" / "masks").scans
    assert inputs_of(tmp_path / "study", output_dir=tmp_path / "study" / "masks").scans == first


def test_a_folder_of_neither_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no scan")
    with pytest.raises(InputError, match="No scans in"):
        inputs_of(tmp_path, output_dir=tmp_path / "out")


def test_a_mask_that_is_gone_or_older_than_its_scan_is_made_again(tmp_path):
    file = nifti(tmp_path / "scans" / "a.nii.gz")
    already_segmented(tmp_path / "out", file)
    assert inputs_of(file, output_dir=tmp_path / "out", resume=True).scans == []
    os.utime(tmp_path / "out" / "a_seg.nii.gz", (0, 0))
    assert inputs_of(file, output_dir=tmp_path / "out", resume=True).scans == [{"image": file}]
    (tmp_path / "out" / "a_seg.nii.gz").unlink()
    assert inputs_of(file, output_dir=tmp_path / "out", resume=True).scans == [{"image": file}]


def test_a_series_beside_files_that_cannot_be_read_is_left_out(tmp_path, caplog):
    """The unreadable files may be its first or last slices. Their absence leaves no gap to detect."""
    files = write_series(tmp_path / "study" / "cut", VOXELS)
    files[-1].write_bytes(files[-1].read_bytes()[:200])
    write_series(tmp_path / "study" / "whole", VOXELS)
    failures = Failures(tmp_path / "out")
    inputs = inputs_of(tmp_path / "study", output_dir=tmp_path / "out", failures=failures)
    assert [Path(scan["image"]).name for scan in inputs.scans] == ["study__whole.nii.gz"]
    assert [failure.scan for failure in failures.all()] == [str(files[-1]), str(files[-1].parent)]
    assert "perhaps slices of it" in failures.all()[1].reason and inputs.count == 3


def test_nifti_below_a_study_is_taken_too(tmp_path):
    write_series(tmp_path / "study" / "dicom", VOXELS)
    file = nifti(tmp_path / "study" / "export" / "b.nii.gz")
    inputs = inputs_of(tmp_path / "study", output_dir=tmp_path / "out")
    assert sorted(Path(scan["image"]).name for scan in inputs.scans) == ["b.nii.gz", "study__dicom.nii.gz"]
    assert file not in inputs.series and len(inputs.series) == 1


def test_a_path_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere not found"):
        inputs_of(tmp_path / "nowhere", output_dir=tmp_path / "out")


def test_whatever_a_library_raises_for_one_series_the_others_are_converted(tmp_path, monkeypatch):
    for name in ("a", "b"):
        write_series(tmp_path / "study" / name, VOXELS)

    def read(series, **options):
        if "/a/" in series.files[0]:
            raise AttributeError("'str' object has no attribute 'name'")
        return read_series(series, **options)

    monkeypatch.setattr(inputs_module, "read_series", read)
    failures = Failures(tmp_path / "out")
    inputs = inputs_of(tmp_path / "study", output_dir=tmp_path / "out", failures=failures)
    assert [Path(scan["image"]).name for scan in inputs.scans] == ["study__b.nii.gz"]
    (failure,) = failures.all()
    assert failure.scan.endswith("study/a") and failure.reason == "AttributeError: 'str' object has no attribute 'name'"


@pytest.mark.parametrize("left", [0, 0.5])
def test_a_scan_whose_mask_was_cut_is_segmented_again(tmp_path, caplog, left):
    files = [nifti(tmp_path / "scans" / name) for name in ("a.nii.gz", "b.nii.gz")]
    already_segmented(tmp_path / "out", *files)
    mask = tmp_path / "out" / "b_seg.nii.gz"
    mask.write_bytes(mask.read_bytes()[: int(left * mask.stat().st_size)])
    inputs = inputs_of(tmp_path / "scans", output_dir=tmp_path / "out", resume=True)
    assert inputs.scans == [{"image": files[1]}] and "b_seg.nii.gz is damaged" in caplog.text


def test_a_scan_that_lacks_something_is_segmented_again(tmp_path):
    done, lacking = (nifti(tmp_path / "scans" / name) for name in ("a.nii.gz", "b.nii.gz"))
    already_segmented(tmp_path / "out", done, lacking)
    Failures(tmp_path / "out").add(lacking, "DICOM SEG", "no reason")
    inputs = inputs_of(tmp_path / "scans", output_dir=tmp_path / "out", resume=True)
    assert inputs.scans == [{"image": lacking}] and inputs.count == 2


def test_failures_of_scans_that_a_run_does_not_try_stay_in_the_table(tmp_path, caplog):
    first, second, gone = (nifti(tmp_path / folder / "ct.nii.gz") for folder in ("one", "two", "three"))
    broken = tmp_path / "two" / "broken.nii.gz"
    broken.write_text("no scan")
    earlier = Failures(tmp_path / "out")
    for scan in (first, second, gone, str(broken)):
        earlier.add(scan, "DICOM SEG", "no room")
    earlier.report(4)
    os.remove(gone)
    caplog.set_level("INFO")
    failures = Failures(tmp_path / "out")
    inputs = inputs_of(tmp_path / "two", output_dir=tmp_path / "out", failures=failures, resume=True)
    failures.add(second, "picture", "no font")
    assert {failure["scan"] for failure in rows_of(failures)} == {
        first,
        second,
        gone,
        str(broken),
    }  # were it killed here
    failures.report(inputs.count)
    assert rows_of(failures) == [
        {"scan": first, "missing": "DICOM SEG", "reason": "no room"},
        {"scan": second, "missing": "picture", "reason": "no font"},
    ]
    assert "also lists 1 scan of earlier runs" in caplog.text


def test_nifti_and_dicom_in_one_folder_are_both_taken_at_any_depth(tmp_path):
    write_series(tmp_path / "study" / "dicom", VOXELS)
    for name in ("a.nii.gz", "more/b.NII.GZ", "labelled/d.nii.gz"):
        nifti(tmp_path / "study" / name)
    masks(tmp_path / "study" / "masks" / "c.nii.gz")
    inputs = inputs_of(tmp_path / "study", output_dir=tmp_path / "out")
    assert {Path(scan["image"]).name for scan in inputs.scans} == {
        "a.nii.gz",
        "b.NII.GZ",
        "d.nii.gz",
        "study__dicom.nii.gz",
    }
    assert set(inputs.names.values()) == {"a", "b", "d", "study__dicom"} and inputs.count == 4


def test_scans_of_equal_names_are_told_apart_by_their_folders(tmp_path):
    """As in TotalSegmentator's data: one folder for each case, masks in a subfolder."""
    files = [nifti(tmp_path / "data" / case / "ct.nii.gz") for case in ("s0001", "s0002")]
    masks(tmp_path / "data" / "s0001" / "segmentations" / "liver.nii.gz")
    inputs = inputs_of(tmp_path / "data", output_dir=tmp_path / "out")
    assert inputs.scans == [{"image": file} for file in files]
    assert [inputs.names[file] for file in files] == ["s0001/ct", "s0002/ct"]
    assert inputs_of(files[:1], output_dir=tmp_path / "out").names == {files[0]: "ct"}
    assert len(inputs_of([files[0], tmp_path / "data"], output_dir=tmp_path / "out").scans) == 2  # each once


def segmented(inputs: SegmentationInputs, output_dir: Path) -> None:
    """Leave what a run leaves that has segmented all scans of its inputs."""
    output_dir.mkdir(exist_ok=True)
    images = [scan["image"] for scan in inputs.scans]
    rows = [",".join(COLUMNS)] + [f"{inputs.names[image]},liver,1,1.0,{image}" for image in images]
    (output_dir / "volumes.csv").write_text("\n".join(rows) + "\n")
    record = RecordSources(output_dir, inputs.sources, names=inputs.names)
    for image in images:
        masks(output_dir / f"{inputs.names[image]}_seg.nii.gz")
        record.case_completed({}, image)


@pytest.mark.parametrize("resume", [False, True])
def test_another_patient_in_the_same_folder_is_another_scan(tmp_path, resume):
    """An inbox holds one patient after the other."""
    out = tmp_path / "out"
    for patient in ("a", "b"):
        shutil.rmtree(tmp_path / "inbox", ignore_errors=True)
        stored = VOXELS + (patient == "b")
        write_series(tmp_path / "inbox", stored, intercept=0, SeriesInstanceUID=f"1.2.{ord(patient)}")
        inputs = inputs_of(tmp_path / "inbox", output_dir=out, resume=resume)
        (scan,) = inputs.scans
        assert inputs.names[scan["image"]] == {"a": "inbox", "b": "inbox-2"}[patient]
        assert nib.load(scan["image"]).get_fdata().sum() == stored.sum()
        segmented(inputs, out)
    assert (out / "inbox_seg.nii.gz").exists() and (out / "inbox-2_seg.nii.gz").exists()
    again = inputs_of(tmp_path / "inbox", output_dir=out, resume=True)
    assert again.scans == [] and again.count == 1


def test_a_series_with_more_slices_than_before_is_segmented_again(tmp_path, caplog):
    out = tmp_path / "out"
    files = write_series(tmp_path / "ct", VOXELS)
    late = files[-1].read_bytes()
    files[-1].unlink()
    segmented(inputs_of(tmp_path / "ct", output_dir=out), out)
    assert inputs_of(tmp_path / "ct", output_dir=out, resume=True).scans == []
    files[-1].write_bytes(late)
    inputs = inputs_of(tmp_path / "ct", output_dir=out, resume=True)
    assert [inputs.names[scan["image"]] for scan in inputs.scans] == ["ct"] and "has changed since" in caplog.text


def test_a_scan_that_was_replaced_by_an_older_file_is_segmented_again(tmp_path, caplog):
    out, file = tmp_path / "out", tmp_path / "in" / "ct.nii.gz"
    nifti(file)
    os.utime(file, (1000, 1000))
    segmented(inputs_of(tmp_path / "in", output_dir=out), out)
    assert inputs_of(tmp_path / "in", output_dir=out, resume=True).scans == []
    nifti(file, VOXELS + 1)
    os.utime(file, (500, 500))
    inputs = inputs_of(tmp_path / "in", output_dir=out, resume=True)
    assert inputs.scans == [{"image": str(file)}] and inputs.names[str(file)] == "ct"
    assert f"{file} has changed since it was segmented" in caplog.text


@pytest.mark.parametrize("resume", [False, True])
def test_a_mask_of_another_scan_is_not_replaced(tmp_path, caplog, resume):
    out = tmp_path / "out"
    first, second = (nifti(tmp_path / patient / "ct.nii.gz", VOXELS + number) for number, patient in enumerate("ab"))
    os.utime(second, (1000, 1000))
    caplog.set_level("INFO")
    segmented(inputs_of(first, output_dir=out), out)
    inputs = inputs_of(second, output_dir=out, resume=resume)
    assert inputs.names[second] == "b/ct" and "the mask of " + second + " is b/ct_seg.nii.gz" in caplog.text
    segmented(inputs, out)
    third = inputs_of(nifti(tmp_path / "c" / "ct.nii.gz", VOXELS + 3), output_dir=out, resume=resume)
    assert (
        third.names[str(tmp_path / "c" / "ct.nii.gz")] == "c/ct"
    )  # the table of the second run has no row of the first
    assert inputs_of(first, output_dir=out).names[first] == "ct"


def test_scans_that_were_moved_keep_their_names_in_a_new_run(tmp_path):
    out = tmp_path / "out"
    names = ("one.nii.gz", "two.nii.gz")
    for name in names:
        nifti(tmp_path / "here" / name)
    segmented(inputs_of(tmp_path / "here", output_dir=out), out)
    os.rename(tmp_path / "here", tmp_path / "there")
    inputs = inputs_of(tmp_path / "there", output_dir=out)
    assert [inputs.names[scan["image"]] for scan in inputs.scans] == ["one", "two"]
    segmented(inputs, out)
    assert sorted(json.loads((out / "sources.json").read_text())) == [str(tmp_path / "there" / name) for name in names]


def test_scans_that_were_moved_are_done_if_their_content_is_the_same(tmp_path):
    out = tmp_path / "out"
    here = nifti(tmp_path / "here" / "ct.nii")
    os.utime(here, (1000, 1000))  # as an archive may have it for all files
    inputs = inputs_of(tmp_path / "here", output_dir=out)
    segmented(inputs, out)
    already_segmented(out, here)
    os.rename(tmp_path / "here", tmp_path / "there")
    assert inputs_of(tmp_path / "there", output_dir=out, resume=True).scans == []
    there = nifti(tmp_path / "there" / "ct.nii", VOXELS + 1)  # of another patient
    os.utime(there, (1000, 1000))
    inputs = inputs_of(tmp_path / "there", output_dir=out, resume=True)
    assert [scan["image"] for scan in inputs.scans] == [there] and inputs.names[there] != "ct"


@pytest.mark.parametrize(("added", "again"), [(0, False), (1, True)])
def test_a_series_that_was_sent_again_is_segmented_again_only_if_its_pixels_changed(tmp_path, added, again):
    out = tmp_path / "out"
    write_series(tmp_path / "study", VOXELS)
    inputs = inputs_of(tmp_path / "study", output_dir=out)
    segmented(inputs, out)
    already_segmented(out, *(scan["image"] for scan in inputs.scans))
    if added:
        write_series(tmp_path / "study", VOXELS + added)  # the same UIDs and sizes
    for file in (tmp_path / "study").iterdir():
        os.utime(file, (2**31, 2**31))
    assert bool(inputs_of(tmp_path / "study", output_dir=out, resume=True).scans) is again


def test_each_failed_series_of_a_folder_has_a_row(tmp_path):
    (tmp_path / "study").mkdir()
    for number in range(2):
        for index, file in enumerate(write_series(tmp_path / f"{number}", VOXELS, seed=number)):
            if index != 4:  # the series lacks this slice
                file.rename(tmp_path / "study" / f"{number}_{file.name}")
    failures = Failures(tmp_path / "out")
    nifti(tmp_path / "scans" / "a.nii.gz")
    inputs = inputs_of([tmp_path / "study", tmp_path / "scans"], output_dir=tmp_path / "out", failures=failures)
    failures.report(inputs.count)
    scans = [row["scan"] for row in rows_of(failures)]
    assert len(scans) == len(set(scans)) == 2 and all(os.path.isfile(scan) for scan in scans)


@pytest.mark.parametrize("name", ["scan.mha", "IM0001.dcm", "scan.nrrd", "IM0001"])
def test_a_file_in_another_format_is_not_read_as_a_data_list(tmp_path, name):
    if name == "IM0001":
        file = write_series(tmp_path, VOXELS[:, :, :1])[0]
    else:
        file = tmp_path / name
        file.write_bytes(b"\1\2\3")
    with pytest.raises(InputError, match="neither a folder nor a NIfTI file.*pass its folder"):
        inputs_of(file, output_dir=tmp_path / "out")


def test_a_scan_has_one_name_whatever_the_way_to_it(tmp_path):
    file = nifti(tmp_path / "scans" / "a.nii.gz")
    (tmp_path / "elsewhere").mkdir()
    for source in (Path(file), tmp_path / "scans"):
        inputs = inputs_of(tmp_path / "elsewhere" / ".." / source.relative_to(tmp_path), output_dir=tmp_path / "out")
        assert inputs.scans == [{"image": file}]


def test_a_scan_of_the_same_name_size_and_time_is_not_one_that_was_moved(tmp_path):
    """As of an archive with one time for all files."""
    out = tmp_path / "out"
    first, second = (nifti(tmp_path / patient / "ct.nii", VOXELS + number) for number, patient in enumerate("ab"))
    for file in (first, second):
        os.utime(file, (1000, 1000))
    segmented(inputs_of(first, output_dir=out), out)
    assert inputs_of(second, output_dir=out).names[second] == "b/ct"


def test_the_name_of_a_scan_that_was_moved_is_not_given_to_another(tmp_path):
    out = tmp_path / "out"
    for patient in ("s1", "s2"):
        nifti(tmp_path / "a" / patient / "ct.nii.gz")
    segmented(inputs_of(tmp_path / "a", output_dir=out), out)
    (tmp_path / "c").mkdir()
    os.rename(tmp_path / "a" / "s1", tmp_path / "c" / "z")
    moved = str(tmp_path / "c" / "z" / "ct.nii.gz")
    inputs = inputs_of(moved, output_dir=out)
    assert inputs.names[moved] == "s1/ct"
    segmented(inputs, out)
    new = nifti(tmp_path / "d" / "s1" / "ct.nii.gz", VOXELS + 1)
    assert inputs_of(new, output_dir=out).names[new] not in ("s1/ct", "s2/ct")


def test_a_table_of_another_program_stops_a_resumed_run_only(tmp_path):
    file = nifti(tmp_path / "in" / "ct.nii.gz")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "volumes.csv").write_text("case;label;voxels\nct;liver;1\n")
    assert inputs_of(file, output_dir=tmp_path / "out").scans == [{"image": file}]
    with pytest.raises(InputError, match="is not a table that an inference wrote"):
        inputs_of(file, output_dir=tmp_path / "out", resume=True)


def test_what_was_repaired_is_no_failure_of_another_run(tmp_path):
    slices = write_series(tmp_path / "in", VOXELS)
    earlier = Failures(tmp_path / "out")
    earlier.add(str(slices[3]), "mask", "it is empty")
    earlier.report(2)
    failures = Failures(tmp_path / "out")
    inputs = inputs_of(tmp_path / "in", output_dir=tmp_path / "out", failures=failures, resume=True)
    failures.report(inputs.count)
    assert not failures.file.exists()


@pytest.mark.parametrize("content", ["", "[1]", '{"a": 1}', '{"a": {"b": 1}}'])
def test_a_damaged_record_of_sources_costs_nothing(tmp_path, content):
    file = nifti(tmp_path / "in" / "ct.nii.gz")
    already_segmented(tmp_path / "out", file)
    (tmp_path / "out" / "sources.json").write_text(content)
    assert inputs_of(file, output_dir=tmp_path / "out", resume=True).scans == []


def test_names_of_an_earlier_run_stay_and_no_mask_is_replaced(tmp_path):
    first, second = (nifti(tmp_path / case / "ct.nii.gz") for case in ("s1", "s2"))
    already_segmented(tmp_path / "out", first)  # as ct_seg.nii.gz
    inputs = inputs_of([first, second], output_dir=tmp_path / "out", resume=True)
    assert inputs.scans == [{"image": second}]
    assert (inputs.names[first], inputs.names[second]) == ("ct", "s2/ct")
    assert inputs_of(second, output_dir=tmp_path / "out", resume=True).names[second] == "s2/ct"


def test_labels_beside_their_images_are_no_scans(tmp_path):
    file = nifti(tmp_path / "data" / "s1" / "ct.nii.gz")
    nifti(tmp_path / "data" / "s1" / "label.nii.gz")
    assert inputs_of(tmp_path / "data", output_dir=tmp_path / "out").scans == [{"image": file}]


def test_masks_may_be_written_beside_the_scans(tmp_path):
    file = nifti(tmp_path / "a.nii.gz")
    nifti(tmp_path / "a_seg.nii.gz")
    nifti(tmp_path / "dicom" / "old.nii.gz")  # converted by an earlier run
    assert inputs_of(tmp_path, output_dir=tmp_path).scans == [{"image": file}]


def test_a_tilted_series_is_straightened_on_request(tmp_path):
    write_series(tmp_path / "study" / "leaning", VOXELS, tilt=12.0)
    write_series(tmp_path / "study" / "upright", VOXELS)
    failures = Failures(tmp_path / "out")
    (scan,) = inputs_of(tmp_path / "study", output_dir=tmp_path / "out", failures=failures).scans
    assert "upright" in scan["image"] and "tilted gantry" in failures.all()[0].reason
    inputs = inputs_of(tmp_path / "study", output_dir=tmp_path / "new", straighten_tilt=True)
    (tilted,) = (scan["image"] for scan in inputs.scans if "leaning" in scan["image"])
    assert tilted not in inputs.series and len(inputs.series) == 1  # no slice lies on the new grid
    axes = nib.load(tilted).affine[:3, :3]
    np.testing.assert_allclose(axes.T @ axes, np.diag(np.array(SPACING) ** 2), atol=1e-3)


def test_what_is_missing_packed_or_empty_costs_no_other(tmp_path, caplog):
    nifti(tmp_path / "scans" / "a.nii.gz")
    (tmp_path / "scans" / "more.zip").write_bytes(b"PK")
    masks(tmp_path / "scans" / "old" / "b_seg.nii.gz")
    nifti(tmp_path / "scans" / "old" / "b_masked.nii.gz")
    (tmp_path / "empty").mkdir()
    nifti(tmp_path / "listed" / "imagesTs" / "c.nii.gz")
    (tmp_path / "listed" / "dataset.json").write_text('{"test": ["imagesTs/c.nii.gz", "gone.nii.gz"]}')
    broken = tmp_path / "scans" / "sub"
    broken.mkdir()
    (broken / "dataset.json").write_text('{"training": [{"image": "b\\u0000.nii.gz"}]}')
    failures = Failures(tmp_path / "out")
    sources = [tmp_path / name for name in ("scans", "empty", "listed")]
    inputs = inputs_of(sources, output_dir=tmp_path / "out", failures=failures)
    assert [case_name(scan["image"]) for scan in inputs.scans] == ["a", "c", "gone"]  # the check finds that it is gone
    failed = {Path(failure.scan).name: failure.reason for failure in failures.all()}
    assert set(failed) == {"more.zip", "empty", "dataset.json"} and "unpack it" in failed["more.zip"]
    assert "b_seg.nii.gz is left out" in caplog.text and inputs.count == 6


def test_names_that_are_no_text_are_written_nevertheless(tmp_path):
    failures = Failures(tmp_path)
    failures.add("f\udcff/a.nii.gz", "mask", "broken")
    assert failures.all()[0].scan == "f\\udcff/a.nii.gz" and "udcff" in failures.file.read_text()


@pytest.mark.parametrize(
    "values",
    [VOXELS, WIDE, np.linspace(0, 1, VOXELS.size, dtype=np.float32).reshape(VOXELS.shape)],
    ids=["HU", "shifted", "scaled"],
)
@pytest.mark.parametrize("name", ["mask_study/p1/a.nii.gz", "Seg 2020/a.nii", "p1_mask.nii.gz"])
def test_a_scan_that_is_named_like_a_mask_is_a_failure(tmp_path, name, values):
    scan = nifti(tmp_path / "in" / "p2.nii.gz")
    masks(tmp_path / "in" / name, values)
    failures = Failures(tmp_path / "out")
    inputs = inputs_of(tmp_path / "in", output_dir=tmp_path / "out", failures=failures)
    assert [one["image"] for one in inputs.scans] == [scan] and inputs.count == 2
    (failure,) = failures.all()
    assert failure.missing == "mask" and "rename it if" in failure.reason
    assert failure.reason.endswith(f"not of a mask ({tmp_path / 'in' / name})")


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.float64])
@pytest.mark.parametrize("name", ["mask_study/a.nii.gz", "segmentations/liver.nii.gz", "p1_mask.nii.gz"])
def test_masks_are_no_failures(tmp_path, caplog, name, kind):
    nifti(tmp_path / "in" / "p2.nii.gz")
    labels = np.random.default_rng(0).integers(0, 118, VOXELS.shape).astype(kind)
    masks(tmp_path / "in" / name, labels + (1e-4 if kind == np.float64 else 0))
    failures = Failures(tmp_path / "out")
    inputs_of(tmp_path / "in", output_dir=tmp_path / "out", failures=failures)
    assert failures.all() == [] and "is left out" in caplog.text


def test_files_that_cannot_be_read_and_are_named_like_masks_are_no_failures(tmp_path):
    nifti(tmp_path / "in" / "p2.nii.gz")
    (tmp_path / "in" / "p1_mask.nii.gz").write_bytes(b"no NIfTI")
    failures = Failures(tmp_path / "out")
    inputs_of(tmp_path / "in", output_dir=tmp_path / "out", failures=failures)
    assert failures.all() == []


def test_two_series_that_would_become_one_file_stop_the_run(tmp_path):
    """Folders passed one by one are named one by one: both series are called "ct"."""
    for patient in ("a", "b"):
        write_series(tmp_path / patient / "ct", VOXELS)
    with pytest.raises(InputError, match=r"would both be converted to .*ct\.nii\.gz: one would replace the other"):
        inputs_of([tmp_path / "a" / "ct", tmp_path / "b" / "ct"], output_dir=tmp_path / "out")
