# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Make a bundle of one task of ``swin_unetr_msd``: clients support one label set and one channel count per bundle."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bundles.common.errors import InputError
from bundles.common.files import write_text
from bundles.segmentation.models.label_names import names_by_value

from .names import check_name
from .packed_weights import Weights
from .task_readme import structure_names, task_readme
from .trained_settings import set_defaults, trained_preset

MSD = "swin_unetr_msd"
EXAMPLE = "Task09_Spleen"  # the task named in the configs' comments and defaults
MANY_TASKS = ("results.yaml", "submit.yaml")  # configs for the whole Decathlon
DECATHLON = "decathlon"  # folder with the scripts of these configs
VOXELS = ("spacing", "hu_window", "roi_size")  # entries of a row that are recorded even in weights without a row
DATA_SOURCE = "http://medicaldecathlon.com"


@dataclass(frozen=True)
class Task:
    """A row of the table of tasks.

    Attributes:
        name: name such as ``Task09_Spleen``.
        row: entries of the row, including those under the names of presets.
        text: the row in YAML, with its comments.
        own: whether it is the user's own task and not one of the Decathlon.
    """

    name: str
    row: dict[str, Any]
    text: str
    own: bool


def find_task(task: str, table: Path) -> Task:
    """Return a task of the table by its name, or the row in a user's YAML file.

    Args:
        task: name such as ``Task09_Spleen``, or the path of a file that contains ``{NAME: row}``.
        table: ``configs/tasks.yaml``.

    Raises:
        InputError: it is neither, the file does not contain exactly one row, or the bundle would have the same name as
            that of another row of the table.
    """
    own = Path(task).suffix in (".yaml", ".yml")
    file = Path(task) if own else table
    if not file.is_file():
        raise InputError(f"--task {task}: {file} does not exist. Known tasks: {', '.join(_rows(table))}.")
    rows = _rows(file)
    if own and len(rows) != 1:
        raise InputError(
            f"--task {task} must contain one row under its name, as in configs/tasks.yaml; it contains {', '.join(rows)}."
        )
    name = next(iter(rows)) if own else task
    if name not in rows:
        raise InputError(
            f"--task {task!r} is not in {file}. Known tasks: {', '.join(rows)}. Or pass a YAML file with one row."
        )
    namesake = next((other for other in _rows(table) if _short(other) == _short(name)), None)
    if namesake is not None and (own or namesake != name):
        raise InputError(
            f"{file}: the bundle of {name} would be called {MSD}_{_short(name)}, like that of {namesake} of the table. Rename the row before training, "
            f"for example to {name}Own (for weights that are already trained, see docs/how-to/publish.md), or use the table's row with --task {namesake}."
        )
    missing = [key for key in ("modality", "channels", "labels", "spacing", "roi_size") if key not in rows[name]]
    if missing:
        raise InputError(f"{file}: {name} lacks {', '.join(missing)}.")
    return Task(name, rows[name], _slice(file, name), own)


def flat_name(task: str) -> str:
    """Return the name of a task's bundle, such as ``swin_unetr_msd_hepaticvessel`` for ``Task08_HepaticVessel``.

    A task name that begins with v is prefixed with ``task``, because clients cut names at ``_v`` and a model cannot be
    renamed after its training.

    Raises:
        InputError: clients would misread the name.
    """
    short = _short(task)
    if not short:
        raise InputError(f"task {task}: the name has no letters or digits to make a bundle name of. Rename the row.")
    short = f"task{short}" if short.startswith("v") else short
    try:
        check_name(f"{MSD}_{short}")
    except InputError as error:
        raise InputError(f"task {task}: {error}") from None
    return f"{MSD}_{short}"


def _short(task: str) -> str:
    """Return the part of a task's name that is used in the bundle's name: ``spleen`` for ``Task09_Spleen``."""
    return re.sub(r"[^a-z0-9]", "", re.sub(r"^Task[0-9]+_", "", task).lower())


def write_trained_row(configs: Path, task: Task, weights: Weights) -> dict[str, Any]:
    """Reduce ``tasks.yaml`` of a copied bundle to one row: the task's, with the values used in training.

    Args:
        configs: folder ``configs`` of the copy.
        task: the task.
        weights: content of ``model.pt``; the row that it records takes precedence over the table's.

    Returns:
        The row, with the values of the preset used in training.

    Raises:
        InputError: the weights were trained for another task or other labels.
    """
    preset = trained_preset(configs / "presets.yaml", weights)
    trained = _trained_row(task, weights)
    row = {"hu_window": None, **task.row, **(task.row.get(preset) or {}), **trained}
    presets = yaml.safe_load((configs / "presets.yaml").read_text(encoding="utf-8"))
    head = "" if task.own else _head(configs / "tasks.yaml")
    write_text(configs / "tasks.yaml", head + _row_with(task, trained, preset, presets))
    return row


def flatten(folder: Path, task: Task, row: Mapping[str, Any]) -> None:
    """Turn a copy of ``swin_unetr_msd`` into the bundle of one task.

    Args:
        folder: the copy, changed in place; its name is the name of the new bundle.
        task: the task.
        row: the row from `write_trained_row`.
    """
    configs = folder / "configs"
    _remove_decathlon_files(folder)
    for name in ("train", "evaluate", "inference"):
        set_defaults(configs / f"{name}.yaml", {"task": task.name})
    for path in configs.glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        write_text(path, re.sub(r"^ *#.*", lambda line: line[0].replace(EXAMPLE, task.name), text, flags=re.MULTILINE))
    metadata = json.loads((configs / "metadata.json").read_text(encoding="utf-8"))
    metadata = task_metadata(metadata, bundle=folder.name, task=task, row=row)
    write_text(configs / "metadata.json", json.dumps(metadata, indent=4) + "\n")
    write_text(folder / "docs" / "README.md", task_readme(bundle=folder.name, task=task.name, row=row, own=task.own))


def task_metadata(metadata: Mapping[str, Any], *, bundle: str, task: Task, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of ``metadata.json`` for one task.

    Args:
        metadata: metadata of ``swin_unetr_msd``.
        bundle: name of the task's bundle.
        task: the task.
        row: row with the values used in training.
    """
    labels, channels = row["labels"], row["channels"]
    structures = [str(name) for value, name in labels.items() if int(value) != 0]
    structures_text = structure_names(structures)
    scan = row["modality"] if len(channels) == 1 else f"{row['modality']} ({', '.join(map(str, channels))})"
    where = (
        "trained on the author's own data"
        if task.own
        else f"trained for {task.name} of the Medical Segmentation Decathlon"
    )
    window = row["hu_window"]
    intensity = f"HU {window[0]:g} to {window[1]:g}, scaled to [0, 1]" if window else "z-score of the non-zero voxels"
    data_format = metadata["network_data_format"]
    image, pred = data_format["inputs"]["image"], data_format["outputs"]["pred"]
    image = image | {
        "format": "hounsfield" if row["modality"] == "CT" else "magnitude",
        "modality": row["modality"],
        "num_channels": len(channels),
        "value_range": [0, 1] if window else [-10, 10],
        "channel_def": {str(number): str(name) for number, name in enumerate(channels)},
    }
    pred = pred | {
        "num_channels": len(labels),
        "channel_def": {str(value): str(name) for value, name in labels.items()},
    }
    changed = {
        "name": bundle,
        "task": f"Segmentation of {structures_text} on {row['modality']}",
        "description": f"Swin UNETR for {structures_text} on {scan}, {where}. Research only.",
        "network_data_format": {"inputs": {"image": image}, "outputs": {"pred": pred}},
        "data_type": "nifti, dicom" if row["modality"] == "CT" and len(channels) == 1 else "nifti",
        "image_classes": f"{', '.join(map(str, channels))}: {intensity}",
        "label_classes": ", ".join(f"{value} {name}" for value, name in labels.items()),
        "pred_classes": f"{len(labels)} channels: {', '.join(map(str, labels.values()))}",
    }
    if not task.own:
        changed["data_source"] = DATA_SOURCE
    return {**metadata, **changed}


def task_names(table: Path) -> list[str]:
    """Return the names of the tasks of a table."""
    return list(_rows(table))


def _rows(table: Path) -> dict[str, Any]:
    try:
        rows = yaml.safe_load(table.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{table} cannot be read as YAML: {error}") from error
    if not isinstance(rows, dict) or not all(
        isinstance(key, str) and isinstance(row, dict) for key, row in rows.items()
    ):
        raise InputError(f"{table} must contain rows under their names, as configs/tasks.yaml does.")
    return rows


def _slice(table: Path, name: str) -> str:
    """Return the text of one row with its comments.

    Text above the first row is not included, because it may name folders of a machine.
    """
    text = table.read_text(encoding="utf-8")
    *_, marks = [  # of two rows with the same name, YAML uses the last
        (key.start_mark, row.end_mark) for key, row in yaml.compose(text, yaml.SafeLoader).value if key.value == name
    ]
    return text[marks[0].index : marks[1].index].rstrip() + "\n"


def _head(table: Path) -> str:
    """Return the comment above the first row."""
    lines = table.read_text(encoding="utf-8").splitlines(keepends=True)
    first = next(number for number, line in enumerate(lines) if line.strip() and not line.startswith("#"))
    return f"# The row of this bundle's task. Header of the table of {MSD} that it comes from:\n#\n{''.join(lines[:first])}"


def _trained_row(task: Task, weights: Weights) -> dict[str, Any]:
    """Return the entries of the row that the weights record."""
    if weights.task is not None and weights.task != task.name:
        raise InputError(
            f"{weights.path} was trained for {weights.task}, not for {task.name}. Pack it as {MSD} with --task {weights.task} "
            "(for your own data, the task.yaml of its training), or pass the folder of other weights as --models."
        )
    trained = dict(weights.row or {key: weights.trained[key] for key in VOXELS if key in weights.trained})
    labels = trained.get("labels", task.row["labels"])
    if weights.labels is not None and names_by_value(weights.labels) != names_by_value(labels):
        raise InputError(
            f"{weights.path} was trained for the labels {weights.labels}; {task.name} has {labels}. Choose a task with those labels, "
            f"such as your own row: {MSD} --task FILE.yaml."
        )
    return trained


def _row_with(task: Task, trained: Mapping[str, Any], preset: str, presets: Iterable[str]) -> str:
    """Return the text of the row; rewritten without comments if the weights were trained with other settings."""
    row = {"hu_window": None, **task.row, **(task.row.get(preset) or {})}
    if all(row.get(key) == value for key, value in trained.items()):
        return task.text
    changed = {**task.row, **trained}
    for name in presets:
        if name in changed:
            changed[name] = {key: value for key, value in (changed[name] or {}).items() if key not in trained}
    body = yaml.safe_dump({task.name: changed}, sort_keys=False, default_flow_style=None, width=1000)
    return f"# Settings used to train these weights; they differ from the table:\n{body}"


def _remove_decathlon_files(folder: Path) -> None:
    """Remove the configs for the whole Decathlon, and their scripts."""
    for name in MANY_TASKS:
        (folder / "configs" / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "scripts" / DECATHLON, ignore_errors=True)
