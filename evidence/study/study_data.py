# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Data and task of a study: a user's data set or synthetic patients, and the row of the task."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nibabel as nib
import numpy as np
import yaml

from bundles.common.data.case_names import case_names
from bundles.common.data.label_values import whole_labels
from bundles.common.data.list_forms.list_file import first_file, image_files
from bundles.common.errors import InputError
from bundles.common.files import write_text
from bundles.segmentation.tasks.proposal import proposed_row
from bundles.segmentation.tasks.tasks import check_dataset, choose_task
from tools.bundle_runs import first_difference, read_json
from tools.synthetic_ct import write_dataset

from .study import BUNDLES, SEGMENT, Study
from .subsets import Parts

# Files in the folder of a study.
MARK, FINGERPRINT, PRESENT, TASK = ".study", ".data.json", ".present_labels.json", "task.yaml"
TASKS = BUNDLES / SEGMENT / "configs/tasks.yaml"


def prepare_folder(out: Path, study: str) -> None:
    """Make the folder of a study, with a ``.gitignore``.

    Args:
        out: the folder.
        study: name of the study.

    Raises:
        InputError: ``out`` is a file, or contains another study or other files.
    """
    above = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not above.is_dir():
        raise InputError(f"--out {out} cannot be a folder: {above} is a file. Pass another --out.")
    mark = out / MARK
    if mark.exists():
        if (other := mark.read_text(encoding="utf-8").strip()) != study:
            raise InputError(f"{out} contains the study {other}, not {study}. Pass another folder as --out.")
        return
    # Hidden files may come from another process that makes the same folder at this moment.
    if out.is_dir() and any(path.name[0] != "." for path in out.iterdir()):
        raise InputError(f"{out} contains files that no study made. Pass an empty or new folder as --out.")
    write_text(out / ".gitignore", "*\n")
    write_text(mark, f"{study}\n")


def labels_of_row(study: Study) -> dict[str, str]:
    """Return the labels, value to name, of the row that a study contains or names; empty if they are not a mapping."""
    labels = (study.row or choose_task(task=study.task, file=str(TASKS), preset=study.preset)).get("labels")
    return {str(value): name for value, name in labels.items()} if isinstance(labels, Mapping) else {}


def absent_labels(
    cases: Mapping[str, Mapping[str, Any]], *, labels: Mapping[str, str], remember: Path | None = None
) -> dict[str, list[str]]:
    """Find the labels that the label file of a case does not contain.

    Args:
        cases: name to case, with its ``label`` file.
        labels: value to name, including background.
        remember: JSON file that caches the values found by case and file size. Reading the labels of a hundred large
            CTs takes minutes.

    Returns:
        Names of the missing labels of each case that misses any.

    Raises:
        InputError: a label file cannot be read, or contains values that are not whole numbers.
    """
    known = read_json(remember, "it is written again") if remember and remember.is_file() else {}
    present = {}
    for name, case in cases.items():
        try:
            key = f"{name}, {Path(case['label']).stat().st_size} bytes"
            values = known.get(key) or np.unique(whole_labels(np.asarray(nib.load(case["label"]).dataobj))).tolist()
        except Exception as error:  # truncated gzip, header of another format, missing file
            raise InputError(
                f"{case['label']} cannot be read ({error}). Restore it, or remove it from the list."
            ) from None
        if wrong := [value for value in values if not float(value).is_integer()]:
            raise InputError(
                f"{case['label']} contains {wrong[0]}, but labels must be whole numbers. Correct it, or remove it from "
                "the list."
            )
        known[key], present[name] = values, {int(value) for value in values}
    if remember:
        write_text(remember, json.dumps(known, indent=1) + "\n")
    names = {int(value): name for value, name in labels.items() if int(value)}
    absent = {case: [name for value, name in names.items() if value not in found] for case, found in present.items()}
    return {case: missing for case, missing in absent.items() if missing}


def write_synthetic(folder: Path, counts: Mapping[str, int]) -> Path:
    """Write synthetic patients as one data set with an unlabelled section.

    Args:
        folder: made if it does not exist.
        counts: numbers and seed for `tools.synthetic_ct.write_dataset`.

    Returns:
        Path of the data list.
    """
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


def fingerprint(parts: Parts) -> dict[str, dict[str, list[int]]]:
    """Return what distinguishes data sets regardless of their folder: case names and file sizes in bytes, by section.

    Tuning patients count as training, because their number is a choice of the study.
    """
    images = {first_file(scan): scan for scan in parts.unlabelled}
    sections = {
        "training": {**parts.training, **parts.tuning},
        "validation": parts.validation,
        "unlabelled": {name: images[file] for file, name in case_names(images).items()},
    }
    return {
        section: {name: [Path(file).stat().st_size for file in _files(cases[name])] for name in sorted(cases)}
        for section, cases in sections.items()
    }


def _files(case: Mapping[str, Any]) -> list[str]:
    return image_files(case) + ([case["label"]] if "label" in case else [])


def check_fingerprint(current: Mapping[str, Mapping[str, list[int]]], out: Path, data: Path) -> None:
    """Refuse data other than those the folder of a study was made with.

    Args:
        current: `fingerprint` of the data.
        out: folder of the study; without a fingerprint it is new or from an earlier version, and any data are accepted.
        data: path of the data, for the message.

    Raises:
        InputError: the fingerprints differ.
    """
    path = out / FINGERPRINT
    if not path.exists():
        return
    saved = read_json(path, "it is written again for the data that you pass next")
    for section in current:
        found = first_difference(saved.get(section, {}), current[section], resized="has files of other sizes")
        if found:
            raise InputError(
                f"{out} was made with other data than {data}: {found[0]} {section} cases differ; {found[1]}. Its "
                "task row and finished runs belong to the other data. Pass another --out, restore the data, or remove "
                "the folder to start again."
            )


def choose_row(study: Study, parts: Parts, out: Path, data: Path) -> tuple[str | Path, Mapping[str, Any]]:
    """Choose the row of the task: named by the study, contained in it, or proposed for the data.

    Args:
        study: the study.
        parts: its data.
        out: folder of the study. Its ``task.yaml`` keeps a contained or proposed row; a refused row is not kept.
        data: folder or list of the data, whose labels and channels must be those of the row.

    Returns:
        The value of ``--task``, a name or a file relative to ``out``, and the row with the preset's values.

    Raises:
        InputError: the row is wrong, does not fit the data, or differs from the row of existing runs.
    """

    def checked(task: str | Path) -> Mapping[str, Any]:
        row = choose_task(task=str(task), file=str(TASKS), preset=study.preset)
        # The bundles read the plan's lists, which have the labels of the row, so the user's list is compared here.
        check_dataset(dataset_dir=str(data), data_list=None, row=row, file=str(TASKS))
        return row

    if study.task:
        return study.task, checked(study.task)
    task_file = out / TASK
    if study.row:
        text = yaml.safe_dump({study.name: dict(study.row)}, sort_keys=False)
        with TemporaryDirectory() as folder, _renamed(temporary := Path(folder, TASK), f"{study.source}, row"):
            temporary.write_text(text, encoding="utf-8")
            row = checked(temporary)
        _keep(text, task_file, study)
        return Path(TASK), row
    if not task_file.exists():
        listed = {"name": study.name, "labels": parts.labels, "modality": parts.modality}
        listed["training"] = list(parts.training.values())
        proposal = out / "lists/proposal.json"
        write_text(proposal, json.dumps(listed, indent=1) + "\n")
        with _renamed(proposal, str(data if data.is_file() else data / "dataset.json")):
            proposed_row(proposal, output_dir=out)
    return Path(TASK), checked(task_file)


@contextmanager
def _renamed(generated: Path, original: str) -> Iterator[None]:
    """Replace a generated file by the user's original in error messages."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace(str(generated), original)) from None


def _keep(text: str, path: Path, study: Study) -> None:
    """Write the study's row where the bundles read it. Another row is replaced only if no run was made with it."""
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    runs = sorted(path.parent.glob("runs/*"))
    if path.exists() and runs:
        raise InputError(
            f"{study.source}: row is not the one that {runs[0]} was made with; that one is in {path}. Undo the change, "
            "or pass another --out."
        )
    write_text(path, text)
