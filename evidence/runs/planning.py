# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Prepare the plan of a study: divide its data and choose the row of its task."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from bundles.common.errors import InputError
from bundles.common.files import folder_lock, write_text

from ..study.study import Study
from ..study.study_data import (
    FINGERPRINT,
    PRESENT,
    TASK,
    absent_labels,
    check_fingerprint,
    choose_row,
    fingerprint,
    labels_of_row,
    write_synthetic,
)
from ..study.subsets import divide
from .plan import Planner


def planner_of(study: Study, *, data: Path | None, out: Path, say: Callable[[str], None] = print) -> Planner:
    """Find the data, divide them, and choose or propose the row of the task.

    Args:
        study: the study.
        data: folder or list of a data set in MSD form; None: synthetic patients are generated in ``out``.
        out: folder of the study.
        say: gets a line if the study's row is not used, because it is the row of its synthetic patients and the data
            have other labels.

    Raises:
        InputError: no data are passed and the study has no synthetic ones; ``out`` was made with other data; the labels
            or channels of the list are not those of the row; see `subsets.divide` and the bundle's tasks.
    """
    own = data is None
    if own:
        if not study.synthetic:
            raise InputError(f"Study {study.name} needs data. Pass --data DIR, a folder with dataset.json in MSD form.")
        with folder_lock(out / ".data.lock"):
            data = write_synthetic(out / "data", study.synthetic.model_dump(exclude_unset=True))
    parts = divide(data, fold=study.split.fold, folds=study.split.folds, tuning=study.tuning)
    if not own and study.synthetic and (study.row or study.task):
        labels = labels_of_row(study)
        if parts.labels and parts.labels != labels:
            say(
                f"{study.source}: {'row' if study.row else 'task'} is not used: its labels are {labels}, those of "
                f"{data} {parts.labels}. A row is proposed for these data instead: {out / TASK}"
            )
            study = study.model_copy(update={"row": None, "task": None})
    with folder_lock(out / ".data.lock"):
        current = fingerprint(parts)
        check_fingerprint(current, out, data)
        task, row = choose_row(study, parts, out, data)
        if not (out / FINGERPRINT).exists():  # written last, so that refused data do not claim the folder
            write_text(out / FINGERPRINT, json.dumps(current, indent=1) + "\n")
    scored = {**parts.validation, **parts.tuning}
    absent = absent_labels(scored, labels=row["labels"], remember=out / PRESENT)
    return Planner(study, parts, row=row, task=task, absent=absent)
