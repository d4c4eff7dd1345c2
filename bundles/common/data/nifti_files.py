# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Find the NIfTI scans of a folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..errors import InputError

NIFTI_SUFFIXES = (".nii", ".nii.gz")

# Skipped by a search for scans: folders of masks (BTCV's labelsTr, TotalSegmentator's segmentations), and results of
# these bundles, which are next to the scans if their folder was used as output_dir.
MASK_FOLDERS = (".", "label", "seg", "mask")

RESULT_NAMES = r"_(seg|masked|reconstruction)\.nii(\.gz)?$"


def is_scan(name: str) -> bool:
    """Whether a file name is that of a NIfTI file, and not of a mask or another result of these bundles."""
    return is_nifti(name) and not re.search(RESULT_NAMES, name.lower())


def is_nifti(name: str) -> bool:
    """Whether a file name is that of a visible NIfTI file."""
    return name.lower().endswith(NIFTI_SUFFIXES) and not name.startswith(".")


def _one_nifti(path: Path) -> list[str]:
    if not path.is_file():
        raise InputError(f"{path} not found. {_content(path.parent)}")
    return [str(path)]


def _nifti_below(folder: Path) -> list[str]:
    images = sorted(_walk_nifti(folder))
    if not images:
        raise InputError(
            f"No scans in {folder}: searched it and its subfolders for dataset.json, *.nii and *.nii.gz, skipping "
            "hidden files, folders of masks (label..., seg..., mask...) and files named like a result "
            f"(..._seg.nii.gz). {_content(folder)} (For DICOM, make a data list with configs/prepare.yaml of "
            "swin_unetr_pretrain.)"
        )
    return images


def _walk_nifti(folder: Path) -> Iterator[str]:
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        # Data folders are often links; a link that leads back up must not be followed forever.
        searched = [] if real in seen else [name for name in folders if not name.lower().startswith(MASK_FOLDERS)]
        folders[:] = sorted(searched)
        if real not in seen:
            yield from (os.path.join(parent, name) for name in files if is_scan(name))
        seen.add(real)


def _content(folder: Path) -> str:
    if not folder.is_dir():
        return f"The folder {folder} does not exist."
    return f"The folder {folder} holds: {_first(sorted(os.listdir(folder)), 8) or 'nothing'}."


def _first(names: list[str], count: int) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
