# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Split scans into training and validation, by patient: as the data list says, or by a seeded draw."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..value_rules import whole_from
from ..words import counted
from .list_forms.list_file import first_file, image_files

logger = logging.getLogger(__name__)

FOLD_NUMBER = whole_from(2).or_null("five (one for each patient if there are fewer)")
FOLDS = 5  # five-fold cross-validation, as in Tang et al., CVPR 2022


def draw_share(patients: Collection, *, share: float, seed: int) -> set:
    """Draw a share of the patients, at least one and never all; depends only on the seed and the patients."""
    distinct = sorted(patients)
    count = min(max(1, round(share * len(distinct))), len(distinct) - 1)
    # RandomState: NumPy guarantees that its stream does not change between versions.
    return {distinct[i] for i in np.random.RandomState(seed).permutation(len(distinct))[:count]}


def draw_folds(patients: list[str], path: Path, *, folds: int | None, seed: int) -> list[int]:
    """Draw a fold for each patient; return one number per entry of ``patients``, which may repeat."""
    distinct = sorted(set(patients))
    if folds is None:
        folds = FOLDS if len(distinct) < 2 else min(FOLDS, len(distinct))
    FOLD_NUMBER.check("folds", folds)
    if len(distinct) < folds:
        raise InputError(
            f"{path}: {counted(len(distinct), 'patient')} with training or validation scans cannot fill {folds} folds. Add a "
            '"validation" section to the list and use it (fold: null), use fewer folds (--folds), or train on all '
            "scans without validation (--fold all)."
        )
    drawn = np.random.RandomState(seed).permutation(len(distinct))
    fold_of = {distinct[index]: position % folds for position, index in enumerate(drawn)}
    return [fold_of[patient] for patient in patients]


def draw_validation(pool: dict[tuple, dict], *, share: float, seed: int) -> set[tuple]:
    """Draw a share of the patients, at least one, and return their scans. Scans without a patient count as one each."""
    patients = {each: (str(scan["patient"]),) if "patient" in scan else each for each, scan in pool.items()}
    if len(set(patients.values())) < 2:
        logger.warning(
            "all %d scans are of patient %r: some are drawn for validation, but training has scans of the same patient",
            *(len(pool), next(iter(patients.values()))[0]),
        )
        patients = {each: each for each in pool}
    drawn = draw_share(set(patients.values()), share=share, seed=seed)
    return {each for each, patient in patients.items() if patient in drawn}


def split_entries(
    content: dict, path: Path, *, fold: int | str | None, folds: int | None, seed: int
) -> tuple[list, list]:
    """Return the training and validation entries, by the rules of `data_list.segmentation_scans`."""
    FOLD_NUMBER.check("folds", folds)
    training, validation = content.get("training", []), content.get("validation", [])
    pool = training + validation
    if fold == "all":
        return pool, []
    if fold is None and validation:
        carried = [scan for scan in training if scan.get("carried")]
        real = [scan for scan in pool if not scan.get("carried")]
        unseen = {id(scan) for scan in _unseen(carried, real, validation, path, None)} if carried else set()
        return [scan for scan in training if not scan.get("carried") or id(scan) in unseen], validation
    fold = 0 if fold is None else fold
    carried = [scan for scan in pool if scan.get("carried")]
    pool = [scan for scan in pool if not scan.get("carried")]
    with_fold = sum("fold" in scan for scan in pool)
    if 0 < with_fold < len(pool):
        raise InputError(
            f"{path}: {with_fold} of {len(pool)} training and validation entries have a 'fold'. Add it to every entry, "
            "or to none; or use the list's own validation section (fold: null)."
        )
    if with_fold:
        fold_of = [_fold(scan, path) for scan in pool]
    else:
        fold_of = draw_folds([patient_of(scan, path) for scan in pool], path, folds=folds, seed=seed)
    known = sorted(set(fold_of), key=str)
    if isinstance(fold, bool) or fold not in known:
        raise InputError(f"fold must be one of {known} or 'all', got {fold!r} ({path})")
    if len(known) == 1:
        raise InputError(f"{path}: every entry has fold {known[0]}: none is left for training.")
    training = [scan for scan, number in zip(pool, fold_of, strict=True) if number != fold]
    validation = [scan for scan, number in zip(pool, fold_of, strict=True) if number == fold]
    return training + _unseen(carried, pool, validation, path, fold), validation


def _unseen(
    carried: Sequence[dict], real: Sequence[dict], validation: Sequence[dict], path: Path, fold: int | str | None
) -> list[dict]:
    """Return the cases with carried labels that show neither the scan nor the label of a validation patient."""
    patients = {patient_of(scan, path) for scan in validation}
    held = {file for scan in real if patient_of(scan, path) in patients for file in image_files(scan)}
    others = [
        scan
        for scan in carried
        if not ("fold" in scan and _fold(scan, path) == fold) and patient_of(scan, path) not in patients
    ]
    kept = [scan for scan in others if held.isdisjoint(scan.get("carried_from", ()))]
    if len(others) < len(carried):
        logger.info(
            "%s: %d of %d cases with carried labels are left out: they belong to validation patients or to this fold",
            *(path, len(carried) - len(others), len(carried)),
        )
    if len(kept) < len(others):
        logger.warning(
            "%s: %d of %d cases with carried labels are left out: their labels were carried from validation cases. To use "
            "all, train on all real cases (--fold all), or carry labels only from the training cases (propagate.yaml with "
            "the same --fold).",
            *(path, len(others) - len(kept), len(carried)),
        )
    return kept


def _fold(scan: dict, path: Path) -> int | str:
    """Return the fold of an entry; "0" is 0."""
    fold = scan["fold"]
    if isinstance(fold, str) and fold.strip().isdecimal():
        return int(fold)
    if isinstance(fold, str) and fold.strip() or isinstance(fold, int) and not isinstance(fold, bool):
        return fold
    raise InputError(
        f"{path}: the entry of {scan['image']} has fold {fold!r}: it must be a number, 0 or above, or a name."
    )


def patient_of(scan: dict, path: Path) -> str:
    """Return the patient of an entry of the list ``path``; an entry without one counts as its own patient."""
    if "patient" in scan:
        return str(scan["patient"])
    # Relative: the split must not change if the data set is moved.
    return os.path.relpath(first_file(scan), path.parent)


def warn_of_shared_patients(training: Iterable[dict], validation: Iterable[dict], where: Path | str) -> None:
    """Warn if a patient that entries name is in training and in validation, as a list's own sections or folds may say.

    Args:
        training, validation: entries; those without ``patient`` are not compared.
        where: the list or lists, for the message.
    """
    first, second = (
        {str(scan["patient"]): first_file(scan) for scan in scans if "patient" in scan}
        for scans in (training, validation)
    )
    if both := sorted(first.keys() & second.keys()):
        logger.warning(
            "%s: %s in both training and validation, such as patient %s (%s and %s). If that is one person, scores will be too "
            "high: move all scans of a patient to one side.",
            *(where, counted(len(both), "patient is", "patients are"), both[0], first[both[0]], second[both[0]]),
        )


def warn_of_missing_patients(scans: Sequence[dict], path: Path | str) -> None:
    """Warn if some scans have a patient and others none: a patient may then be on both sides of a split."""
    without = [scan for scan in scans if "patient" not in scan]
    if 0 < len(without) < len(scans):
        logger.warning(
            "%s: %d of %d scans name no patient, such as %s: each of them counts as a patient of its own",
            *(path, len(without), len(scans), first_file(without[0])),
        )
