# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Odd NIfTI files: checks, the reader of prepare and the loader of training all read the same, or all refuse for the same reason."""

from __future__ import annotations

import bz2
import gzip
import re
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.data import MetaTensor
from monai.transforms import EnsureChannelFirst

from bundles.common.errors import InputError, RefusedScan
from bundles.common.scans import nifti
from bundles.common.scans.checks import examine_scans
from bundles.common.scans.decode_once import LoadScand
from bundles.common.scans.nifti import open_scan
from bundles.common.scans.nifti_writing import AtomicNibabelWriter
from bundles.common.scans.reading import Volume, read_scan
from bundles.common.scans.search import Candidate

SHAPE = (12, 10, 8)
AFFINE = np.array([[-2.0, 0, 0, 60], [0, -2, 0, 60], [0, 0, 3, -40], [0, 0, 0, 1]])
VOXELS = np.random.default_rng(0).integers(-1000, 1500, SHAPE).astype(np.int16)
PIXDIM, OFFSET, SLOPE, QFORM_CODE, SFORM_CODE, SROW = 76, 108, 112, 252, 254, 280  # bytes of the header of NIfTI-1


@pytest.fixture(autouse=True)
def nothing_told():
    nifti._told.clear()


def scan(
    path: Path,
    voxels: np.ndarray = VOXELS,
    *,
    q: tuple[np.ndarray, int] = (AFFINE, 1),
    s: tuple[np.ndarray, int] = (AFFINE, 1),
    unit: str = "mm",
    kind: type = nib.Nifti1Image,
    header: nib.Nifti1Header | None = None,
    put: dict[int, bytes] | None = None,
) -> Path:
    """Write a scan with both forms; ``put`` are bytes to write at places of the file."""
    image = kind(voxels, s[0], header, dtype=voxels.dtype)
    image.set_qform(q[0], code=q[1])
    image.set_sform(s[0], code=s[1])
    image.header.set_xyzt_units(unit)
    nib.save(image, path)
    if put:
        raw = bytearray(content(path))
        for place, data in put.items():
            raw[place : place + len(data)] = data
        path.write_bytes(gzip.compress(bytes(raw), 1) if path.name.endswith(".gz") else bytes(raw))
    return path


def content(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes()) if path.name.lower().endswith(".gz") else path.read_bytes()


def moved(*by: float) -> np.ndarray:
    affine = AFFINE.copy()
    affine[:3, 3] += by
    return affine


def scaled(factor: float) -> np.ndarray:
    return np.diag([factor, factor, factor, 1.0]) @ AFFINE


def turned(degrees: float) -> np.ndarray:
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[cos, -sin, 0, 0], [sin, cos, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]) @ AFFINE


def sheared(degrees: float) -> np.ndarray:
    affine = AFFINE.copy()
    affine[1, 2] = 3 * np.tan(np.radians(degrees))
    return affine


def with_value(value: float) -> np.ndarray:
    voxels = VOXELS.astype(np.float32)
    voxels[1, 2, 3] = value
    return voxels


def renamed(folder: Path, name: str, change: Callable[[bytes], bytes] = bytes) -> Path:
    (folder / name).write_bytes(change(scan(folder / "plain.nii.gz").read_bytes()))
    return folder / name


def read_by_all(path: Path) -> tuple[Volume | None, str]:
    """What all three make of a file: the scan, or the reason why it is refused."""
    _, reasons = examine_scans([{"image": str(path)}])
    try:
        volume, refused = read_scan(Candidate("name", str(path), "nifti", (str(path),))), None
    except RefusedScan as error:
        volume, refused = None, str(error)
    assert reasons == ({} if refused is None else {str(path): refused})
    try:
        loaded = EnsureChannelFirst()(LoadScand("image", image_only=True)({"image": path})["image"])
    except InputError as error:
        assert str(error) == f"{path}: {refused}"
        return None, refused
    assert refused is None
    np.testing.assert_array_equal(loaded[0].numpy(), volume.voxels.astype(np.float32))
    np.testing.assert_allclose(loaded.affine.numpy(), volume.affine, atol=1e-9)
    assert loaded.meta["spatial_shape"].tolist() == list(volume.voxels.shape)
    return volume, ""


def many_extensions(path: Path) -> Path:
    """Two thousand empty extensions before the voxels."""
    start = bytearray(content(scan(path)))
    start[OFFSET : OFFSET + 4] = struct.pack("<f", 352 + 2000 * 8)
    extensions = struct.pack("<4b", 1, 0, 0, 0) + struct.pack("<2i", 8, 0) * 2000
    path.write_bytes(gzip.compress(bytes(start[:348]) + extensions + bytes(start[352:])))
    return path


#: How a file is made; words of the warning, if there is one.
READ: dict[str, tuple[Callable[[Path], Path], str]] = {
    "plain": (lambda p: scan(p / "a.nii.gz"), ""),
    "not compressed": (lambda p: scan(p / "a.nii"), ""),
    "name in capitals": (lambda p: renamed(p, "SCAN.NII.GZ"), ""),
    "name in mixed case": (lambda p: renamed(p, "Scan.Nii.Gz"), ""),
    "name with brackets and blanks": (lambda p: renamed(p, "ct [1] (Ä), #2*.nii.gz"), ""),
    "NIfTI-2": (lambda p: scan(p / "a.nii.gz", kind=nib.Nifti2Image), ""),
    "big-endian": (lambda p: scan(p / "a.nii.gz", VOXELS.astype(">i2"), header=nib.Nifti1Header(endianness=">")), ""),
    "int32": (lambda p: scan(p / "a.nii.gz", VOXELS.astype(np.int32)), ""),
    "int64": (lambda p: scan(p / "a.nii.gz", VOXELS.astype(np.int64)), ""),
    "float64": (lambda p: scan(p / "a.nii.gz", VOXELS.astype(np.float64)), ""),
    "axes of one": (lambda p: scan(p / "a.nii.gz", VOXELS[..., None]), ""),
    "two axes of one": (lambda p: scan(p / "a.nii.gz", VOXELS[..., None, None]), ""),
    "no sform": (lambda p: scan(p / "a.nii.gz", s=(AFFINE, 0)), ""),
    "no qform": (lambda p: scan(p / "a.nii.gz", q=(AFFINE, 0)), ""),
    "pixdim rounded": (lambda p: scan(p / "a.nii.gz", put={PIXDIM + 4: struct.pack("<f", 2.001)}), ""),
    "slope that is not a number": (lambda p: scan(p / "a.nii.gz", put={SLOPE: struct.pack("<2f", np.nan, -9)}), ""),
    "shear without qform": (lambda p: scan(p / "a.nii.gz", s=(sheared(5), 1), q=(AFFINE, 0)), ""),
    "neither sform nor qform": (
        lambda p: scan(p / "a.nii.gz", s=(AFFINE, 0), q=(AFFINE, 0)),
        "neither an sform nor a qform",
    ),
    "sform of zeros": (lambda p: scan(p / "a.nii.gz", put={SROW: bytes(48)}), "sform is invalid .* the qform is used"),
    "forms far apart": (
        lambda p: scan(p / "a.nii.gz", s=(moved(30, -20, 15), 2)),
        r"differ by up to 15 voxels, 39.1 mm .*from \(90, 40, -25\), qform LPS from \(60, 60, -40\)",
    ),
    "no qfac": (lambda p: scan(p / "a.nii.gz", s=(AFFINE, 0), put={PIXDIM: struct.pack("<f", 0)}), ""),
    "no qfac, and an sform": (lambda p: scan(p / "a.nii.gz", put={PIXDIM: struct.pack("<f", np.nan)}), ""),
    "an sform_code that is none": (
        lambda p: scan(p / "a.nii.gz", s=(moved(30, -20, 15), 1), put={SFORM_CODE: struct.pack("<h", 9999)}),
        "sform_code 9999, where the standard knows 0 to 5: it does not count, as in nibabel",
    ),
    "a qform_code that is none": (
        lambda p: scan(p / "a.nii.gz", q=(moved(30, -20, 15), 1), put={QFORM_CODE: struct.pack("<h", 6)}),
        "qform_code 6, where",
    ),
    "no code that is one": (
        lambda p: scan(p / "a.nii.gz", put={QFORM_CODE: struct.pack("<2h", 9999, 9999)}),
        "sform_code 9999 and qform_code 9999, where the standard knows 0 to 5: they count",
    ),
    "a code below 0": (
        lambda p: scan(p / "a.nii.gz", s=(moved(30, -20, 15), 1), put={SFORM_CODE: struct.pack("<h", -1)}),
        "",
    ),
    "scale unlike pixdim": (
        lambda p: scan(p / "a.nii.gz", put={SROW: struct.pack("<12f", *scaled(1.5)[:3].ravel())}),
        r"sform has voxels of \(3, 3, 4.5\), its pixdim says \(2, 2, 3\); pixdim and qform are used",
    ),
    "metres": (
        lambda p: scan(p / "a.nii.gz", q=(scaled(1e-3), 1), s=(scaled(1e-3), 1), unit="meter"),
        r"unit is metres: voxels of \(0.002, 0.002, 0.003\) metres are read as \(2, 2, 3\) mm",
    ),
    "micrometres": (
        lambda p: scan(p / "a.nii.gz", q=(scaled(1e3), 1), s=(scaled(1e3), 1), unit="micron"),
        "unit is micrometres",
    ),
    "unit unknown": (lambda p: scan(p / "a.nii.gz", unit="unknown"), ""),
}  # fmt: skip
#: Where the grid is not `AFFINE`.
GRIDS = {"shear without qform": sheared(5), "forms far apart": moved(30, -20, 15)}


@pytest.mark.parametrize("odd", READ)
def test_odd_scans_are_read_alike_by_all(tmp_path, caplog, odd):
    make, words = READ[odd]
    volume, refused = read_by_all(make(tmp_path))
    assert refused == ""
    np.testing.assert_array_equal(volume.voxels, VOXELS)
    if odd != "neither sform nor qform":
        np.testing.assert_allclose(volume.affine, GRIDS.get(odd, AFFINE), rtol=1e-6, atol=1e-5)
    warnings = [each.getMessage() for each in caplog.records if each.name.startswith("bundles")]
    assert len(warnings) == bool(words)  # once, although three have read it
    if words:
        assert re.search(words, warnings[0]) and str(tmp_path) in warnings[0]


@pytest.mark.parametrize("cut", ["one slice", "two slices", "one row"])
def test_thin_scans_keep_three_axes(tmp_path, cut):
    voxels = {"one slice": VOXELS[:, :, :1], "two slices": VOXELS[:, :, :2], "one row": VOXELS[:, 3:4]}[cut]
    volume, _ = read_by_all(scan(tmp_path / "a.nii.gz", voxels))
    np.testing.assert_array_equal(volume.voxels, voxels)


@pytest.mark.parametrize("degrees", [1, 20, 44, 46, 90, 179])
def test_oblique_scans(tmp_path, degrees):
    affine = turned(degrees)
    volume, _ = read_by_all(scan(tmp_path / "a.nii.gz", q=(affine, 1), s=(affine, 1)))
    np.testing.assert_allclose(volume.affine, affine, atol=1e-4)


def huge(shape: tuple[int, ...]) -> dict[int, bytes]:
    return {40: struct.pack(f"<{len(shape) + 1}h", len(shape), *shape)}


#: How a file is made; words of the reason.
REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    # names and compression
    "gzip named .nii": (lambda p: renamed(p, "a.nii"), "is gzip-compressed though named .nii: rename it to .nii.gz"),
    "not compressed, named .nii.gz": (
        lambda p: renamed(p, "a.nii.gz", gzip.decompress),
        "is not compressed though named .nii.gz: rename it to .nii",
    ),
    "bzip2 named .nii.gz": (
        lambda p: renamed(p, "a.nii.gz", bz2.compress),
        "is bzip2-compressed though named .nii.gz: decompress it",
    ),
    "bzip2": (lambda p: renamed(p, "a.nii.bz2", bz2.compress), "is not named like a NIfTI file"),
    "another format": (lambda p: renamed(p, "a.nrrd"), "is not named like a NIfTI file"),
    "a web page": (lambda p: renamed(p, "a.nii.gz", lambda _: b"<html>"), "cannot be read: it is no NIfTI file"),
    "zeros": (lambda p: renamed(p, "a.nii", lambda _: bytes(999)), "cannot be read: it is no NIfTI file"),
    # shapes and values
    "two-dimensional": (lambda p: scan(p / "a.nii.gz", VOXELS[:, :, 0]), "it is a single slice"),
    "vectors": (lambda p: scan(p / "a.nii.gz", np.stack([VOXELS] * 3, -1)[:, :, :, None]), "(12, 10, 8, 1, 3)"),
    "NaN": (lambda p: scan(p / "a.nii.gz", with_value(np.nan)), "1 of 960 voxels that are NaN or infinite"),
    "infinity": (lambda p: scan(p / "a.nii", with_value(-np.inf)), "1 of 960 voxels that are NaN or infinite"),
    "beyond float32": (lambda p: scan(p / "a.nii.gz", VOXELS * 1e305), "to 1.49e+308, which no scan has"),
    "scaled beyond any scan": (
        lambda p: scan(p / "a.nii.gz", put={SLOPE: struct.pack("<2f", 1e30, 0)}),
        "e+33, which no scan has",
    ),
    "an intercept that is not a number": (
        lambda p: scan(p / "a.nii.gz", put={SLOPE: struct.pack("<2f", 1, np.nan)}),
        "cannot be read, perhaps damaged or cut short (HeaderDataError: Valid slope but invalid intercept nan)",
    ),
    "voxels within the header": (
        lambda p: scan(p / "a.nii.gz", put={OFFSET: struct.pack("<f", 100)}),
        "perhaps damaged or cut short (HeaderDataError: vox offset 100 too low",
    ),
    "gzip cut short": (
        lambda p: renamed(p, "a.nii.gz", lambda data: data[:-200]),
        "perhaps damaged or cut short (EOFError",
    ),
    "complex": (lambda p: scan(p / "a.nii.gz", VOXELS.astype(np.complex64)), "they must be plain numbers"),
    # grids
    "forms mirrored": (
        lambda p: scan(p / "a.nii.gz", q=(np.diag([-1.0, 1, 1, 1]) @ AFFINE, 1)),
        "mirrored or turned against each other (sform LPS from (60, 60, -40), qform RPS from (-60, 60, -40))",
    ),
    "forms half a turn apart": (
        lambda p: scan(p / "a.nii.gz", q=(np.diag([-1.0, -1, 1, 1]) @ AFFINE, 1)),
        "sform LPS from (60, 60, -40), qform RAS from (-60, -60, -40)",
    ),
    "sform of zeros, no qform": (lambda p: scan(p / "a.nii", q=(AFFINE, 0), put={SROW: bytes(48)}), "axes are zero"),
    "negative spacing": (
        lambda p: scan(p / "a.nii.gz", put={PIXDIM + 4: struct.pack("<f", -2)}),
        "has spacing [-2.0, 2.0, 3.0] mm",
    ),
    "spacing of zero": (
        lambda p: scan(p / "a.nii.gz", put={PIXDIM + 12: struct.pack("<f", 0)}),
        "has spacing [2.0, 2.0, 0.0] mm",
    ),
    "metres that say mm": (
        lambda p: scan(p / "a.nii.gz", q=(scaled(1e-3), 1), s=(scaled(1e-3), 1)),
        "has voxels of 0.002 x 0.002 x 0.003 mm, below 0.05 mm, which no scan of a patient has: correct spacing and "
        "affine in its header; its numbers look like metres",
    ),
    "micrometres that say mm": (
        lambda p: scan(p / "a.nii.gz", q=(scaled(1e3), 1), s=(scaled(1e3), 1)),
        "above 20 mm, which no scan of a patient has: correct spacing and affine in its header; its numbers look like micro",
    ),
    "mm that say metres": (
        lambda p: scan(p / "a.nii.gz", unit="meter"),
        "has voxels of 2000 x 2000 x 3000 mm, above 20 mm, which no scan of a patient has (the file states its unit as metres): correct "
        "spacing and affine in its header; its numbers look like mm, so correct its unit",
    ),
    "smaller than an organ": (
        lambda p: scan(p / "a.nii.gz", q=(scaled(0.05), 1), s=(scaled(0.05), 1)),
        "is 1.2 x 1 x 1.2 mm in size, below 3 mm on every side",
    ),
    "longer than a body": (lambda p: scan(p / "a.nii.gz", np.zeros((2, 2, 900), np.uint8)), "larger than a whole body"),
    # sizes
    "cut short": (
        lambda p: renamed(p, "a.nii", lambda data: gzip.decompress(data)[:-99]),
        "perhaps damaged or cut short: its shape (12, 10, 8) requires 2272 bytes, and the file has 2173",
    ),
    "terabytes, not compressed": (lambda p: scan(p / "a.nii", put=huge((999, 999, 999))), "requires 1994006350 bytes"),
    "terabytes, compressed": (lambda p: scan(p / "a.nii.gz", put=huge((999, 999, 999))), "requires 1994006350 bytes"),
    "more voxels than any scan": (
        lambda p: scan(p / "a.nii.gz", put=huge((32767, 32767, 32767))),
        "claims 3.52e+13 voxels",
    ),
    "an axis below zero": (lambda p: scan(p / "a.nii.gz", put=huge((12, -10, 8))), "has no voxels"),
    "voxels far behind": (
        lambda p: scan(p / "a.nii.gz", put={OFFSET: struct.pack("<f", 2e9)}),
        "its voxels begin at byte 2e+09",
    ),
    "an extension longer than the header": (
        lambda p: scan(p / "a.nii.gz", put={OFFSET: struct.pack("<f", 416), 348: struct.pack("<4b2i", 1, 0, 0, 0, 2**30, 6)}),
        "an extension of 1073741824 bytes at byte 352",
    ),
    "extensions without end": (
        lambda p: many_extensions(p / "a.nii.gz"),
        "more than 1000 extensions",
    ),
}  # fmt: skip


@pytest.mark.parametrize("odd", REFUSED)
def test_bad_scans_are_refused_alike_by_all(tmp_path, odd):
    make, words = REFUSED[odd]
    _, refused = read_by_all(make(tmp_path))
    assert words in refused


def test_a_gzip_that_unpacks_to_more_than_its_header_needs_is_not_unpacked(tmp_path, monkeypatch):
    """A hundred megabytes of zeros behind the voxels, in a file of 100 KB."""
    path = scan(tmp_path / "a.nii.gz")
    path.write_bytes(gzip.compress(content(path) + bytes(100 * 2**20), 1))
    taken = []
    real = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda file, size=-1: taken.append(size) or real(file, size))
    volume, _ = read_by_all(path)
    np.testing.assert_array_equal(volume.voxels, VOXELS)
    assert all(0 <= size < 10_000 for size in taken)


def test_many_odd_files_are_not_all_named(tmp_path, caplog):
    items = [{"image": str(scan(tmp_path / f"{i}.nii", s=(AFFINE, 0), q=(AFFINE, 0)))} for i in range(14)]
    assert examine_scans(items, voxels=False)[0] == items
    named = [each.getMessage() for each in caplog.records if "neither" in each.getMessage()]
    assert len(named) == 10 and "are not named" in caplog.text


@pytest.mark.parametrize(
    "odd", ["no qfac", "an sform_code that is none", "a qform_code that is none", "no code that is one"]
)
def test_the_mask_of_an_odd_header_lies_on_its_scan(tmp_path, odd):
    path = READ[odd][0](tmp_path)
    volume, _ = read_by_all(path)
    mask = MetaTensor(np.ones((1, *SHAPE)), affine=volume.affine, meta={"filename_or_obj": str(path)})
    writer = AtomicNibabelWriter(output_dtype=np.uint8)
    writer.set_data_array(mask, channel_dim=0)
    writer.set_metadata(mask.meta | {"affine": mask.affine}, resample=False)
    writer.write(tmp_path / "mask.nii.gz")
    np.testing.assert_allclose(open_scan(tmp_path / "mask.nii.gz").affine, volume.affine, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(nib.load(tmp_path / "mask.nii.gz").affine, volume.affine, rtol=1e-6, atol=1e-5)
