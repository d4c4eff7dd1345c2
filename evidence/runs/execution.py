# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Carry out one run: its commands one after another in processes of their own, and ``done.json`` at the end.

A command that has ended well leaves a mark and is not run again; one that was interrupted goes on (``--resume true``).
``settings.json``, written at the start, holds what the run is made by: the same name with other settings is refused.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bundles.common.data.case_names import case_names
from bundles.common.data.data_list import first_file
from bundles.common.errors import InputError
from bundles.common.files import write_text

from ..results.encoder_figures import figures_of
from ..results.records import DONE, read_scores
from ..study.study import BUNDLES
from ..study.study_data import read_json
from .plan import Command, Run, words_of, write_lists
from .run_claim import Claim

SETTINGS, SPENT, LOG = "settings.json", ".spent.json", "log.txt"
BEAT, SAY = 15.0, 30.0  # seconds between signs of life, and between progress lines
PATIENCE = 60.0  # seconds that a command may take to write its last state
STEP = re.compile(r"step (\d+)/(\d+)  loss (\S+).*?(?:left (\S+))?\s*$", re.MULTILINE)


class RunFailed(Exception):
    """A command ended with an error."""


def check_settings(run: Run, out: Path) -> None:
    """Compare what a run was made by, or was begun with, with what it would be made by now.

    Raises:
        InputError: names each setting that differs, with both values; or both precisions. A run of an earlier version, which did not keep its
            precision, is taken as it is.
    """
    path = out / "runs" / run.name / SETTINGS
    if not path.exists():
        return
    kept = read_json(path, "the run then goes on by the study as it is now")
    precision = kept.pop("precision", run.precision)
    was, now = _flat(kept), _flat(run.settings_of_study)
    changed = [key for key in sorted({**was, **now}) if was.get(key) != now.get(key)]
    if changed:
        said = "; ".join(f"{key} was {was.get(key)!r}, now {now.get(key)!r}" for key in changed[:5])
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise InputError(
            f"{path.parent} was made by other settings: {said}{more}. Take the change back, remove the folder to run it "
            "again, or choose another --out."
        )
    if precision != run.precision:
        raise InputError(
            f"{path.parent} was computed in {_listed(precision)}; this process would compute in {_listed(run.precision)}. Runs that are compared must "
            "not differ in it. Start all processes on the same kind of GPU (CUDA_VISIBLE_DEVICES), or begin in another --out with 'amp: false', or "
            "'amp: true' and one 'amp_type', in pretraining, finetuning and evaluation of the study."
        )


def carry_out(run: Run, *, out: Path, claim: Claim, threads: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Run what is not done yet of a claimed run.

    Args:
        run: of the plan.
        out: folder of the study.
        claim: held on the run.
        threads: for the commands' arithmetic.
        say: gets progress lines.

    Returns:
        What is to be written as ``done.json`` (`finish`).

    Raises:
        RunFailed: if a command fails.
        ClaimLost: if another process took the run over.
    """
    folder = out / "runs" / run.name
    write_text(folder / SETTINGS, json.dumps(run.settings, indent=1) + "\n")
    for command in run.commands:
        mark = folder / f".{command.name}.done"
        if not mark.exists():
            write_lists(run, out)  # an attempt before may have been on a machine that has the data elsewhere
            _call(command, folder, out=out, claim=claim, threads=threads, say=say)
            if not (folder / command.result).is_file():
                raise RunFailed(f"{run.name}: {command.name} ended well, but did not write {folder / command.result}")
            write_text(mark, "")
    done = {"settings": run.settings, "seconds": round(_spent(folder), 1)}
    if run.kind == "pretraining":
        done["figures"] = figures_of(folder, run.settings)
    if run.kind == "finetuning":
        done["scores"] = _named_as_planned(read_scores(folder / "evaluation" / "scores.csv"), run)
    return done


def finish(run: Run, done: Mapping[str, Any], *, out: Path, claim: Claim) -> None:
    """Write ``done.json``, and remove what only an unfinished run needs; the trained weights stay."""
    claim.beat()
    folder = out / "runs" / run.name
    write_text(folder / DONE, json.dumps(done, indent=1) + "\n")
    for name in ("last.pt", "best.pt"):
        (folder / "train" / "models" / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "evaluation" / "cases", ignore_errors=True)


def _call(command: Command, folder: Path, *, out: Path, claim: Claim, threads: int, say: Callable[[str], None]) -> None:
    words = words_of(command, out, folder)
    spent, began = _spent(folder), time.monotonic()
    log = folder / LOG
    with open(log, "ab") as written, open(log, errors="replace") as read:
        written.write(f"$ cd {command.bundle}; python {shlex.join(words)}\n".encode())
        written.flush()
        read.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=BUNDLES / command.bundle,
            env=_environment(threads),
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C comes to this process alone, which ends the command in order
            preexec_fn=_end_with_parent,
        )
        try:
            beat = said = began
            step: re.Match | None = None
            while (status := _wait(process, 0.3)) is None:
                now = time.monotonic()
                step = [step, *STEP.finditer(read.read())][-1]
                if now - beat > BEAT:
                    beat = now
                    claim.beat()
                    write_text(folder / SPENT, json.dumps(spent + now - began))
                if now - said > SAY:
                    said = now
                    at = f"step {step[1]}/{step[2]}, loss {step[3]}, {step[4]} left" if step else f"{now - began:.0f} s"
                    say(f"{folder.name}: {command.name}, {at}")
        finally:
            _end(process)
            write_text(folder / SPENT, json.dumps(spent + time.monotonic() - began))
    if status:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise RunFailed(f"{tail}\n\n{folder.name}: {command.name} failed with status {status}. The whole log: {log}")


def _named_as_planned(rows: list[dict[str, Any]], run: Run) -> list[dict[str, Any]]:
    """Scores under the study's names of cases: the evaluation names those of its own list apart, the study all."""
    scored = next(content["test"] for content in run.lists.values() if "test" in content)
    files = [first_file(case) for case in scored]
    own = case_names(files)
    planned = {own[file]: name for file, name in zip(files, run.cases["scored"], strict=True)}
    return [{**row, "case": planned[row["case"]]} for row in rows]


def _listed(precision: Mapping[str, str]) -> str:
    return ", ".join(f"{kind} ({command})" for command, kind in sorted(precision.items()))


def _spent(folder: Path) -> float:
    try:
        return float(json.loads((folder / SPENT).read_text()))
    except (FileNotFoundError, ValueError):
        return 0.0


def _wait(process: subprocess.Popen, seconds: float) -> int | None:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def _end(process: subprocess.Popen) -> None:
    """Let a command write its last state and end; with all its processes, and by force if it does not."""
    if process.poll() is not None:
        return
    for number, patience in ((signal.SIGTERM, PATIENCE), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        if _wait(process, patience) is not None:
            return


def _end_with_parent() -> None:
    """In the command's process: die with the runner, so that nobody else writes there when the run is taken over."""
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


def _environment(threads: int) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return environment | dict.fromkeys(names, str(threads)) | {"PYTHONUNBUFFERED": "1"}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
