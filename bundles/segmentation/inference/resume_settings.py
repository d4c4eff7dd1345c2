# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""What an output folder was made with, so that a run that goes on in it does not mix results of two kinds."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...common.errors import InputError
from ...common.files import write_text
from ...common.run.distributed import rank

FILE = "settings.json"


def write_or_compare_settings(
    *, output_dir: str, settings: Mapping[str, Any], models: Sequence[str], resume: bool
) -> None:
    """Write ``settings.json`` for a run that starts; compare with it where a run goes on.

    Args:
        output_dir: folder of the results.
        settings: whatever decides them, of types that JSON knows.
        models: files of the networks; size and time of change say whether they are the same.
        resume: whether the run goes on.

    Raises:
        InputError: a model is not there; or the run goes on with other settings or models: names them with both values.
    """
    path = Path(output_dir) / FILE
    stamps = {}
    for model in models:
        if not os.path.exists(model):  # nothing is written: the run with the right path would be another one
            raise InputError(
                f"--pretrained_model {model} does not exist: check the path, or make or download the file."
            )
        status = os.stat(model)
        stamps[os.path.abspath(model)] = [status.st_size, status.st_mtime_ns]
    ours = json.loads(json.dumps({**settings, "models": stamps}))  # as it comes back from the file
    if resume and path.exists():
        theirs = json.loads(path.read_text(encoding="utf-8"))
        names = sorted({*theirs, *ours})
        changed = [
            f"{name} was {theirs.get(name)}, now {ours.get(name)}"
            for name in names
            if theirs.get(name) != ours.get(name)
        ]
        if changed:
            raise InputError(
                f"--resume true: the results in {output_dir} were made otherwise: {'; '.join(changed)}. Give the options of that run, or another "
                "--output_dir."
            )
    elif rank() == 0:
        write_text(path, json.dumps(ours, indent=1) + "\n")
