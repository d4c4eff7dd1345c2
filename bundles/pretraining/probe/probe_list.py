# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The data list of the probe: a few labelled scans to fit its decoder (training) and to score it (validation)."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ...common.data.data_list import data_list_ignore_label, data_list_labels, segmentation_scans
from ...common.data.ignore_label import IGNORE_LABEL, ignored_value
from ...common.data.list_fingerprint import fingerprint
from ...common.data.list_forms.list_file import image_files, parse_data_list
from ...common.data.partial_labels import refuse_partial
from ...common.errors import InputError
from ...common.files import absolute_path

SECTIONS = ("training", "validation")


def probe_scans(*, file: str | None, section: str) -> list[dict]:
    """List the labelled scans of one section of ``--probe_list``.

    Args:
        file: a data list in MSD form (`common.data.list_forms.list_file`), or None: no probe.
        section: ``training`` or ``validation``.

    Returns:
        Items ``{"image": path or list of paths, "label": path}``; none without a file.

    Raises:
        InputError: the file does not exist or is not a data list; a section is empty; a patient is in both sections; a
            scan has no label, or its files do not exist.
    """
    if file is None:
        return []
    path = _path(file)
    content = parse_data_list(path)
    for name in SECTIONS:
        if not content.get(name):
            raise InputError(
                f"--probe_list {path} has no '{name}' section. The probe fits a decoder to the labelled scans of "
                "'training' and scores it on those of 'validation': list some of each, of different patients."
            )
    _check_patients(content, path)
    scans = segmentation_scans(path, section=section, fold=None)
    refuse_partial(scans, where=f"--probe_list {path}: the probe")
    return [{"image": scan["image"], "label": scan["label"]} for scan in scans]


def probe_classes(*, file: str | None) -> dict[int, str]:
    """Return the names of the label values of ``--probe_list`` in the order of the values, the background 0 first.

    Names are those of metrics: lower case, with one underscore for each run of other characters. None without a file.

    Raises:
        InputError: the list has no ``labels``, none besides the background, no background, or two of the same name.
    """
    if file is None:
        return {}
    path = _path(file)
    labels = data_list_labels(path)
    if 0 not in labels or len(labels) < 2:
        raise InputError(
            f"--probe_list {path} must name its label values, the background too, as in "
            f'"labels": {{"0": "background", "1": "liver"}}; it has {labels or "no labels"}.'
        )
    names = {value: re.sub(r"[^a-z0-9]+", "_", labels[value].lower()).strip("_") for value in sorted(labels)}
    if len(set(names.values())) < len(names) or "" in names.values():
        raise InputError(
            f"--probe_list {path}: each label needs a name of its own, with letters or digits; it has {labels}."
        )
    return names


def probe_ignore_label(*, file: str | None) -> int | None:
    """Return the value of unknown voxels: the list's ``ignore_label``, else 255 unless that is a class.

    None if there is no such value, or no list.

    Raises:
        InputError: the value is no label value, or is also the value of a class.
    """
    if file is None:
        return None
    path = _path(file)
    declared, labels = data_list_ignore_label(path), data_list_labels(path)
    if declared is not None and declared in labels:
        raise InputError(
            f"--probe_list {path}: ignore_label {declared} is also one of its labels: a value is either a class or unknown."
        )
    return ignored_value(ignore_label=IGNORE_LABEL, labels=labels, of_list=declared)


def probe_facts(*, file: str | None) -> dict[str, Any] | None:
    """Return what identifies a probe: checksums of its two sections, and its classes. None without a probe."""
    if file is None:
        return None
    sections = {name: fingerprint(probe_scans(file=file, section=name)) for name in SECTIONS}
    return {**sections, "classes": list(probe_classes(file=file).values())}


def _path(file: str) -> Path:
    path = absolute_path(str(file))
    if not path.is_file():
        raise InputError(f"--probe_list {path} is not a file. Name a data list (JSON) of labelled scans.")
    return path


def _check_patients(content: dict, path: Path) -> None:
    """Raise `InputError` if the sections share a patient: a decoder would be scored on what it was fitted to."""
    for kind, name_of in (("scan", _real_image), ("patient", lambda scan: scan.get("patient"))):
        ours, theirs = ({name_of(scan) for scan in content[name]} - {None} for name in SECTIONS)
        if both := sorted(map(str, ours & theirs)):
            raise InputError(
                f"--probe_list {path}: {kind} {both[0]} is in 'training' and in 'validation' ({len(both)} such). The "
                "Dice of a scan that the decoder was fitted to says nothing about others: keep it in one of them."
            )


def _real_image(scan: dict) -> str:
    return os.path.realpath(image_files(scan)[0])
