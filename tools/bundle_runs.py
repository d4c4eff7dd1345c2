# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Runs of the bundles' commands, planned before anything is computed, and the file that lists all of them.

A run is a folder ``runs/NAME`` in which one command follows another: train, evaluate. What plans runs (a study, a
cross-validation) writes ``plan.json``; the rules of workflow/Snakefile carry it out.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from bundles.common.errors import InputError
from bundles.common.files import write_text
from bundles.common.words import counted, did_you_mean

BUNDLES = Path(__file__).resolve().parents[1] / "bundles"
PLAN, SETTINGS, DONE = "plan.json", "settings.json", "done.json"
SPENT = ".spent.json"  # in the folder of a run: seconds of all its attempts
LISTS = "lists"  # subfolder of a run for its data lists
# First words of a path in the words of a command, see `words_of`.
IN_OUT, IN_RUN = "{out}/", "{run}/"


@dataclass(frozen=True, kw_only=True)
class Command:
    """One call of a bundle.

    Attributes:
        name: such as ``train``, ``evaluate`` or ``propagate``.
        bundle: folder name of the bundle.
        configs: config files, relative to the bundle or absolute.
        options: name to value, of plain types or `Path`. A relative path is relative to the folder of all runs; that of
            a data list, ``lists/NAME.json``, to the run's folder.
        result: the file that it writes last, relative to the run's folder.
        statuses: exit statuses that are not an error.
    """

    name: str
    bundle: str
    configs: tuple[str, ...]
    options: Mapping[str, Any]
    result: str
    statuses: tuple[int, ...] = (0,)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Commands that follow one another in one folder.

    Attributes:
        name: name of the run and of its folder.
        kind: such as ``pretraining``, ``propagation`` (of labels) or ``finetuning`` (whatever is scored).
        facts: what a report needs: arm, n, seed, tasks, steps.
        commands: its commands, in order.
        lists: name to content of each data list.
        cases: names of the training cases and of the scored cases.
        row: row of the task, with the preset's values.
        needs: names of the runs that must be finished before.
    """

    name: str
    kind: str
    facts: Mapping[str, Any]
    commands: tuple[Command, ...]
    lists: Mapping[str, Mapping[str, Any]]
    cases: Mapping[str, Sequence[str]]
    row: Mapping[str, Any]
    needs: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """Return everything that determines the result, without the paths and the precision of this machine."""
        commands = {
            command.name: {"bundle": command.bundle, "configs": [Path(name).name for name in command.configs]}
            | {"options": {key: _json_value(value) for key, value in command.options.items()}}
            for command in self.commands
        }
        settings = {"kind": self.kind, "facts": dict(self.facts), "commands": commands, "row": dict(self.row)}
        return json.loads(json.dumps({**settings, "cases": {k: list(v) for k, v in self.cases.items()}}))


def unique(runs: Sequence[Run]) -> list[Run]:
    """Return runs with each name once."""
    return list({run.name: run for run in runs}.values())


def words_of(command: Command) -> list[str]:
    """Return the words after ``python`` of a command, to be run in the bundle's folder.

    A path in the folder of all runs begins with `IN_OUT`, one in the folder of the run with `IN_RUN`: the folder may lie
    elsewhere on another machine, see `placed`.
    """
    configs = command.configs[0] if len(command.configs) == 1 else repr(list(command.configs))
    words = ["-W", "ignore", "-m", "monai.bundle", "run", "--config_file", configs]
    for name, value in command.options.items():
        if isinstance(value, Path) and not value.is_absolute():
            value = (IN_RUN if value.parts[0] == LISTS else IN_OUT) + value.as_posix()
        word = "$None" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        words += [f"--{name}", word]
    return words


def placed(words: Sequence[str], *, out: Path, run: str) -> list[str]:
    """Return the words of a command with the paths of this machine.

    Args:
        words: see `words_of`.
        out: folder of all runs.
        run: name of the run.
    """
    beginnings = {IN_OUT: f"{out}/", IN_RUN: f"{out / 'runs' / run}/"}
    return [
        next((new + word.removeprefix(old) for old, new in beginnings.items() if word.startswith(old)), word)
        for word in words
    ]


def write_plan(
    out: Path, *, workflow: str, name: str, source: str, runs: Sequence[tuple[Run, float]], **entries: Any
) -> None:
    """Write ``plan.json``, and the data lists of all runs.

    Args:
        out: folder of all runs.
        workflow: what was planned: ``study`` or ``folds``.
        name: name of the study or the cross-validation, for messages.
        source: the file that says so, for messages.
        runs: every run with a rough number of minutes.
        entries: what else the rules need.

    Raises:
        InputError: a run exists with other settings.
    """
    for run, _ in runs:
        check_options(run, source)
        check_settings(run, out)
    planned = {
        run.name: {
            "kind": run.kind,
            "minutes": minutes,
            "needs": list(run.needs),
            "settings": run.settings,
            "commands": [
                {"name": command.name, "bundle": command.bundle, "words": words_of(command), "result": command.result}
                | {"statuses": list(command.statuses)}
                for command in run.commands
            ],
        }
        for run, minutes in runs
    }
    for run, _ in runs:
        write_lists(run, out)
    _write_if_changed(out / PLAN, json.dumps({"workflow": workflow, "name": name, "runs": planned, **entries}) + "\n")


def read_plan(out: Path) -> dict[str, Any]:
    """Return the content of ``plan.json``.

    Raises:
        InputError: there is no plan, or it is damaged.
    """
    try:
        return json.loads((out / PLAN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{out} has no {PLAN}: no workflow was started there. Check the folder.") from None
    except ValueError as error:
        raise InputError(f"{out / PLAN} is damaged ({error}). Start the workflow again: it writes it anew.") from None


def write_lists(run: Run, out: Path) -> None:
    """Write the data lists of a run into its folder, unless they are up to date."""
    for name, content in run.lists.items():
        _write_if_changed(out / "runs" / run.name / LISTS / f"{name}.json", json.dumps(content, indent=1) + "\n")


def check_options(run: Run, source: str) -> None:
    """Refuse options that a command's configs do not have, before anything is computed.

    Args:
        run: the run as planned.
        source: the file that sets them.

    Raises:
        InputError: names the option, the config and the most similar option.
    """
    for command in run.commands:
        known = {"args_file"}.union(*(_options_of(command.bundle, config) for config in command.configs))
        if unknown := [name for name in command.options if name not in known]:
            said = f"{source}: {unknown[0]}, which {run.name} would get, is not an option of {command.configs[0]} of "
            raise InputError(f"{said}{command.bundle}. {did_you_mean(unknown[0], known)}".rstrip())


@cache
def _options_of(bundle: str, config: str) -> frozenset[str]:
    """Return the top-level entries of a config above the line that ends its options."""
    content = yaml.safe_load((BUNDLES / bundle / config).read_text(encoding="utf-8"))
    names = list(content)
    return frozenset(names[: names.index("components")] if "components" in names else names)


def check_settings(run: Run, out: Path) -> None:
    """Compare the settings of an existing run with those it would have now.

    Args:
        run: the run as planned.
        out: folder of all runs.

    Raises:
        InputError: they differ; names them with both values. Or the file is damaged.
    """
    path = out / "runs" / run.name / SETTINGS
    if not path.exists():
        return
    saved = read_json(path, "the run then continues with the settings of now")
    saved.pop("precision", None)
    before, now = _flat(saved), _flat(run.settings)
    changed = [key for key in sorted({**before, **now}) if before.get(key) != now.get(key)]
    if changed:
        changes = "; ".join(f"{key} was {before.get(key)!r}, now {now.get(key)!r}" for key in changed[:5])
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise InputError(
            f"{path.parent} was made with other settings: {changes}{more}. Undo the change, remove the folder to "
            "repeat the run, or choose another output folder."
        )


def mark_of(folder: Path, command: str) -> Path:
    """Return the file that says that a command of a run has succeeded.

    Args:
        folder: folder of the run.
        command: name of the command.
    """
    return folder / f".{command}.done"


def has_ended(folder: Path, command: str) -> bool:
    """Return whether a command of a run has succeeded, see `mark_of`."""
    return mark_of(folder, command).exists()


def what_failed(folder: Path, command: Mapping[str, Any]) -> str | None:
    """Return what a command that has ended could not do, and how it is tried again; None if nothing is missing.

    Args:
        folder: folder of the run.
        command: its entry in the plan.
    """
    table = folder / Path(command["result"]).parent / "failed.csv"
    if not has_ended(folder, command["name"]) or not table.is_file():
        return None
    with open(table, newline="", encoding="utf-8") as file:
        scans = len({row.get("scan") for row in csv.DictReader(file)})
    files = [mark_of(folder, command["name"])]
    if command["name"] != "infer":  # the engine looks for the results, and for the table of all runs
        files.append(folder / command["result"])
        files += [path for path in (folder.parents[1] / "results" / "results.md",) if path.exists()]
    return (
        f"{folder.name}: {command['name']} could not do all of {counted(scans, 'scan')}, see {table}. To try these "
        f"again, remove {' and '.join(map(str, files))}, and start the workflow again."
    )


def spent(folder: Path) -> float:
    """Return the seconds of all attempts of a run, of which its jobs keep account."""
    try:
        return float(json.loads((folder / SPENT).read_text()))
    except (FileNotFoundError, ValueError):
        return 0.0


def read_json(path: Path, then: str) -> Any:
    """Read a JSON file that a workflow has written.

    Args:
        path: the file.
        then: what happens after the user has removed it, for the message.

    Raises:
        InputError: the file is empty or truncated, as after a full disk or a power cut.
        FileNotFoundError: the file does not exist.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(
            f"{path} is not valid JSON ({error}; {path.stat().st_size} bytes), probably after a full disk or a power "
            f"cut. Remove it: {then}."
        ) from None


def first_difference(before: Mapping[str, Any], after: Mapping[str, Any], *, resized: str) -> tuple[int, str] | None:
    """Compare names and sizes of data with those that a folder was made with.

    Args:
        before, after: name to size or sizes.
        resized: what is said of a name whose sizes differ.

    Returns:
        How many names differ, and the first of them with how it does; None if none differs.
    """
    changed = [name for name in sorted({**before, **after}) if before.get(name) != after.get(name)]
    if not changed:
        return None
    name = changed[0]
    return len(changed), f"{name} {'is new' if name not in before else 'is gone' if name not in after else resized}"


def _write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


def _json_value(value: Any) -> Any:
    """Return the value for JSON: paths as text with forward slashes, elsewhere on this machine only the name."""
    return (value.name if value.is_absolute() else value.as_posix()) if isinstance(value, Path) else value


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
