# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""What a run writes besides the labels: table, data list, contact sheets, and how far agreement can be trusted."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ...common.files import save_figure, write_text
from ...common.scans.contact_sheet import write_sheets
from .agreement import Relation
from .outputs import Outputs
from .scans_of_run import TRAINING, Scan, ScansOfRun

if TYPE_CHECKING:
    from .propagate import Summary

TABLE = "propagation.csv"
MEASURED = "left_one_out.csv"
DATA_LIST = "dataset.json"
COLUMNS = ("scan", "organ", "kept", "reason", "agreement", "confidence", "volume")
HEADER = ("scan", "organ", "kept", "reason", "agreement", "confidence", "volume_ml")


def write_results(
    out: Path,
    *,
    scans: ScansOfRun,
    results: Sequence[Mapping[str, Any]],
    measured: Sequence[Mapping[str, Any]],
    min_agreement: float,
    relation: Relation | None,
    real: Sequence[Scan],
    kept: Collection[str] | None,
    names: Mapping[str, Any],
) -> None:
    """Write all results except the labels.

    Args:
        out: output folder.
        scans: the run's scans.
        results: results of `label_scan`, in the order of ``scans.targets``.
        measured: rows of the labelled scans that were left out one by one.
        min_agreement: the value that was used.
        relation: relation of agreement and Dice.
        real: labelled scans whose labels can be used for training.
        kept: names of the scans with a label; None: write no data list.
        names: ``labels`` and ``modality`` of the data list.
    """
    write_text(out / TABLE, table_text(results))
    if measured:
        write_text(out / MEASURED, _csv(("scan", "organ", "agreement", "dice"), measured))
        save_figure(agreement_figure(measured, min_agreement, relation), out / "agreement.png")
    else:
        for file in (MEASURED, "agreement.png"):
            (out / file).unlink(missing_ok=True)
    if kept is not None:
        write_text(out / DATA_LIST, data_list_text(scans, results, real, kept, names))
    _write_sheets(out, results)


def table_text(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the table: a row per scan and organ, and one row (organ ``*``) for a scan that is left out."""
    rows = []
    for result in results:
        if result["reason"]:
            rows.append({"scan": result["scan"], "organ": "*", "kept": False, "reason": result["reason"]})
        rows += [
            {"scan": result["scan"], **row, "kept": row["kept"] and result["labelled"]} for row in result["organs"]
        ]
    return _csv(COLUMNS, rows, header=HEADER)


def _csv(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], *, header: Sequence[str] | None = None) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header or columns)
    for row in rows:
        writer.writerow([_cell(row.get(column)) for column in columns])
    return text.getvalue()


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else value


def data_list_text(
    scans: ScansOfRun,
    results: Sequence[Mapping[str, Any]],
    real: Sequence[Scan],
    kept: Collection[str],
    names: Mapping[str, Any],
) -> str:
    """Return a data list for training: real labels, carried labels (marked), and the held-out scans as they were.

    Scans have absolute paths, labels of this run relative ones.

    Args:
        scans: the run's scans.
        results: results of `label_scan`, which name the labelled scans that each label was carried from.
        real: labelled scans.
        kept: names of the scans with a carried label.
        names: ``labels`` and ``modality``.
    """

    def entry(scan: Scan, label: str, **notes: Any) -> dict[str, Any]:
        return {"image": scan.image, "label": label, **({"patient": scan.patient} if scan.patient else {}), **notes}

    images = {scan.name: scan.image for scan in scans.labelled}
    sources = {
        result["scan"]: [images[pair["atlas"]] for pair in result["pairs"] if not pair["reason"]] for result in results
    }
    carried = [
        entry(scan, f"./labels/{scan.name}.nii.gz", carried=True, carried_from=sources[scan.name])
        for scan in scans.targets
        if scan.name in kept
    ]
    content = {
        **names,
        "training": [entry(scan, scan.label, **_weight(scan)) for scan in real] + carried,
        **{
            section: [{key: value for key, value in each.items() if key != "fold"} for each in entries]
            for section, entries in scans.held_out.items()
            if entries
        },
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _weight(scan: Scan) -> dict[str, float]:
    return {} if scan.weight == 1 else {"weight": scan.weight}


def _write_sheets(out: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Write the contact sheets of scans with a label, and of scans that were left out after registration."""
    for stem, labelled, colour in (("contact_sheet", True, "dimgray"), ("left_out", False, "firebrick")):
        shown = [result for result in results if result["labelled"] is labelled and result["organs"]]
        pictures = []
        for result in shown:
            picture = np.load(Outputs(str(out), result["scan"]).picture)
            pictures.append((result["scan"], _remark(result), picture))
        write_sheets(out, pictures, stem=stem, colour=colour)


def _remark(result: Mapping[str, Any]) -> str:
    kept = [row for row in result["organs"] if row["kept"]]
    agreed = [row["agreement"] for row in result["organs"] if row["agreement"] is not None]
    text = f"{len(kept)} of {len(result['organs'])} organs"
    if agreed:
        text += f", mean agreement {sum(agreed) / len(agreed):.2f}"
    without = [row["organ"] for row in result["organs"] if not row["kept"]]
    if without and kept:
        text += f"; without {', '.join(without)}"
    return text


def agreement_figure(measured: Sequence[Mapping[str, Any]], min_agreement: float, relation: Relation | None) -> Figure:
    """Draw the Dice of carried labels with the labelled scans' own, over the agreement of the copies.

    Organs without agreement (fewer than two copies) are drawn at the left edge.

    Args:
        measured: rows with ``organ``, ``agreement`` and ``dice``.
        min_agreement: the value that was used.
        relation: relation of both.
    """
    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for organ in dict.fromkeys(row["organ"] for row in measured):
        rows = [row for row in measured if row["organ"] == organ and row["dice"] is not None]
        agreed = [-0.04 if row["agreement"] is None else row["agreement"] for row in rows]
        axes.scatter(agreed, [row["dice"] for row in rows], s=18, label=organ)
    axes.axvline(min_agreement, color="black", linewidth=1, linestyle="--")
    axes.set(
        xlim=(-0.08, 1),
        ylim=(0, 1),
        xlabel="Dice between the copies (left edge: one copy)",
        ylabel="Dice with the own label",
    )
    title = f"labelled scans, each from the others; kept from {min_agreement:.2f} on"
    if relation is not None and not math.isnan(relation.rank_correlation):
        title += f"; rank correlation {relation.rank_correlation:.2f}"
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7)
    return figure


def _alike(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """Return names by what their reasons share, apart from numbers, files, their own names and text in brackets."""
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        common = re.sub(r"\S*[/\d]\S*|\(.*", "", reason.replace(name, ""))
        groups.setdefault(common, []).append(name)
    return groups


def summary_lines(out: Path, summary: Summary, purpose: str, *, held_out: bool) -> list[str]:
    """Return the last lines of the log: what came of the run, and what to do next.

    Args:
        out: output folder.
        summary: what came of the run.
        purpose: the run's purpose.
        held_out: whether the data list has scans that gave no labels, to validate with.
    """
    total = len(summary.labelled) + len(summary.left_out)
    lines = [f"{len(summary.labelled)} of {total} scans got a label; each has its rows in {out / TABLE}"]
    lines += [
        f"left out: {len(names):4d}, such as {names[0]}: {summary.left_out[names[0]]}"
        for names in sorted(_alike(summary.left_out).values(), key=len, reverse=True)
    ]
    lines.append(f"organs are kept from an agreement of {summary.min_agreement:.2f} on")
    if purpose == TRAINING:
        lines.append(
            f"look at {out / 'contact_sheet_001.png'}, remove what is wrong from {out / DATA_LIST}, then train:"
        )
        fold = "" if held_out else " --fold all"
        lines.append(
            f"  --dataset_dir {out}{fold} (real and carried labels together; see --real_repeats, --real_only_steps)"
        )
        if not held_out:
            lines.append(
                "all labelled scans gave their labels, so none is left to validate with: name some as validation in the list, "
                "or carry only from the others (--fold 0)"
            )
    else:
        lines.append(f"masks: {out / 'masks'}")
    return lines
