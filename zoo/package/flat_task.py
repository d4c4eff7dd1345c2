# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""One task of ``swin_unetr_msd`` as a bundle of its own, for clients that know one label set and one number of channels a bundle."""

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

from .names import check_name
from .packed_weights import Weights
from .task_readme import listed, task_readme
from .trained_settings import set_defaults, trained_preset

MSD = "swin_unetr_msd"
EXAMPLE = "Task09_Spleen"  # the task that the configs' comments and defaults name
MANY_TASKS = ("results.yaml", "submit.yaml")  # configs of the Decathlon as a whole
DECATHLON = "decathlon"  # folder of their scripts
VOXELS = ("spacing", "hu_window", "roi_size")  # entries of a row that weights without a row record
DATA_SOURCE = "http://medicaldecathlon.com"


@dataclass(frozen=True)
class Task:
    """A row of the table of tasks.

    Attributes:
        name: such as ``Task09_Spleen``.
        row: its entries, those under the presets' names included.
        text: the row in YAML, with its comments.
        own: whether it is a user's own and not one of the Decathlon.
    """

    name: str
    row: dict[str, Any]
    text: str
    own: bool


def find_task(task: str, table: Path) -> Task:
    """A task of the table by its name, or the row in a user's YAML file.

    Args:
        task: such as ``Task09_Spleen``, or the path of a file that holds ``{NAME: row}``.
        table: ``configs/tasks.yaml``.

    Raises:
        InputError: if it is neither, the file does not hold one row, or its bundle would be called as that of another row of the table.
    """
    own = Path(task).suffix in (".yaml", ".yml")
    file = Path(task) if own else table
    if not file.is_file():
        raise InputError(f"--task {task}: {file} is not there. Known tasks: {', '.join(_rows(table))}.")
    rows = _rows(file)
    if own and len(rows) != 1:
        raise InputError(
            f"--task {task} must hold one row under its name, as configs/tasks.yaml does; it has {', '.join(rows)}."
        )
    name = next(iter(rows)) if own else task
    if name not in rows:
        raise InputError(
            f"--task {task!r} is not in {file}. Known tasks: {', '.join(rows)}; or a YAML file that holds one row."
        )
    namesake = next((other for other in _rows(table) if _short(other) == _short(name)), None)
    if namesake is not None and (own or namesake != name):
        raise InputError(
            f"{file}: the bundle of {name} would be called {MSD}_{_short(name)}, as that of {namesake} of the table. Rename the row before the training, such as "
            f"{name}Own (weights that are trained already: docs/how-to/publish.md), or take the table's own row by --task {namesake}."
        )
    missing = [key for key in ("modality", "channels", "labels", "spacing", "roi_size") if key not in rows[name]]
    if missing:
        raise InputError(f"{file}: {name} lacks {', '.join(missing)}.")
    return Task(name, rows[name], _slice(file, name), own)


def flat_name(task: str) -> str:
    """Name of a task's bundle, such as ``swin_unetr_msd_hepaticvessel`` for ``Task08_HepaticVessel``.

    A name that begins with v gets ``task`` before it: clients cut names off at ``_v``, and a model cannot be renamed after its training.

    Raises:
        InputError: if clients would misread it.
    """
    short = _short(task)
    if not short:
        raise InputError(f"task {task}: a name without letters or digits makes no name of a bundle. Rename the row.")
    short = f"task{short}" if short.startswith("v") else short
    try:
        check_name(f"{MSD}_{short}")
    except InputError as error:
        raise InputError(f"task {task}: {error}") from None
    return f"{MSD}_{short}"


def _short(task: str) -> str:
    """What the name of a task gives to that of its bundle: ``spleen`` for ``Task09_Spleen``."""
    return re.sub(r"[^a-z0-9]", "", re.sub(r"^Task[0-9]+_", "", task).lower())


def write_trained_row(configs: Path, task: Task, weights: Weights) -> dict[str, Any]:
    """Make ``tasks.yaml`` of a copied bundle hold one row: the task's, with the values that the weights were trained with.

    Args:
        configs: the folder ``configs`` of the copy.
        task: the task.
        weights: the content of ``model.pt``; the row that it records takes precedence over the table's.

    Returns:
        The row, with the values of the training's preset.

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
    """Make a copy of ``swin_unetr_msd`` the bundle of one task.

    Args:
        folder: the copy, changed in place; its name is the new bundle's.
        task: the task.
        row: from `write_trained_row`.
    """
    configs = folder / "configs"
    _remove_what_is_for_many_tasks(folder)
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
    """``metadata.json`` of one task.

    Args:
        metadata: that of ``swin_unetr_msd``.
        bundle: name of the task's bundle.
        task: the task.
        row: its row, as the weights were trained.
    """
    labels, channels = row["labels"], row["channels"]
    structures = [str(name) for value, name in labels.items() if int(value) != 0]
    said = listed(structures)
    scan = row["modality"] if len(channels) == 1 else f"{row['modality']} ({', '.join(map(str, channels))})"
    where = (
        "on data of the maker's own" if task.own else f"trained for {task.name} of the Medical Segmentation Decathlon"
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
        "task": f"Segmentation of {said} on {row['modality']}",
        "description": f"Swin UNETR for {said} on {scan}, {where}. Research only.",
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
    """Names of the tasks of a table."""
    return list(_rows(table))


def _rows(table: Path) -> dict[str, Any]:
    try:
        rows = yaml.safe_load(table.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{table} cannot be read as YAML: {error}") from error
    if not isinstance(rows, dict) or not all(
        isinstance(key, str) and isinstance(row, dict) for key, row in rows.items()
    ):
        raise InputError(f"{table} must hold rows under their names, as configs/tasks.yaml does.")
    return rows


def _slice(table: Path, name: str) -> str:
    """Text of one row with the comments in it; what stands above the first row, which may name a machine's folders, is not in it."""
    text = table.read_text(encoding="utf-8")
    *_, marks = [  # of two rows of one name YAML takes the last
        (key.start_mark, row.end_mark) for key, row in yaml.compose(text, yaml.SafeLoader).value if key.value == name
    ]
    return text[marks[0].index : marks[1].index].rstrip() + "\n"


def _head(table: Path) -> str:
    """The comment above the first row."""
    lines = table.read_text(encoding="utf-8").splitlines(keepends=True)
    first = next(number for number, line in enumerate(lines) if line.strip() and not line.startswith("#"))
    return (
        f"# One row, of this bundle's task. Head of the table of {MSD} that it comes from:\n#\n{''.join(lines[:first])}"
    )


def _trained_row(task: Task, weights: Weights) -> dict[str, Any]:
    """The entries of the row that the weights record."""
    if weights.task is not None and weights.task != task.name:
        raise InputError(
            f"{weights.path} was trained for {weights.task}, not for {task.name}. Pack it as {MSD} with --task {weights.task} "
            "(your own data: the task.yaml of its training), or name the folder of other weights by --models."
        )
    trained = dict(weights.row or {key: weights.trained[key] for key in VOXELS if key in weights.trained})
    labels = trained.get("labels", task.row["labels"])
    if weights.labels is not None and _names_by_value(weights.labels) != _names_by_value(labels):
        raise InputError(
            f"{weights.path} was trained for the labels {weights.labels}; {task.name} has {labels}. Choose a task with those labels, "
            f"such as a row of your own: {MSD} --task FILE.yaml."
        )
    return trained


def _names_by_value(labels: Mapping[Any, Any]) -> dict[int, str]:
    return {int(value): str(name) for value, name in labels.items()}


def _row_with(task: Task, trained: Mapping[str, Any], preset: str, presets: Iterable[str]) -> str:
    """Text of the row; written anew, without comments, where the weights were trained with other settings."""
    row = {"hu_window": None, **task.row, **(task.row.get(preset) or {})}
    if all(row.get(key) == value for key, value in trained.items()):
        return task.text
    changed = {**task.row, **trained}
    for name in presets:
        if name in changed:
            changed[name] = {key: value for key, value in (changed[name] or {}).items() if key not in trained}
    body = yaml.safe_dump({task.name: changed}, sort_keys=False, default_flow_style=None, width=1000)
    return f"# Settings as these weights were trained, which differ from the table's:\n{body}"


def _remove_what_is_for_many_tasks(folder: Path) -> None:
    """Remove the configs of the Decathlon as a whole, and their scripts."""
    for name in MANY_TASKS:
        (folder / "configs" / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "scripts" / DECATHLON, ignore_errors=True)
