# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Who trains, who tunes, who is scored: parts of a data set that never overlap, and nested subsets of labelled patients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bundles.common.case_names import case_names
from bundles.common.data_list import first_file, parse_data_list, segmentation_scans
from bundles.common.input_error import InputError

Case = Mapping[str, Any]


@dataclass(frozen=True)
class Parts:
    """The parts of a data set; a case is known by the name of its image.

    Attributes:
        training: name to case: labelled, from whom the subsets are drawn. Pre-training sees their images.
        tuning: name to case: labelled, scored by the search alone. Pre-training validates on their images.
        validation: name to case: scored by the study, and seen by nothing before.
        unlabelled: images for pre-training alone.
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
        fold, folds: which cases validate, see `bundles.common.data_list.segmentation_scans`; None: the list's own
            validation section, else fold 0 of five.
        tuning: number of training patients to set apart. They depend on ``seed`` and the names alone.
        seed: of that draw.

    Raises:
        InputError: the data are not there, an image has no label, or fewer training cases are there than to be set apart.
    """
    scans = {
        section: segmentation_scans(data, section=section, fold=fold, folds=folds, seed=seed)
        for section in ("training", "validation")
    }
    names = case_names([first_file(scan) for section in scans.values() for scan in section])
    training, validation = (
        {names[first_file(scan)]: scan for scan in sorted(scans[section], key=lambda scan: names[first_file(scan)])}
        for section in ("training", "validation")
    )
    if overlap := sorted(set(training) & set(validation)):
        raise InputError(
            f"{data}: {overlap[0]} is a training and a validation case at once. Take it out of one section."
        )
    if not 0 <= tuning < len(training):
        raise InputError(
            f"{data}: tuning {tuning} patients cannot be set apart from {len(training)} training patients. Lower 'tuning' in the study."
        )
    patients = [str(scan.get("patient", name)) for name, scan in training.items()]
    if len(set(patients)) < len(patients):
        raise InputError(
            f"{data}: {len(patients)} training scans are of {len(set(patients))} patients. A study counts patients: keep one scan of each in the list."
        )
    path = Path(data)
    content = parse_data_list((path if path.is_file() else path / "dataset.json").expanduser().absolute())
    apart = set(_shuffled(training, [seed, 0])[:tuning])
    return Parts(
        training={name: case for name, case in training.items() if name not in apart},
        tuning={name: case for name, case in training.items() if name in apart},
        validation=validation,
        unlabelled=tuple(
            {"image": scan["image"]} for section in ("unlabelled", "unlabeled") for scan in content.get(section, [])
        ),
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


def _shuffled(names: Sequence[str] | Mapping[str, Any], seed: list[int]) -> list[str]:
    ordered = sorted(names)
    # RandomState: numpy promises that its stream never changes between versions. An array of numbers is a seed, too.
    return [ordered[i] for i in np.random.RandomState(seed).permutation(len(ordered))]
