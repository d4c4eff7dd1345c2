# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The row of a task: the settings that differ between tasks.

A row comes from ``configs/tasks.yaml``, from a user's file in the same form, or is proposed from the user's own data.
It is saved in the model that was trained with it.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from monai.bundle import ConfigParser

from ...common.data.ignore_label import IGNORE_LABEL
from ...common.data.list_forms.list_file import data_list_path, parse_data_list
from ...common.errors import InputError
from ...common.run.presets import choose
from ...common.value_rules import ZERO_OR_ABOVE, is_number
from ...common.weights.checkpoint_file import checkpoint_facts
from ...common.weights.recorded_preset import recorded_training
from ...common.words import counted, did_you_mean, plain_name, sentence, shown
from ..models.label_names import check_labels, recorded_labels
from .proposal import proposed_row

logger = logging.getLogger(__name__)

#: Required and optional entries of a row.
REQUIRED = ("modality", "channels", "labels", "spacing", "roi_size", "foreground", "nsd_tolerance")
OPTIONAL = ("hu_window", "cases")
#: The entries saved in a model file: those that affect its masks and their scores.
KEPT = (*REQUIRED, "hu_window")
#: Entries on which the voxels that a network sees depend.
OF_THE_VOXELS = ("spacing", "hu_window", "roi_size", "foreground")
MODALITIES = ("CT", "MR")
MADE_UP = re.compile(r"label_\d+")  # names of `found_names`, which say so themselves
SIMILAR = 0.85  # `difflib` ratio from which two spellings count as one name, such as tumour and tumor


def choose_task(
    *,
    task: str | None,
    file: str,
    preset: str,
    checkpoint: str | None = None,
    output_dir: str | None = None,
    ignore_label: int | None = IGNORE_LABEL,
) -> dict[str, Any]:
    """Return the row of a task with the preset's changes applied, and the task's ``name``.

    Args:
        task: a name in the table, such as ``Task09_Spleen``; a YAML file that contains one row under its name; or your
            own data, a folder or a data list, for which a row is proposed. None: the task of the checkpoint, else the
            only one of the table.
        file: the table, ``configs/tasks.yaml``. ``presets.yaml`` next to it contains the values that a row may change.
        preset: name of the preset. A row may contain values for it under its name.
        checkpoint: a ``model.pt``. If it records the row that it was trained with, that row is used, whatever the
            table or the data say now; differing values in a user's file are logged as a warning. If it records no
            row, its labels and the values of `OF_THE_VOXELS` that it records replace the row's; those that it does not
            record are logged as a warning. A file that does not exist (yet) is ignored.
        output_dir: where a proposed row is written, as ``task.yaml``.
        ignore_label: value of unknown voxels in the labels that a row is proposed from.

    Raises:
        InputError: a file or task does not exist (similar names are suggested); no task is named and the table has
            several; the model was trained for another task than ``task``; a row is incomplete or has unknown entries.
    """
    trained, kept, labels = _trained_by(checkpoint)
    if trained and task and not _is_own_data(task, file) and trained not in (task, _name_in(task)):
        raise InputError(
            f"{checkpoint} was trained for {trained}, not for --task {task}. Leave --task out or choose another model."
        )
    presets = Path(file).with_name("presets.yaml")
    if trained and kept:
        if task and _is_row_file(task):
            _warn_of_other_values(task, kept, str(checkpoint), presets=presets)
        return {"hu_window": None, **kept, "name": trained}
    name, row, source = _find(str(task or trained or _only_task(file)), file, output_dir, ignore_label)
    _check_row(name, row, source, presets=presets)
    row = {"hu_window": None, **row, **(row.get(preset) or {})}
    recorded = recorded_training(checkpoint)
    if checkpoint is not None and Path(checkpoint).exists():
        if absent := [key for key in OF_THE_VOXELS if key not in recorded]:
            logger.warning(
                "%s does not record its %s: those of %s with --preset %s are used. A network gives wrong masks for "
                "voxels unlike those of its training.",
                *(checkpoint, ", ".join(absent), name, preset),
            )
    row |= {key: recorded[key] for key in OF_THE_VOXELS if key in recorded}
    return row | {"labels": check_labels(labels or row["labels"]), "name": name}


def _only_task(file: str) -> str:
    """Return the name of the only row of a table."""
    names = list(_load_table(file))
    if len(names) > 1:
        raise InputError(
            f"--task is missing: {file} has the tasks {', '.join(names)}. Add --task NAME, such as --task {names[0]}, "
            "or --task FOLDER for your own data. (A --pretrained_model that records its task needs none.)"
        )
    return names[0]


def task_values(*, preset: str, file: str, row: Mapping[str, Any], checkpoint: str | None = None) -> dict[str, Any]:
    """Return the values of a preset (`presets.choose`), changed by the task's row and by what a model records.

    Args:
        preset: name of the preset.
        file: ``configs/presets.yaml``.
        row: from `choose_task` for the same preset.
        checkpoint: a ``model.pt``; a value that its training recorded, such as ``overlap``, takes precedence over the
            preset's.

    Raises:
        InputError: see `presets.choose`.
    """
    values = choose(preset=preset, file=file)
    changes = {**row, **recorded_training(checkpoint)}
    return {**values, **{key: value for key, value in changes.items() if key in values}}


def kept_row(*, row: Mapping[str, Any], **used: Any) -> dict[str, Any]:
    """Return the part of a row that a model file records.

    Args:
        row: from `choose_task`.
        used: values in use that options may have changed, such as ``spacing``.
    """
    return {key: row[key] for key in KEPT} | used


def dataset_folder(*, task: str | None, otherwise: str, file: str | None = None) -> str:
    """Return the default of ``--dataset_dir``: the folder of a task that is one's own data, else the given folder.

    A list with another name than ``dataset.json`` is returned itself, since a ``dataset.json`` next to it is another
    data set.

    Args:
        task: see `choose_task`.
        otherwise: the folder for any other task.
        file: the table, whose names take precedence over folders of the same name.
    """
    if task is None or not _is_own_data(task, file):
        return otherwise
    if Path(task).expanduser().is_dir():
        return str(task)
    return str(Path(task).parent if Path(task).name == "dataset.json" else task)


def check_dataset(
    *,
    dataset_dir: str,
    data_list: str | None,
    row: Mapping[str, Any],
    labels: Mapping[str, str] | None = None,
    file: str | None = None,
) -> None:
    """Compare the data set's own ``dataset.json`` with the row of the task.

    Different names of labels or channels, and a different number of cases, are logged as warnings only: a subset of the
    data set, or a copy from another source, can be used in the same way.

    Args:
        dataset_dir: the task's folder, or a data list.
        data_list: another list in that folder.
        row: from `choose_task`.
        labels: those of this run; None: the row's.
        file: the table, ``configs/tasks.yaml``: labels that are those of another of its tasks are refused.

    Raises:
        InputError: the list declares different label values, a different value for a label name, the labels of another
            task, a different number or order of channels, or CT instead of MR or the reverse.
    """
    path = data_list_path(dataset_dir, data_list)
    content = parse_data_list(path)
    named = bool(labels) and _structures(labels) != _structures(row["labels"])  # by --labels
    row = {**row, "labels": labels or row["labels"]}
    task, labels = row["name"], {int(value): str(name) for value, name in row["labels"].items()}
    made_up = any(map(MADE_UP.fullmatch, _structures(row["labels"])))
    if not content.get("labels") and not path.is_file() and not named and not made_up:
        logger.warning(
            "%s has no dataset.json, so nothing says what its label values mean: they are taken for those of %s, %s. Does "
            "it have other structures? Use --task %s (in either segmentation bundle) and name them with --labels.",
            *(path.parent, task, shown(dict(sorted(labels.items())))),
            path.parent,
        )
    declared = content.get("labels") or row["labels"]
    if not isinstance(declared, Mapping):
        raise InputError(
            f'{path} declares labels {declared!r}: they must be values with names, such as {{"0": "background", "1": "spleen"}}.'
        )
    try:
        declared_names = {int(value): str(name) for value, name in declared.items()}
    except ValueError:
        raise InputError(
            f"{path} declares labels {declared}: each must be a whole number with its name, "
            'such as {"0": "background", "1": "spleen"}.'
        ) from None
    values = {plain_name(name): value for value, name in labels.items()}
    own = {value: plain_name(name) for value, name in labels.items()}
    moved = [
        value
        for value, name in declared_names.items()
        if plain_name(name) != own.get(value) and values.get(plain_name(name), value) != value
    ]
    if sorted(declared_names) != sorted(labels) or moved:
        right = {str(value): name for value, name in sorted(declared_names.items())}
        raise InputError(
            f"{path} declares labels {declared}, but {task} has {row['labels']}. Is this the folder of that task? "
            f'If the list is right, pass --labels "{right}".'
        )
    channels = content.get("modality") or row["channels"]
    if not isinstance(channels, Mapping | list):
        raise InputError(
            f'{path} declares modality {channels!r}: it must be channels with names, such as {{"0": "CT"}}.'
        )
    if len(channels) != len(row["channels"]):
        raise InputError(
            f"{path} declares {counted(len(channels), 'channel')} ({shown(channels)}), but {task} has {len(row['channels'])}: {shown(row['channels'])}."
        )
    _compare_labels(path, declared, row, file)
    _compare_channels(path, channels, row)
    for section, number in (row.get("cases") or {}).items():
        listed = len(content.get(section, []))
        if listed != number:
            logger.warning("%s lists %s under %s, %s has %d", path, counted(listed, "case"), section, task, number)


def _names_match(names: Sequence[Any], declared: Sequence[Any]) -> bool:
    """Return whether names match pairwise.

    Spelling variants, longer declared names (``colon cancer primaries``) and initials (``PZ``) also match.
    """
    pairs = [(plain_name(a), plain_name(b)) for a, b in zip(names, declared, strict=True)]
    return all(
        difflib.SequenceMatcher(None, a, b).ratio() >= SIMILAR
        or b.startswith(a)
        or b == "".join(word[0] for word in a.split("_") if word)
        for a, b in pairs
    )


def _structures(labels: Mapping[Any, Any]) -> list[Any]:
    """Return the names in the order of their values, without the background."""
    return [name for value, name in sorted(labels.items(), key=lambda item: int(item[0])) if int(value)]


def _compare_labels(path: Path, declared: Mapping[str, Any], row: Mapping[str, Any], file: str | None) -> None:
    declared_names, row_names = _structures(declared), _structures(row["labels"])
    if _names_match(row_names, declared_names):
        return
    table = _load_table(file) if file else {}
    for task, other in table.items():
        names = _structures(other["labels"])
        if len(names) == len(declared_names) and _names_match(names, declared_names):
            raise InputError(
                f"{path} declares the labels {shown(declared_names)}, which are those of {task}; {row['name']} has {shown(row_names)}. "
                f"Is this the folder of {row['name']}?"
            )
    names = shown(declared_names), shown(row_names)
    logger.warning("%s names its labels %s: they are used as %s of %s", path, *names, row["name"])


def _compare_channels(path: Path, declared: Mapping[str, Any] | Sequence[Any], row: Mapping[str, Any]) -> None:
    if isinstance(declared, Mapping):
        declared = [declared[number] for number in sorted(declared, key=lambda number: str(number).zfill(4))]
    declared_names, row_names = [[plain_name(name) for name in names] for names in (declared, row["channels"])]
    if declared_names == row_names:
        return
    if sorted(declared_names) == sorted(row_names) or ("ct" in declared_names) != ("ct" in row_names):
        raise InputError(
            f"{path} declares the channels {shown(list(declared))}, but {row['name']} has {shown(row['channels'])}, in that order. "
            f"Is this the folder of {row['name']}?"
        )
    logger.warning(
        "%s names its channels %s: they are used as %s of %s",
        path,
        shown(list(declared)),
        shown(row["channels"]),
        row["name"],
    )


def _load_table(file: str) -> Mapping[str, Any]:
    """Read the bundle's own table."""
    if not Path(file).is_file():
        raise InputError(f"{file} not found. Run inside the bundle's folder, or pass that folder as --bundle_root.")
    return ConfigParser.load_config_file(file)


def _load(file: str) -> Any:
    """Read a user's YAML file."""
    try:
        return ConfigParser.load_config_file(file)
    except yaml.YAMLError as error:
        raise InputError(
            f"{file} is not valid YAML: {sentence(str(error))} Correct the file, or propose the row again."
        ) from None


def _warn_of_other_values(task: str, kept: Mapping[str, Any], checkpoint: str, *, presets: Path) -> None:
    """Warn about values of a user's file that are ignored because the model was trained with different ones."""
    name, row, source = _find(task, task, None)
    _check_row(name, row, source, presets=presets)
    names = [name for name in ConfigParser.load_config_file(str(presets)) if isinstance(row.get(name), Mapping)]
    for key in (key for key in KEPT if key in row and key in kept):
        of_file = [row[key], *(row[name][key] for name in names if key in row[name])]
        if key == "labels":
            of_file = [check_labels(row[key])]
        if kept[key] not in of_file:
            logger.warning(
                "%s was trained with %s %s, which is used; %s has %s, which is ignored. "
                "If there is an option of that name, it overrides the model's value.",
                *(checkpoint, key, shown(kept[key]), task, shown(of_file[-1])),
            )


def _trained_by(checkpoint: str | None) -> tuple[str | None, Mapping[str, Any] | None, Mapping[str, str] | None]:
    """Return the task, row and labels that a model file records; None for what it does not record."""
    if checkpoint is None or not Path(checkpoint).exists():
        return None, None, None
    content = checkpoint_facts(checkpoint)
    return content.get("task"), content.get("row"), recorded_labels(content, str(checkpoint))


def _name_in(task: str) -> str | None:
    """Return the name of the only row in a user's file; None for anything else."""
    if not _is_row_file(task) or not Path(task).is_file():
        return None
    table = _load(task)
    return str(next(iter(table))) if isinstance(table, Mapping) and len(table) == 1 else None


def _is_own_data(task: str, table_file: str | None) -> bool:
    """Return whether a task is a data list or a folder. A name in the table is not, even if such a folder exists."""
    if Path(str(task)).suffix == ".json":
        return True
    known = _load_table(table_file) if table_file and Path(table_file).is_file() else {}
    return task not in known and Path(str(task)).expanduser().is_dir()


def _is_row_file(task: str) -> bool:
    return Path(task).suffix in (".yaml", ".yml")


def _find(
    task: str, table_file: str, output_dir: str | None, ignore_label: int | None = IGNORE_LABEL
) -> tuple[str, dict[str, Any], str]:
    """Return the name, the row and the file that it comes from."""
    if _is_own_data(task, table_file):
        name, row = proposed_row(task, output_dir=output_dir, ignore_label=ignore_label)
        return name, row, task
    if _is_row_file(task):
        if not Path(task).is_file():
            raise InputError(f"--task {task} not found. --task FOLDER proposes a row for your own data.")
        table, file = _load(task), task
        if not isinstance(table, Mapping) or len(table) != 1:
            raise InputError(
                f"--task {task} must contain exactly one row under its name, in the form of configs/tasks.yaml."
            )
        ((name, row),) = table.items()
        return str(name), row, file
    table, file = _load_table(table_file), table_file
    if task not in table:
        hint = did_you_mean(task, table, most=3, cutoff=0.4)
        raise InputError(
            f"--task {task!r} is not in {file}. {hint}Known tasks: {', '.join(table)}. "
            "For your own data: --task FOLDER, or --task FOLDER/dataset.json."
        )
    return task, table[task], file


def _check_row(name: str, row: Any, source: str, *, presets: Path) -> None:
    """Reject a row with entries that would fail late in a run, or be ignored."""
    if not isinstance(row, Mapping):
        raise InputError(f"{source}: {name} must contain entries such as 'spacing: [1.5, 1.5, 1.5]', but is {row!r}.")
    if missing := [key for key in REQUIRED if key not in row]:
        raise InputError(f"{source}: {name} lacks {', '.join(missing)}.")
    table = ConfigParser.load_config_file(str(presets))
    values = set(next(iter(table.values())))
    known = {*REQUIRED, *OPTIONAL, *table, *values}
    own = [(f"{name}", row)] + [(f"{name}, {key}", row[key]) for key in table if key in row]
    for where, entries in own:
        if not isinstance(entries, Mapping):
            raise InputError(f"{source}: {where} must contain entries, but is {entries!r}.")
        for key in sorted(set(entries) - (known if entries is row else known - set(table))):
            said = f"{source}: {where} sets {key!r}, which is neither an entry of a row nor a value of a preset."
            raise InputError(f"{said} {did_you_mean(key, known)}".rstrip())
    if not isinstance(row["channels"], Sequence) or isinstance(row["channels"], str) or not row["channels"]:
        raise InputError(f"{source}: {name} has channels {row['channels']!r}; expected a list of names, such as [CT].")
    if row["modality"] not in MODALITIES:
        raise InputError(
            f"{source}: {name} has modality {row['modality']!r}; expected CT (in HU), or MR for all scans to z-score."
        )
    try:
        check_labels(row["labels"])
    except (AttributeError, TypeError, ValueError) as error:
        fault = (
            error
            if isinstance(error, InputError)
            else 'expected a name for each value, such as {"0": background, "1": spleen}'
        )
        raise InputError(f"{source}: {name} has labels {row['labels']!r}: {fault}") from None
    for where, entries in own:
        _check_numbers(f"{source}: {where}", entries)


def _check_numbers(where: str, entries: Mapping[str, Any]) -> None:
    """Check the numbers that no later check covers. Window, spacing and ROI are options and checked as such."""
    if "foreground" in entries and not is_number(entries["foreground"]):
        raise InputError(
            f"{where} has foreground {entries['foreground']!r}; expected a number, in HU or in the scans' intensities."
        )
    tolerance = entries.get("nsd_tolerance", 0.0)
    for value in tolerance.values() if isinstance(tolerance, Mapping) else [tolerance]:
        if not ZERO_OR_ABOVE.holds(value):
            raise InputError(
                f"{where} has nsd_tolerance {tolerance!r}; expected mm, 0 or above: one number, or one per label name."
            )
