# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The split that a model was trained with, so that it is scored on cases which it has not seen."""

from __future__ import annotations

import logging
from typing import Any

from .model_facts import training_of

logger = logging.getLogger(__name__)

DEFAULTS = {"fold": None, "folds": None, "seed": 0}


def model_split(checkpoint: str, *, fold: int | str | None, folds: int | None, seed: int | None) -> dict[str, Any]:
    """What was asked for, else what the model's file says of its training, else the default.

    A difference between the first two is logged as a warning: cases of the training would be scored as if they were new.

    Args:
        checkpoint: ``model.pt``.
        fold, folds, seed: None to take the model's.
    """
    said = training_of(checkpoint)
    if said is None:
        logger.warning(
            "%s does not say which cases it was trained on: they may be among those that it is scored on", checkpoint
        )
        said = {}
    trained = DEFAULTS | {name: value for name, value in said.items() if name in DEFAULTS}
    asked = {name: value for name, value in (("fold", fold), ("folds", folds), ("seed", seed)) if value is not None}
    for name, value in asked.items():
        if trained[name] != value:
            logger.warning(
                "%s was trained with %s %s; scored with %s, cases of its training may count as new ones",
                *(checkpoint, name, trained[name], value),
            )
    return trained | asked
