# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Find the NIfTI scans of a folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..errors import InputError

NIFTI_SUFFIXES = (".nii", ".nii.gz")

#: Whole words that name masks. They are the first word of a folder of masks (BTCV's ``labelsTr``, TotalSegmentator's
#: ``segmentations``); a mask beside its image has one of them anywhere in its name.
MASK_WORDS = frozenset({"label", "labels", "seg", "segs", "segmentation", "segmentations", "mask", "masks"})

# Results of these bundles, which are next to the scans if their folder was used as output_dir.
RESULT_NAMES = r"_(seg|masked|reconstruction)\.nii(\.gz)?$"


def words(name: str) -> list[str]:
    """Return the words of a name in lower case: ``labelsTr_2`` gives ``labels``, ``tr``, ``2``.

    A word ends at any character that is no letter, before a digit, and where a small letter is followed by a capital.
    """
    return [word.lower() for word in re.findall(r"[^\W\d_]+|\d+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name))]


def is_mask_folder(name: str) -> bool:
    """Whether a folder's name says that it holds masks: ``labelsTr`` and ``seg-2`` do, ``labelled`` does not."""
    return words(name)[:1] != [] and words(name)[0] in MASK_WORDS


def without_suffix(name: str) -> str:
    """Return a file name without ``.nii`` or ``.nii.gz``, however they are written."""
    return re.sub(r"\.nii(\.gz)?$", "", name, flags=re.IGNORECASE)


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
            "hidden files, folders of masks (labels, segmentations, masks) and files named like a result "
            f"(..._seg.nii.gz). {_content(folder)} (For DICOM, make a data list with configs/prepare.yaml of "
            "swin_unetr_pretrain.)"
        )
    return images


def _walk_nifti(folder: Path) -> Iterator[str]:
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        # Data folders are often links; a link that leads back up must not be followed forever.
        searched = [name for name in folders if not name.startswith(".") and not is_mask_folder(name)]
        searched = [] if real in seen else searched
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
