# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Plan what a workflow's config asks for: a study, or the folds of one task or ten."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bundles.common.errors import InputError
from evidence.runs.study_plan import plan_study
from evidence.study.study import suggestion

from .fold_plan import plan_folds

#: Key of --config to what it says.
CONFIG = {
    "study": "a study: its name or YAML file",
    "folds": "a cross-validation or the Decathlon: YAML file",
    "data": "folder of the data",
    "tracking_uri": "MLflow store of a study",
    "threads": "threads of each job",
    "gpus_per_job": "0 or 1",
    "assign_gpus": "true: jobs on one machine take a free GPU each",
    "planned": "true: plan.json is up to date",
}


def plan_from(config: Mapping[str, Any], out: Path) -> None:
    """Write ``plan.json`` for a workflow's config.

    Args:
        config: see `CONFIG`.
        out: output folder.

    Raises:
        InputError: a key is unknown, there is not exactly one of ``study`` and ``folds``, or what they name is wrong.
    """
    for key in config:
        if key not in CONFIG:
            raise InputError(f"--config {key} is not known. {suggestion(key, CONFIG)}.")
    asked = [key for key in ("study", "folds") if config.get(key)]
    if len(asked) != 1:
        raise InputError("Say what to run: either --config study=NAME or --config folds=FILE.yaml.")
    data = Path(str(config["data"])).expanduser().resolve() if config.get("data") else None
    if asked == ["study"]:
        plan_study(str(config["study"]), data=data, out=out)
    else:
        plan_folds(Path(str(config["folds"])).expanduser(), data=data, out=out)
