# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Divide a data set into training, tuning and validation patients, and draw nested subsets of labelled patients."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bundles.common.data.carried_labels import refuse_carried
from bundles.common.data.case_names import case_names
from bundles.common.data.data_list import segmentation_scans
from bundles.common.data.list_forms.list_file import first_file, image_files, parse_data_list
from bundles.common.data.partial_labels import refuse_partial
from bundles.common.errors import InputError

Case = Mapping[str, Any]
UNLABELLED_SECTIONS = ("unlabelled", "unlabeled")


@dataclass(frozen=True)
class Parts:
    """The parts of a data set, which never overlap. A case has the name of its image.

    Attributes:
        training: name to case; labelled. The subsets are drawn from these, and pre-training uses their images.
        tuning: name to case; labelled. Only the search scores these, and pre-training validates on their images.
        validation: name to case; labelled. The study scores these, and no training uses them.
        unlabelled: images for pre-training only; none of them is in the parts above.
        labels, modality: as in the data list.
    """

    training: Mapping[str, Case]
    tuning: Mapping[str, Case]
    validation: Mapping[str, Case]
    unlabelled: tuple[Case, ...]
    labels: Mapping[str, str]
    modality: Mapping[str, str] | None


def divide(
    data: str | Path, *, fold: int | None = None, folds: int | None = None, tuning: int = 0, seed: int = 0
) -> Parts:
    """Divide a data set in MSD form.

    Args:
        data: its folder, or its data list.
        fold, folds: which cases validate, see `bundles.common.data.data_list.segmentation_scans`; None: the list's
            validation section, or fold 0 of five if it has none.
        tuning: number of training patients to set apart. Which ones depends only on ``seed`` and the case names.
        seed: seed of that draw.

    Raises:
        InputError: the data do not exist; an image has no label; a label was carried, or shows some structures only;
            ``tuning`` is not below the number of training cases; a file, or a patient (``patient`` of an entry), is used both for validation and for any training, including
            pre-training, or occurs twice in one section.
    """
    path = Path(data)
    content = parse_data_list((path if path.is_file() else path / "dataset.json").expanduser().absolute())
    scans = {
        section: segmentation_scans(data, section=section, fold=fold, folds=folds, seed=seed)
        for section in ("training", "validation")
    }
    unlabelled = [scan for section in UNLABELLED_SECTIONS for scan in content.get(section, [])]
    if missing := [file for scan in unlabelled for file in image_files(scan) if not Path(file).is_file()]:
        raise InputError(
            f"{data}: {len(missing)} unlabelled images do not exist, such as {missing[0]}. Restore them, or remove "
            "them from the list."
        )
    for listed in scans.values():
        refuse_carried(listed, where=f"{data}: a study")
        refuse_partial(listed, where=f"{data}: a study")
    _check_apart(data, scans, unlabelled)
    names = case_names([first_file(scan) for section in scans.values() for scan in section])
    training, validation = (
        {names[first_file(scan)]: scan for scan in sorted(scans[section], key=lambda scan: names[first_file(scan)])}
        for section in ("training", "validation")
    )
    if not 0 <= tuning < len(training):
        raise InputError(
            f"{data}: tuning {tuning} patients cannot be set apart from {len(training)} training patients. Lower "
            "'tuning' in the study."
        )
    apart = set(_shuffled(training, [seed, 0])[:tuning])
    return Parts(
        training={name: case for name, case in training.items() if name not in apart},
        tuning={name: case for name, case in training.items() if name in apart},
        validation=validation,
        unlabelled=_only_unlabelled(unlabelled, training=scans["training"]),
        labels=content.get("labels") or {},
        modality=content.get("modality"),
    )


def labelled_subset(parts: Parts, *, n: int, seed: int) -> list[str]:
    """Draw ``n`` labelled training cases. With the same seed, a smaller subset is part of a larger one.

    Returns:
        Sorted names.

    Raises:
        InputError: if there are fewer than ``n`` training cases.
    """
    if n > len(parts.training):
        raise InputError(
            f"n = {n} labelled patients are requested, but the training part has {len(parts.training)} "
            f"(after {len(parts.tuning)} for tuning). Lower n in the study."
        )
    return sorted(_shuffled(parts.training, [seed, 1])[:n])


def _check_apart(data: str | Path, scans: Mapping[str, Sequence[Case]], unlabelled: Sequence[Case]) -> None:
    """Refuse validation patients that any training uses, and patients that would count twice."""
    for section, listed in scans.items():
        paths = {file: path for scan in listed for file, path in _files(scan).items()}
        if twice := _first_repeated([file for scan in listed for file in _files(scan)]):
            raise InputError(
                f"{data}: the {section} section contains {paths[twice]} twice, possibly through a link. Keep one entry."
            )
        patients = [str(scan.get("patient", first_file(scan))) for scan in listed]
        if twice := _first_repeated(patients):
            raise InputError(
                f"{data}: {len(patients)} {section} scans are of {len(set(patients))} patients; {twice} has more than "
                "one. A study counts patients: keep one scan of each in the list."
            )
    scored = {file for scan in scans["validation"] for file in _files(scan)}
    scored_patients = {str(scan["patient"]) for scan in scans["validation"] if "patient" in scan}
    for section, listed in (("training", scans["training"]), ("unlabelled", unlabelled)):
        for scan in listed:
            both = first_file(scan) if _files(scan).keys() & scored else None
            if both is None and "patient" in scan and str(scan["patient"]) in scored_patients:
                both = f"patient {scan['patient']} ({first_file(scan)})"
            if both:
                raise InputError(
                    f"{data}: {both} is in the {section} and in the validation section, or fold. No training, "
                    "including pre-training, may use what is scored. Remove it from one of them."
                )


def _only_unlabelled(unlabelled: Sequence[Case], *, training: Sequence[Case]) -> tuple[Case, ...]:
    """Return the unlabelled images that are not training cases as well, each once."""
    known = {file for scan in training for file in _files(scan)}
    images = []
    for scan in unlabelled:
        if not _files(scan).keys() & known:
            images.append({"image": scan["image"]})
        known |= _files(scan).keys()
    return tuple(images)


def _files(scan: Case) -> dict[str, str]:
    """Map the identity of each file of an image, which is the same through all links, to its path."""
    paths = [os.path.realpath(file) for file in image_files(scan)]
    return {_identity(path): path for path in paths}


def _identity(path: str) -> str:
    """Return the path of a file, or device and inode if it has several hard links."""
    status = os.stat(path)
    return f"{status.st_dev}/{status.st_ino}" if status.st_nlink > 1 else path


def _first_repeated(values: Sequence[str]) -> str | None:
    seen: set[str] = set()
    return next((value for value in values if value in seen or seen.add(value)), None)


def _shuffled(names: Sequence[str] | Mapping[str, Any], seed: list[int]) -> list[str]:
    ordered = sorted(names)
    # NumPy guarantees that the stream of RandomState does not change between versions.
    return [ordered[i] for i in np.random.RandomState(seed).permutation(len(ordered))]
