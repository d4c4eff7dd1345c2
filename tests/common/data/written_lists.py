# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Write data lists, and read the splits of them."""

from __future__ import annotations

import json
from pathlib import Path

from bundles.common.data.data_list import segmentation_scans, unlabelled_scans


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def entry(name: str, **extra) -> dict:
    return {"image": f"imagesTr/{name}.nii.gz", "label": f"labelsTr/{name}.nii.gz", **extra}


def write_list(folder: Path, name: str = "dataset.json", **content) -> Path:
    """Write a data list and an empty file for every path that it names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    for section in content.values():
        for scan in section if isinstance(section, list) else []:
            scan = {"image": scan} if isinstance(scan, str) else scan
            touch(
                (folder / name).parent,
                *(scan[key] for key in ("image", "label") if isinstance(scan.get(key), str) and scan[key]),
            )
    return folder / name


def names(scans: list[dict]) -> list[str]:
    return [Path(scan["image"]).name.split(".")[0] for scan in scans]


def split(folder: Path, **options) -> tuple[list[str], list[str]]:
    return tuple(
        names(segmentation_scans(folder, section=section, **options)) for section in ("training", "validation")
    )


def both(source, **options) -> tuple[list[str], list[str]]:
    return tuple(names(unlabelled_scans(source, section=s, **options)) for s in ("training", "validation"))
