# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Run a study, or what is left of it.

    python -m evidence.run demo                                         synthetic patients, minutes
    python -m evidence.run openkbp --data DIR --out OUT                 a data set in MSD form
    python -m evidence.run openkbp --data DIR --out OUT --list          what is done, running and left

One process does one run after another. Start as many on one OUT as there are GPUs, on any machines that see it: each run is
done by one of them. Killed and started again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bundles.common.errors import InputError
from bundles.common.files import write_text
from demo.run import Stopped, available_cores, raise_on_signals

from .report import write_report
from .results.mlflow_store import log_missing, log_run, open_store, tracking_store
from .results.records import DONE, OUTLINE
from .runs import run_claim as claims
from .runs.execution import RunFailed, carry_out, check_settings, finish
from .runs.plan import Plan, Planner
from .runs.planning import planner_of
from .runs.progress import overview
from .runs.run_claim import ClaimLost
from .study.study import read_study
from .study.study_data import prepare_folder

OUT = Path(__file__).resolve().parent / "out"
WAIT = 5.0  # seconds between looks at what other processes do
PARTS = ("curve", "ablation")


def plan_of(planner: Planner, parts: Sequence[str], *, beside: Sequence[str] = ()) -> Plan:
    """The runs of parts of a study, each once.

    Args:
        planner: of the study.
        parts: names of the parts whose runs are wanted.
        beside: of further parts that the report draws (`Plan.beside`).
    """
    runs, others = ({run.name: run for part in each for run in getattr(planner, part)()} for each in (parts, beside))
    rest = tuple(run for name, run in others.items() if name not in runs)
    return Plan(study=planner.study, runs=tuple(runs.values()), outline=planner.outline(), beside=rest)


def run_plan(
    plan: Plan,
    *,
    out: Path,
    threads: int,
    tracking_uri: str,
    say: Callable[[str], None],
    report: Callable[[], None] = lambda: None,
    wait: bool = True,
) -> bool:
    """Carry out the runs that nobody has done or does, until none is left for this process.

    Args:
        plan: the runs.
        out: folder of the study.
        threads: of each command.
        tracking_uri: MLflow's store.
        say: gets progress lines.
        report: called after each run.
        wait: for runs of other processes that others need; False: leave when nothing is free at the moment.

    Returns:
        Whether all runs are done.

    Raises:
        InputError: a run of the plan, or one that would be drawn beside it, was made by other settings.
        RunFailed: if a command fails.
        Stopped: on Ctrl-C or a signal to end.
    """
    waiting = False
    while True:
        for run in (*plan.runs, *plan.beside):  # every time: another process may have begun since, by another edit
            check_settings(run, out)
        left = [run for run in plan.runs if not (out / "runs" / run.name / DONE).exists()]
        ready = [run for run in left if all((out / "runs" / name / DONE).exists() for name in run.needs)]
        held = None
        for run in ready:
            if held := claims.take(out / "runs" / run.name):
                break
        if held is None:
            blocked = [run for run in left if run not in ready]
            if not blocked or not wait:
                return not left
            if not waiting:
                say(f"{len(blocked)} runs wait for {len(ready)} that other processes are doing")
            waiting = True
            time.sleep(WAIT)
            continue
        waiting = False
        try:
            check_settings(run, out)  # between the look and the claim
            if (out / "runs" / run.name / DONE).exists():  # finished between the look and the claim
                continue
            say(f"{run.name} ...")
            done = carry_out(run, out=out, claim=held, threads=threads, say=say)
            log_run(run.name, done, outline=plan.outline, out=out, uri=tracking_uri)
            finish(run, done, out=out, claim=held)
        except ClaimLost:
            say(f"{run.name}: another process took it over")
            continue
        finally:
            held.release()
        say(f"{run.name} done in {done['seconds'] / 60:.1f} min. {overview(plan, out, names=False)}")
        report()


def arguments_of(parser: argparse.ArgumentParser) -> None:
    """Options that running and searching share."""
    parser.add_argument("study", help="name of a study in evidence/studies, or the path of a YAML file")
    parser.add_argument("--data", type=Path, help="data set in MSD form with labels: folder or list")
    parser.add_argument("--out", type=Path, help="folder for all that is made (evidence/out/STUDY)")
    parser.add_argument("--threads", type=_positive, default=available_cores(), help="threads of each run (all cores)")
    parser.add_argument("--tracking_uri", help="MLflow's store (sqlite:///OUT/mlruns.db)")
    parser.add_argument("--list", action="store_true", help="print what is done, running and left, and run nothing")
    parser.add_argument("--no_wait", action="store_true", help="leave as soon as no run is free, rather than wait")


def call(action: Callable[[], int]) -> int:
    """Do something from the command line: signals end it in order (but those that are ignored), errors of the user are one message."""
    raise_on_signals()
    try:
        return action()
    except InputError as error:
        print(f"Stopped: {error}", file=sys.stderr)
        return 1
    except RunFailed as error:
        print(error, file=sys.stderr)
        return 1
    except Stopped as stop:
        print("Stopped. The same command goes on from here.", file=sys.stderr)
        return stop.status


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


def say(text: str) -> None:
    """Print a progress line with the time of day."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a study from the command line, and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m evidence.run", description=__doc__.partition("\n")[0])
    arguments_of(parser)
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all", help="few-label curve, ablation, or both")
    given = parser.parse_args(arguments)

    def action() -> int:
        study = read_study(given.study)
        out = (given.out or OUT / study.name).resolve()
        prepare_folder(out, study.name)
        parts = [part for part in PARTS if given.part == part or (given.part == "all" and getattr(study, part))]
        drawn = [part for part in PARTS if getattr(study, part)]  # one report, whatever is run now
        plan = plan_of(planner_of(study, data=given.data and given.data.resolve(), out=out), parts, beside=drawn)
        print(overview(plan, out, names=given.list), flush=True)
        if given.list:
            return 0

        uri = given.tracking_uri or tracking_store(out)
        open_store(uri, out=out)  # a wrong address shall not cost a run
        write_text(out / OUTLINE, json.dumps(plan.outline, indent=1) + "\n")
        log_missing(out, outline=plan.outline, uri=uri, say=say)
        finished = run_plan(
            plan,
            out=out,
            threads=given.threads,
            tracking_uri=uri,
            say=say,
            report=lambda: write_report(out),
            wait=not given.no_wait,
        )
        print(write_report(out))
        if not finished:
            print(overview(plan, out, names=False))
        return 0

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of this process: it only waits, counts and draws
    return call(action)


if __name__ == "__main__":
    sys.exit(main())
