# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The fingerprint equals measurements by hand, along the axes of training; unusable scans are named."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.transforms import Compose, CropForegroundd, EnsureChannelFirstd, LoadImaged, Orientationd

from bundles.common.data.foreground import above_or_all
from bundles.common.errors import InputError
from bundles.segmentation.tasks import data_fingerprint as module
from bundles.segmentation.tasks.data_fingerprint import data_fingerprint

SHAPE = (10, 8, 6)
LPS = np.diag([-0.5, -1.0, 3.0, 1.0])
# The file's axes run superior, right, posterior, with 3, 0.5 and 1 mm.
TURNED = np.array([[0, 0.5, 0, 0], [0, 0, -1.0, 0], [3.0, 0, 0, 0], [0, 0, 0, 1]])


def write(path: Path, voxels: np.ndarray, affine: np.ndarray = LPS) -> str:
    nib.save(nib.Nifti1Image(voxels, affine), path)
    return str(path)


def pair(folder: Path, name: str, image: np.ndarray, label: np.ndarray, affine: np.ndarray = LPS) -> dict:
    return {
        "image": write(folder / f"{name}.nii.gz", image, affine),
        "label": write(folder / f"{name}_label.nii.gz", label, affine),
    }


def patch_header(file: str, **fields) -> None:
    """Set fields of an uncompressed file as they are, where nibabel would correct them."""
    content = bytearray(Path(file).read_bytes())
    header = nib.Nifti1Header(bytes(content[:348]), check=False)
    for name, value in fields.items():
        header[name] = value
    content[:348] = header.binaryblock
    Path(file).write_bytes(content)


def ct(seed: int, shape: tuple[int, ...] = SHAPE) -> tuple[np.ndarray, np.ndarray]:
    """Air around a body of 4 x 3 x 2 voxels, and a label map of it with two classes."""
    image, label = np.full(shape, -1000, np.int16), np.zeros(shape, np.uint8)
    body = (slice(2, 6), slice(4, 7), slice(1, 3))
    image[body] = np.random.default_rng(seed).integers(-100, 300, (4, 3, 2))
    label[body][:2], label[body][2] = 1, 2
    return image, label


def measure(items: list[dict], **options) -> module.DataFingerprint:
    return data_fingerprint(items, **{"channels": 1, "labels": [0, 1, 2], "intensities": True, **options})


def test_spacing_size_volumes_and_intensities_are_those_made(tmp_path):
    image, label = ct(0)
    (scan,) = measure([pair(tmp_path, "a", image, label)]).scans
    assert scan.file == str(tmp_path / "a.nii.gz")
    assert scan.spacing == (0.5, 1.0, 3.0)
    assert scan.size_above(-900) == (4, 3, 2)
    assert (
        scan.size_above(-1001) == scan.size_above(5000) == SHAPE
    )  # nothing above 5000: the whole scan, as in training
    assert scan.class_voxels.tolist() == [480 - 12 - 6, 12, 6]
    assert sorted(scan.intensities) == sorted(image[label > 0])


def test_axes_are_those_that_training_sees(tmp_path):
    image, label = ct(0)
    item = pair(tmp_path, "a", image, label, affine=TURNED)
    fingerprint = measure([item])
    (scan,) = fingerprint.scans
    assert scan.spacing == pytest.approx((0.5, 1.0, 3.0))
    assert scan.size_above(-900) == (3, 2, 4)
    keys = {"keys": ["image", "label"]}
    loaded = Compose(
        [
            LoadImaged(**keys, image_only=True),
            EnsureChannelFirstd(**keys),
            Orientationd(**keys, axcodes="RAS", labels=None),
        ]
    )(item)
    assert scan.spacing == pytest.approx(loaded["image"].pixdim.tolist())
    crop = CropForegroundd(**keys, source_key="image", select_fn=lambda voxels: above_or_all(voxels, other=-900))
    assert scan.size_above(-900) == crop(loaded)["image"].shape[1:]
    assert fingerprint.class_volumes[0] == pytest.approx([(480 - 18) * 1.5, 12 * 1.5, 6 * 1.5])


def test_random_scans_agree_with_a_slow_formula(tmp_path):
    """The box of the voxels above several thresholds, found by checking every voxel."""
    rng = np.random.default_rng(1)
    for number in range(5):
        image = np.where(rng.random(SHAPE) < 0.02, rng.normal(0, 100, SHAPE), -1000).astype(np.float32)
        label = rng.integers(0, 3, SHAPE).astype(np.float32)
        (scan,) = measure([pair(tmp_path, f"{number}", image, label)]).scans
        for threshold in (-500.0, 0.0, 80.0):
            where = np.argwhere(image > threshold)
            box = where.max(axis=0) - where.min(axis=0) + 1 if len(where) else SHAPE
            assert scan.size_above(threshold) == tuple(box)
        assert scan.class_voxels.tolist() == [sum(value == v for value in label.flat) for v in range(3)]


def test_several_channels_in_one_file_or_in_several_are_one_scan(tmp_path):
    """The box contains all voxels above the threshold in any channel."""
    first, label = ct(0)
    second = np.full(SHAPE, -1000, np.int16)
    second[8, 5, 5] = 7
    together = pair(tmp_path, "both", np.stack([first, second], axis=3), label)
    apart = {
        "image": [write(tmp_path / f"{n}.nii", v) for n, v in enumerate((first, second))],
        "label": together["label"],
    }
    scans = [measure([item], channels=2).scans[0] for item in (together, apart)]
    assert scans[1].file == str(tmp_path / "0.nii")
    for scan in scans:
        assert scan.size_above(-900) == (7, 3, 5)
        assert sorted(scan.intensities) == sorted([*first[label > 0], *second[label > 0]])


def test_stored_numbers_are_scaled_as_the_header_says_also_downwards(tmp_path):
    image, label = ct(0)
    item = pair(tmp_path, "a", image, label)
    expected = measure([item]).scans[0]
    for slope, inter in ((2.0, -1024.0), (-1.0, 50.0)):
        stored = write(tmp_path / "stored.nii", ((image.astype(float) - inter) / slope).astype(np.float32))
        patch_header(stored, scl_slope=slope, scl_inter=inter)
        (scan,) = measure([item | {"image": stored}]).scans
        assert [scan.size_above(t) for t in (-900, 100)] == [expected.size_above(t) for t in (-900, 100)]
        assert scan.intensities == pytest.approx(expected.intensities)


def test_the_same_scans_give_the_same_fingerprint_in_any_order_and_a_bounded_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SAMPLE", 7)
    items = [pair(tmp_path, f"s{number}", *ct(number)) for number in range(4)]
    one, other = measure(items), measure(items[::-1], workers=1)
    assert [scan.file for scan in one.scans] == [item["image"] for item in items] == [scan.file for scan in other.scans]
    assert np.array_equal(one.intensities, other.intensities) and one.intensities.shape == (4 * 7,)
    assert np.array_equal(one.spacings, other.spacings) and one.spacings.shape == (4, 3)
    assert np.array_equal(one.sizes_above(0), other.sizes_above(0))
    assert np.array_equal(one.class_volumes, other.class_volumes)
    image, label = ct(2)
    assert set(one.scans[2].intensities) <= set(image[label > 0])
    assert measure(items, intensities=False).intensities.size == 0


def refusal(items: list[dict], **options) -> str:
    with pytest.raises(InputError) as error:
        measure(items, **options)
    return str(error.value)


def test_labels_that_are_no_whole_numbers_or_not_declared_are_named(tmp_path):
    image, label = ct(0)
    half = label.astype(np.float32)
    half[0, 0, :2] = 0.5, 1.25
    seven = label.copy()
    seven[0, 0, 0] = 7
    items = [pair(tmp_path, "good", image, label), pair(tmp_path, "h", image, half), pair(tmp_path, "s", image, seven)]
    message = refusal(items)
    assert message.startswith("2 of 3 scans are bad:\n") and message.endswith("start again.")
    assert (
        f"{tmp_path}/h_label.nii.gz: holds the label values 0.5, 1.25; allowed are whole numbers, the declared 0, 1, 2"
        in message
    )
    assert f"{tmp_path}/s_label.nii.gz: holds the label value 7; allowed are the declared 0, 1, 2" in message
    assert measure([pair(tmp_path, "f", image, label.astype(np.float64))]).scans[0].class_voxels[1] == 12


def test_channels_other_than_declared_are_named(tmp_path):
    image, label = ct(0)
    item = pair(tmp_path, "two", np.stack([image, image], axis=3), label)
    assert f"{item['image']}: has shape (10, 8, 6, 2), not (X, Y, Z): it has 2 volumes in one file" in refusal([item])
    flat = pair(tmp_path, "one", image, label)
    assert (
        f"{flat['image']}: has shape (10, 8, 6), not (X, Y, Z, 2): it holds one channel, but 2 are expected"
        in refusal([flat], channels=2)
    )


def test_a_spacing_of_zero_a_broken_file_and_nan_are_named(tmp_path):
    image, label = ct(0)
    items = [pair(tmp_path, name, image, label) for name in ("zero", "cut")]
    broken = items[0] | {"image": write(tmp_path / "zero.nii", image)}
    patch_header(broken["image"], pixdim=[1, 0.5, 0, 3, 0, 0, 0, 0])
    assert f"{broken['image']}: has spacing [0.5, 0.0, 3.0] mm; every spacing must be above 0" in refusal([broken])

    Path(items[1]["label"]).write_bytes(Path(items[1]["label"]).read_bytes()[:-20])
    assert f"{items[1]['label']}: cannot be read, perhaps damaged or cut short" in refusal([items[1]])

    wrong = image.astype(np.float32)
    wrong[0, 0, 0] = np.nan
    item = pair(tmp_path, "nan", wrong, label)
    assert f"{item['image']}: has 1 of 480 voxels that are NaN or infinite" in refusal([item])

    item = {**items[0], "image": str(tmp_path / "gone.nii.gz")}
    assert f"{item['image']}: does not exist" in refusal([item])


def test_unknown_voxels_are_not_measured(tmp_path):
    image, label = ct(0)
    expected = measure([pair(tmp_path, "a", image, label)])
    partly = label.copy()
    partly[0] = 255  # air, outside of the structures
    item = pair(tmp_path, "b", image, partly)
    (scan,) = measure([item], ignore_label=255).scans
    assert scan.class_voxels.tolist() == [480 - 12 - 6 - partly[0].size, 12, 6]
    np.testing.assert_array_equal(scan.intensities, expected.scans[0].intensities)
    assert scan.size_above(-900) == expected.scans[0].size_above(-900)
    with pytest.raises(InputError, match=r"holds the label value 255; allowed are the declared 0, 1, 2"):
        measure([item])
    partly[1, 1, 1] = 7
    with pytest.raises(InputError, match=r"holds the label value 7; allowed"):
        measure([pair(tmp_path, "c", image, partly)], ignore_label=255)
