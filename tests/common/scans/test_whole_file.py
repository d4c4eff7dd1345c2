# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A NIfTI file that was cut is told from a whole one, whoever has written it."""

from __future__ import annotations

import gzip

import nibabel as nib
import numpy as np
import pytest

from bundles.common.scans.nifti import is_whole


@pytest.fixture
def voxels():
    return np.random.default_rng(0).integers(0, 200, (20, 21, 22)).astype(np.int16)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_whole_file_and_any_part_of_it(tmp_path, voxels, name):
    file = tmp_path / name
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), file)
    assert is_whole(file)
    content = file.read_bytes()
    for share in (0, 0.001, 0.3, 0.9, 0.99):
        file.write_bytes(content[: int(share * len(content))])
        assert not is_whole(file)


def test_a_gzip_file_of_several_parts_is_whole_too(tmp_path, voxels):
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / "a.nii")
    content = (tmp_path / "a.nii").read_bytes()
    parts = gzip.compress(content[:5000]) + gzip.compress(content[5000:])
    (tmp_path / "b.nii.gz").write_bytes(parts)
    assert is_whole(tmp_path / "b.nii.gz")
    (tmp_path / "b.nii.gz").write_bytes(parts[:-20])
    assert not is_whole(tmp_path / "b.nii.gz")


def test_no_file_and_another_file(tmp_path):
    (tmp_path / "text.nii.gz").write_text("text")
    assert not is_whole(tmp_path / "text.nii.gz") and not is_whole(tmp_path / "none.nii.gz")
