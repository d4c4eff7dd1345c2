# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Every kind of bad scan is found and named; good ones pass, and are not read again."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from bundles.common.errors import InputError
from bundles.common.scans import checks as scan_checks
from bundles.common.scans.checks import check_scans, examine_scans

SHAPE = (8, 9, 10)
AFFINE = np.array([[-0.8, 0, 0, 100], [0, -0.8, 0, 90], [0, 0, 2.5, -300], [0, 0, 0, 1]])


def write(path: Path, voxels: np.ndarray | None = None, affine: np.ndarray = AFFINE, **header) -> str:
    """Write a NIfTI file; ``header`` sets raw fields after the data are prepared, e.g. ``pixdim``."""
    if voxels is None:
        voxels = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    image = nib.Nifti1Image(voxels, affine)
    nib.save(image, path)
    if header:
        raw = bytearray(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
        fields = nib.Nifti1Header(bytes(raw[:348]), check=False)
        for key, value in header.items():
            fields[key] = value
        raw[:348] = fields.binaryblock
        path.write_bytes(gzip.compress(bytes(raw)) if path.suffix == ".gz" else bytes(raw))
    return str(path)


def label(path: Path, values=(0, 1, 2), shape: tuple[int, ...] = SHAPE, dtype=np.uint8, **options) -> str:
    voxels = np.zeros(shape, dtype)
    voxels.flat[: len(values)] = values
    return write(path, voxels, **options)


def fault(item: dict, **options) -> str:
    """The message for one bad scan, checked to name exactly that file's fault."""
    with pytest.raises(InputError) as error:
        check_scans([item], **options)
    message = str(error.value)
    assert message.startswith("1 of 1 scans are bad:\n") and message.endswith("start again.")
    return message.splitlines()[1].strip()


def test_good_scans_pass(tmp_path):
    pair = {"image": write(tmp_path / "a.nii.gz"), "label": label(tmp_path / "l.nii.gz")}
    integers = {"image": write(tmp_path / "i.nii", np.ones(SHAPE, np.int16)), "label": label(tmp_path / "m.nii")}
    trailing = {"image": write(tmp_path / "t.nii", np.ones((*SHAPE, 1), np.float32)), "label": pair["label"]}
    check_scans([pair, integers, trailing], labels=[0, 1, 2])
    check_scans([{"image": write(tmp_path / "c.nii", np.ones((*SHAPE, 4), np.float32))}], channels=4)
    check_scans([{"image": [pair["image"]] * 4, "label": pair["label"]}], channels=4)
    check_scans([])


def test_a_missing_an_empty_and_a_foreign_file_are_named(tmp_path):
    empty, foreign = tmp_path / "empty.nii.gz", tmp_path / "foreign.nii.gz"
    empty.write_bytes(b"")
    foreign.write_bytes(b"not a scan" * 100)
    missing = tmp_path / "gone.nii.gz"
    assert fault({"image": str(missing)}) == f"{missing}: does not exist"
    assert fault({"image": str(empty)}) == f"{empty}: is empty (0 bytes)"
    assert fault({"image": str(foreign)}).startswith(f"{foreign}: cannot be read")


@pytest.mark.parametrize("name", ["cut.nii", "cut.nii.gz"])
def test_a_file_cut_short_is_found_when_voxels_are_read(tmp_path, name):
    path = tmp_path / name
    write(path)
    path.write_bytes(path.read_bytes()[:-1500])
    assert fault({"image": str(path)}).startswith(f"{path}: cannot be read, perhaps damaged or cut short")
    if name == "cut.nii":  # its size tells
        assert "requires 3232 bytes, and the file has 1732" in fault({"image": str(path)}, voxels=False)
    else:
        check_scans([{"image": str(path)}], voxels=False)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_corrupt_header_is_found(tmp_path, name):
    path = tmp_path / name
    write(path, datatype=9999)
    assert fault({"image": str(path)}, voxels=False).startswith(f"{path}: cannot be read")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_not_finite_are_counted(tmp_path, value):
    voxels = np.zeros(SHAPE, np.float32)
    voxels[1, 2, 3] = voxels[4, 5, 6] = value
    path = write(tmp_path / "a.nii.gz", voxels)
    assert fault({"image": path}).startswith(f"{path}: has 2 of 720 voxels that are NaN or infinite")
    check_scans([{"image": path}], voxels=False)


@pytest.mark.parametrize("spacing", [0, -0.8, np.nan])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_spacing_that_nibabel_would_mend_in_silence_is_found(tmp_path, spacing, name):
    pixdim = [1, 0.8, spacing, 2.5, 0, 0, 0, 0]
    path = write(tmp_path / name, pixdim=pixdim, sform_code=0, qform_code=0)
    found = fault({"image": path}, voxels=False)
    assert found.startswith(f"{path}: ") and "spacing" in found and str(float(spacing))[:4] in found


def test_an_affine_that_is_not_finite_or_flat_is_found(tmp_path):
    path = write(tmp_path / "a.nii", srow_x=[np.nan, 0, 0, 0])
    assert "affine that is not finite" in fault({"image": path})
    path = write(tmp_path / "b.nii", srow_x=[0, 0, 0, 0])
    assert "axes are zero or lie in one plane" in fault({"image": path})


@pytest.mark.parametrize(
    ("shape", "channels", "words"),
    [
        ((8, 9), 1, "has shape (8, 9), not (X, Y, Z): it is a single slice; stack"),
        ((8, 9, 5, 4), 1, "has shape (8, 9, 5, 4), not (X, Y, Z): it has 4 volumes in one file; if they are channels"),
        ((8, 9, 5, 1, 3), 1, "has shape (8, 9, 5, 1, 3), not (X, Y, Z)"),
        (
            (8, 9, 5),
            4,
            "has shape (8, 9, 5), not (X, Y, Z, 4): it holds one channel, but 4 are expected; store all 4 along",
        ),
        ((8, 9, 5, 2), 4, "has shape (8, 9, 5, 2), not (X, Y, Z, 4): it holds 2 channels, but 4 are expected"),
        (
            (8, 9, 5, 1, 4),
            4,
            "has shape (8, 9, 5, 1, 4), not (X, Y, Z, 4): it holds 4 channels, but 4 are expected; store all",
        ),
    ],
)
def test_wrong_dimensions_are_named_with_what_to_do(tmp_path, shape, channels, words):
    path = write(tmp_path / "a.nii", np.ones(shape, np.float32))
    assert fault({"image": path}, channels=channels).startswith(f"{path}: {words}")


def test_a_list_of_files_must_have_one_file_per_channel_on_one_grid(tmp_path):
    a, b = write(tmp_path / "a.nii"), write(tmp_path / "b.nii", np.ones((8, 9, 11), np.float32))
    assert "list of 2 files, but 3 channels" in fault({"image": [a, a]}, channels=3)
    assert fault({"image": [a, b]}, channels=2).startswith(f"{b}: has shape (8, 9, 11), but its first channel {a}")


def test_a_label_off_the_grid_of_its_image_is_named(tmp_path):
    image = write(tmp_path / "a.nii")
    other = label(tmp_path / "shape.nii", shape=(8, 9, 11))
    assert fault({"image": image, "label": other}).startswith(f"{other}: has shape (8, 9, 11), but its image {image}")
    one_hot = label(tmp_path / "hot.nii", shape=(*SHAPE, 3))
    assert fault({"image": image, "label": one_hot}).startswith(
        f"{one_hot}: is a label of shape (8, 9, 10, 3); it must be"
    )

    half, flipped, stretched = AFFINE.copy(), AFFINE.copy(), AFFINE.copy()
    half[0, 3] += 0.4  # half a voxel
    flipped[0] *= -1
    stretched[2, 2] = 3.0
    for name, affine, words in (
        ("half", half, "differ by up to 0.5 voxels (origin (100.4, 90, -300) versus (100, 90, -300)"),
        ("flipped", flipped, "is not aligned with its image"),
        ("stretched", stretched, "spacing (0.8, 0.8, 3) versus (0.8, 0.8, 2.5)"),
    ):
        path = label(tmp_path / f"{name}.nii", affine=affine)
        found = fault({"image": image, "label": path}, voxels=False)
        assert found.startswith(f"{path}: is not aligned with its image") and words in found


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_origin_may_differ_by_a_tenth_of_a_voxel_and_the_far_corner_by_half_a_voxel(tmp_path, axis):
    """Decimal rounding moves an origin, rounding of a quaternion turns a grid; whoever resamples moves it further."""
    grid, side = np.diag([0.8, 0.8, 2.5, 1.0]), SHAPE[axis] - 1  # in RAS, so that its first voxel is the origin
    image = write(tmp_path / "a.nii", affine=grid)
    for origin, stretch, passes in ((0.08, 0, True), (0.12, 0, False), (0, 0.45 / side, True), (0, 0.55 / side, False)):
        affine = grid.copy()
        affine[axis, 3] += origin * grid[axis, axis]
        affine[axis, axis] *= 1 + stretch
        item = {"image": image, "label": label(tmp_path / "l.nii", affine=affine)}
        if passes:
            check_scans([item])
        else:
            assert "is not aligned with its image" in fault(item)


def test_the_rounding_of_a_qform_passes(tmp_path):
    # A tilted head in LPS: half a turn about a slanted axis, where the float32 quaternion is least exact.
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_rotvec(np.array([0, np.sin(0.1), np.cos(0.1)]) * (np.pi - 1e-4)).as_matrix() * 0.7
    affine[:3, 3] = [170.123456, 160.654321, -812.3]
    image = nib.Nifti1Image(np.zeros((512, 512, 2), np.uint8), affine)
    image.header.set_sform(affine, 1)
    nib.save(image, tmp_path / "sform.nii.gz")
    image.header.set_sform(None, 0)
    image.header.set_qform(affine, 1)
    nib.save(nib.Nifti1Image(image.dataobj, None, image.header), tmp_path / "qform.nii.gz")
    assert np.abs(nib.load(tmp_path / "qform.nii.gz").affine - affine).max() > 1e-6
    check_scans([{"image": str(tmp_path / "sform.nii.gz"), "label": str(tmp_path / "qform.nii.gz")}])


def test_label_values_that_are_not_declared_are_named(tmp_path):
    image, path = write(tmp_path / "a.nii"), label(tmp_path / "l.nii.gz", values=(0, 1, 255, 7))
    item = {"image": image, "label": path}
    assert fault(item, labels={0: "background", 1: "spleen"}) == (
        f"{path}: holds the label values 7, 255; allowed are the declared 0, 1"
    )
    check_scans([item])
    check_scans([item], labels=[0, 1], voxels=False)


@pytest.mark.parametrize(("values", "words"), [((0, 0.5), "0.5"), ((0, -1), "-1"), ((0, np.nan), "nan")])
def test_label_values_that_are_no_whole_numbers_are_named(tmp_path, values, words):
    item = {"image": write(tmp_path / "a.nii"), "label": label(tmp_path / "l.nii", values, dtype=np.float32)}
    assert f"{words}; allowed are whole numbers from 0" in fault(item)
    assert f"{words}; allowed are the declared 0, 1" in fault(item, labels=[1, 0])


def test_slope_and_intercept_count_for_labels_and_images(tmp_path):
    image = write(tmp_path / "a.nii", np.full(SHAPE, 1000, np.int16), scl_slope=2.0, scl_inter=-1024.0)
    scaled = label(tmp_path / "l.nii", scl_slope=0.5, scl_inter=0.0)  # 0, 1, 2 stored are 0, 0.5, 1
    assert "holds the label value 0.5;" in fault({"image": image, "label": scaled}, labels=[0, 1])
    check_scans([{"image": image, "label": label(tmp_path / "m.nii", (0, 1), scl_slope=2.0)}], labels=[0, 2])


def test_colour_voxels_are_refused(tmp_path):
    voxels = np.zeros(SHAPE, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    path = write(tmp_path / "a.nii", voxels)
    assert fault({"image": path}).startswith(f"{path}: has voxels of type")


def test_all_bad_scans_are_counted_and_ten_are_listed(tmp_path):
    good = {"image": write(tmp_path / "good.nii")}
    bad = [{"image": str(tmp_path / f"bad{i:02d}.nii")} for i in range(13)]
    with pytest.raises(InputError) as error:
        check_scans([good, *bad, good])
    lines = str(error.value).splitlines()
    assert lines[0] == "13 of 15 scans are bad:"
    assert [line.strip() for line in lines[1:11]] == [f"{item['image']}: does not exist" for item in bad[:10]]
    assert lines[11].strip() == "and 3 more" and "leave them out (their entries in the data list" in lines[12]


# ---- remember ----


def test_good_scans_are_told_from_bad_ones_so_that_a_run_can_go_on(tmp_path):
    voxels = np.zeros(SHAPE, np.float32)
    voxels[0, 0, 0] = np.nan
    nan, good = write(tmp_path / "nan.nii.gz", voxels), write(tmp_path / "good.nii.gz")
    wrong, gone = label(tmp_path / "wrong.nii.gz", (0, 7)), str(tmp_path / "gone.nii.gz")
    items = [
        {"image": nan},
        {"image": good, "label": label(tmp_path / "l.nii.gz"), "fold": 3},
        {"image": [gone, good]},
        {"image": write(tmp_path / "other.nii.gz"), "label": wrong},
        {"image": write(tmp_path / "last.nii.gz")},
    ]
    found, reasons = examine_scans(items, labels=[0, 1, 2])
    assert found == [items[1], items[4]] and found[0] is items[1]
    assert list(reasons) == [nan, gone, items[3]["image"]]
    assert reasons[nan].startswith("has 1 of 720 voxels that are NaN")
    assert reasons[gone].startswith("this scan is a list of 2 files")
    assert reasons[items[3]["image"]] == f"{wrong}: holds the label value 7; allowed are the declared 0, 1, 2"
    assert examine_scans([items[0]], voxels=False) == ([items[0]], {})
    assert examine_scans([]) == ([], {})


@pytest.fixture
def opened(monkeypatch):
    """The files that were opened since the list was last cleared."""
    files, real = [], scan_checks.open_scan
    monkeypatch.setattr(scan_checks, "open_scan", lambda file: (files.append(Path(file).name), real(file))[1])
    return files


def test_scans_that_passed_are_skipped_until_they_or_the_question_change(tmp_path, opened):
    items = [
        {"image": write(tmp_path / "a.nii"), "label": label(tmp_path / "l.nii")},
        {"image": write(tmp_path / "b.nii")},
    ]
    remember = tmp_path / "cache" / "checked.json"
    check_scans(items, remember=remember)
    assert sorted(opened) == ["a.nii", "b.nii", "l.nii"]
    opened.clear()
    check_scans(items, remember=remember)
    assert opened == []
    check_scans(items, remember=remember, labels=[0, 1, 2])
    assert len(opened) == 3
    opened.clear()
    os.utime(tmp_path / "l.nii", ns=(1, 1))
    check_scans(items, remember=remember)
    assert sorted(opened) == ["a.nii", "l.nii"]
    assert os.listdir(tmp_path / "cache") == ["checked.json"]  # no temporary file is left


def test_a_check_of_the_headers_does_not_stand_for_one_of_the_voxels(tmp_path):
    item = {"image": write(tmp_path / "a.nii", np.full(SHAPE, np.nan, np.float32))}
    check_scans([item], voxels=False, remember=tmp_path / "r.json")
    with pytest.raises(InputError, match="720 of 720 voxels"):
        check_scans([item], remember=tmp_path / "r.json")


def test_bad_scans_are_not_remembered_but_good_ones_beside_them_are(tmp_path, opened):
    items = [{"image": write(tmp_path / "a.nii")}, {"image": write(tmp_path / "b.nii", np.ones((3, 3), np.float32))}]
    for expected in (["a.nii", "b.nii"], ["b.nii"]):
        opened.clear()
        with pytest.raises(InputError, match=r"1 of 2 scans are bad"):
            check_scans(items, remember=tmp_path / "r.json")
        assert sorted(opened) == expected
    (tmp_path / "a.nii").unlink()
    with pytest.raises(InputError, match=r"a\.nii: does not exist"):
        check_scans(items, remember=tmp_path / "r.json")


@pytest.mark.parametrize("content", ["{", "[1]", '{"other": 1}', '{"passed_scan_checks": [2]}', "\x00"])
def test_a_broken_or_foreign_memory_is_ignored_and_replaced(tmp_path, content):
    remember = tmp_path / "r.json"
    remember.write_text(content)
    check_scans([{"image": write(tmp_path / "a.nii")}], remember=remember)
    assert len(json.loads(remember.read_text())["passed_scan_checks"]) == 1


def test_a_memory_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    check_scans([{"image": write(tmp_path / "a.nii")}], remember=tmp_path / "file" / "r.json")
    assert "Cannot record the checked scans" in caplog.text


def test_scans_that_do_not_look_like_hu_are_named_once_and_let_pass(tmp_path, caplog):
    rng = np.random.default_rng(0)
    ranges = {"ct": (-1024, 1500), "mr": (0, 900), "windowed": (-175, 250), "scaled": (0, 1), "bone_cut": (-1000, 400)}
    items = []
    for name, (low, high) in ranges.items():
        voxels = np.clip(rng.normal(0, 300, (20, 20, 20)), low, high).astype(np.float32)
        voxels.flat[:2] = low, high
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / f"{name}.nii.gz")
        items.append({"image": str(tmp_path / f"{name}.nii.gz")})
    check_scans(items, hounsfield=True)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith("4 of 5 scans do not look like CT in HU")
    assert all(f"/{name}.nii.gz" in warning for name in set(ranges) - {"ct"}) and "/ct.nii.gz" not in warning
    caplog.clear()
    check_scans(items)
    check_scans(items, hounsfield=True, voxels=False)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_the_value_of_unknown_voxels_is_allowed_where_it_is_named(tmp_path):
    item = {"image": write(tmp_path / "a.nii.gz"), "label": label(tmp_path / "l.nii.gz", (0, 1, 255))}
    check_scans([item], labels=[0, 1], ignore_label=255)
    assert fault(item, labels=[0, 1]).endswith(
        "holds the label value 255; allowed are the declared 0, 1; for unknown voxels, pass --ignore_label 255"
    )
    assert "the label value 1; allowed are the declared 0, and 255 for unknown voxels" in fault(
        item, labels=[0], ignore_label=255
    )


def test_a_scan_that_passed_with_unknown_voxels_is_checked_again_without(tmp_path):
    item = {"image": write(tmp_path / "a.nii.gz"), "label": label(tmp_path / "l.nii.gz", (0, 1, 255))}
    check_scans([item], labels=[0, 1], ignore_label=255, remember=tmp_path / "r.json")
    assert "255" in fault(item, labels=[0, 1], remember=tmp_path / "r.json")


@pytest.mark.parametrize("axes", ["RAS", "SPL", "IAR"])
def test_a_label_that_is_only_turned_passes_and_one_that_is_also_shifted_does_not(tmp_path, axes):
    image = write(tmp_path / "a.nii")
    turn = nib.orientations.ornt_transform(nib.io_orientation(AFFINE), nib.orientations.axcodes2ornt(axes))
    turned = nib.load(label(tmp_path / "l.nii")).as_reoriented(turn)
    nib.save(turned, tmp_path / "turned.nii")
    check_scans([{"image": image, "label": str(tmp_path / "turned.nii")}], labels=[0, 1, 2])
    shifted = turned.affine.copy()
    shifted[0, 3] += 0.4
    nib.save(nib.Nifti1Image(np.asarray(turned.dataobj), shifted), tmp_path / "shifted.nii")
    found = fault({"image": image, "label": str(tmp_path / "shifted.nii")})
    assert "is not aligned with its image" in found and "differ by up to 0.5 voxels" in found
    with pytest.raises(InputError, match="must have the same grid|is not aligned"):  # channels are stacked as they are
        check_scans([{"image": [image, str(tmp_path / "turned.nii")]}], channels=2)


def test_label_values_off_by_a_rounding_error_pass(tmp_path):
    image = write(tmp_path / "a.nii")
    good = label(tmp_path / "l.nii", (0, 1.0000001, 1.9995), dtype=np.float32)
    check_scans([{"image": image, "label": good}], labels=[0, 1, 2])
    check_scans([{"image": image, "label": good}])
    bad = label(tmp_path / "b.nii", (0, 1.002), dtype=np.float32)
    assert "holds the label value 1.002;" in fault({"image": image, "label": bad}, labels=[0, 1, 2])
