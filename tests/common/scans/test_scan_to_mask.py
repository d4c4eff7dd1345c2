# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Whatever the grid, type and slope of a scan: its mask has the same grid, to the voxel, in every program."""

from __future__ import annotations

import gzip
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, EnsureChannelFirstd, Orientationd, SaveImaged

from bundles.common.scans.checks import examine_scans
from bundles.common.scans.decode_once import LoadScand
from bundles.common.scans.nifti_writing import AtomicNibabelWriter
from bundles.common.scans.reading import read_scan
from bundles.common.scans.search import Candidate
from bundles.segmentation.inference.mask_on_scan_grid import MaskOnScanGridd

hypothesis = pytest.importorskip("hypothesis", reason="pip install -e .[test]")
from hypothesis import strategies as st  # noqa: E402

CLASSES = 5
UNITS = {"mm": 1.0, "unknown": 1.0, "meter": 1e3, "micron": 1e-3}
PLACING = ("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z")
PLACING = (*PLACING, "srow_x", "srow_y", "srow_z", "pixdim", "xyzt_units")
LOADING = Compose(
    [
        LoadScand("image", image_only=True),
        EnsureChannelFirstd("image"),
        Orientationd("image", axcodes="RAS", labels=None),
    ]
)


@st.composite
def affines(draw: st.DrawFn) -> np.ndarray:
    """Any order and direction of the axes, turned by any angle, with any spacing of a scan."""
    order = draw(st.permutations(range(3)))
    signs = draw(st.tuples(*[st.sampled_from((-1.0, 1.0))] * 3))
    spacing = draw(st.tuples(*[st.integers(3, 60).map(lambda tenths: tenths / 10)] * 3))
    angles = draw(st.tuples(*[st.sampled_from((0.0, 0.05, 0.4, 0.7))] * 3))
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, order] * signs * spacing
    for axis, angle in enumerate(angles):
        turn = np.eye(3)
        a, b = [other for other in range(3) if other != axis]
        turn[[a, a, b, b], [a, b, a, b]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        affine[:3, :3] = turn @ affine[:3, :3]
    affine[:3, 3] = draw(st.tuples(*[st.integers(-7200, 7200).map(lambda eighths: eighths / 8)] * 3))
    return affine


@st.composite
def scans(draw: st.DrawFn) -> nib.Nifti1Image:
    shape = draw(st.tuples(*[st.integers(1, 7)] * 3).filter(lambda sizes: max(sizes) > 1))
    dtype = np.dtype(draw(st.sampled_from(("uint8", "int16", "uint16", "int32", "float32", "float64", ">i2"))))
    voxels = np.random.default_rng(draw(st.integers(0, 99))).integers(0, CLASSES, shape).astype(dtype)
    affine = draw(affines().filter(lambda a: (nib.affines.voxel_sizes(a) * shape).max() > 4))
    kind = draw(st.sampled_from((nib.Nifti1Image, nib.Nifti2Image)))
    image = kind(
        voxels.reshape(shape + (1,) * draw(st.integers(0, 2))),
        affine,
        kind.header_class(endianness=">" if dtype.str[0] == ">" else "<"),
    )
    image.set_data_dtype(dtype)
    sform, qform = draw(st.sampled_from(((1, 1), (2, 1), (1, 0), (0, 1), (4, 2))))
    unit = draw(st.sampled_from(tuple(UNITS)))
    affine = np.diag([1 / UNITS[unit]] * 3 + [1.0]) @ affine
    image.header.set_xyzt_units(unit, "sec")
    image.set_sform(affine, code=sform)
    image.set_qform(affine, code=qform)
    if sform and qform and draw(st.booleans()):  # another origin: programs place the scan differently
        other = affine.copy()
        other[:3, 3] += np.array((20, -30, 10)) / UNITS[unit]
        image.set_qform(other, code=qform)
    if dtype.kind in "iu" and draw(st.booleans()):
        image.header.set_slope_inter(draw(st.sampled_from((1.0, 0.5, 2.0))), draw(st.sampled_from((0.0, -1024.0, 3.0))))
    return image


@hypothesis.settings(
    max_examples=30, derandomize=True, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
)
@hypothesis.given(image=scans(), suffix=st.sampled_from((".nii", ".nii.gz")))
def test_a_mask_lies_on_its_scan(image, suffix):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"scan{suffix}")
        slope, inter = image.header.get_slope_inter()
        raw = np.asarray(image.dataobj)
        write_unscaled(image, path)
        assert examine_scans([{"image": str(path)}])[1] == {}
        stored = read_scan(Candidate("name", str(path), "nifti", (str(path),)))
        values = (raw * (slope or 1.0) + (inter or 0.0)).reshape(raw.shape[:3]).astype(np.float32)
        np.testing.assert_array_equal(stored.voxels, values)

        item = LOADING({"image": path})
        factor = UNITS[image.header.get_xyzt_units()[0]]
        native = np.diag([factor] * 3 + [1.0]) @ nib.load(path).affine
        np.testing.assert_allclose(item["image"].meta["original_affine"], native, rtol=1e-9, atol=1e-9)
        np.testing.assert_array_equal(item["image"].as_tensor()[0].numpy(), stored.to_ras().voxels)

        labels = ((item["image"].as_tensor()[0] - (inter or 0.0)) / (slope or 1.0)).round().long()
        pred = torch.nn.functional.one_hot(labels, CLASSES).movedim(-1, 0).float()
        item["pred"] = MetaTensor(pred, meta=item["image"].meta)
        save = SaveImaged(
            "pred",
            output_dir=folder,
            output_postfix="seg",
            separate_folder=False,
            resample=False,
            output_dtype=np.uint8,
            writer=AtomicNibabelWriter,
            print_log=False,
        )
        save(MaskOnScanGridd("pred", mode="nearest")(item))
        mask, scan = nib.load(Path(folder, "scan_seg.nii.gz")), nib.load(path)
        assert mask.shape == raw.shape[:3]
        np.testing.assert_array_equal(np.asarray(mask.dataobj), raw.reshape(raw.shape[:3]))
        for field in PLACING:
            expected = scan.header[field][:4] if field == "pixdim" else scan.header[field]
            actual = mask.header[field][:4] if field == "pixdim" else mask.header[field]
            np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-7, err_msg=field)


def write_unscaled(image: nib.Nifti1Image, path: Path) -> None:
    """Write the voxels as they are; nibabel would choose slope and intercept itself."""
    header = image.header
    slope, inter = header.get_slope_inter()
    header.set_slope_inter(1.0, 0.0)
    nib.save(image, path)
    if slope is None:
        return
    kind = type(header)
    raw = bytearray(path.read_bytes() if path.suffix == ".nii" else gzip.decompress(path.read_bytes()))
    fields = kind(bytes(raw[: kind.sizeof_hdr]), check=False)
    fields["scl_slope"], fields["scl_inter"] = slope, inter
    raw[: kind.sizeof_hdr] = fields.binaryblock
    path.write_bytes(bytes(raw) if path.suffix == ".nii" else gzip.compress(bytes(raw), 1))
