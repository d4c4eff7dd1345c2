# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""RAS and LPS: every voxel keeps its value and its place, on oblique, flipped and sheared grids."""

from __future__ import annotations

import sys

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from bundles.common.errors import InputError
from bundles.common.scans.nifti_writing import write_nifti
from bundles.common.scans.reading import Volume
from bundles.segmentation.propagation.itk_images import as_volume, one_thread, simple_itk, to_image, to_lps, to_volume

TURN = Rotation.from_euler("xyz", (10, -20, 30), degrees=True).as_matrix()


def affine_of(directions, spacing=(2.0, 3.0, 5.0), origin=(-40.0, 25.0, 700.0)):
    affine = np.eye(4)
    affine[:3, :3] = directions * spacing
    affine[:3, 3] = origin
    return affine


GRIDS = {
    "RAS": affine_of(np.eye(3)),
    "LPS": affine_of(np.diag([-1.0, -1.0, 1.0])),
    "left-handed": affine_of(np.diag([1.0, -1.0, 1.0])),
    "axes swapped": affine_of(np.eye(3)[[2, 0, 1]] * [1, -1, 1]),
    "oblique": affine_of(TURN),
    "sheared": affine_of(TURN @ np.array([[1, 0, 0], [0, 1, 0.3], [0, 0, np.sqrt(1 - 0.09)]])),
}


@pytest.mark.parametrize("grid", GRIDS)
def test_voxels_keep_value_and_place(grid):
    voxels = np.arange(3 * 4 * 5, dtype=np.int16).reshape(3, 4, 5)
    image = to_image(Volume(voxels, GRIDS[grid]))
    for index in [(0, 0, 0), (2, 0, 0), (0, 3, 0), (0, 0, 4), (1, 2, 3)]:
        right, front, head = nib.affines.apply_affine(GRIDS[grid], index)
        assert image.GetPixel(index) == voxels[index]
        assert image.TransformIndexToPhysicalPoint(index) == pytest.approx((-right, -front, head))
    back = to_volume(image)
    assert np.array_equal(back.voxels, voxels) and back.affine == pytest.approx(GRIDS[grid], abs=1e-9)


def test_a_nifti_file_read_by_simple_itk_itself_is_the_same_image(tmp_path):
    voxels = np.random.default_rng(0).integers(-1000, 1000, (5, 4, 3)).astype(np.int16)
    write_nifti(tmp_path / "scan.nii.gz", voxels=voxels, affine=GRIDS["oblique"])
    theirs = sitk.ReadImage(str(tmp_path / "scan.nii.gz"))
    ours = to_image(as_volume(tmp_path / "scan.nii.gz"))
    assert np.array_equal(sitk.GetArrayFromImage(ours), sitk.GetArrayFromImage(theirs))
    for get in ("GetOrigin", "GetSpacing", "GetDirection"):
        assert getattr(ours, get)() == pytest.approx(getattr(theirs, get)(), abs=1e-4)


def test_a_meta_image_file(tmp_path):
    volume = Volume(np.arange(24, dtype=np.int16).reshape(2, 3, 4), GRIDS["left-handed"])
    sitk.WriteImage(to_image(volume), str(tmp_path / "scan.mha"))
    read = as_volume(str(tmp_path / "scan.mha"))
    assert np.array_equal(read.voxels, volume.voxels) and read.affine == pytest.approx(volume.affine)


def test_maps_of_points():
    matrix = affine_of(TURN)
    right, front, head = nib.affines.apply_affine(matrix, (1.0, 2.0, 3.0))
    assert nib.affines.apply_affine(to_lps(matrix), (-1.0, -2.0, 3.0)) == pytest.approx((-right, -front, head))
    assert to_lps(to_lps(matrix)) == pytest.approx(matrix)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.nii does not exist"):
        as_volume(tmp_path / "none.nii")
    (tmp_path / "bad.nii.gz").write_bytes(b"not a scan")
    with pytest.raises(InputError, match=r"bad\.nii\.gz cannot be read"):
        as_volume(tmp_path / "bad.nii.gz")


def test_without_simple_itk_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(
        InputError, match="Run `make install EXTRAS=register` in the project's folder, or `pip install SimpleITK`"
    ):
        simple_itk()


def test_one_thread_inside_and_the_former_number_after():
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(3)
    with pytest.raises(KeyError), one_thread():
        assert sitk.ImageRegistrationMethod().GetNumberOfThreads() == 1
        raise KeyError
    assert sitk.ProcessObject.GetGlobalDefaultNumberOfThreads() == 3
