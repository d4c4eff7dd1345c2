# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""How well a pre-training learned its proxy tasks: figures of its last validation, compared with no learning."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from bundles.common.weights.dialects import find_weights
from bundles.pretraining.results.learning import CONTRAST_MARGIN
from bundles.pretraining.results.learning import UNLEARNT as UNLEARNT_OF

from ..study.study import CONTROL

UNLEARNT = UNLEARNT_OF["contrast"]
ROTATION_CHANCE = 0.25  # one of four rotations
P_VALUE = 0.001  # of the one-sided binomial test, as in docs/explanation/measured.md
SHOWN = {"masked_psnr": 1, "loss_contrast": 4, "contrast_top1": 3, "rotation_accuracy": 3}  # columns and their decimals


def figures_of(folder: Path, settings: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of a pre-training's last validation.

    Args:
        folder: folder of the run.
        settings: settings of its ``done.json``.

    Returns:
        The content of ``train/validation.json`` (`proxy_report.ProxyReport`); ``steps``; and ``steps_kept``, the step
        of the weights in ``encoder.pt``, which are those with the best validation. Empty if ``validation.json`` does
        not exist.
    """
    path = folder / "train" / "validation.json"
    if not path.is_file():
        return {}
    figures = {"steps": settings["facts"]["steps"], **json.loads(path.read_text(encoding="utf-8"))}
    encoder = folder / "train" / "models" / "encoder.pt"
    if encoder.is_file():
        figures["steps_kept"] = find_weights(str(encoder)).content["trained"]["steps"]
    return figures


def doubts_of(figures: Mapping[str, float]) -> list[str]:
    """Describe the proxy tasks that were not learned according to these figures."""
    doubts = []
    if UNLEARNT in figures and not figures["loss_contrast"] < figures[UNLEARNT] - CONTRAST_MARGIN:
        doubts.append(
            f"contrast was not learned: its loss {figures['loss_contrast']:.4f} is not below {figures[UNLEARNT]:.4f}, "
            "the loss of equal embeddings"
        )
    if "rotation_accuracy" in figures:
        views = int(figures["views"])
        correct = round(figures["rotation_accuracy"] * views)
        if binomtest(correct, views, ROTATION_CHANCE, alternative="greater").pvalue >= P_VALUE:
            doubts.append(
                f"rotation is not above chance: {correct} of {views} views correct, {ROTATION_CHANCE * views:g} "
                f"expected by chance (one-sided binomial test at {P_VALUE})"
            )
    return doubts


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
        "| pre-training | steps | inpainting: PSNR (dB) | contrast: loss | contrast: top-1 | rotation: accuracy |",
        "|---|---|---|---|---|---|",
    ]
    for name, own in found.items():
        cells = [name, _steps(own), *(_cell(own, *shown) for shown in SHOWN.items())]
        lines.append(f"| {' | '.join(cells)} |")
    unlearned = sorted({f"{own[UNLEARNT]:.4f}" for own in found.values() if UNLEARNT in own})
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
