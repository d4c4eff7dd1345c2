# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""How well a pre-training learnt its proxy tasks: the figures of its last validation, beside what they are without learning."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from bundles.common.weights.dialects import find_weights
from bundles.pretraining.results.proxy_report import COLLAPSED, UNLEARNT

from ..study.study import CONTROL

ROTATION_CHANCE = 0.25  # of four turns
P_VALUE = 0.001  # one-sided binomial test; that of docs/explanation/measured.md
SHOWN = {"masked_psnr": 1, "loss_contrast": 4, "contrast_top1": 3, "rotation_accuracy": 3}  # columns and their digits


def figures_of(folder: Path, settings: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a pre-training's last validation.

    Args:
        folder: of the run.
        settings: of its ``done.json``.

    Returns:
        Those of ``train/validation.json`` (`proxy_report.ProxyReport`), ``steps``, and ``steps_kept``, the step of the weights of ``encoder.pt``, the best by
        their validation; empty where the first file is not there.
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
    """The proxy tasks that these figures do not show to be learnt, in words."""
    doubts = []
    if UNLEARNT in figures and not figures["loss_contrast"] < figures[UNLEARNT] - COLLAPSED:
        doubts.append(
            f"contrast was not learnt: its loss {figures['loss_contrast']:.4f} is not below {figures[UNLEARNT]:.4f}, that of equal embeddings"
        )
    if "rotation_accuracy" in figures:
        views = int(figures["views"])
        right = round(figures["rotation_accuracy"] * views)
        if binomtest(right, views, ROTATION_CHANCE, alternative="greater").pvalue >= P_VALUE:
            doubts.append(
                f"rotation is not above chance: {right} of {views} views right, {ROTATION_CHANCE * views:g} expected (one-sided binomial test at {P_VALUE})"
            )
    return doubts


def encoder_table(
    part: Mapping[str, Any], arms: Sequence[str], figures: Mapping[str, Mapping[str, float]]
) -> list[str]:
    """Markdown lines: the encoders of a part of the study with their figures, and which proxy tasks were not learnt.

    Args:
        part: of the outline: ``seeds``, ``encoder_per_seed``.
        arms: of that part.
        figures: name of a pre-training to its figures; empty ones leave the places empty.
    """
    seeds = part["seeds"] if part["encoder_per_seed"] else part["seeds"][:1]
    found = {
        f"{arm}, seed {seed}": figures.get(f"pretrain_{arm}_seed{seed}") or {}
        for arm in arms
        if arm != CONTROL
        for seed in seeds
    }
    lines = [
        "Encoders:",
        "",
        "| encoder | steps | inpainting: PSNR (dB) | contrast: loss | contrast: top-1 | rotation: accuracy |",
        "|---|---|---|---|---|---|",
    ]
    for name, own in found.items():
        cells = [name, _steps(own), *(_cell(own, *shown) for shown in SHOWN.items())]
        lines.append(f"| {' | '.join(cells)} |")
    unlearnt = sorted({f"{own[UNLEARNT]:.4f}" for own in found.values() if UNLEARNT in own})
    chance = f"contrast loss {' or '.join(unlearnt)} (ln of the number of other views in a batch), " if unlearnt else ""
    lines += [
        "",
        "Figures of the last validation of the pre-training, on scans that it does not train on; the weights that are kept are those of the validation with "
        f"the lowest loss, of an earlier step where the table says so. Without learning: {chance}rotation accuracy {ROTATION_CHANCE:g}.",
    ]
    doubted = {name: doubts for name, own in found.items() if (doubts := doubts_of(own))}
    said = [f"- {name}: {'; '.join(doubts)}." for name, doubts in doubted.items()]
    return [*lines, "", *said] if said else lines


def _steps(figures: Mapping[str, float]) -> str:
    if "steps" not in figures:
        return ""
    kept = figures.get("steps_kept", figures["steps"])
    return f"{figures['steps']:g}" + (f" (weights of {kept:g})" if kept != figures["steps"] else "")


def _cell(figures: Mapping[str, float], key: str, digits: int) -> str:
    value = figures.get(key, math.nan)
    return "" if math.isnan(value) else f"{value:.{digits}f}"
