# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The row of a task: all that changes from one task to the next.

It stands in ``configs/tasks.yaml``, in a file of the user's in the same form, or is proposed from the user's own data; and it travels with the
model that was trained by it.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from .common.checkpoint_file import load_checkpoint_file
from .common.data_list import parse_data_list
from .common.input_error import InputError
from .common.presets import choose
from .task_proposal import proposed_row

logger = logging.getLogger(__name__)

DEFAULT_TASK = "Task09_Spleen"
#: What each row must say, and what it may say besides.
REQUIRED = ("modality", "channels", "labels", "spacing", "roi_size", "foreground", "nsd_tolerance")
OPTIONAL = ("hu_window", "cases")
#: What a model's file keeps of its row: whatever its masks and their scores depend on.
KEPT = (*REQUIRED, "hu_window")


def choose_task(
    *,
    task: str | None,
    file: str,
    preset: str,
    checkpoint: str | None = None,
    output_dir: str | None = None,
) -> dict[str, Any]:
    """The row of a task, with what it states for the preset put in place, and the task's ``name``.

    Args:
        task: a name in the table, such as ``Task09_Spleen``; a YAML file that holds one row under its name; or a data set of one's own,
            ``DIR/dataset.json``, for which a row is proposed. None: the task of the checkpoint, else `DEFAULT_TASK`.
        file: the table, ``configs/tasks.yaml``. Beside it lies ``presets.yaml``, whose values a row may change.
        preset: a row may hold values for it under its name.
        checkpoint: a ``model.pt``. Where it carries the row that it was trained by, that row is taken, whatever the table or the data say now.
            A file that does not exist (yet) says nothing.
        output_dir: where a proposed row is written, as ``task.yaml``.

    Raises:
        InputError: a file or task is not there (the nearest names are offered); the model was trained for another task than ``task``; a row
            lacks something, or names what nobody knows.
    """
    trained, kept = _trained_by(checkpoint)
    if trained and task and not _is_list(task) and trained not in (task, _name_in(task)):
        raise InputError(
            f"{checkpoint} was trained for {trained}, not for --task {task}. Leave --task out or choose another model."
        )
    if trained and kept:
        return {"hu_window": None, **kept, "name": trained}
    presets = Path(file).with_name("presets.yaml")
    name, row, source = _find(str(task or trained or DEFAULT_TASK), file, output_dir)
    _check_row(name, row, source, presets=presets)
    of_preset = row.get(preset) or {}
    return {"hu_window": None, **row, **of_preset, "name": name}


def task_values(*, preset: str, file: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a preset (`common.presets.choose`), with what the task's row changes of them.

    Args:
        preset: name of the preset.
        file: ``configs/presets.yaml``.
        row: from `choose_task` for the same preset.

    Raises:
        InputError: see `common.presets.choose`.
    """
    values = choose(preset=preset, file=file)
    return {**values, **{key: value for key, value in row.items() if key in values}}


def kept_row(*, row: Mapping[str, Any], **used: Any) -> dict[str, Any]:
    """What a model's file keeps of its row.

    Args:
        row: from `choose_task`.
        used: values that options changed, such as ``spacing``.
    """
    return {key: row[key] for key in KEPT} | used


def dataset_folder(*, task: str, otherwise: str) -> str:
    """Where the data lie unless ``--dataset_dir`` says it: beside the ``dataset.json`` that is the task, else the bundle's own folder.

    Args:
        task: see `choose_task`.
        otherwise: that folder.
    """
    return str(Path(task).parent) if _is_list(task) else otherwise


def check_dataset(*, dataset_dir: str, data_list: str | None, row: Mapping[str, Any]) -> None:
    """Compare the data set's own ``dataset.json`` with the row of the task.

    Fewer or more cases than the row counts are worth a warning and no more: a part of a data set is used in the same way.

    Raises:
        InputError: if it declares other label values or another number of channels.
    """
    folder = Path(dataset_dir)
    path = folder / data_list if data_list else folder if folder.is_file() else folder / "dataset.json"
    content = parse_data_list(path)
    task = row["name"]
    declared = content.get("labels") or row["labels"]
    try:
        values = sorted(int(value) for value in declared)
    except ValueError:
        raise InputError(
            f"{path} declares labels {declared}: each must be a whole number with its name, "
            'such as {"0": "background", "1": "spleen"}.'
        ) from None
    if values != sorted(int(value) for value in row["labels"]):
        raise InputError(
            f"{path} declares labels {declared}, but {task} has {row['labels']}. Is this the folder of that task?"
        )
    channels = content.get("modality") or row["channels"]
    if len(channels) != len(row["channels"]):
        raise InputError(
            f"{path} declares {len(channels)} channels ({channels}), but {task} has {len(row['channels'])}: {row['channels']}."
        )
    for section, number in (row.get("cases") or {}).items():
        there = len(content.get(section, []))
        if there != number:
            logger.warning("%s: %d cases under %r, %s has %d", path, there, section, task, number)


def _trained_by(checkpoint: str | None) -> tuple[str | None, Mapping[str, Any] | None]:
    """Task and row of a model, None for what its file does not say."""
    if checkpoint is None or not Path(checkpoint).exists():
        return None, None
    content = load_checkpoint_file(checkpoint)
    return (content.get("task"), content.get("row")) if isinstance(content, Mapping) else (None, None)


def _name_in(task: str) -> str | None:
    """Name of the one row in a user's file, None for anything else."""
    return (
        next(iter(ConfigParser.load_config_file(task)), None) if _is_row_file(task) and Path(task).is_file() else None
    )


def _is_list(task: str) -> bool:
    return Path(str(task)).suffix == ".json"


def _is_row_file(task: str) -> bool:
    return Path(task).suffix in (".yaml", ".yml")


def _find(task: str, table_file: str, output_dir: str | None) -> tuple[str, dict[str, Any], str]:
    """Name, row and the file that it comes from."""
    if _is_list(task):
        name, row = proposed_row(task, output_dir=output_dir)
        return name, row, task
    file = task if _is_row_file(task) else table_file
    if not Path(file).is_file():
        advice = (
            "A row for data of your own is proposed by --task DIR/dataset.json."
            if _is_row_file(task)
            else "Run inside the bundle's folder, or name that folder by --bundle_root."
        )
        raise InputError(f"{file} not found. {advice}")
    table = ConfigParser.load_config_file(file)
    if _is_row_file(task):
        if not isinstance(table, Mapping) or len(table) != 1:
            raise InputError(f"--task {task} must hold one row under its name, as configs/tasks.yaml does.")
        (name,) = table
        return name, table[name], file
    if task not in table:
        near = difflib.get_close_matches(task, table, n=3, cutoff=0.4)
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        raise InputError(
            f"--task {task!r} is not in {file}. {hint}Known tasks: {', '.join(table)}. "
            "For data of your own: --task DIR/dataset.json."
        )
    return task, table[task], file


def _check_row(name: str, row: Any, source: str, *, presets: Path) -> None:
    """Refuse a row that would fail, or be ignored, deep inside a run."""
    if not isinstance(row, Mapping):
        raise InputError(f"{source}: {name} must be entries such as 'spacing: [1.5, 1.5, 1.5]', not {row!r}.")
    if missing := [key for key in REQUIRED if key not in row]:
        raise InputError(f"{source}: {name} lacks {', '.join(missing)}.")
    table = ConfigParser.load_config_file(str(presets))
    values = set(next(iter(table.values())))
    known = {*REQUIRED, *OPTIONAL, *table, *values}
    own = [(f"{name}", row)] + [(f"{name}, {key}", row[key]) for key in table if key in row]
    for where, entries in own:
        if not isinstance(entries, Mapping):
            raise InputError(f"{source}: {where} must be entries, not {entries!r}.")
        for key in sorted(set(entries) - (known if entries is row else known - set(table))):
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise InputError(
                f"{source}: {where} sets {key!r}, which is no entry of a row and no value of a preset.{hint}"
            )
    if not isinstance(row["channels"], Sequence) or isinstance(row["channels"], str) or not row["channels"]:
        raise InputError(f"{source}: {name} has channels {row['channels']!r}; a list of names is due, such as [CT].")
