# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Carry out one command of a planned run, as a job of the workflow; the rules in workflow/rules start it.

    python -m workflow.job --out OUT RUN COMMAND -- WORDS

WORDS follow ``python`` and are the bundle's command line. Its output goes to ``runs/RUN/log.txt``; every half minute one
line says how far it is. A command that has succeeded leaves a mark file and does not run again; an interrupted one
continues (``--resume true``). The job ends with the engine that started it, so that two never write into one folder.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

from bundles.common.errors import InputError, report_input_errors
from bundles.common.files import folder_lock, write_text
from bundles.common.parent_process import end_with_parent
from tools.bundle_runs import BUNDLES, SETTINGS, SPENT, has_ended, mark_of, read_plan, spent, what_failed
from tools.child_process import Stopped, raise_on_signals, run_python

from .gpu import one_gpu
from .precision import check_precision, precision_of_run

LOG, LOCK = "log.txt", ".job.lock"
NOTE_SECONDS, SAY_SECONDS = 15.0, 30.0  # between notes of the time spent, and between lines of progress
PATIENCE = 60.0  # seconds that a stopped command may take to save its state
STEP = re.compile(r"step (\d+)/(\d+)  loss (\S+).*?(?:left (\S+))?\s*$", re.MULTILINE)


class JobFailed(Exception):
    """A command ended with an error."""


def say(text: str) -> None:
    """Print a line of progress with the time of day."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


def carry_out(
    out: Path,
    run: str,
    command: str,
    words: Sequence[str],
    *,
    threads: int,
    gpu: bool,
    say: Callable[[str], None] = say,
) -> None:
    """Run one command of a planned run, unless it has succeeded before.

    Args:
        out: folder of all runs.
        run: name of the run.
        command: name of the command.
        words: what follows ``python``.
        threads: number of threads.
        gpu: take one GPU of this machine that no other job has; False: those that the environment shows.
        say: gets lines of progress.

    Raises:
        InputError: the run was made with other settings or in another precision.
        JobFailed: the command failed.
        Stopped: on Ctrl-C or another stop signal.
    """
    plan, folder = read_plan(out), out / "runs" / run
    planned = plan["runs"][run]
    this = next(each for each in planned["commands"] if each["name"] == command)
    with _alone(folder, say):
        result = folder / this["result"]
        if has_ended(folder, command) and result.is_file():
            return
        precision = precision_of_run(planned, out)
        check_precision(run, planned["kind"], precision, out)
        write_text(folder / SETTINGS, json.dumps({**planned["settings"], "precision": precision}, indent=1) + "\n")
        say(f"{run}: {command} ...")
        with one_gpu() if gpu else nullcontext():
            status = _run(run, command, words, this["bundle"], folder, threads=threads, say=say)
        log = folder / LOG
        if status not in this["statuses"]:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise JobFailed(f"{tail}\n\n{run}: {command} failed with status {status}. Full log: {log}")
        if not result.is_file():
            raise JobFailed(f"{run}: {command} succeeded but did not write {result}. Full log: {log}")
        write_text(
            mark_of(folder, command), ""
        )  # first: a job that is killed here is done, and needs nothing of what is removed
        if this is planned["commands"][-1]:
            _clear(folder)
        if failed := what_failed(folder, this):
            say(failed)


def _clear(folder: Path) -> None:
    """Remove what only an unfinished run needs. The trained weights stay, and scores if some may be tried again."""
    for name in ("last.pt", "best.pt"):
        (folder / "train" / "models" / name).unlink(missing_ok=True)
    if not (folder / "evaluation" / "failed.csv").is_file():
        shutil.rmtree(folder / "evaluation" / "cases", ignore_errors=True)


@contextmanager
def _alone(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Wait until no other job works on this run: one that an engine left behind on a cluster may still run there."""
    with ExitStack() as held:
        try:
            held.enter_context(folder_lock(folder / LOCK, wait=False))
        except BlockingIOError:
            say(f"{folder.name}: another job works on it; waiting for its end")
            held.enter_context(folder_lock(folder / LOCK))
        yield


def _run(
    run: str, command: str, words: Sequence[str], bundle: str, folder: Path, *, threads: int, say: Callable[[str], None]
) -> int:
    """Run a command, say how far it is, and record the time spent."""
    before, began = spent(folder), time.monotonic()
    noted = said = began
    step: re.Match | None = None

    def on_poll(output: str) -> None:
        nonlocal noted, said, step
        now = time.monotonic()
        step = [step, *STEP.finditer(output)][-1]
        if now - noted > NOTE_SECONDS:
            noted = now
            write_text(folder / SPENT, json.dumps(before + now - began))
        if now - said > SAY_SECONDS:
            said = now
            at = f"step {step[1]}/{step[2]}, loss {step[3]}, {step[4]} left" if step else f"{now - began:.0f} s"
            say(f"{run}: {command}, {at}")

    try:
        return run_python(
            words,
            cwd=BUNDLES / bundle,
            log=folder / LOG,
            threads=threads,
            on_poll=on_poll,
            title=f"cd {bundle}; ",
            patience=PATIENCE,
            die_with_parent=True,
        )
    finally:
        write_text(folder / SPENT, json.dumps(before + time.monotonic() - began))


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out a command from the command line, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m workflow.job", description=__doc__.partition("\n")[0])
    parser.add_argument("run", help="name of the run")
    parser.add_argument("command", help="name of the command")
    parser.add_argument("words", nargs=argparse.REMAINDER, help="what follows python")
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--threads", type=int, default=1, help="threads of the command")
    parser.add_argument("--gpu", action="store_true", help="take a GPU of this machine that no other job has")
    options = parser.parse_args(arguments)
    words = options.words[1:] if options.words[:1] == ["--"] else options.words
    end_with_parent()
    raise_on_signals()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # this process mostly waits
    try:
        carry_out(options.out.resolve(), options.run, options.command, words, threads=options.threads, gpu=options.gpu)
    except InputError as error:
        print(f"Stopped: {error}", file=sys.stderr)
        return 1
    except JobFailed as error:
        print(error, file=sys.stderr)
        return 1
    except Stopped as stop:
        return stop.status
    return 0


if __name__ == "__main__":
    report_input_errors()
    sys.exit(main())
