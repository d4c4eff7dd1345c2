# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Record which cases a training learns from and which validate it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events

from ..data.case_names import names_of
from ..files import move_file, write_text
from ..run.distributed import rank
from ..words import counted

logger = logging.getLogger(__name__)

FILE = "split.json"
NAMED = 10  # cases named in the log; the file has all


class SplitRecord:
    """Handler for `SupervisedTrainer`: `record_split` when the training starts.

    List it after `TrainingCheckpoint`, which may refuse to resume: the file then stays that of the finished run.

    Args:
        output_dir, training, validation: see `record_split`.
        resume: whether the run is resumed; else the file of an earlier run becomes ``previous_split.json``.
    """

    def __init__(
        self,
        *,
        output_dir: str,
        training: Sequence[Mapping[str, Any]],
        validation: Sequence[Mapping[str, Any]],
        resume: bool = False,
    ) -> None:
        self.output_dir, self.training, self.validation, self.resume = output_dir, training, validation, resume

    def attach(self, engine: Engine) -> None:
        """Register the handler."""
        engine.add_event_handler(Events.STARTED, self.started)

    def started(self, engine: Engine) -> None:
        """Write the file."""
        path = Path(self.output_dir) / FILE
        if rank() == 0 and not self.resume:
            move_file(path, path.with_name(f"previous_{FILE}"))
        record_split(output_dir=self.output_dir, training=self.training, validation=self.validation)


def record_split(
    *, output_dir: str, training: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]]
) -> None:
    """Write ``OUTPUT_DIR/split.json`` and log the split: names of up to `NAMED` validation cases, else their number.

    The file has the image of each case by its name, under ``training`` and ``validation``. Only rank 0 writes.

    Args:
        output_dir: output folder of the training.
        training, validation: cases, ``{"image": path or list of paths}``.
    """
    if rank() != 0:
        return
    names = names_of([*training, *validation])
    sections = {
        section: {names[file]: file for file in names_of(cases)}
        for section, cases in (("training", training), ("validation", validation))
    }
    path = Path(output_dir) / FILE
    write_text(path, json.dumps(sections, indent=1) + "\n")
    held_out = list(sections["validation"])
    if not held_out:
        told = "no validation"
    elif len(held_out) > NAMED:
        told = f"validation on {counted(len(held_out), 'case')}"
    else:
        told = f"validation on {counted(len(held_out), 'case')}: {', '.join(held_out)}"
    logger.info("training on %s, %s (%s)", counted(len(sections["training"]), "case"), told, path)
