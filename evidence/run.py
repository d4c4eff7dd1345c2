# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Run a study, or continue it.

    python -m evidence.run demo                                         synthetic patients, takes minutes
    python -m evidence.run openkbp --data DIR --out OUT                 a data set in MSD form
    python -m evidence.run openkbp --data DIR --out OUT --list          show what is done, running and left

One process does one run after another. Start as many processes on one OUT as there are GPUs, on any machines that share
it: each run is done by one of them. An interrupted study continues where it stopped when the command is repeated.
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
from tools.child_process import Stopped, available_cores, raise_on_signals

from .report import write_report
from .results.mlflow_store import log_missing, log_report, log_run, open_store, tracking_store
from .results.records import DONE, OUTLINE
from .runs import run_claim as claims
from .runs.execution import RunFailed, carry_out, check_settings, finish
from .runs.plan import Plan, Planner
from .runs.planning import planner_of
from .runs.progress import overview
from .runs.run_claim import ClaimLost
from .study.reading import read_study
from .study.study import CONTROL
from .study.study_data import prepare_folder

OUT = Path(__file__).resolve().parent / "out"
WAIT = 5.0  # seconds between checks whether other processes have finished
PARTS = ("curve", "headroom", "ablation")


def plan_of(planner: Planner, parts: Sequence[str], *, beside: Sequence[str] = ()) -> Plan:
    """Return the plan of parts of a study, with each run once.

    Args:
        planner: planner of the study.
        parts: names of the parts to run.
        beside: names of further parts that the report covers (`Plan.beside`).
    """
    chains = planner.chains() if "headroom" in parts else {}
    runs, others = ({run.name: run for part in each for run in getattr(planner, part)()} for each in (parts, beside))
    rest = tuple(run for name, run in others.items() if name not in runs)
    growing = tuple(f"{CONTROL} with n = {n}, {chain.next} steps" for n, chain in chains.items() if chain.next)
    return Plan(
        study=planner.study,
        runs=tuple(runs.values()),
        outline=planner.outline(),
        beside=rest,
        chains=growing,
        follow=(lambda: plan_of(planner, parts, beside=beside)) if growing else None,
    )


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
    """Carry out runs that no process has finished or works on, until none is left for this process.

    A plan with chains of doubled steps grows while it is carried out (`Plan.follow`).

    Args:
        plan: the runs.
        out: folder of the study.
        threads: number of threads of each command.
        tracking_uri: MLflow store.
        say: gets progress lines.
        report: called after each run.
        wait: wait for runs of other processes that remaining runs need; False: return when no run is free.

    Returns:
        Whether all runs are done.

    Raises:
        InputError: a run of the plan, or one that the report would include, was made with other settings.
        RunFailed: if a command fails.
        Stopped: on Ctrl-C or another stop signal.
    """
    waiting = False
    while True:
        plan = plan.follow() if plan.follow else plan
        # Checked every time: another process may have started meanwhile, with an edited study.
        for run in (*plan.runs, *plan.beside):
            check_settings(run, out)
        left = [run for run in plan.runs if not (out / "runs" / run.name / DONE).exists()]
        ready = [run for run in left if all((out / "runs" / name / DONE).exists() for name in run.needs)]
        claim = None
        for run in ready:
            if claim := claims.take(out / "runs" / run.name):
                break
        if claim is None:
            blocked = [run for run in left if run not in ready]
            if not (blocked or plan.chains) or not wait:
                return not left and not plan.chains
            if not waiting:
                say(f"{len(blocked) or 'further'} runs wait for {len(ready)} runs of other processes")
            waiting = True
            time.sleep(WAIT)
            continue
        waiting = False
        try:
            # Another process may have begun or finished the run before this one claimed it.
            check_settings(run, out)
            if (out / "runs" / run.name / DONE).exists():
                continue
            say(f"{run.name} ...")
            done = carry_out(run, out=out, claim=claim, threads=threads, say=say)
            log_run(run.name, done, outline=plan.outline, out=out, uri=tracking_uri)
            finish(run, done, out=out, claim=claim)
        except ClaimLost:
            say(f"{run.name}: taken over by another process")
            continue
        finally:
            claim.release()
        plan = plan.follow() if plan.follow else plan
        say(f"{run.name} done in {done['seconds'] / 60:.1f} min. {overview(plan, out, names=False)}")
        report()


def arguments_of(parser: argparse.ArgumentParser) -> None:
    """Add the options that `evidence.run` and `evidence.search` share."""
    parser.add_argument("study", help="name of a study in evidence/studies, or the path of a YAML file")
    parser.add_argument("--data", type=Path, help="labelled data set in MSD form: its folder or data list")
    parser.add_argument("--out", type=Path, help="output folder (default: evidence/out/STUDY)")
    parser.add_argument(
        "--threads", type=_positive, default=available_cores(), help="threads of each run (default: all cores)"
    )
    parser.add_argument("--tracking_uri", help="MLflow store (default: sqlite:///OUT/mlruns.db)")
    parser.add_argument("--list", action="store_true", help="show what is done, running and left; run nothing")
    parser.add_argument("--no_wait", action="store_true", help="exit as soon as no run is free, instead of waiting")


def processes_of(threads: int) -> int:
    """Return how many processes of this many threads keep all cores of this machine busy, at least 1."""
    return max(1, available_cores() // threads)


def call(action: Callable[[], int]) -> int:
    """Run a command line's action: stop signals end it in order, and user errors print one message.

    Returns:
        The exit status.
    """
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
        print("Stopped. Repeat the command to continue from here.", file=sys.stderr)
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
    """Run a study from the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m evidence.run", description=__doc__.partition("\n")[0])
    arguments_of(parser)
    parser.add_argument(
        "--part", choices=[*PARTS, "all"], default="all", help="a part of the study alone (default: all that it has)"
    )
    options = parser.parse_args(arguments)

    def action() -> int:
        study = read_study(options.study)
        out = (options.out or OUT / study.name).resolve()
        prepare_folder(out, study.name)
        reported = [part for part in PARTS if getattr(study, part)]
        parts = reported if options.part == "all" else [options.part]
        plan = plan_of(planner_of(study, data=options.data and options.data.resolve(), out=out), parts, beside=reported)
        print(overview(plan, out, names=options.list, processes=processes_of(options.threads)), flush=True)
        if options.list:
            return 0

        uri = options.tracking_uri or tracking_store(out)
        open_store(uri, out=out)  # so that a wrong address fails before the first run
        write_text(out / OUTLINE, json.dumps(plan.outline, indent=1) + "\n")
        log_missing(out, outline=plan.outline, uri=uri, say=say)
        finished = run_plan(
            plan,
            out=out,
            threads=options.threads,
            tracking_uri=uri,
            say=say,
            report=lambda: write_report(out),
            wait=not options.no_wait,
        )
        print(write_report(out))
        log_report(out, study=study.name, uri=uri, say=say)
        if not finished:
            print(overview(plan.follow() if plan.follow else plan, out, names=False))
        return 0

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # this process mostly waits
    return call(action)


if __name__ == "__main__":
    sys.exit(main())
