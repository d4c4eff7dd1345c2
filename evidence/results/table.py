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

from ..study.study import CONTROL, PAPER_TASKS, PROXY_TASKS
from .encoder_figures import encoder_table
from .paired_bootstrap import PairedDifference, figure_of, paired_difference, patient_means
from .power import t_interval
from .records import METRICS, Result, stacked

MEAN, FIRST = "mean", "first figure"  # rows of the mean over all labels, and over those of the first figure
COLUMNS = (
    *("n", "arm", "label", "metric", "seeds", "seeds_planned", "patients", "missed", "mean", "sd_patients", "sd_seeds"),
    *("difference", "low", "high", "t_low", "t_high", "pairs_of_seeds", "higher", "lower", "equal"),
)
SCORE_COLUMNS = ("run", "arm", "n", "seed", "case", "label", *METRICS)
FIGURES = (
    *("Dice", "NSD", "HD95 (mm)", "Dice, minus scratch", "t interval over seeds", "patients better / worse"),
    "HD95, minus scratch (mm)",
)
FEW_SEEDS = 5  # with fewer, the interval of `paired_bootstrap` is too narrow where seeds differ


def rows_of(
    outline: Mapping[str, Any], results: Sequence[Result], part: Mapping[str, Any], *, n: int, arms: Sequence[str]
) -> list[dict[str, Any]]:
    """Return one row for each arm, metric and label at one n, for the mean over labels, and for the first figure.

    Columns: ``mean`` is the mean over seeds and patients, then over labels (`paired_bootstrap.figure_of`).
    ``sd_patients`` is the standard deviation (n - 1) over patients of their mean over seeds and labels; ``sd_seeds``
    that of the figures of the single runs. ``low`` to ``high`` is the bootstrap interval, ``t_low`` to ``t_high`` the
    t interval over seeds (`power.t_interval`). ``missed`` counts the scores that HD95 lacks because only one of the two
    masks contains the organ. The difference is to `CONTROL`, for the seeds that both arms have finished; ``by_seed``
    has the difference of each of these seeds, ``sd_differences`` the standard deviation over patients of their difference.
    What is not finished is NaN. The first figure has rows of its own unless it is the mean over all labels.

    Args:
        outline: outline of the study.
        results: finished runs.
        part: part of the outline, with ``seeds`` and ``encoder_per_seed``.
        n: number of labelled patients.
        arms: names of the arms.
    """
    rows = []
    labels = outline["labels"]
    columns = {MEAN: list(range(len(labels))), **{label: [place] for place, label in enumerate(labels)}}
    if main_label(outline) == FIRST:
        columns = {FIRST: [labels.index(name) for name in outline["first_figure"]], **columns}
    for metric in METRICS:
        scores, done = stacked(results, part, metric=metric, n=n, arms=arms)
        dice, _ = stacked(results, part, metric="dice", n=n, arms=arms)
        for arm in arms:
            both = [seed for seed in done[arm] if seed in done[CONTROL]] if arm != CONTROL else []
            for label, pick in columns.items():
                row = dict.fromkeys(COLUMNS, math.nan) | {"n": n, "arm": arm, "label": label, "metric": metric}
                row |= {"seeds": len(done[arm]), "seeds_planned": len(part["seeds"])}
                row |= {"by_seed": {}, "sd_differences": math.nan, "encoder_per_seed": part["encoder_per_seed"]}
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
    t_low, t_high = t_interval(found.by_seed) or (math.nan, math.nan)
    return {
        **{"t_low": t_low, "t_high": t_high, "sd_differences": found.sd_patients},
        **{"difference": found.difference, "low": low, "high": high, "pairs_of_seeds": seeds},
        **{"higher": found.higher, "lower": found.lower, "equal": found.equal},
    }


def curve_rows(outline: Mapping[str, Any], results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return the rows of the few-label curve, see `rows_of`."""
    curve = outline["curve"]
    return [row for n in curve["n"] for row in rows_of(outline, results, curve, n=n, arms=outline["arms"])]


def ablation_rows(outline: Mapping[str, Any], results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return the rows of the ablation, see `rows_of`. The arm of a row is a subset of the proxy tasks."""
    ablation = outline["ablation"]
    arms = [row["arm"] for row in ablation["rows"]]
    return rows_of(outline, results, ablation, n=ablation["n"], arms=arms)


def main_label(outline: Mapping[str, Any]) -> str:
    """Return the label of the rows that tables, plots and power show first: `FIRST`, or `MEAN` if it is the same."""
    return MEAN if set(outline["first_figure"]) == set(outline["labels"]) else FIRST


def csv_of(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = COLUMNS) -> str:
    """Return rows as CSV, with empty fields for NaN."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _cell(row[key]) for key in columns})
    return text.getvalue()


def score_rows(outline: Mapping[str, Any], results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return every score that the tables are made of: one row per run, case and label, for an analysis of your own.

    A label that the case's own label file lacks has no row. HD95 is NaN where only one of the two masks has the label.

    Args:
        outline: outline of the study.
        results: finished runs.
    """
    return [
        {"run": result.name, **{key: result.facts[key] for key in ("arm", "n", "seed")}, "case": case, "label": label}
        | {metric: float(result.scores[metric][row, column]) for metric in METRICS}
        for result in results
        for row, case in enumerate(outline["cases"])
        for column, label in enumerate(outline["labels"])
        if not math.isnan(result.scores["dice"][row, column])
    ]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6f}" if value != int(value) else f"{value:g}"
    return str(value)


def curve_markdown(
    outline: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], figures: Mapping[str, Mapping[str, float]]
) -> str:
    """Return the few-label curve in Markdown: table, one sentence for each n, all labels, and the pre-trainings.

    Args:
        outline: outline of the study.
        rows: `curve_rows`.
        figures: figures of each pre-training, by name.
    """
    main = main_label(outline)
    lines = [
        f"## {outline['study']}: few-label curve",
        "",
        f"| n | arm | runs | {' | '.join(FIGURES)} |",
        "|---|---|---|" + "---|" * len(FIGURES),
    ]
    for n in outline["curve"]["n"]:
        for arm in outline["arms"]:
            lines.append(f"| {' | '.join([str(n), arm, *cells_of(rows, n, arm, main)])} |")
    lines += ["", explanation(outline), ""]
    for n in outline["curve"]["n"]:
        for arm in outline["arms"]:
            if arm != CONTROL:
                lines.append(f"- n = {n}, {arm}: {verdict(row_of(rows, n, arm, main, 'dice'))}")
    lines += [
        "",
        *label_lines(outline, rows, [(n, arm, arm) for n in outline["curve"]["n"] for arm in outline["arms"]]),
    ]
    return "\n".join([*lines, "", *encoder_table(outline, outline["curve"], outline["arms"], figures), ""])


def ablation_markdown(
    outline: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], figures: Mapping[str, Mapping[str, float]]
) -> str:
    """Return the ablation in Markdown: a table as in the paper, with its figures, all labels, and the pre-trainings.

    Args:
        outline: outline of the study.
        rows: `ablation_rows`.
        figures: figures of each pre-training, by name.
    """
    ablation, main = outline["ablation"], main_label(outline)
    named = {task for each in ablation["rows"] for task in each["tasks"]}
    tasks = [task for task in PROXY_TASKS if task in PAPER_TASKS or task in named]
    lines = [
        f"## {outline['study']}: proxy tasks, n = {ablation['n']}",
        "",
        f"| {' | '.join(tasks)} | runs | {' | '.join(FIGURES)} | paper: Dice (BTCV) | paper: HD95 |",
        "|---|---|---|" + "---|" * (len(tasks) + len(FIGURES)),
    ]
    for each in ablation["rows"]:
        marks = ["x" if task in each["tasks"] else "" for task in tasks]
        paper = ["" if each[key] is None else f"{each[key]:.2f}" for key in ("paper_dice", "paper_hd95")]
        lines.append(f"| {' | '.join([*marks, *cells_of(rows, ablation['n'], each['arm'], main), *paper])} |")
    lines += ["", explanation(outline), ""]
    for each in ablation["rows"]:
        row = row_of(rows, ablation["n"], each["arm"], main, "dice")
        if row["by_seed"]:
            lines.append(f"- {', '.join(each['tasks'])}: {'; '.join([_by_seed(row), *_doubts(row)])}.")
    arms = [each["arm"] for each in ablation["rows"]]
    named = [(ablation["n"], each["arm"], ", ".join(each["tasks"]) or CONTROL) for each in ablation["rows"]]
    lines += ["", *label_lines(outline, rows, named)]
    return "\n".join([*lines, "", *encoder_table(outline, ablation, arms, figures), ""])


def label_lines(
    outline: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], arms: Sequence[tuple[int, str, str]]
) -> list[str]:
    """Return Markdown lines: Dice of all labels together and of each, and the labels that are lower than from scratch.

    Args:
        outline: outline of the study.
        rows: see `rows_of`.
        arms: n, name and shown name of each arm.
    """
    first = outline["first_figure"]
    apart = [label for label in outline["labels"] if label not in first]
    lines = []
    if apart:
        lines += [f"All {len(outline['labels'])} labels together:", ""]
        lines += ["| n | arm | Dice | minus scratch | t interval over seeds |", "|---|---|---|---|---|"]
        for n, arm, shown in arms:
            row = row_of(rows, n, arm, MEAN, "dice")
            lines.append(f"| {n} | {shown} | {_spread(row)} | {_interval(row)} | {_t_ends(row)} |")
        lines += [""]
    lines += [
        "Dice by label" + (f"; apart from the first figure: {', '.join(apart)}:" if apart else ":"),
        "",
        f"| n | arm | {' | '.join([*first, *apart])} |",
        "|---|---|" + "---|" * len(outline["labels"]),
    ]
    for n, arm, shown in arms:
        cells = [_figure(row_of(rows, n, arm, label, "dice")["mean"]) for label in [*first, *apart]]
        lines.append(f"| {n} | {shown} | {' | '.join(cells)} |")
    found = []
    for n, arm, shown in arms:
        own = [row_of(rows, n, arm, label, "dice") for label in outline["labels"]]
        if measured := [row for row in own if not math.isnan(row["difference"])]:
            found.append(f"| {n} | {shown} | {lower_labels(measured)} |")
    if found:
        lines += ["", "Labels lower than from scratch (the intervals are not corrected for the number of labels):", ""]
        lines += ["| n | arm | label, difference, bootstrap interval |", "|---|---|---|", *found]
    return lines


def lower_labels(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the labels whose interval is below 0; else the one with the lowest difference."""
    lower = [row for row in rows if row["high"] < 0]
    if lower:
        return "; ".join(
            f"{row['label']} is lower, {_interval(row)}"
            + (f", t interval {_t_ends(row)}" if _t_ends(row) else "")
            + ("" if row["t_high"] < 0 else " (not by the t interval)" if _t_ends(row) else "")
            for row in lower
        )
    row = min(rows, key=lambda row: row["difference"])
    return f"no interval is below 0; the lowest difference is {row['label']}, {_interval(row)}" + (
        f", t interval {_t_ends(row)}" if _t_ends(row) else ""
    )


def verdict(row: Mapping[str, Any]) -> str:
    """State in words what the intervals of a row show: a gain, a loss, a hint of one, or no difference.

    A gain or loss is shown if the bootstrap interval and the t interval over seeds both exclude 0. If only the
    bootstrap interval does, which is too narrow with few seeds, or if there is no t interval, it is a hint.
    """
    if math.isnan(row["difference"]):
        return "not measured yet."
    if math.isnan(row["low"]):
        return f"{row['difference']:+.4f} for one patient: no interval."
    t_ends = f", over seeds {_t_ends(row)} (t)" if _t_ends(row) else ""
    figures = f"{row['difference']:+.4f}, {LEVEL:.0%} interval {_ends(row)}{t_ends}"
    figures += f"; {_by_seed(row)}" + "".join(f"; {doubt}" for doubt in _doubts(row))
    if row["low"] <= 0 <= row["high"]:
        return f"no difference shown ({figures}; it contains 0)."
    kind = "gain" if row["low"] > 0 else "loss"
    if row["t_low"] > 0 or row["t_high"] < 0:
        return f"a {kind} is shown ({figures})."
    why = "the t interval over seeds contains 0" if t_ends else "one seed has no t interval"
    return f"a hint of a {kind}, not shown ({figures}; {why})."


def _by_seed(row: Mapping[str, Any]) -> str:
    return ", ".join(f"seed {seed} {difference:+.4f}" for seed, difference in row["by_seed"].items())


def _doubts(row: Mapping[str, Any]) -> list[str]:
    """Return the sources of variation that the interval does not cover."""
    doubts = []
    if row["pairs_of_seeds"] == 1:
        doubts.append("only one seed: other labelled patients may give another result")
    elif row["pairs_of_seeds"] < FEW_SEEDS:
        doubts.append(f"only {row['pairs_of_seeds']} seeds: the interval is too narrow if seeds differ")
    if not row["encoder_per_seed"]:
        doubts.append("one pre-training for all seeds: the interval does not cover differences between pre-trainings")
    return doubts


def explanation(outline: Mapping[str, Any]) -> str:
    """Explain the figures of the tables."""
    first = ""
    if main_label(outline) == FIRST:
        first = f"First figure: the mean over {', '.join(outline['first_figure'])}, as the study says. "
    return first + (
        "Dice, NSD and HD95: mean over runs and patients, then over labels; ± is the standard deviation over patients "
        "(of their mean over runs). Missed: scores that HD95 lacks because the prediction does not contain the organ, "
        "which the label file has. The HD95 of arms with different missed scores is of different organs; compare them by "
        "their difference, which uses the scores that both arms have. Difference: of the same patients and seeds, with "
        f"its {LEVEL:.0%} percentile bootstrap interval ({DRAWS} draws; each resamples the seeds and, independently, "
        f"the patients with replacement). The {LEVEL:.0%} t interval takes only the differences of the seeds; with "
        "few seeds it is the honest one. Better and worse count patients by their mean Dice over runs and labels."
    )


def cells_of(rows: Sequence[Mapping[str, Any]], n: int, arm: str, label: str) -> list[str]:
    """Return the number of runs, and the `FIGURES` of an arm at one n."""
    dice, nsd, hd95 = (row_of(rows, n, arm, label, metric) for metric in METRICS)
    runs = f"{dice['seeds']} of {dice['seeds_planned']}"
    scores = [_spread(dice), _spread(nsd), _spread(hd95, 1)]
    return [runs, *scores, _interval(dice), _t_ends(dice), _wins(dice), _interval(hd95, 1)]


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


def _t_ends(row: Mapping[str, Any], digits: int = 4) -> str:
    return "" if math.isnan(row["t_low"]) else f"[{row['t_low']:+.{digits}f}, {row['t_high']:+.{digits}f}]"


def _interval(row: Mapping[str, Any], digits: int = 4) -> str:
    if math.isnan(row["difference"]):
        return ""
    return f"{row['difference']:+.{digits}f}" + ("" if math.isnan(row["low"]) else f" {_ends(row, digits)}")


def _wins(row: Mapping[str, Any]) -> str:
    return "" if math.isnan(row["difference"]) else f"{row['higher']:g} / {row['lower']:g}"
