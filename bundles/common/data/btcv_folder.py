# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Labelled scans in folders without a data list, as BTCV is downloaded: images here, labels there, paired by name."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import InputError

# Folders of images, labels and test images. The first is the Decathlon's way to sort files, which BTCV's users took over; the next two are the
# challenge's own download (Synapse syn3193805), as a whole and with its upper folder left out.
LAYOUTS = (
    ("imagesTr", "labelsTr", "imagesTs"),
    ("RawData/Training/img", "RawData/Training/label", "RawData/Testing/img"),
    ("Training/img", "Training/label", "Testing/img"),
    ("img", "label", "imgTs"),
)


def find_layout(folder: Path) -> tuple[Path, Path, Path] | None:
    """The folders of images, labels and test images (which need not exist) below ``folder``; None where it is not laid out so."""
    for layout in LAYOUTS:
        images, labels, test = (folder / part for part in layout)
        if images.is_dir() and labels.is_dir():
            return images, labels, test
    return None


def _case(name: str) -> str:
    """What image and label of a case have in common: ``0001`` of ``img0001.nii.gz`` and ``label0001.nii.gz``."""
    return re.sub(r"^(img|label)(?=\d)|_0000(?=\.)|\.nii(\.gz)?$", "", name)


def _by_case(folder: Path) -> dict[str, Path]:
    files = sorted(folder.glob("[!.]*.nii")) + sorted(folder.glob("[!.]*.nii.gz")) if folder.is_dir() else []
    cases: dict[str, Path] = {}
    for file in files:
        other = cases.setdefault(_case(file.name), file)
        if other != file:
            raise InputError(f"{other} and {file.name} are both case '{_case(file.name)}'. Keep one of them.")
    return cases


def btcv_data_list(folder: Path) -> dict | None:
    """Make the data list of a folder in BTCV's layout.

    Args:
        folder: holds one of the `LAYOUTS`. Files are paired by name: ``img0001.nii.gz`` with ``label0001.nii.gz``, others with the file of
            their own name.

    Returns:
        ``{"training": [{"image", "label"}, ...], "test": [image, ...]}`` with paths relative to ``folder``; None where it is not laid out so.

    Raises:
        InputError: an image without its label or the other way round, which would otherwise be left out without a word.
    """
    layout = find_layout(folder)
    if layout is None:
        return None
    images, labels, test = (_by_case(part) for part in layout)
    lonely = [str(images[case]) for case in images.keys() - labels.keys()]
    lonely += [str(labels[case]) for case in labels.keys() - images.keys()]
    if lonely:
        raise InputError(
            f"{folder} has no dataset.json, so images in {layout[0]} and labels in {layout[1]} are paired by name (img0001 with label0001), but "
            f"{len(lonely)} have no partner, such as {min(lonely)}. Add or remove files, or write a dataset.json."
        )
    return {
        "training": [
            {"image": str(images[case].relative_to(folder)), "label": str(labels[case].relative_to(folder))}
            for case in sorted(images)
        ],
        "test": [str(test[case].relative_to(folder)) for case in sorted(test)],
    }
