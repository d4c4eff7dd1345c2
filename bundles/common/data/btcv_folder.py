# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Pair images and labels by name in folders without a data list, such as the download of BTCV."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import InputError

# Folders of images, labels and test images. The first is the Decathlon's layout, which users of BTCV have adopted. The
# next two are the challenge's own download (Synapse syn3193805), with and without its top folder.
LAYOUTS = (
    ("imagesTr", "labelsTr", "imagesTs"),
    ("RawData/Training/img", "RawData/Training/label", "RawData/Testing/img"),
    ("Training/img", "Training/label", "Testing/img"),
    ("img", "label", "imgTs"),
)


def find_layout(folder: Path) -> tuple[Path, Path, Path] | None:
    """Return the folders of images, labels and test images (may be missing); None if the layout is not known."""
    for layout in LAYOUTS:
        images, labels, test = (folder / part for part in layout)
        if images.is_dir() and labels.is_dir():
            return images, labels, test
    return None


def _case(name: str) -> str:
    """Return what the names of image and label share: ``0001`` for ``img0001.nii.gz`` and ``label0001.nii.gz``."""
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
        folder: has one of the `LAYOUTS`. Files are paired by name: ``img0001.nii.gz`` with ``label0001.nii.gz``, others
            with the file of the same name.

    Returns:
        ``{"training": [{"image", "label"}, ...], "test": [image, ...]}`` with paths relative to ``folder``; None if it
        has none of the layouts.

    Raises:
        InputError: an image has no label, or a label has no image. It would otherwise be ignored silently.
    """
    layout = find_layout(folder)
    if layout is None:
        return None
    images, labels, test = (_by_case(part) for part in layout)
    unpaired = [str(images[case]) for case in images.keys() - labels.keys()]
    unpaired += [str(labels[case]) for case in labels.keys() - images.keys()]
    if unpaired:
        raise InputError(
            f"{folder} has no dataset.json, so images in {layout[0]} and labels in {layout[1]} are paired by name "
            f"(img0001 with label0001), but {len(unpaired)} have no partner, such as {min(unpaired)}. Add or remove "
            "files, or write a dataset.json."
        )
    return {
        "training": [
            {"image": str(images[case].relative_to(folder)), "label": str(labels[case].relative_to(folder))}
            for case in sorted(images)
        ],
        "test": [str(test[case].relative_to(folder)) for case in sorted(test)],
    }
