# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The settings that an output folder was produced with, so that a resumed run does not mix results."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...common.errors import InputError
from ...common.files import file_stamp, write_text
from ...common.run.distributed import rank

FILE = "settings.json"


def write_or_compare_settings(
    *, output_dir: str, settings: Mapping[str, Any], models: Sequence[str], resume: bool
) -> None:
    """Write ``settings.json`` when a run starts; compare with it when a run is resumed.

    Args:
        output_dir: folder of the results.
        settings: everything that decides them, of types that JSON knows.
        models: files of the networks, identified by size and modification time.
        resume: whether the run is resumed.

    Raises:
        InputError: a model does not exist; or the run is resumed with other settings or models: names them with both values.
    """
    path = Path(output_dir) / FILE
    stamps = {}
    for model in models:
        if not os.path.exists(model):  # before anything is written: with the right path it is another run
            raise InputError(
                f"--pretrained_model {model} does not exist: check the path, or make or download the file."
            )
        stamps[os.path.abspath(model)] = file_stamp(model)
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
                f"Cannot resume: the results in {output_dir} were produced with different settings ({'; '.join(changed)}). "
                "Use those, or another --output_dir."
            )
    elif rank() == 0:
        write_text(path, json.dumps(ours, indent=1) + "\n")
