# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""MetaImage files come with their voxels and their grid; SimpleITK 2.5.7 wrote the header and says where its voxels lie."""

from __future__ import annotations

import gzip
import os
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from bundles.common.errors import RefusedScan
from bundles.common.scans.meta_image import data_file, read_meta_image
from bundles.common.scans.reading import read_scan
from bundles.common.scans.search import Candidate

SHAPE = (7, 6, 5)
# As SimpleITK wrote an image turned by 10, 20 and 30 degrees about x, y and z.
OBLIQUE = (
    "0.81379768134937358 0.4698463103929541 -0.34202014332566866 -0.44096961052988237 0.88256411925938538 0.16317591116653479 "
    "0.37852230636979245 0.018028311236297265 0.92541657839832325"
)


def write(
    path: Path, voxels: np.ndarray, *, local: bool = False, compressed: bool = False, **changed: str | None
) -> Path:
    kinds = {
        "int64": "MET_LONG_LONG",
        "int16": "MET_SHORT",
        "uint8": "MET_UCHAR",
        "uint16": "MET_USHORT",
        "float32": "MET_FLOAT",
        "float64": "MET_DOUBLE",
    }
    data = voxels.tobytes(order="F")
    data = zlib.compress(data) if compressed else data
    fields = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": str(voxels.dtype.byteorder == ">"),
        "CompressedData": str(compressed),
        "TransformMatrix": "1 0 0 0 1 0 0 0 1",
        "Offset": "-10.5 20 30.25",
        "CenterOfRotation": "0 0 0",
        "AnatomicalOrientation": "RAI",
        "ElementSpacing": "0.69999999999999996 0.80000000000000004 2.5",
        "DimSize": " ".join(map(str, voxels.shape)),
        "ElementType": kinds[voxels.dtype.name],
        "ElementDataFile": "LOCAL" if local else "voxels.raw",
    } | changed
    fields["ElementDataFile"] = fields.pop("ElementDataFile")  # always the last
    text = "".join(f"{name} = {value}\n" for name, value in fields.items() if value is not None)
    path.write_bytes(text.encode() + (data if local else b""))
    if not local:
        (path.parent / "voxels.raw").write_bytes(data)
    return path


def voxels(dtype=np.int16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, SHAPE).astype(dtype)


@pytest.mark.parametrize("dtype", [np.int16, ">i2", np.uint8, np.uint16, np.float32, np.float64])
@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("compressed", [True, False])
def test_voxels_of_every_kind_are_read(tmp_path, dtype, local, compressed):
    path = write(tmp_path / "scan.mhd", voxels(dtype), local=local, compressed=compressed)
    read, _ = read_meta_image(path)
    np.testing.assert_array_equal(read, voxels(dtype))
    assert data_file(path) == str(path if local else tmp_path / "voxels.raw")


def test_an_oblique_grid_lies_where_simpleitk_says(tmp_path):
    """SimpleITK: voxel (i, j, k) lies at Offset + R diag(spacing) (i, j, k) in LPS, R the rotation given to SetDirection."""
    _, affine = read_meta_image(write(tmp_path / "scan.mhd", voxels(), TransformMatrix=OBLIQUE))
    rotation = Rotation.from_euler("xyz", [10, 20, 30], degrees=True).as_matrix()
    place = np.array([-10.5, 20, 30.25]) + rotation @ np.diag([0.7, 0.8, 2.5]) @ (1, 2, 3)
    np.testing.assert_allclose(affine @ (1, 2, 3, 1), [-place[0], -place[1], place[2], 1], atol=1e-9)


def test_an_axial_scan_is_lps(tmp_path):
    path = write(tmp_path / "scan.mha", voxels(), local=True, TransformMatrix=None)
    volume = read_scan(Candidate("name", str(path), "metaimage", (str(path),)))
    assert volume.orientation == "LPS"
    np.testing.assert_allclose(volume.spacing, (0.7, 0.8, 2.5))
    assert "".join(nib.aff2axcodes(volume.affine)) == "LPS"
    np.testing.assert_array_equal(volume.to_ras().voxels, voxels()[::-1, ::-1])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"NDims": "4"}, "4 dimensions"),
        ({"ElementNumberOfChannels": "3"}, "3 channels"),
        ({"ElementType": "MET_STRING"}, "MET_STRING"),
        ({"ElementDataFile": "LIST"}, "several files (ElementDataFile = LIST)"),
        ({"ElementDataFile": "slice%03d.raw 1 5 1"}, "several files"),
        ({"ElementDataFile": "gone.raw"}, "gone.raw as its data file, which does not exist"),
        ({"BinaryData": "False"}, "BinaryData = False"),
        ({"DistanceUnits": "cm"}, "DistanceUnits = cm, which programs read in different ways: convert it, with mm"),
        ({"ElementToIntensityFunctionSlope": "2"}, "ElementToIntensityFunctionSlope = 2"),
        ({"ElementToIntensityFunctionOffset": "-1024"}, "ElementToIntensityFunctionOffset = -1024"),
        ({"HeaderSize": "-2"}, "HeaderSize = -2"),
        ({"HeaderSize": "many"}, "HeaderSize = many"),
        ({"HeaderSize": "1000000000000"}, "begin behind its end (HeaderSize 1000000000000)"),
        ({"HeaderSize": "4"}, "416 bytes of voxels, but its header requires 420"),
        ({"ElementSpacing": "0.7 0 2.5"}, "spacing [0.7, 0.0, 2.5]"),
        ({"ElementSpacing": "0.7 x"}, "ElementSpacing = 0.7 x"),
        ({"ElementSpacing": None}, "ElementSpacing = (missing)"),
        ({"DimSize": "7 6 6"}, "420 bytes of voxels, but its header requires 504"),
        ({"ElementDataFile": None}, "no ElementDataFile"),
    ],
)
def test_bad_headers_are_refused(tmp_path, changed, words):
    with pytest.raises(RefusedScan) as error:
        read_meta_image(write(tmp_path / "scan.mhd", voxels(), **changed))
    assert words in str(error.value)


@pytest.mark.parametrize("size", ["-1", "128"])
def test_voxels_behind_another_header_are_read(tmp_path, size):
    """As of a raw file with the header of its scanner."""
    path = write(tmp_path / "scan.mhd", voxels(), HeaderSize=size)
    data = tmp_path / "voxels.raw"
    data.write_bytes(b"h" * 128 + data.read_bytes())
    np.testing.assert_array_equal(read_meta_image(path)[0], voxels())


def test_voxels_packed_with_gzip_are_read(tmp_path):
    path = write(tmp_path / "scan.mhd", voxels(), CompressedData="True")
    data = tmp_path / "voxels.raw"
    data.write_bytes(gzip.compress(data.read_bytes()))
    np.testing.assert_array_equal(read_meta_image(path)[0], voxels())


def test_harmless_fields_are_accepted(tmp_path):
    harmless = {
        "ElementToIntensityFunctionSlope": "1.0",
        "ElementToIntensityFunctionOffset": "0.0",
        "DistanceUnits": "mm",
    }
    path = write(tmp_path / "scan.mhd", voxels(np.int64), ElementSpacing=None, ElementSize="0.7 0.8 2.5", **harmless)
    found, affine = read_meta_image(path)
    np.testing.assert_array_equal(found, voxels())
    np.testing.assert_allclose(nib.affines.voxel_sizes(affine), (0.7, 0.8, 2.5))


@pytest.mark.parametrize("compressed", [True, False])
def test_voxels_cut_short_are_refused(tmp_path, compressed):
    path = write(tmp_path / "scan.mhd", voxels(), compressed=compressed)
    (tmp_path / "voxels.raw").write_bytes((tmp_path / "voxels.raw").read_bytes()[:-100])
    with pytest.raises(RefusedScan, match="cut short"):
        read_scan(Candidate("name", str(path), "metaimage", (str(path),)))


def test_voxels_that_are_missing_are_refused(tmp_path):
    path = write(tmp_path / "scan.mhd", voxels())
    (tmp_path / "voxels.raw").unlink()
    with pytest.raises(RefusedScan, match="voxels.raw as its data file, which does not exist"):
        read_scan(Candidate("name", str(path), "metaimage", (str(path),)))


@pytest.mark.parametrize(("offset", "matrix"), [("Position", "Orientation"), ("Origin", "Rotation")])
def test_the_grid_is_read_by_its_other_names(tmp_path, offset, matrix):
    voxels = np.arange(210, dtype=np.int16).reshape(SHAPE)
    expected = read_meta_image(write(tmp_path / "a.mha", voxels, local=True, TransformMatrix=OBLIQUE))[1]
    fields = {"Offset": None, "TransformMatrix": None, offset: "-10.5 20 30.25", matrix: OBLIQUE}
    affine = read_meta_image(write(tmp_path / "b.mha", voxels, local=True, **fields))[1]
    np.testing.assert_array_equal(affine, expected)
    assert not np.allclose(affine[:3, 3], 0)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../voxels.raw", "sub/../../voxels.raw", "..\\voxels.raw", "C:\\voxels.raw", "/dev/zero"]
)
def test_a_data_file_elsewhere_is_refused(tmp_path, name):
    path = write(tmp_path / "scan.mhd", np.zeros(SHAPE, np.int16), ElementDataFile=name)
    for read in (data_file, read_meta_image):
        with pytest.raises(RefusedScan, match="which is not in the folder of the header"):
            read(path)


def test_no_more_is_unpacked_than_the_header_needs(tmp_path):
    path = write(tmp_path / "scan.mha", np.zeros(SHAPE, np.int16), local=True, compressed=True)
    content = path.read_bytes()
    start = content.index(b"ElementDataFile = LOCAL\n") + len(b"ElementDataFile = LOCAL\n")
    path.write_bytes(content[:start] + zlib.compress(bytes(10**6)))
    with pytest.raises(RefusedScan, match="it has 421 bytes of voxels, but its header requires 420"):
        read_meta_image(path)
    path.write_bytes(content[:start] + bytes(5000))
    with pytest.raises(RefusedScan, match="it has 5000 bytes"):
        read_meta_image(path)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"DimSize": "99999 99999 99999"}, "claims 1e\\+15 voxels"),
        ({"ElementSpacing": "0.0007 0.0008 0.0025"}, "its numbers look like metres"),
    ],
)
def test_a_grid_that_no_scan_has_is_refused(tmp_path, changed, words):
    path = write(tmp_path / "scan.mha", np.zeros(SHAPE, np.int16), local=True, **changed)
    with pytest.raises(RefusedScan, match=words):
        read_meta_image(path)


def test_a_data_file_that_is_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.raw")
    path = tmp_path / "x.mhd"
    path.write_text(
        "NDims = 3\nDimSize = 8 8 8\nElementSpacing = 1 1 1\nElementType = MET_SHORT\nElementDataFile = x.raw\n"
    )
    with pytest.raises(RefusedScan, match=r"names .*x\.raw as its data file, which is no regular file"):
        read_meta_image(path)


def test_axes_in_one_plane_are_refused(tmp_path):
    (tmp_path / "x.raw").write_bytes(bytes(1024))
    path = tmp_path / "x.mhd"
    path.write_text(
        "NDims = 3\nDimSize = 8 8 8\nElementSpacing = 1 1 1\nElementType = MET_SHORT\n"
        "TransformMatrix = 1 0 0 1 0 0 0 0 1\nElementDataFile = x.raw\n"
    )
    with pytest.raises(
        RefusedScan, match="TransformMatrix = 1 0 0 1 0 0 0 0 1, whose axes are zero or lie in one plane"
    ):
        read_meta_image(path)
