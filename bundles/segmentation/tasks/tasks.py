# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The row of a task: all that changes from one task to the next.

It stands in ``configs/tasks.yaml``, in a file of the user's in the same form, or is proposed from the user's own data; and it travels with the
model that was trained by it.
"""

from __future__ import annotations

import difflib
import logging
import math
import re
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import yaml
from monai.bundle import ConfigParser

from ...common.data.data_list import parse_data_list
from ...common.errors import InputError
from ...common.run.presets import choose
from ...common.weights.checkpoint_file import load_checkpoint_file
from ..models.label_names import check_labels
from .proposal import proposed_row

logger = logging.getLogger(__name__)

DEFAULT_TASK = "Task09_Spleen"
#: What each row must say, and what it may say besides.
REQUIRED = ("modality", "channels", "labels", "spacing", "roi_size", "foreground", "nsd_tolerance")
OPTIONAL = ("hu_window", "cases")
#: What a model's file keeps of its row: whatever its masks and their scores depend on.
KEPT = (*REQUIRED, "hu_window")
MODALITIES = ("CT", "MR")
ALIKE = 0.85  # of two spellings of one name, such as tumour and tumor (`difflib`)


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
        checkpoint: a ``model.pt``. Where it carries the row that it was trained by, that row is taken, whatever the table or the data say now;
            what a user's file says otherwise is logged as a warning. A file that does not exist (yet) says nothing.
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
    presets = Path(file).with_name("presets.yaml")
    if trained and kept:
        if task and _is_row_file(task):
            _warn_of_other_values(task, kept, str(checkpoint), presets=presets)
        return {"hu_window": None, **kept, "name": trained}
    name, row, source = _find(str(task or trained or DEFAULT_TASK), file, output_dir)
    _check_row(name, row, source, presets=presets)
    of_preset = row.get(preset) or {}
    return {"hu_window": None, **row, **of_preset, "labels": check_labels(row["labels"]), "name": name}


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

    A list of another name is given itself: a ``dataset.json`` beside it is another data set.

    Args:
        task: see `choose_task`.
        otherwise: that folder.
    """
    if not _is_list(task):
        return otherwise
    return str(Path(task).parent if Path(task).name == "dataset.json" else task)


def check_dataset(*, dataset_dir: str, data_list: str | None, row: Mapping[str, Any], file: str | None = None) -> None:
    """Compare the data set's own ``dataset.json`` with the row of the task.

    Other names of labels or channels, and fewer or more cases than the row counts, are worth a warning and no more: a part of a data set, or one of
    other makers, is used in the same way.

    Args:
        dataset_dir: the task's folder, or a data list.
        data_list: another list in that folder.
        row: from `choose_task`.
        file: the table, ``configs/tasks.yaml``: labels that are those of another of its tasks are refused.

    Raises:
        InputError: if it declares other label values, the names of labels of another task, another number or order of channels, or CT for MR.
    """
    folder = Path(dataset_dir)
    path = folder / data_list if data_list else folder if folder.is_file() else folder / "dataset.json"
    content = parse_data_list(path)
    task = row["name"]
    declared = content.get("labels") or row["labels"]
    if not isinstance(declared, Mapping):
        raise InputError(
            f'{path} declares labels {declared!r}: they must be values with names, such as {{"0": "background", "1": "spleen"}}.'
        )
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
    if not isinstance(channels, Mapping | list):
        raise InputError(
            f'{path} declares modality {channels!r}: it must be channels with names, such as {{"0": "CT"}}.'
        )
    if len(channels) != len(row["channels"]):
        raise InputError(
            f"{path} declares {len(channels)} channels ({channels}), but {task} has {len(row['channels'])}: {row['channels']}."
        )
    _compare_labels(path, declared, row, file)
    _compare_channels(path, channels, row)
    for section, number in (row.get("cases") or {}).items():
        there = len(content.get(section, []))
        if there != number:
            logger.warning("%s: %d cases under %r, %s has %d", path, there, section, task, number)


def _plain(name: Any) -> str:
    return re.sub(r"[^a-z0-9]+", "_", str(name).lower()).strip("_")


def _alike(ours: Sequence[Any], theirs: Sequence[Any]) -> bool:
    """Whether names are the same, one by one, but for their spelling, their end (``colon cancer primaries``), or being initials (``PZ``)."""
    pairs = [(_plain(a), _plain(b)) for a, b in zip(ours, theirs, strict=True)]
    return all(
        difflib.SequenceMatcher(None, a, b).ratio() >= ALIKE
        or b.startswith(a)
        or b == "".join(word[0] for word in a.split("_") if word)
        for a, b in pairs
    )


def _structures(labels: Mapping[Any, Any]) -> list[Any]:
    """Names in the order of their values, without the background."""
    return [name for value, name in sorted(labels.items(), key=lambda item: int(item[0])) if int(value)]


def _compare_labels(path: Path, declared: Mapping[str, Any], row: Mapping[str, Any], file: str | None) -> None:
    theirs, ours = _structures(declared), _structures(row["labels"])
    if _alike(ours, theirs):
        return
    table = ConfigParser.load_config_file(file) if file else {}
    for task, other in table.items():
        names = _structures(other["labels"])
        if len(names) == len(theirs) and _alike(names, theirs):
            raise InputError(
                f"{path} declares the labels {theirs}, which are those of {task}; {row['name']} has {ours}. Is this the folder of that task?"
            )
    logger.warning("%s names its labels %s, taken for %s of %s", path, theirs, ours, row["name"])


def _compare_channels(path: Path, declared: Mapping[str, Any] | Sequence[Any], row: Mapping[str, Any]) -> None:
    if isinstance(declared, Mapping):
        declared = [declared[number] for number in sorted(declared, key=lambda number: str(number).zfill(4))]
    theirs, ours = [_plain(name) for name in declared], [_plain(name) for name in row["channels"]]
    if theirs == ours:
        return
    if sorted(theirs) == sorted(ours) or ("ct" in theirs) != ("ct" in ours):
        raise InputError(
            f"{path} declares the channels {list(declared)}, but {row['name']} has {row['channels']}, in that order. Is this the folder of that task?"
        )
    logger.warning("%s names its channels %s, taken for %s of %s", path, list(declared), row["channels"], row["name"])


def _load(file: str) -> Any:
    """Content of a user's YAML file."""
    try:
        return ConfigParser.load_config_file(file)
    except yaml.YAMLError as error:
        raise InputError(f"{file} is no YAML: {error}. Mend it there, or propose the row anew.") from None


def _warn_of_other_values(task: str, kept: Mapping[str, Any], checkpoint: str, *, presets: Path) -> None:
    """Say what of a user's file is not used, because the model was trained otherwise."""
    name, row, source = _find(task, task, None)
    _check_row(name, row, source, presets=presets)
    names = [name for name in ConfigParser.load_config_file(str(presets)) if isinstance(row.get(name), Mapping)]
    for key in (key for key in KEPT if key in row and key in kept):
        said = [row[key], *(row[name][key] for name in names if key in row[name])]
        if key == "labels":
            said = [check_labels(row[key])]
        if kept[key] not in said:
            logger.warning(
                "%s was trained with %s %s, which is used; %s has %s. An option of that name changes it where there is one.",
                *(checkpoint, key, kept[key], task, said[-1]),
            )


def _trained_by(checkpoint: str | None) -> tuple[str | None, Mapping[str, Any] | None]:
    """Task and row of a model, None for what its file does not say."""
    if checkpoint is None or not Path(checkpoint).exists():
        return None, None
    content = load_checkpoint_file(checkpoint)
    return (content.get("task"), content.get("row")) if isinstance(content, Mapping) else (None, None)


def _name_in(task: str) -> str | None:
    """Name of the one row in a user's file, None for anything else."""
    if not _is_row_file(task) or not Path(task).is_file():
        return None
    table = _load(task)
    return str(next(iter(table))) if isinstance(table, Mapping) and len(table) == 1 else None


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
    table = _load(file)
    if _is_row_file(task):
        if not isinstance(table, Mapping) or len(table) != 1:
            raise InputError(f"--task {task} must hold one row under its name, as configs/tasks.yaml does.")
        ((name, row),) = table.items()
        return str(name), row, file
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
    if row["modality"] not in MODALITIES:
        raise InputError(
            f"{source}: {name} has modality {row['modality']!r}; it is CT (in HU), or MR for whatever is z-scored."
        )
    try:
        check_labels(row["labels"])
    except (AttributeError, TypeError, ValueError) as error:
        said = (
            error
            if isinstance(error, InputError)
            else 'a name for each value is due, such as {"0": background, "1": spleen}'
        )
        raise InputError(f"{source}: {name} has labels {row['labels']!r}: {said}") from None
    for where, entries in own:
        _check_numbers(f"{source}: {where}", entries)


def _check_numbers(where: str, entries: Mapping[str, Any]) -> None:
    """What no later check looks at before the training; window, spacing and ROI are options and checked as such."""
    if "foreground" in entries and not _is_number(entries["foreground"]):
        raise InputError(
            f"{where} has foreground {entries['foreground']!r}; a number is due, in HU or as the scans' intensities."
        )
    tolerance = entries.get("nsd_tolerance", 0.0)
    for value in tolerance.values() if isinstance(tolerance, Mapping) else [tolerance]:
        if not _is_number(value) or value < 0:
            raise InputError(
                f"{where} has nsd_tolerance {tolerance!r}; mm are due, 0 or above, one or by name of label."
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
