# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Write the report of the demo: one self-contained HTML file, made from the files of the runs.

python -m demo.report --out demo/out
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread, imsave

from bundles.common.data.case_names import case_name
from bundles.common.errors import InputError, report_input_errors
from bundles.common.files import atomic_path
from bundles.common.training.log import read_log
from bundles.segmentation.results.overlay import load_ras, organ_colours, overlay_figure

from .findings import (
    FOUND,
    LEVEL,
    Comparison,
    compare,
    control_sentence,
    interval_of_mean,
    learnt_sentence,
    missed_organs,
    missed_sentences,
    not_learnt,
    organs_of_patients,
    patient_means,
    patients,
    read_rows,
    read_validation,
    start_sentence,
)
from .summary import RUNS, clock, mlflow_command, read_scores, read_stages, score_text, tolerance_text

PRETRAINED, FINETUNED, SCRATCH, SHUFFLED = "swin_unetr_pretrain", *RUNS
COLOURS = {PRETRAINED: "#0f766e", FINETUNED: "#2563eb", SCRATCH: "#d97706", SHUFFLED: "#8b95a3"}
# For each proxy task: its title, and what its picture shows.
TASKS = {
    "inpainting": (
        "Fill holes (inpainting)",
        "Blocks of each crop are replaced by noise, and the network restores the crop. To fill a block it must learn "
        "what anatomy to expect there. From left to right: the crop; the masked view; restored, the masked view with its "
        "blocks filled by the network; the whole reconstruction.",
    ),
    "contrast": (
        "Find the partner (contrast)",
        "Two views of one crop (A1 and B1) should be more similar to each other than to any other view. The matrix "
        "shows the similarity of all pairs; the two views of a crop are outlined in red.",
    ),
    "rotation": (
        "Tell the turn (rotation)",
        "Each view is rotated by 0, 90, 180 or 270 degrees about the body's long axis, and the network predicts the "
        "angle. Green: correct, red: wrong.",
    ),
}
ARTEFACTS = {
    "swin_unetr_pretrain/models/encoder.pt": "pre-trained encoder, for the segmentation bundles' --pretrained_encoder",
    "swin_unetr_pretrain/models/model.pt": "encoder with the heads of the proxy tasks",
    "swin_unetr_btcv_seg/models/model.pt": "segmentation network fine-tuned from the encoder",
    "from_scratch/models/model.pt": "the same network from random weights, with the same steps and seed",
    "shuffled_labels/models/model.pt": "control: trained on label maps of other patients",
    "swin_unetr_btcv_seg/evaluation/scores.csv": "Dice, NSD and HD95 per case and organ (also in the folders of the other runs)",
    "segmentation": "segmentations of the unseen scans in each scan's own geometry, with pictures",
    "data": "the synthetic patients as NIfTI, with data lists",
    "mlruns.db": "curves and settings of all four trainings (MLflow)",
    "logs": "full output of each stage",
}
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "svg.hashsalt": "demo",  # makes the report reproducible
}


def write_report(out: Path) -> Path:
    """Write ``report.html`` from the files of a finished demo.

    Args:
        out: the demo's folder.

    Returns:
        Path of the report.

    Raises:
        InputError: if a file of the demo is missing.
    """
    try:
        with matplotlib.rc_context(STYLE):
            content = _content(Path(out))
    except FileNotFoundError as error:
        raise InputError(
            f"{error.filename} is missing. Run the demo to its end, then write the report again."
        ) from error
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    report = Path(out) / "report.html"
    with atomic_path(report) as temporary:
        temporary.write_text(environment.get_template("report.html.jinja").render(content), encoding="utf-8")
    return report


def _content(out: Path) -> dict[str, Any]:
    """Return everything that the template shows."""
    scores, stages, validation = read_scores(out), read_stages(out), read_validation(out)
    rows = {run: read_rows(out, run) for run in RUNS}
    pretraining = read_log(out / PRETRAINED / "training_log.csv")
    finetuning = {run: read_log(out / run / "training_log.csv") for run in RUNS}
    labelled = json.loads((out / "data/labelled/dataset.json").read_text())
    unlabelled = json.loads((out / "data/unlabelled/dataset.json").read_text())
    start = compare(rows[FINETUNED], rows[SCRATCH])
    control = compare(rows[SCRATCH], rows[SHUFFLED])
    present = organs_of_patients(out, labelled)
    missed = {run: missed_organs(rows[run], present) for run in (FINETUNED, SCRATCH)}
    return {
        "counts": {
            "unlabelled": len(unlabelled["training"]) + len(unlabelled["validation"]),
            **{section: len(labelled[section]) for section in ("training", "validation")},
            "test": patients(len(labelled["test"])),
            "organs": len(labelled["labels"]) - 1,
            "pretraining_steps": int(pretraining[-1]["step"]),
            "finetuning_steps": int(finetuning[FINETUNED][-1]["step"]),
        },
        "learnt": {"text": learnt_sentence(validation), "failed": not_learnt(validation)},
        "tasks": [
            {
                "title": title,
                "text": text,
                **_figures(task, validation),
                **validation["verdicts"][task],
                "panels": _panels(task, out / PRETRAINED / f"panel_{task}.png"),
                "curve": _svg(curve_figure({"": pretraining}, f"loss_{task}", {"": COLOURS[PRETRAINED]})),
            }
            for task, (title, text) in TASKS.items()
        ],
        "start": {"text": start_sentence(start), "verdict": start.verdict, "picture": _svg(comparison_figure(start))},
        "control": {
            "text": control_sentence(control),
            "failed": control.interval is not None and control.verdict != "higher",
        },
        "missed": missed_sentences(missed[FINETUNED]),
        "any_missed": any(missed.values()),
        "found": FOUND,
        "level": f"{LEVEL:.0%}",
        "runs": [{"title": title, "colour": COLOURS[run]} for run, title in RUNS.items()],
        "total_time": clock(sum(stage["seconds"] for stage in stages)),
        "stages": [
            {
                "title": stage["title"],
                "time": clock(stage["seconds"]),
                "share": 100 * stage["seconds"] / max(other["seconds"] for other in stages),
                "command": "python " + shlex.join(stage["key"]["command"]),
            }
            for stage in stages
        ],
        "finetuning_curves": _svg(
            curve_figure(
                {RUNS[run]: finetuning[run] for run in (FINETUNED, SCRATCH)},
                "loss",
                {RUNS[run]: COLOURS[run] for run in RUNS},
                size=(4.6, 3.0),
            )
        ),
        "overlays": _overlays(out, labelled, patient_means(rows[FINETUNED], "dice")),
        "legend": _legend(labelled, missed[FINETUNED]),
        "organs": [
            {
                "name": organ.replace("_", " "),
                "scores": [
                    score_text(scores[run]["labels"][organ][metric]["mean"])
                    for run in RUNS
                    for metric in ("dice", "nsd")
                ],
                "missed": [
                    f"{missed[run][organ][0]} of {missed[run][organ][1]}" if organ in missed[run] else ""
                    for run in missed
                ],
            }
            for organ in scores[FINETUNED]["labels"]
        ],
        "means": [score_text(scores[run][metric]) for run in RUNS for metric in ("mean_dice", "mean_nsd")],
        "intervals": [
            _range_text(interval_of_mean(list(patient_means(rows[run], metric).values())))
            for run in RUNS
            for metric in ("dice", "nsd")
        ],
        "tolerance": tolerance_text(scores[FINETUNED]),
        "organ_dots": _svg(organ_figure(rows)),
        "artefacts": [(path, text) for path, text in ARTEFACTS.items() if (out / path).exists()],
        "mlflow": mlflow_command(out),
    }


def _figures(task: str, validation: Mapping[str, Any]) -> dict[str, str]:
    """Return the figure of a proxy task on held-out views, and what it is without learning."""
    if task == "rotation":
        return {"value": f"{validation['rotation_accuracy']:.0%}", "of": "turns told", "chance": "25% by chance"}
    if task == "contrast":
        chance = math.exp(-validation["contrast_without_learning"])  # one of the other views
        return {
            "value": f"{validation['contrast_top1']:.0%}",
            "of": "partners found",
            "chance": f"{chance:.0%} by chance",
        }
    error = 10 ** ((validation["masked_psnr_of_a_constant"] - validation["masked_psnr"]) / 10)
    return {"value": f"{error:.0%}", "of": "squared error left in the holes", "chance": "100% with the best plain grey"}


def _range_text(interval: tuple[float, float] | None) -> str:
    return "–" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"


def curve_figure(
    logs: Mapping[str, Sequence[Mapping[str, float]]],
    name: str,
    colours: Mapping[str, str],
    *,
    size: tuple[float, float] = (3.6, 2.1),
) -> Figure:
    """Plot one loss over the steps.

    Args:
        logs: rows of each run's training log, by the run's title; an empty title gives no legend.
        name: column to plot.
        colours: colour of each run, by title.
        size: width and height in inches.
    """
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    for title, rows in logs.items():
        steps, values = [row["step"] for row in rows], [row[name] for row in rows]
        axes.plot(steps, values, color=colours[title], linewidth=1.6, label=title, marker="" if len(rows) > 2 else ".")
    axes.set(xlabel="step", ylabel="loss")
    if any(logs):
        axes.legend(frameon=False)
    return figure


def comparison_figure(found: Comparison) -> Figure:
    """Plot the difference in mean Dice of each patient as a dot, and their mean with its interval.

    Args:
        found: the pre-trained start (first) against the random one (second).
    """
    differences = np.subtract(found.first, found.second)
    figure = Figure(figsize=(4.6, 0.32 * len(found.cases) + 1.4), layout="constrained")
    axes = figure.subplots()
    rows = np.arange(len(found.cases))
    axes.axvline(0, color="#16202e", linewidth=1.2)
    axes.scatter(differences, rows, color=COLOURS[FINETUNED], s=36)
    mean = len(rows) + 0.3
    if found.interval is not None:
        axes.plot(found.interval, (mean, mean), color="#16202e", linewidth=3, solid_capstyle="butt")
    axes.plot(found.difference, mean, "D", color="#16202e", markersize=7)
    reach = 1.1 * np.max(np.abs([*differences, *(found.interval or ()), 0.01]))
    axes.set(xlim=(-reach, reach), ylim=(mean + 0.6, -0.6), xlabel="difference in mean Dice")
    axes.set_yticks([*rows, mean], [*found.cases, f"mean, {LEVEL:.0%}"])
    axes.locator_params(axis="x", nbins=5)
    axes.set_title(f"{RUNS[SCRATCH]} better", loc="left", fontsize=10, color=COLOURS[SCRATCH])
    axes.set_title(f"{RUNS[FINETUNED]} better", loc="right", fontsize=10, color=COLOURS[FINETUNED])
    axes.tick_params(axis="y", length=0)
    return figure


def organ_figure(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Plot the Dice of each organ: a dot for each patient, a line at their mean, one row per run.

    Args:
        rows: scores of each run in `summary.RUNS`, of `findings.read_rows`.
    """
    organs = list(dict.fromkeys(row["label"] for row in rows[FINETUNED]))
    figure = Figure(figsize=(4.6, 0.46 * len(organs) + 1.0), layout="constrained")
    axes = figure.subplots()
    for place, (run, title) in enumerate(RUNS.items()):
        offset = 0.25 * (place - 1)
        at = np.array([organs.index(row["label"]) for row in rows[run]]) + offset
        dice = np.array([row["dice"] for row in rows[run]])
        axes.scatter(dice, at, color=COLOURS[run], s=16, alpha=0.55, linewidths=0, label=title, clip_on=False)
        means = [np.mean(values) if (values := _known(rows[run], organ)) else np.nan for organ in organs]
        axes.scatter(means, np.arange(len(organs)) + offset, color=COLOURS[run], marker="|", s=90, linewidths=2.4)
    axes.set_yticks(range(len(organs)), [organ.replace("_", " ") for organ in organs])
    axes.set(xlim=(0, 1), xlabel="Dice", ylim=(len(organs) - 0.5, -0.5))
    for line in np.arange(len(organs) - 1) + 0.5:
        axes.axhline(line, color="#e3e8ee", linewidth=0.8, zorder=0)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    legend = figure.legend(
        loc="outside upper center", ncols=len(RUNS), frameon=False, handletextpad=0.2, columnspacing=1.2, markerscale=2
    )
    for handle in legend.legend_handles:
        handle.set_alpha(1)
    return figure


def _known(rows: Sequence[Mapping[str, Any]], organ: str) -> list[float]:
    return [row["dice"] for row in rows if row["label"] == organ and not math.isnan(row["dice"])]


def _organs(labelled: Mapping[str, Any]) -> dict[int, str]:
    return {int(value): organ for value, organ in labelled["labels"].items() if int(value)}


def _legend(labelled: Mapping[str, Any], missed: Mapping[str, tuple[int, int]]) -> list[dict[str, str]]:
    """Return name and colour of each organ in the overlays, and in how many patients it was not found."""
    organs = _organs(labelled)
    return [
        {
            "name": organ.replace("_", " "),
            "colour": to_hex(organ_colours(organs)[value]),
            "missed": f"not found in {missed[organ][0]} of {missed[organ][1]}" if organ in missed else "",
        }
        for value, organ in organs.items()
    ]


def _overlays(out: Path, labelled: Mapping[str, Any], dice: Mapping[str, float]) -> list[dict[str, str]]:
    """Draw the prediction for each test scan and its reference, the one of median Dice first.

    Args:
        out: the demo's folder.
        labelled: the data list of labelled scans.
        dice: mean Dice of each patient.
    """
    cases = {case_name(case["image"]): case for case in labelled["test"]}
    ranked = sorted(cases, key=lambda name: dice.get(name, 0.0))
    median = ranked[(len(ranked) - 1) // 2]
    return [
        {**_overlay(out, cases[name], _organs(labelled)), "dice": score_text(dice.get(name))}
        for name in (median, *(name for name in cases if name != median))
    ]


def _overlay(out: Path, case: Mapping[str, str], organs: Mapping[int, str]) -> dict[str, str]:
    """Draw the prediction for one scan and the reference. The legend is part of the page, in readable letters."""
    name = case_name(case["image"])
    image, spacing = load_ras(_existing(out / "data/labelled" / case["image"]))
    truth, _ = load_ras(_existing(out / "data/labelled" / case["label"]))
    prediction, _ = load_ras(_existing(out / "segmentation" / f"{name}_seg.nii.gz"))
    figure = overlay_figure(image, prediction, truth=truth, spacing=spacing, labels=organs)
    figure.legends[0].remove()
    for axes in figure.axes:
        axes.title.set_fontsize(13)
        axes.yaxis.label.set_fontsize(14)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, bbox_inches="tight", pad_inches=0.05)
    size = " × ".join(map(str, image.shape))
    voxel = " × ".join(f"{millimetres:.1f}" for millimetres in spacing)
    return {"name": name, "size": size, "voxel": voxel, "picture": _data_address("image/png", buffer.getvalue())}


def _existing(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(2, "No such file", str(path))
    return path


def _svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _data_address("image/svg+xml", buffer.getvalue())


def _panels(task: str, path: Path) -> list[str]:
    """Return the picture of a proxy task, large enough to read: half of the crops, or all views in two rows."""
    picture = imread(_existing(path))
    if task == "inpainting":
        pictures = halves(picture, axis=0)[:1]
    else:
        pictures = halves(picture, axis=1) if task == "rotation" else [picture]
    return [_png(each) for each in pictures]


def halves(picture: np.ndarray, *, axis: int) -> list[np.ndarray]:
    """Cut a picture (rows, columns, channels) at the blank row (axis 0) or column (1) nearest to its middle.

    Returns:
        The two parts; the whole picture if no row or column is blank.
    """
    blank = np.flatnonzero((picture == 1).all(axis=(1 - axis, 2)))
    if not len(blank):
        return [picture]
    nearest = blank[np.abs(blank - picture.shape[axis] / 2).argmin()]
    return np.split(picture, [nearest], axis=axis)


def _png(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    imsave(buffer, np.ascontiguousarray(picture), format="png")
    return _data_address("image/png", buffer.getvalue())


def _data_address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report from the command line."""
    parser = argparse.ArgumentParser(prog="python -m demo.report", description="Write the report of a finished demo.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the demo")
    try:
        print(write_report(parser.parse_args(arguments).out))
    except InputError as error:
        print(f"Stopped: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    report_input_errors()
    sys.exit(main())
