# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Who trains, who tunes, who is scored: parts of a data set that never overlap, and nested subsets of labelled patients."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bundles.common.data.case_names import case_names
from bundles.common.data.data_list import first_file, image_files, parse_data_list, segmentation_scans
from bundles.common.errors import InputError

Case = Mapping[str, Any]
UNLABELLED_SECTIONS = ("unlabelled", "unlabeled")


@dataclass(frozen=True)
class Parts:
    """The parts of a data set; a case is known by the name of its image.

    Attributes:
        training: name to case: labelled, from whom the subsets are drawn. Pre-training sees their images.
        tuning: name to case: labelled, scored by the search alone. Pre-training validates on their images.
        validation: name to case: scored by the study, and seen by nothing before.
        unlabelled: images for pre-training alone; none of them is of the parts above.
        labels, modality: of the data list.
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
        data: its folder, or its list.
        fold, folds: which cases validate, see `bundles.common.data.data_list.segmentation_scans`; None: the list's own
            validation section, else fold 0 of five.
        tuning: number of training patients to set apart. They depend on ``seed`` and the names alone.
        seed: of that draw.

    Raises:
        InputError: the data are not there, an image has no label, or fewer training cases are there than to be set apart; a file, or a patient
            by the entries' ``patient``, both validates and trains (pre-training counts), or is twice in one section.
    """
    path = Path(data)
    content = parse_data_list((path if path.is_file() else path / "dataset.json").expanduser().absolute())
    for section in ("training", "validation", *UNLABELLED_SECTIONS):
        for scan in content.get(section, []):
            if scan.get("patient", "") is None:
                raise InputError(
                    f"{data}: {first_file(scan)} has patient null. Give the patient's name, or leave the key out."
                )
    scans = {
        section: segmentation_scans(data, section=section, fold=fold, folds=folds, seed=seed)
        for section in ("training", "validation")
    }
    unlabelled = [scan for section in UNLABELLED_SECTIONS for scan in content.get(section, [])]
    if missing := [file for scan in unlabelled for file in image_files(scan) if not Path(file).is_file()]:
        raise InputError(
            f"{data}: {len(missing)} unlabelled images do not exist, such as {missing[0]}. Restore them, or take them out of the list."
        )
    _check_apart(data, scans, unlabelled)
    names = case_names([first_file(scan) for section in scans.values() for scan in section])
    training, validation = (
        {names[first_file(scan)]: scan for scan in sorted(scans[section], key=lambda scan: names[first_file(scan)])}
        for section in ("training", "validation")
    )
    if not 0 <= tuning < len(training):
        raise InputError(
            f"{data}: tuning {tuning} patients cannot be set apart from {len(training)} training patients. Lower 'tuning' in the study."
        )
    apart = set(_shuffled(training, [seed, 0])[:tuning])
    return Parts(
        training={name: case for name, case in training.items() if name not in apart},
        tuning={name: case for name, case in training.items() if name in apart},
        validation=validation,
        unlabelled=_further(unlabelled, seen=scans["training"]),
        labels=content.get("labels") or {},
        modality=content.get("modality"),
    )


def labelled_subset(parts: Parts, *, n: int, seed: int) -> list[str]:
    """Names of ``n`` labelled training cases, sorted; the subset of a smaller n of the same seed lies in that of a larger.

    Raises:
        InputError: if there are fewer.
    """
    if n > len(parts.training):
        raise InputError(
            f"n = {n} labelled patients were asked for, but the training part has {len(parts.training)} "
            f"(after {len(parts.tuning)} for tuning). Lower n in the study."
        )
    return sorted(_shuffled(parts.training, [seed, 1])[:n])


def _check_apart(data: str | Path, scans: Mapping[str, Sequence[Case]], unlabelled: Sequence[Case]) -> None:
    """Refuse scored patients that any training sees, and patients that count twice."""
    for section, listed in scans.items():
        paths = {file: path for scan in listed for file, path in _files(scan).items()}
        if twice := _first_repeated([file for scan in listed for file in _files(scan)]):
            raise InputError(
                f"{data}: the {section} section holds {paths[twice]} twice, maybe by a link. Keep one entry."
            )
        patients = [str(scan.get("patient", first_file(scan))) for scan in listed]
        if twice := _first_repeated(patients):
            raise InputError(
                f"{data}: {len(patients)} {section} scans are of {len(set(patients))} patients; {twice} has more than one. A study counts patients: "
                "keep one scan of each in the list."
            )
    scored = {file for scan in scans["validation"] for file in _files(scan)}
    of_scored = {str(scan["patient"]) for scan in scans["validation"] if "patient" in scan}
    for section, listed in (("training", scans["training"]), ("unlabelled", unlabelled)):
        for scan in listed:
            both = first_file(scan) if _files(scan).keys() & scored else None
            if both is None and "patient" in scan and str(scan["patient"]) in of_scored:
                both = f"patient {scan['patient']} ({first_file(scan)})"
            if both:
                raise InputError(
                    f"{data}: {both} is in the {section} and in the validation section, or fold: what is scored must be seen by no training, "
                    f"pre-training included. Take it out of one of them."
                )


def _further(unlabelled: Sequence[Case], *, seen: Sequence[Case]) -> tuple[Case, ...]:
    """The unlabelled images that are not among the training cases, each once."""
    known = {file for scan in seen for file in _files(scan)}
    further = []
    for scan in unlabelled:
        if not _files(scan).keys() & known:
            further.append({"image": scan["image"]})
        known |= _files(scan).keys()
    return tuple(further)


def _files(scan: Case) -> dict[str, str]:
    """The files of an image: what tells each apart, whatever links lead to it, to its path."""
    paths = [os.path.realpath(file) for file in image_files(scan)]
    return {_identity(path): path for path in paths}


def _identity(path: str) -> str:
    """The path of a file, or, where hard links give it several, its number on its disk."""
    try:
        status = os.stat(path)
    except OSError:  # not there: it is named where it is read
        return path
    return f"{status.st_dev}/{status.st_ino}" if status.st_nlink > 1 else path


def _first_repeated(values: Sequence[str]) -> str | None:
    seen: set[str] = set()
    return next((value for value in values if value in seen or seen.add(value)), None)


def _shuffled(names: Sequence[str] | Mapping[str, Any], seed: list[int]) -> list[str]:
    ordered = sorted(names)
    # RandomState: numpy promises that its stream never changes between versions. An array of numbers is a seed, too.
    return [ordered[i] for i in np.random.RandomState(seed).permutation(len(ordered))]
