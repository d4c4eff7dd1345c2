# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Write the report of the demo: one self-contained HTML file, made from the files of the runs.

python -m demo.report --out demo/out
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from bundles.common.data.case_names import case_name
from bundles.common.errors import InputError
from bundles.common.files import atomic_path
from bundles.common.training.log import read_log
from bundles.segmentation.results.overlay import load_ras, overlay_figure

from .summary import RUNS, clock, mlflow_command, read_scores, read_stages, score_text, tolerance_text

PRETRAINED, FINETUNED, SCRATCH, SHUFFLED = "swin_unetr_pretrain", *RUNS
COLOURS = {PRETRAINED: "#0f766e", FINETUNED: "#2563eb", SCRATCH: "#ea8a0b", SHUFFLED: "#9ca3af"}
PANELS = {
    "inpainting": "Blocks of each crop are replaced by noise, and the network restores the crop. "
    "To fill a block it must learn what anatomy to expect there. Restored: the view with its blocks filled by the network.",
    "rotation": "Each view is rotated by 0, 90, 180 or 270 degrees about the body's long axis, and the network "
    "predicts the angle. Green: correct, red: wrong.",
    "contrast": "Two views of one crop (A1 and B1) should be more similar to each other than to any other view. The "
    "matrix shows the similarity of all pairs; the two views of a crop are outlined in red.",
}
ARTEFACTS = {
    "swin_unetr_pretrain/models/encoder.pt": "pre-trained encoder, for the segmentation bundles' --pretrained_encoder",
    "swin_unetr_pretrain/models/model.pt": "encoder with the heads of the proxy tasks",
    "swin_unetr_btcv_seg/models/model.pt": "segmentation network fine-tuned from the encoder",
    "from_scratch/models/model.pt": "the same network from random weights, with the same steps and seed",
    "shuffled_labels/models/model.pt": "control: trained on label maps of other patients",
    "swin_unetr_btcv_seg/evaluation/scores.csv": "Dice, NSD and HD95 per case and organ (also in the folders of the other runs)",
    "segmentation": "segmentation of the unseen scan in the scan's own geometry, with a picture",
    "data": "the synthetic patients as NIfTI, with data lists",
    "mlruns.db": "curves and settings of all four trainings (MLflow)",
    "logs": "full output of each stage",
}
STYLE = {
    "font.size": 9,
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
    scores, stages = read_scores(out), read_stages(out)
    pretraining = read_log(out / PRETRAINED / "training_log.csv")
    finetuning = {run: read_log(out / run / "training_log.csv") for run in RUNS}
    labelled = json.loads((out / "data/labelled/dataset.json").read_text())
    unlabelled = json.loads((out / "data/unlabelled/dataset.json").read_text())
    losses = {name: name.removeprefix("loss_") for name in pretraining[0] if name.startswith("loss")}
    return {
        "counts": {
            "unlabelled": len(unlabelled["training"]) + len(unlabelled["validation"]),
            **{section: len(labelled[section]) for section in ("training", "validation", "test")},
            "organs": len(labelled["labels"]) - 1,
            "pretraining_steps": int(pretraining[-1]["step"]),
            "finetuning_steps": int(finetuning[FINETUNED][-1]["step"]),
        },
        "runs": [
            {
                "title": title,
                "colour": COLOURS[run],
                "dice": score_text(scores[run]["mean_dice"]),
                "nsd": score_text(scores[run]["mean_nsd"]),
            }
            for run, title in RUNS.items()
        ],
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
        "pretraining_curves": [
            (
                "Sum of the three" if name == "loss" else task.capitalize(),
                _svg(curve_figure({"": pretraining}, name, {"": COLOURS[PRETRAINED]})),
            )
            for name, task in losses.items()
        ],
        "validation": json.loads((out / PRETRAINED / "validation.json").read_text()),
        "panels": [(task, text, _png(out / PRETRAINED / f"panel_{task}.png")) for task, text in PANELS.items()],
        "finetuning_curves": _svg(
            curve_figure(
                {RUNS[run]: finetuning[run] for run in (FINETUNED, SCRATCH)},
                "loss",
                {RUNS[run]: COLOURS[run] for run in RUNS},
                size=(7, 2.8),
            )
        ),
        "overlay": _overlay(out, labelled),
        "organs": [
            (
                organ.replace("_", " "),
                [
                    score_text(scores[run]["labels"][organ][metric]["mean"])
                    for run in RUNS
                    for metric in ("dice", "nsd")
                ],
            )
            for organ in scores[FINETUNED]["labels"]
        ],
        "means": [score_text(scores[run][metric]) for run in RUNS for metric in ("mean_dice", "mean_nsd")],
        "tolerance": tolerance_text(scores[FINETUNED]),
        "dice_bars": _svg(dice_figure(scores)),
        "artefacts": [(path, text) for path, text in ARTEFACTS.items() if (out / path).exists()],
        "mlflow": mlflow_command(out),
    }


def curve_figure(
    logs: Mapping[str, Sequence[Mapping[str, float]]],
    name: str,
    colours: Mapping[str, str],
    *,
    size: tuple[float, float] = (3.4, 2.1),
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


def dice_figure(scores: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Plot the Dice of each organ as bars, one per run.

    Args:
        scores: ``summary.json`` of each run in `summary.RUNS`, by folder.
    """
    organs = list(scores[FINETUNED]["labels"])
    figure = Figure(figsize=(7, 0.42 * len(organs) + 0.8), layout="constrained")
    axes = figure.subplots()
    rows = np.arange(len(organs))
    for place, (run, title) in enumerate(RUNS.items()):
        dice = [scores[run]["labels"][organ]["dice"]["mean"] for organ in organs]
        values = [np.nan if value is None else value for value in dice]
        axes.barh(rows + 0.26 * (place - 1), values, height=0.24, color=COLOURS[run], label=title)
    axes.set_yticks(rows, [organ.replace("_", " ") for organ in organs])
    axes.set(xlim=(0, 1), xlabel="Dice", ylim=(len(organs) - 0.5, -0.5))
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside upper center", ncols=len(RUNS), frameon=False)
    return figure


def _overlay(out: Path, labelled: Mapping[str, Any]) -> dict[str, str]:
    """Draw the prediction for the first test scan and the reference."""
    case = labelled["test"][0]
    name = case_name(case["image"])
    image, spacing = load_ras(_existing(out / "data/labelled" / case["image"]))
    truth, _ = load_ras(_existing(out / "data/labelled" / case["label"]))
    prediction, _ = load_ras(_existing(out / "segmentation" / f"{name}_seg.nii.gz"))
    organs = {int(value): organ.replace("_", " ") for value, organ in labelled["labels"].items() if int(value)}
    figure = overlay_figure(image, prediction, truth=truth, spacing=spacing, labels=organs)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", pad_inches=0.05)
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


def _png(path: Path) -> str:
    return _data_address("image/png", path.read_bytes())


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
    sys.exit(main())
