# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The table of the Decathlon's tasks: what changes from one task to the next stands in ``configs/tasks.yaml`` alone."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from .common.checkpoint_file import load_checkpoint_file
from .common.input_error import InputError

DEFAULT_TASK = "Task09_Spleen"


def choose_task(*, task: str, file: str, preset: str) -> dict[str, Any]:
    """One row of the table, with what it states for the preset put in place.

    Args:
        task: name of the task, such as ``Task09_Spleen``.
        file: ``configs/tasks.yaml``.
        preset: name of the preset; a row may hold values for it under that name.

    Raises:
        InputError: if the file or the task is not there; the nearest names are offered.
    """
    if not Path(file).is_file():
        raise InputError(f"{file} not found. Run inside the bundle's folder, or name that folder by --bundle_root.")
    table = ConfigParser.load_config_file(file)
    if task not in table:
        near = difflib.get_close_matches(str(task), table, n=3, cutoff=0.4)
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        raise InputError(f"--task {task!r} is not in {file}. {hint}Known tasks: {', '.join(table)}.")
    row = dict(table[task])
    return {"hu_window": None, **row, **row.get(preset, {})}


def model_task(*, task: str | None, checkpoint: str) -> str:
    """The task to predict: what the model was trained for, if its file says so.

    Args:
        task: what the user asked for, None to leave it to the model.
        checkpoint: ``model.pt``; where it does not exist (yet), the answer is what was asked for, else `DEFAULT_TASK`.

    Raises:
        InputError: if the model was trained for another task than the one asked for.
    """
    content = load_checkpoint_file(checkpoint) if Path(checkpoint).exists() else {}
    trained = content.get("task") if isinstance(content, Mapping) else None
    if task and trained and task != trained:
        raise InputError(
            f"{checkpoint} was trained for {trained}, not for --task {task}. Leave --task out or choose another model."
        )
    return task or trained or DEFAULT_TASK


def check_dataset(*, dataset_dir: str, data_list: str | None, task: str, row: Mapping[str, Any]) -> None:
    """Compare the data set's own ``dataset.json`` with the row of the table.

    Raises:
        InputError: if it declares other label values or another number of channels.
    """
    folder = Path(dataset_dir)
    path = folder / data_list if data_list else folder if folder.is_file() else folder / "dataset.json"
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    declared = sorted(int(value) for value in content.get("labels") or row["labels"])
    expected = sorted(int(value) for value in row["labels"])
    if declared != expected:
        raise InputError(
            f"{path} declares labels {content['labels']}, but {task} has {row['labels']}. Is this the folder of that task?"
        )
    channels = content.get("modality") or row["channels"]
    if len(channels) != len(row["channels"]):
        raise InputError(
            f"{path} declares {len(channels)} channels ({channels}), but {task} has {len(row['channels'])}: {row['channels']}."
        )
