# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Run the demo: synthetic patients, pre-training, fine-tuning with controls, scores, a segmentation and a report.

    python -m demo.run

Each stage is one command that also runs alone (``python -m monai.bundle run ...``); the report lists the commands.
Finished stages are not repeated, and an interrupted demo continues where it stopped.

It does not run on Snakemake, as workflow/ does: a newcomer sees one bar with step, loss and time left, and installs nothing
more.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console

from bundles.common.errors import InputError, report_input_errors
from tools.arguments import positive
from tools.child_process import Stopped, available_cores, raise_on_signals, run_python

from .screen import Screen
from .stage import RECORDS, Attempt, Records, Stage
from .stages import ROOT, stages
from .summary import print_summary

# Files and folders that the demo makes; --fresh removes them.
OWN_OUTPUTS = (
    *("data", "swin_unetr_pretrain", "swin_unetr_btcv_seg", "from_scratch", "shuffled_labels", "segmentation"),
    *("logs", "mlruns", "mlruns.db", "report.html"),
)


class StageFailed(Exception):
    """A stage's command ended with an error."""

    def __init__(self, stage: Stage, log: Path, status: int) -> None:
        self.stage, self.log, self.status = stage, log, status


@contextmanager
def alone_in(out: Path) -> Iterator[int]:
    """Lock the demo's folder against other runners, and end a stage that a killed runner left behind.

    Yields:
        A file descriptor that each stage's process inherits: its lock is held as long as one of them lives.

    Raises:
        InputError: if another runner uses the folder.
    """
    folder = out / RECORDS
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".runner.lock", "a") as runner, open(folder / ".stage.lock", "a+") as stage:
        try:
            fcntl.flock(runner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"A demo is already running in {out}. Wait for it, or stop it.") from None
        for _ in range(50):
            try:
                fcntl.flock(stage, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:  # still locked, so the process whose id is in the file is alive
                stage.seek(0)
                with suppress(ValueError, ProcessLookupError):
                    os.killpg(int(stage.read()), signal.SIGKILL)
                time.sleep(0.1)
        else:
            raise InputError(f"A stage of an earlier run is still running in {out}. Try again when it has ended.")
        yield stage.fileno()


def run_stage(attempt: Attempt, records: Records, screen: Screen, *, threads: int, lock: int) -> None:
    """Run the command of a stage, write its output to its log, and record its success.

    Args:
        attempt: the stage that has begun.
        records: gets the time spent, every few seconds.
        screen: shows the progress.
        threads: number of threads of the command.
        lock: file descriptor of `alone_in`; gets the process id of the command.

    Raises:
        StageFailed: if the command fails.
    """
    stage, began = attempt.stage, time.monotonic()
    log = records.out / "logs" / f"{stage.name}.log"
    log.parent.mkdir(exist_ok=True)
    if not attempt.resumed:
        log.unlink(missing_ok=True)
    screen.begin(stage, attempt.resumed)
    os.ftruncate(lock, 0)
    noted, status = began, None

    def on_poll(output: str) -> None:
        nonlocal noted
        screen.update(output)
        if time.monotonic() - noted > 5:
            noted = time.monotonic()
            records.note(attempt, noted - began)

    try:
        status = run_python(
            attempt.words,
            cwd=ROOT,
            log=log,
            threads=threads,
            on_poll=on_poll,
            on_start=lambda pid: os.write(lock, str(pid).encode()),
            pass_fds=[lock],
        )
    finally:
        if status is None:
            records.note(attempt, time.monotonic() - began)
    if status:
        raise StageFailed(stage, log, status)
    records.finish(attempt, time.monotonic() - began)
    screen.end()


def start_over(out: Path) -> None:
    """Remove what the demo made in its folder, and nothing else."""
    for path in [*(out / name for name in OWN_OUTPUTS), *(out / RECORDS).glob("*.json")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def check_folder(out: Path) -> None:
    """Refuse a folder with other content, because the demo empties folders with common names such as ``data``.

    Raises:
        InputError: if the folder is not empty and no demo ran in it.
    """
    if out.is_dir() and any(out.iterdir()) and not (out / RECORDS).is_dir():
        raise InputError(f"{out} contains files that the demo did not make. Pass an empty or new folder as --out.")


def run(out: Path, plan: Sequence[Stage], *, threads: int, lock: int, console: Console) -> None:
    """Run the stages that are not finished, and those that depend on them.

    Args:
        out: the demo's folder.
        plan: all stages, in order.
        threads: number of threads of each stage.
        lock: file descriptor of `alone_in`.
        console: where to print.

    Raises:
        StageFailed: if a stage fails.
        Stopped: on Ctrl-C or another stop signal.
    """
    records = Records(out)
    stale: set[str] = set()
    for stage in plan:
        if not records.is_done(stage) or stale.intersection(stage.needs):
            stale.add(stage.name)
    todo = [stage for stage in plan if stage.name in stale]
    if reused := [stage.title for stage in plan if stage.name not in stale]:
        console.print(f"Already finished, skipped: {', '.join(reused)}.", soft_wrap=True)
    if not todo:
        return
    console.print(f"Running {len(todo)} of {len(plan)} stages with {threads} threads in {out}", soft_wrap=True)
    screen = Screen(todo, console)
    with screen.bar:
        for stage in todo:
            run_stage(records.begin(stage), records, screen, threads=threads, lock=lock)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo from the command line, and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m demo.run", description="Run the demo on synthetic patients.")
    parser.add_argument("--out", type=Path, default=ROOT / "demo/out", help="output folder (default: demo/out)")
    parser.add_argument("--fresh", action="store_true", help="remove the results of an earlier demo and start over")
    parser.add_argument("--pretrain_steps", type=positive, help="pre-training steps (default: the cpu preset's)")
    parser.add_argument("--finetune_steps", type=positive, help="steps of each fine-tuning (default: the cpu preset's)")
    parser.add_argument("--threads", type=positive, default=available_cores(), help="threads (default: all cores)")
    options = parser.parse_args(arguments)

    console = Console()
    out = options.out.resolve()
    raise_on_signals()
    try:
        check_folder(out)
        with alone_in(out) as lock:
            if options.fresh:
                start_over(out)
            plan = stages(out, pretrain_steps=options.pretrain_steps, finetune_steps=options.finetune_steps)
            run(out, plan, threads=options.threads, lock=lock, console=console)
            print_summary(out, console)
    except InputError as error:
        console.print(f"Stopped: {error}", markup=False, highlight=False, soft_wrap=True)
        return 1
    except StageFailed as failure:
        lines = failure.log.read_text(errors="replace").splitlines()[-15:]
        console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
        message = f"\n{failure.stage.title} failed with status {failure.status}. Full log: {failure.log}"
        console.print(message, markup=False, highlight=False, soft_wrap=True)
        # Ended by a signal: the status is negative here and 128 + signal in a shell.
        return failure.status if failure.status > 0 else 128 - failure.status
    except Stopped as stop:
        console.print("Stopped. `make demo` continues from here.")
        return stop.status
    return 0


if __name__ == "__main__":
    report_input_errors()
    sys.exit(main())
