# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""How well a pre-training learned its proxy tasks: figures of its last validation, compared with no learning."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bundles.common.weights.dialects import find_weights
from bundles.pretraining.results.learning import UNLEARNT, verdicts

from ..study.study import CONTROL

ROTATION_CHANCE = 0.25  # one of four rotations
# Columns: key of validation.json, heading and decimals.
SHOWN = (
    ("masked_psnr", "inpainting: PSNR (dB)", 1),
    ("loss_contrast", "contrast: loss", 4),
    ("contrast_top1", "contrast: top-1", 3),
    ("rotation_accuracy", "rotation: accuracy", 3),
    ("position_mm", "position: error (mm)", 0),
)


def figures_of(folder: Path, settings: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of a pre-training's last validation.

    Args:
        folder: folder of the run.
        settings: settings of its ``done.json``.

    Returns:
        The numbers of ``train/validation.json`` (`proxy_report.ProxyReport`); ``steps``; and ``steps_kept``, the step
        of the weights in ``encoder.pt``, which are those with the best validation. Empty if ``validation.json`` does
        not exist.
    """
    path = folder / "train" / "validation.json"
    if not path.is_file():
        return {}
    written = json.loads(path.read_text(encoding="utf-8"))
    numbers = {key: value for key, value in written.items() if isinstance(value, int | float)}
    figures = {"steps": settings["facts"]["steps"], **numbers}
    encoder = folder / "train" / "models" / "encoder.pt"
    if encoder.is_file():
        figures["steps_kept"] = find_weights(str(encoder)).content["trained"]["steps"]
    return figures


def doubts_of(figures: Mapping[str, float]) -> list[str]:
    """Describe the proxy tasks that were not learnt according to these figures, by `learning.verdicts`."""
    found = verdicts(figures) if figures else {}
    return [f"{task} was not learnt: {each['because']}" for task, each in found.items() if not each["learnt"]]


def encoder_table(
    outline: Mapping[str, Any],
    part: Mapping[str, Any],
    arms: Sequence[str],
    figures: Mapping[str, Mapping[str, float]],
) -> list[str]:
    """Return Markdown lines: the pre-trainings of a part of the study, and the tasks that they did not learn.

    Args:
        outline: outline of the study; ``pretrainings`` names the arm whose pre-training an arm shares.
        part: part of the outline, with ``seeds`` and ``encoder_per_seed``.
        arms: arms of that part.
        figures: figures of each pre-training, by name. Missing figures leave the cells empty.
    """
    seeds = part["seeds"] if part["encoder_per_seed"] else part["seeds"][:1]
    owners: dict[str, list[str]] = {}
    for arm in arms:
        if arm != CONTROL:
            owners.setdefault(outline["pretrainings"].get(arm, arm), []).append(arm)
    found = {
        f"{', '.join(sharing)}, seed {seed}": figures.get(f"pretrain_{owner}_seed{seed}") or {}
        for owner, sharing in owners.items()
        for seed in seeds
    }
    lines = [
        "Pre-trainings:",
        "",
        f"| pre-training | steps | {' | '.join(heading for _, heading, _ in SHOWN)} |",
        "|---|---|" + "---|" * len(SHOWN),
    ]
    for name, own in found.items():
        cells = [name, _steps(own), *(_cell(own, key, digits) for key, _, digits in SHOWN)]
        lines.append(f"| {' | '.join(cells)} |")
    contrast = UNLEARNT["contrast"]
    unlearned = sorted({f"{own[contrast]:.4f}" for own in found.values() if contrast in own})
    chance = (
        f"contrast loss {' or '.join(unlearned)} (ln of the number of other views in a batch), " if unlearned else ""
    )
    lines += [
        "",
        "Figures of the last validation of the pre-training, on scans that it does not train on. The saved weights are "
        "those of the validation with the lowest loss; where that was an earlier step, the table names it. Without "
        f"learning: {chance}rotation accuracy {ROTATION_CHANCE:g}.",
    ]
    warnings = [f"- {name}: {'; '.join(doubts)}." for name, own in found.items() if (doubts := doubts_of(own))]
    return [*lines, "", *warnings] if warnings else lines


def _steps(figures: Mapping[str, float]) -> str:
    if "steps" not in figures:
        return ""
    kept = figures.get("steps_kept", figures["steps"])
    return f"{figures['steps']:g}" + (f" (weights of {kept:g})" if kept != figures["steps"] else "")


def _cell(figures: Mapping[str, float], key: str, digits: int) -> str:
    value = figures.get(key, math.nan)
    return "" if math.isnan(value) else f"{value:.{digits}f}"
