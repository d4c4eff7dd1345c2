# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Tables of a study: each arm at each n compared with training from scratch, and the ablation as in the paper."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bundles.segmentation.results.bootstrap import DRAWS, LEVEL

from ..study.study import CONTROL
from .encoder_figures import encoder_table
from .paired_bootstrap import PairedDifference, figure_of, paired_difference, patient_means
from .records import METRICS, Result, stacked

MEAN = "mean"
COLUMNS = (
    *("n", "arm", "label", "metric", "seeds", "seeds_planned", "patients", "missed", "mean", "sd_patients", "sd_seeds"),
    *("difference", "low", "high", "pairs_of_seeds", "higher", "lower", "equal"),
)
FIGURES = ("Dice", "NSD", "HD95 (mm)", "Dice, minus scratch", "patients better / worse", "HD95, minus scratch (mm)")
FEW_SEEDS = 5  # with fewer, the interval of `paired_bootstrap` is too narrow where seeds differ


def rows_of(
    results: Sequence[Result], part: Mapping[str, Any], *, n: int, arms: Sequence[str], labels: Sequence[str]
) -> list[dict[str, Any]]:
    """Return one row for each arm, label (and the mean over labels) and metric at one n.

    Columns: ``mean`` is the mean over seeds and patients, then over labels (`paired_bootstrap.figure_of`).
    ``sd_patients`` is the standard deviation (n - 1) over patients of their mean over seeds and labels; ``sd_seeds``
    that of the figures of the single runs. ``missed`` counts the scores that HD95 lacks because only one of the two
    masks contains the organ. The difference is to `CONTROL`, for the seeds that both arms have finished; ``by_seed``
    has the difference of each of these seeds. What is not finished is NaN.

    Args:
        results: finished runs.
        part: part of the outline, with ``seeds`` and ``encoder_per_seed``.
        n: number of labelled patients.
        arms: names of the arms.
        labels: names of the labels.
    """
    rows = []
    for metric in METRICS:
        scores, done = stacked(results, part, metric=metric, n=n, arms=arms)
        dice, _ = stacked(results, part, metric="dice", n=n, arms=arms)
        for arm in arms:
            both = [seed for seed in done[arm] if seed in done[CONTROL]] if arm != CONTROL else []
            for place, label in [(None, MEAN), *enumerate(labels)]:
                row = dict.fromkeys(COLUMNS, math.nan) | {"n": n, "arm": arm, "label": label, "metric": metric}
                row |= {"seeds": len(done[arm]), "seeds_planned": len(part["seeds"])}
                row |= {"by_seed": {}, "encoder_per_seed": part["encoder_per_seed"]}
                pick = slice(None) if place is None else slice(place, place + 1)
                if arm in scores:
                    own = scores[arm][:, :, pick]
                    row |= _moments(own)
                    row["missed"] = int((np.isnan(own) & ~np.isnan(dice[arm][:, :, pick])).sum())
                if both:
                    a, b = (
                        scores[each][[done[each].index(seed) for seed in both]][:, :, pick] for each in (arm, CONTROL)
                    )
                    found = paired_difference(a, b)
                    row |= _difference(found, len(both))
                    row["by_seed"] = dict(zip(both, found.by_seed, strict=True))
                rows.append(row)
    return rows


def _moments(own: np.ndarray) -> dict[str, Any]:
    patients = patient_means(own)
    by_seed = [figure_of(own[[i]]) for i in range(len(own))]
    return {
        "patients": len(patients),
        "mean": figure_of(own),
        "sd_patients": float(np.std(patients, ddof=1)) if len(patients) > 1 else math.nan,
        "sd_seeds": float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else math.nan,
    }


def _difference(found: PairedDifference, seeds: int) -> dict[str, Any]:
    low, high = found.interval or (math.nan, math.nan)
    return {
        **{"difference": found.difference, "low": low, "high": high, "pairs_of_seeds": seeds},
        **{"higher": found.higher, "lower": found.lower, "equal": found.equal},
    }


def curve_rows(outline: Mapping[str, Any], results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return the rows of the few-label curve, see `rows_of`."""
    curve = outline["curve"]
    return [
        row for n in curve["n"] for row in rows_of(results, curve, n=n, arms=outline["arms"], labels=outline["labels"])
    ]


def ablation_rows(outline: Mapping[str, Any], results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return the rows of the ablation, see `rows_of`. The arm of a row is a subset of the proxy tasks."""
    ablation = outline["ablation"]
    arms = [row["arm"] for row in ablation["rows"]]
    return rows_of(results, ablation, n=ablation["n"], arms=arms, labels=outline["labels"])


def csv_of(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = COLUMNS) -> str:
    """Return rows as CSV, with empty fields for NaN."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _cell(row[key]) for key in columns})
    return text.getvalue()


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6f}" if value != int(value) else f"{value:g}"
    return str(value)


def curve_markdown(
    outline: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], figures: Mapping[str, Mapping[str, float]]
) -> str:
    """Return the few-label curve in Markdown: table, one sentence for each n, Dice by label, and the encoders.

    Args:
        outline: outline of the study.
        rows: `curve_rows`.
        figures: figures of each pre-training, by name.
    """
    lines = [
        f"## {outline['study']}: few-label curve",
        "",
        f"| n | arm | runs | {' | '.join(FIGURES)} |",
        "|---|---|---|" + "---|" * len(FIGURES),
    ]
    for n in outline["curve"]["n"]:
        for arm in outline["arms"]:
            lines.append(f"| {' | '.join([str(n), arm, *_cells(rows, n, arm)])} |")
    lines += ["", _explanation(), ""]
    for n in outline["curve"]["n"]:
        for arm in outline["arms"]:
            if arm != CONTROL:
                lines.append(f"- n = {n}, {arm}: {verdict(row_of(rows, n, arm, MEAN, 'dice'))}")
    lines += [
        "",
        "Dice by label:",
        "",
        f"| n | arm | {' | '.join(outline['labels'])} |",
        "|---|---|" + "---|" * len(outline["labels"]),
    ]
    for n in outline["curve"]["n"]:
        for arm in outline["arms"]:
            cells = [_figure(row_of(rows, n, arm, label, "dice")["mean"]) for label in outline["labels"]]
            lines.append(f"| {n} | {arm} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *encoder_table(outline["curve"], outline["arms"], figures), ""])


def ablation_markdown(
    outline: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], figures: Mapping[str, Mapping[str, float]]
) -> str:
    """Return the ablation in Markdown: a table as in the paper, with the paper's figures, and the encoders.

    Args:
        outline: outline of the study.
        rows: `ablation_rows`.
        figures: figures of each pre-training, by name.
    """
    ablation = outline["ablation"]
    lines = [
        f"## {outline['study']}: proxy tasks, n = {ablation['n']}",
        "",
        f"| inpainting | contrast | rotation | runs | {' | '.join(FIGURES)} | paper: Dice (BTCV) | paper: HD95 |",
        "|---|---|---|---|---|---|" + "---|" * len(FIGURES),
    ]
    for each in ablation["rows"]:
        marks = ["x" if task in each["tasks"] else "" for task in ("inpainting", "contrast", "rotation")]
        paper = ["" if each[key] is None else f"{each[key]:.2f}" for key in ("paper_dice", "paper_hd95")]
        lines.append(f"| {' | '.join([*marks, *_cells(rows, ablation['n'], each['arm']), *paper])} |")
    lines += ["", _explanation(), ""]
    for each in ablation["rows"]:
        row = row_of(rows, ablation["n"], each["arm"], MEAN, "dice")
        if row["by_seed"]:
            lines.append(f"- {', '.join(each['tasks'])}: {'; '.join([_by_seed(row), *_doubts(row)])}.")
    arms = [each["arm"] for each in ablation["rows"]]
    return "\n".join([*lines, "", *encoder_table(ablation, arms, figures), ""])


def verdict(row: Mapping[str, Any]) -> str:
    """State in words what the interval of a row shows: a gain, a loss, or no difference."""
    if math.isnan(row["difference"]):
        return "not measured yet."
    figures = f"{row['difference']:+.4f}, {LEVEL:.0%} interval {_ends(row)}"
    if math.isnan(row["low"]):
        return f"{row['difference']:+.4f} for one patient: no interval."
    figures += f"; {_by_seed(row)}" + "".join(f"; {doubt}" for doubt in _doubts(row))
    if row["low"] > 0:
        return f"pre-training gains ({figures})."
    if row["high"] < 0:
        return f"pre-training loses ({figures})."
    return f"no difference shown ({figures}; it contains 0)."


def _by_seed(row: Mapping[str, Any]) -> str:
    return ", ".join(f"seed {seed} {difference:+.4f}" for seed, difference in row["by_seed"].items())


def _doubts(row: Mapping[str, Any]) -> list[str]:
    """Sources of variation that the interval does not cover."""
    doubts = []
    if row["pairs_of_seeds"] == 1:
        doubts.append("only one seed: other labelled patients may give another result")
    elif row["pairs_of_seeds"] < FEW_SEEDS:
        doubts.append(f"only {row['pairs_of_seeds']} seeds: the interval is too narrow if seeds differ")
    if not row["encoder_per_seed"]:
        doubts.append("one pre-training for all seeds: the interval does not cover differences between pre-trainings")
    return doubts


def _explanation() -> str:
    return (
        "Dice, NSD and HD95: mean over runs and patients, then over labels; ± is the standard deviation over patients "
        "(of their mean over runs). Missed: scores that HD95 lacks because only one of prediction and label file "
        "contains the organ. The HD95 of arms with different missed scores is of different organs; compare them by "
        "their difference, which uses the scores that both arms have. Difference: of the same patients and seeds, with "
        f"its {LEVEL:.0%} percentile bootstrap interval ({DRAWS} draws; each resamples the seeds and, independently, "
        "the patients with replacement). Better and worse count patients by their mean Dice over runs and labels."
    )


def _cells(rows: Sequence[Mapping[str, Any]], n: int, arm: str) -> list[str]:
    """Number of runs, and the `FIGURES` of an arm at one n."""
    dice, nsd, hd95 = (row_of(rows, n, arm, MEAN, metric) for metric in METRICS)
    runs = f"{dice['seeds']} of {dice['seeds_planned']}"
    return [runs, _spread(dice), _spread(nsd), _spread(hd95, 1), _interval(dice), _wins(dice), _interval(hd95, 1)]


def row_of(rows: Sequence[Mapping[str, Any]], n: int, arm: str, label: str, metric: str) -> Mapping[str, Any]:
    """Return the row of an n, arm, label and metric."""
    wanted = (n, arm, label, metric)
    return next(row for row in rows if (row["n"], row["arm"], row["label"], row["metric"]) == wanted)


def _figure(value: float, digits: int = 4) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def _spread(row: Mapping[str, Any], digits: int = 4) -> str:
    if math.isnan(row["mean"]):
        return ""
    spread = "" if math.isnan(row["sd_patients"]) else f" ± {row['sd_patients']:.{digits}f}"
    missed = f" ({row['missed']} missed)" if row["missed"] else ""
    return f"{row['mean']:.{digits}f}{spread}{missed}"


def _ends(row: Mapping[str, Any], digits: int = 4) -> str:
    return f"[{row['low']:+.{digits}f}, {row['high']:+.{digits}f}]"


def _interval(row: Mapping[str, Any], digits: int = 4) -> str:
    if math.isnan(row["difference"]):
        return ""
    return f"{row['difference']:+.{digits}f}" + ("" if math.isnan(row["low"]) else f" {_ends(row, digits)}")


def _wins(row: Mapping[str, Any]) -> str:
    return "" if math.isnan(row["difference"]) else f"{row['higher']:g} / {row['lower']:g}"
