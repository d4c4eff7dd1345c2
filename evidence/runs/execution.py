# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Carry out one run: its commands as child processes, one after another, and ``done.json`` at the end.

A command that succeeds leaves a mark file and does not run again; an interrupted one continues (``--resume true``).
``settings.json`` is written at the start, so that a run of the same name with other settings is refused.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bundles.common.data.case_names import case_names
from bundles.common.data.data_list import first_file
from bundles.common.errors import InputError
from bundles.common.files import write_text
from bundles.segmentation.results.scores_table import read_scores
from tools.child_process import run_python

from ..results.carried_labels import compare_with_truth, scores_of_masks
from ..results.encoder_figures import figures_of
from ..results.records import DONE, METRICS
from ..study.study import BUNDLES
from ..study.study_data import read_json
from .plan import Command, Run, words_of, write_lists
from .run_claim import Claim

SETTINGS, SPENT, LOG = "settings.json", ".spent.json", "log.txt"
BEAT_SECONDS, SAY_SECONDS = 15.0, 30.0  # between touches of the claim, and between progress lines
PATIENCE = 60.0  # seconds that a stopped command may take to save its state
STEP = re.compile(r"step (\d+)/(\d+)  loss (\S+).*?(?:left (\S+))?\s*$", re.MULTILINE)


class RunFailed(Exception):
    """A command ended with an error."""


def check_settings(run: Run, out: Path) -> None:
    """Compare the settings of an existing run with those it would have now.

    A run of an earlier version, which did not record its precision, is accepted with any precision.

    Args:
        run: the run as planned.
        out: folder of the study.

    Raises:
        InputError: settings or precision differ; names them with both values.
    """
    path = out / "runs" / run.name / SETTINGS
    if not path.exists():
        return
    saved = read_json(path, "the run then continues with the settings of the study as it is now")
    precision = saved.pop("precision", run.precision)
    before, now = _flat(saved), _flat(run.settings_of_study)
    changed = [key for key in sorted({**before, **now}) if before.get(key) != now.get(key)]
    if changed:
        changes = "; ".join(f"{key} was {before.get(key)!r}, now {now.get(key)!r}" for key in changed[:5])
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise InputError(
            f"{path.parent} was made with other settings: {changes}{more}. Undo the change, remove the folder to "
            "repeat the run, or pass another --out."
        )
    if precision != run.precision:
        raise InputError(
            f"{path.parent} was computed in {_listed(precision)}, but this process would compute in "
            f"{_listed(run.precision)}. Compared runs must have the same precision. Start all processes on the same "
            "kind of GPU (CUDA_VISIBLE_DEVICES). Or start again in another --out, with 'amp: false', or 'amp: true' "
            "and one 'amp_type', in pretraining, finetuning and evaluation of the study."
        )


def carry_out(run: Run, *, out: Path, claim: Claim, threads: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Run the commands of a claimed run that are not done yet.

    Args:
        run: a run of the plan.
        out: folder of the study.
        claim: this process's claim on the run.
        threads: number of threads of each command.
        say: gets progress lines.

    Returns:
        The content of ``done.json``, which `finish` writes.

    Raises:
        RunFailed: if a command fails.
        ClaimLost: if another process took over the run.
    """
    folder = out / "runs" / run.name
    write_text(folder / SETTINGS, json.dumps(run.settings, indent=1) + "\n")
    for command in run.commands:
        mark = folder / f".{command.name}.done"
        if not mark.exists():
            write_lists(run, out)
            _run_command(command, folder, out=out, claim=claim, threads=threads, say=say)
            if not (folder / command.result).is_file():
                raise RunFailed(f"{run.name}: {command.name} succeeded but did not write {folder / command.result}")
            write_text(mark, "")
    done = {"settings": run.settings, "seconds": round(_spent(folder), 1)}
    if run.kind == "pretraining":
        done["figures"] = figures_of(folder, run.settings)
    if run.kind == "propagation":
        done["carried"] = compare_with_truth(run, folder)
    if run.kind == "finetuning":
        table = folder / "evaluation" / "scores.csv"
        done["scores"] = _planned_scores(read_scores(table), run) if table.is_file() else scores_of_masks(run, folder)
    return done


def finish(run: Run, done: Mapping[str, Any], *, out: Path, claim: Claim) -> None:
    """Write ``done.json`` and remove what only an unfinished run needs. The trained weights stay."""
    claim.beat()
    folder = out / "runs" / run.name
    write_text(folder / DONE, json.dumps(done, indent=1) + "\n")
    for name in ("last.pt", "best.pt"):
        (folder / "train" / "models" / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "evaluation" / "cases", ignore_errors=True)


def _run_command(
    command: Command, folder: Path, *, out: Path, claim: Claim, threads: int, say: Callable[[str], None]
) -> None:
    """Run a command, touch the claim and report progress meanwhile, and record the time spent."""
    spent, began = _spent(folder), time.monotonic()
    beat = reported = began
    step: re.Match | None = None
    log = folder / LOG

    def on_poll(output: str) -> None:
        nonlocal beat, reported, step
        now = time.monotonic()
        step = [step, *STEP.finditer(output)][-1]
        if now - beat > BEAT_SECONDS:
            beat = now
            claim.beat()
            write_text(folder / SPENT, json.dumps(spent + now - began))
        if now - reported > SAY_SECONDS:
            reported = now
            at = f"step {step[1]}/{step[2]}, loss {step[3]}, {step[4]} left" if step else f"{now - began:.0f} s"
            say(f"{folder.name}: {command.name}, {at}")

    try:
        status = run_python(
            words_of(command, out, folder),
            cwd=BUNDLES / command.bundle,
            log=log,
            threads=threads,
            on_poll=on_poll,
            title=f"cd {command.bundle}; ",
            patience=PATIENCE,
            die_with_parent=True,  # so that nobody else writes here when the run is taken over
        )
    finally:
        write_text(folder / SPENT, json.dumps(spent + time.monotonic() - began))
    if status not in command.statuses:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise RunFailed(f"{tail}\n\n{folder.name}: {command.name} failed with status {status}. Full log: {log}")


def _planned_scores(rows: list[dict[str, Any]], run: Run) -> list[dict[str, Any]]:
    """Scores for ``done.json``: None instead of NaN, and the study's names of the cases.

    The evaluation names the cases so that they are unique in its own list, the study so that they are unique in all.
    """
    scored = next(content["test"] for content in run.lists.values() if "test" in content)
    files = [first_file(case) for case in scored]
    names = case_names(files)
    planned = {names[file]: name for file, name in zip(files, run.cases["scored"], strict=True)}
    return [
        {**row, "case": planned[row["case"]]}
        | {metric: None if math.isnan(row[metric]) else row[metric] for metric in METRICS}
        for row in rows
    ]


def _listed(precision: Mapping[str, str]) -> str:
    return ", ".join(f"{kind} ({command})" for command, kind in sorted(precision.items()))


def _spent(folder: Path) -> float:
    try:
        return float(json.loads((folder / SPENT).read_text()))
    except (FileNotFoundError, ValueError):
        return 0.0


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
