# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Start or continue a workflow.

    python -m workflow few_label_curve --study demo
    python -m workflow few_label_curve --study openkbp --data DIR --out OUT --profile slurm
    python -m workflow decathlon --folds FILE.yaml --data DIR --out OUT

Checks everything that can be checked before a job starts, then becomes Snakemake, whose further options may follow. An
interrupted workflow continues when the command is repeated.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bundles.common.errors import InputError, report_input_errors
from tools.arguments import not_negative, positive
from tools.bundle_runs import has_ended, read_plan, what_failed
from tools.child_process import available_cores

from .gpu import visible_gpus
from .planning import plan_from
from .slurm import cancel_left_jobs
from .start import check_engine, check_shared, claim_folder, engine_words, read_profile

ROOT = Path(__file__).resolve().parents[1]
STUDY_TARGETS = {"few_label_curve": "curve", "headroom": "headroom", "ablation": "ablation", "search": "search"}
FOLD_TARGETS = ("cross_validation", "decathlon")


def threads_of(cores: int, gpus: int) -> int:
    """Return the threads of each job: with GPUs a share of the cores; else few, since more jobs at once finish sooner.

    Args:
        cores: CPU cores.
        gpus: GPUs.
    """
    return max(1, cores // gpus) if gpus else max(1, cores // 4)


def main(arguments: Sequence[str] | None = None) -> int:
    """Start a workflow from the command line; returns only if it cannot be started."""
    parser = argparse.ArgumentParser(
        prog="python -m workflow", description=__doc__.partition("\n")[0], epilog="Further options are Snakemake's."
    )
    parser.add_argument("target", choices=[*STUDY_TARGETS, "study", *FOLD_TARGETS], help="what to make")
    parser.add_argument(
        "--study", default="demo", help="name of a study in evidence/studies, or a YAML file (default: demo)"
    )
    parser.add_argument("--folds", type=Path, help="YAML file of a cross-validation or of the Decathlon")
    parser.add_argument("--data", type=Path, help="folder of the data")
    parser.add_argument("--out", type=Path, help="output folder (default: evidence/out/STUDY)")
    parser.add_argument("--profile", default="local", help="local, slurm, or the folder of a Snakemake profile")
    parser.add_argument("--threads", type=positive, help="threads of each job (default: from cores and GPUs)")
    parser.add_argument("--gpus", type=not_negative, help="GPUs of this machine to use (default: all)")
    parser.add_argument("--tracking_uri", help="MLflow store of a study (default: sqlite:///OUT/mlruns.db)")
    parser.add_argument("--shared_disk", action="store_true", help="all machines see the folders named here")
    parser.add_argument(
        "--as_planned", action="store_true", help="go on with the plan in OUT, without reading study and data again"
    )
    parser.add_argument("--list", action="store_true", help="say what is left to do, and do nothing")
    options, more = parser.parse_known_args(arguments)
    try:
        words = prepare(options, more)
    except InputError as error:
        print(f"Stopped: {error}", file=sys.stderr)
        return 1
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *words])


def prepare(options: argparse.Namespace, more: Sequence[str]) -> list[str]:
    """Check, plan, and return the command line of the engine.

    Args:
        options: options of this module.
        more: options of Snakemake.

    Raises:
        InputError: something is wrong or missing.
    """
    folds = options.target in FOLD_TARGETS
    if folds and options.folds is None and not options.as_planned:
        raise InputError(f"{options.target} needs --folds FILE.yaml, such as workflow/examples/{options.target}.yaml.")
    name = Path(options.folds or "folds" if folds else options.study).stem
    out = (options.out or ROOT / "evidence" / "out" / name).resolve()
    data = options.data and options.data.resolve()
    folder, profile = read_profile(options.profile)
    executor = check_engine(profile, folder / "config.yaml")
    if executor != "local" and not options.shared_disk:
        check_shared({"The project in": ROOT, "--data": data, "--out": out})
    claim_folder(out)
    if executor == "slurm" and not options.list:
        cancel_left_jobs(out)
    config = dict(entry.partition("=")[::2] for entry in profile.get("config", ()))
    if not options.as_planned:
        asked = {"folds": options.folds.resolve()} if folds else {"study": _study_file(options.study)}
        config |= {**asked, **({"data": data} if data else {})}
        plan_from(config, out)
    plan = read_plan(out)
    check_target(plan, options.target)
    print(overview(plan, out, options.target), flush=True)
    config["planned"] = True
    resources = {}
    if executor == "local":
        gpus = len(visible_gpus()) if options.gpus is None else options.gpus
        config["threads"] = threads_of(available_cores(), gpus)
        if gpus:
            config |= {"gpus_per_job": 1, "assign_gpus": True}
            resources["gpu"] = gpus
    elif options.gpus is not None:
        config["gpus_per_job"] = min(1, options.gpus)
    if options.threads:
        config["threads"] = options.threads
    if options.tracking_uri:
        config["tracking_uri"] = options.tracking_uri
    more = [*more, *(["--dry-run"] if options.list else [])]
    return engine_words(options.target, out=out, profile=folder, config=config, resources=resources, more=more)


def overview(plan: Mapping[str, Any], out: Path, target: str) -> str:
    """Say how many runs have ended, what the others take by the planned minutes, and what could not be done.

    Args:
        plan: content of ``plan.json``.
        out: output folder.
        target: what to make.
    """
    parts = plan.get("parts", {})
    wanted = [STUDY_TARGETS[target]] if target in STUDY_TARGETS else [part for part in parts if part != "search"]
    names = dict.fromkeys(name for part in wanted for name in parts[part]) if parts else plan["runs"]
    runs = {name: plan["runs"][name] for name in names}
    left = {
        name: run["minutes"]
        for name, run in runs.items()
        if not all(has_ended(out / "runs" / name, command["name"]) for command in run["commands"])
    }
    text = f"{plan['name']}: {len(runs) - len(left)} of {len(runs)} runs have ended"
    if left:
        hours = sum(left.values()) / 60
        time = f"{hours:.0f} h" if hours >= 2 else f"{max(1, round(60 * hours))} min"
        text += f"; by the planned minutes, the others take about {time} one after another"
    if "headroom" in wanted and plan["chains"]:
        text += ", without what the chains of doubled steps add"
    failed = [what_failed(out / "runs" / name, command) for name, run in runs.items() for command in run["commands"]]
    return "\n".join([text + ".", *filter(None, failed)])


def check_target(plan: Mapping[str, Any], target: str) -> None:
    """Refuse what a plan does not have.

    Args:
        plan: content of ``plan.json``.
        target: what to make.

    Raises:
        InputError: the plan is of another workflow, or the study has no such part.
    """
    workflow = "folds" if target in FOLD_TARGETS else "study"
    if plan["workflow"] != workflow:
        raise InputError(
            f"The output folder has the plan of {plan['name']}, which has no {target}. Pass another --out."
        )
    part = STUDY_TARGETS.get(target)
    if part and part not in plan["parts"]:
        raise InputError(
            f"Study {plan['name']} has no {part}, only {', '.join(plan['parts'])}. Add the entry '{part}' to its file."
        )


def _study_file(name: str) -> str:
    """Return a study's name, or the whole path of its file: the engine works in the output folder."""
    return str(Path(name).resolve()) if Path(name).suffix in (".yaml", ".yml") else name


if __name__ == "__main__":
    report_input_errors()
    sys.exit(main())
