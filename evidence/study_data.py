# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The patients and the task of a study: from the user's data set or made up, with the row given, chosen or proposed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from bundles.common.checkpoint_file import write_text
from bundles.common.input_error import InputError
from bundles.swin_unetr_msd.scripts.task_proposal import proposed_row
from bundles.swin_unetr_msd.scripts.tasks import choose_task
from demo.synthetic_ct import write_dataset

from .claim import one_at_a_time
from .plan import BUNDLES, SEGMENT, Planner
from .study import Study
from .subsets import Parts, divide

MARK = ".study"


def prepare_folder(out: Path, study: str) -> None:
    """Make the folder of a study; git is told to leave it alone.

    Raises:
        InputError: it holds another study, or something else.
    """
    mark = out / MARK
    if mark.exists():
        if (held := mark.read_text(encoding="utf-8").strip()) != study:
            raise InputError(f"{out} holds the study {held}, not {study}: choose another folder by --out.")
        return
    # hidden files may be of another process that makes the same folder now
    if out.is_dir() and any(path.name[0] != "." for path in out.iterdir()):
        raise InputError(f"{out} holds files that no study made: choose an empty or a new folder by --out.")
    write_text(out / ".gitignore", "*\n")
    write_text(mark, f"{study}\n")


def planner_of(study: Study, *, data: Path | None, out: Path) -> Planner:
    """Find the data, divide them, and choose or propose the row of the task.

    Args:
        study: the study.
        data: folder or list of a data set in MSD form; None: synthetic patients are made in ``out``.
        out: folder of the study.

    Raises:
        InputError: no data are given and the study has no synthetic ones; see `subsets.divide` and the bundle's tasks.
    """
    own = data is None
    if own:
        if not study.synthetic:
            raise InputError(f"Study {study.name} needs data: give --data DIR, a folder with dataset.json in MSD form.")
        with one_at_a_time(out / ".data.lock"):
            data = _synthetic(out / "data", study.synthetic)
    split = study.split or {}
    parts = divide(data, fold=split.get("fold"), folds=split.get("folds"), tuning=study.tuning)
    if not own and study.synthetic:
        study = dataclasses.replace(study, row=None, task=None)  # those of the synthetic patients
    with one_at_a_time(out / ".data.lock"):
        task, row = _row(study, parts, out)
    return Planner(study, parts, row=row, task=task)


def _synthetic(folder: Path, counts: Mapping[str, int]) -> Path:
    """Synthetic patients as one data set with an unlabelled section."""
    lists = write_dataset(folder, test=0, shuffled=False, **counts)
    labelled, unlabelled = (json.loads(path.read_text()) for path in (lists.labelled, lists.unlabelled))
    scans = [
        {"image": f"../unlabelled/{each['image'] if isinstance(each, Mapping) else each}"}
        for section in ("training", "validation")
        for each in unlabelled.get(section, [])
    ]
    whole = lists.labelled.with_name("study.json")
    text = json.dumps({**labelled, "unlabelled": scans}, indent=1) + "\n"
    if not whole.exists() or whole.read_text() != text:
        write_text(whole, text)
    return whole


def _row(study: Study, parts: Parts, out: Path) -> tuple[str | Path, Mapping[str, Any]]:
    """What ``--task`` is, and the row with the preset's values."""
    table = BUNDLES / SEGMENT / "configs/tasks.yaml"
    task: str | Path = Path("task.yaml")
    if study.task:
        task = study.task
    elif study.row:
        _write_once(out / task, yaml.safe_dump({study.name: dict(study.row)}, sort_keys=False))
    elif not (out / task).exists():
        listed = {"name": study.name, "labels": parts.labels, "modality": parts.modality}
        listed["training"] = list(parts.training.values())
        write_text(out / "lists/proposal.json", json.dumps(listed, indent=1) + "\n")
        proposed_row(out / "lists/proposal.json", output_dir=out)
    named = task if isinstance(task, str) else str(out / task)
    return task, choose_task(task=named, file=str(table), preset=study.preset)


def _write_once(path: Path, text: str) -> None:
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise InputError(f"{path} holds another row than the study. Take the change back, or choose another --out.")
    if not path.exists():
        write_text(path, text)
