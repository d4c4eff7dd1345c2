# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Find the NIfTI scans of a folder."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from ..errors import InputError
from ..files import walk_once

NIFTI_SUFFIXES = (".nii", ".nii.gz")

#: Whole words that name masks. They begin or end the name of a folder of masks (BTCV's ``labelsTr``, TotalSegmentator's
#: ``segmentations``, FLARE's ``TrainingMask``); a mask beside its image has one of them anywhere in its name.
MASK_WORDS = frozenset({"label", "labels", "seg", "segs", "segmentation", "segmentations", "mask", "masks"}) | {
    *("annotation", "annotations"),  # KiTS: ``instances/kidney_instance-1_annotation-1.nii.gz``
}
#: Words that do not distinguish cases, as in ``case_1_ct.nii.gz`` and ``case_1_seg.nii.gz``.
IMAGE_WORDS = frozenset({"ct", "image", "images", "imaging", "img", "scan", "volume"})

# Results of these bundles, which are next to the scans if their folder was used as output_dir.
RESULT_NAMES = r"_(seg|masked|reconstruction)\.nii(\.gz)?$"


def words(name: str) -> list[str]:
    """Return the words of a name in lower case: ``labelsTr_2`` gives ``labels``, ``tr``, ``2``.

    A word ends at any character that is not a letter, before a digit, and where a small letter is followed by a
    capital.
    """
    return [word.lower() for word in re.findall(r"[^\W\d_]+|\d+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name))]


def is_mask_folder(name: str) -> bool:
    """Return whether a folder's name says that it holds masks: ``labelsTr`` and ``seg-2`` do, ``labelled`` does not."""
    return words(name)[:1] != [] and words(name)[0] in MASK_WORDS


def holds_masks(folder: Path) -> bool:
    """Return whether a folder holds masks by its name: see `is_mask_folder`, or its last non-numeric word names them.

    ``TrainingMask`` and ``TCIA_pancreas_labels-02-05-2017`` do. ``patient_1_seg`` does not if a file directly in it is
    named like an image (``ct.nii.gz``), or is next to one that is named like a mask.
    """
    if is_mask_folder(folder.name):
        return True
    letters = [word for word in words(folder.name) if not word.isdigit()]
    if not letters or letters[-1] not in MASK_WORDS:
        return False
    try:
        files = [name for name in os.listdir(folder) if is_nifti(name)]
    except OSError:
        return True
    images = [name for name in files if not is_mask_name(name)]
    named = any(not IMAGE_WORDS.isdisjoint(words(without_suffix(name))) for name in images)
    return not images or (len(images) == len(files) and not named)


def is_mask_name(name: str) -> bool:
    """Return whether a file name has a whole word of `MASK_WORDS`."""
    return not MASK_WORDS.isdisjoint(words(without_suffix(name)))


def masks_beside_images(files: Collection[str]) -> set[str]:
    """Return the files named like masks (`is_mask_name`) if a file not named so is in their folder or above.

    ``P01/liver_mask.nii.gz`` is one if there is ``P01/ct.nii.gz``, and so is ``P01/instances/annotation-1.nii.gz``.
    Alone in its folder, a file can be a scan whatever its name.
    """
    masks = {file for file in files if is_mask_name(os.path.basename(file))}
    images = {os.path.dirname(file) for file in files if file not in masks}
    return {file for file in masks if not images.isdisjoint(list(map(str, Path(file).parents))[:2])}


def without_suffix(name: str) -> str:
    """Return a file name without ``.nii`` or ``.nii.gz``, however they are written."""
    return re.sub(r"\.nii(\.gz)?$", "", name, flags=re.IGNORECASE)


def is_scan(name: str) -> bool:
    """Return whether a file name is that of a NIfTI file, and not of a mask or another result of these bundles."""
    return is_nifti(name) and not re.search(RESULT_NAMES, name.lower())


def is_nifti(name: str) -> bool:
    """Return whether a file name is that of a visible NIfTI file."""
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
    for parent, folders, files in walk_once(folder):  # data folders are often links
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and not holds_masks(Path(parent, name))
        )
        yield from (os.path.join(parent, name) for name in files if is_scan(name))


def _content(folder: Path) -> str:
    if not folder.is_dir():
        return f"The folder {folder} does not exist."
    return f"The folder {folder} holds: {_first(sorted(os.listdir(folder)), 8) or 'nothing'}."


def _first(names: list[str], count: int) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
