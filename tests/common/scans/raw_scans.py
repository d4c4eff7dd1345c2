# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Small raw scans of every kind, good and bad, as they lie in the folders of a hospital."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np

from .dicom_files import set_or_remove, write_series
from .test_checks import write

SHAPE = (24, 22, 20)
AFFINE = np.array([[-0.8, 0, 0, 100], [0, -0.9, 0, 90], [0, 0, 2.5, -300], [0, 0, 0, 1.0]])  # LPS
MIN_BODY = 500


def phantom(seed: int) -> np.ndarray:
    """Air, a body of soft tissue, a bone in it; no two are equal."""
    generator = np.random.default_rng(seed)
    voxels = generator.integers(-1010, -990, SHAPE).astype(np.int16)
    voxels[4:20, 5:18, 2:19] = generator.integers(-60, 90, (16, 13, 17))
    voxels[10:13, 12:15, 2:19] = generator.integers(700, 1100, (3, 3, 17))
    return voxels


def write_nifti(path: Path, seed: int, voxels: np.ndarray | None = None, **header) -> str:
    """Write a phantom, or other voxels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return write(path, phantom(seed) if voxels is None else voxels, AFFINE, **header)


def write_dicom(folder: Path, seed: int, **options) -> list[Path]:
    """Write a phantom as a series; ``options`` of `write_series`."""
    return write_series(folder, phantom(seed) + 1024, spacing=(0.8, 0.9, 2.5), unsigned=True, bits=12, **options)


def write_good(folder: Path) -> dict[str, int]:
    """Write two NIfTI files and two series; returns the seed of each name that `prepare` gives them."""
    write_nifti(folder / "site 1" / "Müller" / "scan.nii.gz", 1)
    write_nifti(folder / "site 2" / "scan.nii", 2)
    write_dicom(folder / "pacs" / "a", 3, PatientID="A")
    write_dicom(folder / "pacs" / "b", 4, PatientID="B")
    return {
        f"{folder.name}__{name}": seed
        for name, seed in {"site_1__Müller__scan": 1, "site_2__scan": 2, "pacs__a": 3, "pacs__b": 4}.items()
    }


def write_bad(folder: Path) -> dict[str, str]:
    """Write bad scans of every kind; returns the end of each name, or of its path, and words of the reason."""
    whole = Path(write_nifti(folder / "truncated.nii.gz", 10))
    whole.write_bytes(whole.read_bytes()[:9000])
    nan = phantom(11).astype(np.float32)
    nan[3, 4, 5] = np.nan
    write_nifti(folder / "nan.nii.gz", 0, nan)
    write_nifti(folder / "constant.nii.gz", 0, np.full(SHAPE, -1024, np.int16))
    write_nifti(folder / "header.nii", 12, dim=[3, 240, 220, 200, 1, 1, 1, 1])
    write_nifti(folder / "spacing.nii.gz", 13, pixdim=[1, 0.8, 0.9, 0, 1, 1, 1, 1])
    write_nifti(folder / "time.nii.gz", 0, np.stack([phantom(14)] * 3, axis=-1))
    write_nifti(folder / "colour.nii.gz", 0, np.zeros(SHAPE, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])))
    (folder / "empty.nii.gz").write_bytes(b"")
    write_nifti(folder / "mr.nii.gz", 0, (phantom(15) + 1024).astype(np.uint16))
    write_nifti(folder / "windowed.nii.gz", 0, phantom(16).clip(-175, 250))
    write_nifti(folder / "twin.nii.gz", 17)
    write_nifti(folder / "twin again.nii.gz", 0, phantom(17).astype(np.float32))
    write_dicom(folder / "gap", 18, offsets=[z * 2.5 + (z > 9) * 2.5 for z in range(20)])
    write_dicom(folder / "pet", 19, Modality="PT")
    write_dicom(folder / "structures", 20, Modality="RTSTRUCT", edit=without_pixels)
    write_dicom(folder / "scout", 21, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    (folder / "scan.nrrd").write_bytes(b"NRRD0004")
    (folder / "loop.nii.gz").symlink_to(folder / "loop.nii.gz")
    (folder / "up").symlink_to(folder)
    return {
        "truncated": "cut short",
        "nan": "1 of 10560 voxels that are NaN",
        "constant": "every voxel is -1024",
        "header": "cut short",
        "spacing": "spacing",
        "time": "(24, 22, 20, 3)",
        "colour": "plain numbers",
        "empty": "empty (0 bytes)",
        "mr": "not CT",
        "windowed": "windowed",
        "twin_again": "equal to another scan",
        "gap": "5.00 mm",
        "pet": "PT",
        "structures": "RTSTRUCT",
        "scout": "localizer",
        "scan.nrrd": "convert it",
        "loop.nii.gz": "broken link",
    }


def without_pixels(dataset, _: int) -> None:
    """Make a CT image to an object without pixels."""
    for keyword in ("PixelData", "Rows", "Columns", "ImagePositionPatient", "ImageOrientationPatient"):
        set_or_remove(dataset, keyword, None)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too, with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def read_list(folder: Path) -> dict:
    """The data list that `prepare` wrote."""
    return json.loads((folder / "dataset.json").read_text(encoding="utf-8"))


def ras(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels and affine of a NIfTI file in RAS, as nibabel has them."""
    image = nib.as_closest_canonical(nib.load(path))
    return np.asanyarray(image.dataobj), image.affine
