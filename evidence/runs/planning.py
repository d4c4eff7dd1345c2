# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The plan of a study: its data divided, its row chosen."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from bundles.common.errors import InputError
from bundles.common.files import one_at_a_time, write_text

from ..study.study import Study
from ..study.study_data import (
    FINGERPRINT,
    PRESENT,
    TASK,
    _check_fingerprint,
    _labels_of_row,
    _row,
    _synthetic,
    absent_labels,
    fingerprint,
)
from ..study.subsets import divide
from .plan import Planner


def planner_of(study: Study, *, data: Path | None, out: Path, say: Callable[[str], None] = print) -> Planner:
    """Find the data, divide them, and choose or propose the row of the task.

    Args:
        study: the study.
        data: folder or list of a data set in MSD form; None: synthetic patients are made in ``out``.
        out: folder of the study.
        say: gets a line where the study's row is not used: it is that of its synthetic patients, and the data given have other labels.

    Raises:
        InputError: no data are given and the study has no synthetic ones; ``out`` was made of other data; the list's labels or channels are not
            those of the row; see `subsets.divide` and the bundle's tasks.
    """
    own = data is None
    if own:
        if not study.synthetic:
            raise InputError(f"Study {study.name} needs data: give --data DIR, a folder with dataset.json in MSD form.")
        with one_at_a_time(out / ".data.lock"):
            data = _synthetic(out / "data", study.synthetic)
    split = study.split or {}
    parts = divide(data, fold=split.get("fold"), folds=split.get("folds"), tuning=study.tuning)
    if not own and study.synthetic and (study.row or study.task):
        labels = _labels_of_row(study)
        if parts.labels and parts.labels != labels:  # the row is that of the synthetic patients
            say(
                f"{study.source}: {'row' if study.row else 'task'} is not used: its labels are {labels}, those of {data} {parts.labels}. "
                f"The row is proposed for these data instead: {out / TASK}"
            )
            study = dataclasses.replace(study, row=None, task=None)
    with one_at_a_time(out / ".data.lock"):
        now = fingerprint(parts)
        _check_fingerprint(now, out, data)
        task, row = _row(study, parts, out, data)
        if not (out / FINGERPRINT).exists():  # not before: what was refused shall not hold the folder
            write_text(out / FINGERPRINT, json.dumps(now, indent=1) + "\n")
    scored = {**parts.validation, **parts.tuning}
    return Planner(
        study, parts, row=row, task=task, absent=absent_labels(scored, labels=row["labels"], remember=out / PRESENT)
    )
