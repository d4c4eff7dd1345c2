# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Compare carried labels with the true labels that the study hides from them."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy.stats import spearmanr

from bundles.common.data.case_names import case_names
from bundles.common.data.list_forms.list_file import first_file
from bundles.common.errors import InputError
from bundles.common.files import save_figure
from bundles.common.run.worker_pool import Died
from bundles.common.scans.headers.axes import turned
from bundles.common.words import sentence
from bundles.segmentation.models.label_names import organ_names
from bundles.segmentation.propagation.agreement import dice_of_organs
from bundles.segmentation.propagation.fusion import IGNORE
from bundles.segmentation.propagation.itk_images import as_label
from bundles.segmentation.propagation.records import UNEXPECTED
from bundles.segmentation.propagation.results import TABLE, agreement_figure
from bundles.segmentation.results.metrics import score_case
from bundles.segmentation.results.score_summary import METRICS
from tools.bundle_runs import Run

from .records import read_done

TRUTH, CARRIED = "truth", "carried"  # data lists of a run; the latter is also the folder of `propagate.yaml`
PICTURE = "agreement_with_truth.png"
OF_THE_MACHINE = (
    "cannot be read",
    UNEXPECTED,
    Died.reason.partition(",")[0],
)  # reasons that say nothing about a scan's content


def compare_with_truth(run: Run, folder: Path) -> list[dict[str, Any]]:
    """Return the Dice of every carried organ with the hidden label of its scan, and draw it over the agreement.

    Args:
        run: a propagation that is finished.
        folder: its folder, which gets `PICTURE`.

    Returns:
        Rows with ``case``, ``label``, ``agreement`` (None with one copy), ``kept`` and ``dice`` (None where the scan's own
        label lacks the organ, as in the scores). Scans that were left out before registration have none.
    """
    labels, rows = organ_names(run.row["labels"]), []
    table = _read_table(folder)
    names = _names(run)
    for case, entry in zip(run.cases["unlabelled"], run.lists[TRUTH]["test"], strict=True):
        name = names[first_file(entry)]
        mask = folder / CARRIED / "masks" / f"{name}_seg.nii.gz"
        if not mask.is_file():
            continue
        carried = nib.load(mask)
        truth, _ = _truth(entry["label"], like=carried.affine)
        dice = dice_of_organs(np.asarray(carried.dataobj), truth, labels=labels)
        drawn = {organ for value, organ in labels.items() if (truth == value).any()}
        for row in table.get(name, []):
            agreed = float(row["agreement"]) if row["agreement"] else None
            rows.append(
                {"case": case, "label": row["organ"], "agreement": agreed, "kept": row["kept"] == "true"}
                | {"dice": round(dice[row["organ"]], 6) if row["organ"] in drawn else None}
            )
    if rows:
        shown = [{"organ": row["label"], "agreement": row["agreement"], "dice": row["dice"]} for row in rows]
        least = min((row["agreement"] for row in rows if row["kept"] and row["agreement"] is not None), default=0.0)
        figure = agreement_figure(shown, least, None)
        figure.axes[0].set_title("scans whose labels were hidden; line: smallest agreement that was kept", fontsize=9)
        save_figure(figure, folder / PICTURE)
    return rows


def scores_of_masks(run: Run, folder: Path) -> list[dict[str, Any]]:
    """Return the scores of carried masks, as an evaluation gives them; a scan without a mask scores as background.

    Args:
        run: a run that carried labels to the scored patients.
        folder: its folder.

    Raises:
        InputError: a scan was left out because it could not be read or its process died, which says nothing about the
            method.
    """
    labels, names, rows = organ_names(run.row["labels"]), _names(run), []
    reasons = _reasons(folder)
    for case, entry in zip(run.cases["scored"], run.lists["scored"]["test"], strict=True):
        mask = folder / CARRIED / "masks" / f"{names[first_file(entry)]}_seg.nii.gz"
        reason = reasons.get(names[first_file(entry)], "")
        if not mask.is_file() and any(fault in reason for fault in OF_THE_MACHINE):
            raise InputError(f"{first_file(entry)} has no carried mask, and not for what it shows: {sentence(reason)}")
        carried = nib.load(mask) if mask.is_file() else None
        truth, spacing = _truth(entry["label"], like=None if carried is None else carried.affine)
        voxels = np.zeros(truth.shape, np.uint8) if carried is None else np.asarray(carried.dataobj).astype(np.uint8)
        if IGNORE not in labels:  # unknown voxels count as background in both, as in an evaluation
            voxels, truth = (np.where(truth == IGNORE, 0, each) for each in (voxels, truth))
        scores = score_case(
            voxels,
            truth,
            labels=labels,
            spacing=spacing,
            tolerance=run.row["nsd_tolerance"],
        )
        rows += [
            {"case": case, "label": organ}
            | {metric: None if math.isnan(score[metric]) else score[metric] for metric in METRICS}
            for organ, score in scores.items()
        ]
    return rows


def carried_table(out: Path) -> str:
    """Return a table (Markdown) of the finished propagations of a study's folder; empty without any.

    Dice is the mean over the organs that a scan has, of all carried labels and of those that were kept. The correlation
    is Spearman's between agreement and Dice: over all organs and scans, which also says that some organs are easier than
    others, and within organs (its mean over the organs), which says whether agreement distinguishes good scans from bad
    ones.
    """
    lines = []
    for folder in sorted(path for path in (out / "runs").glob("carry_*") if path.is_dir()):
        if not (done := read_done(folder)):
            continue
        facts, rows = done["settings"]["facts"], done["carried"]
        known = [row for row in rows if row["dice"] is not None]
        both = [row for row in known if row["agreement"] is not None]
        scans = _number_labelled(folder, rows)
        lines.append(
            f"| {facts['arm']} | {facts['n']} | {facts['seed']} | {scans} of {facts['steps']} | {_mean(known)} | "
            f"{_mean([row for row in known if row['kept']])} | {_correlation(both)} | {_within_organs(both)} | {done['seconds'] / 60:.0f} |"
        )
    if not lines:
        return ""
    head = (
        "| arm | n | seed | scans with a label | Dice of all | Dice of kept | correlation | within organs | minutes |"
    )
    return "\n".join([head, "|---|---|---|---|---|---|---|---|---|", *lines]) + "\n"


def _number_labelled(folder: Path, rows: Sequence[Mapping[str, Any]]) -> int:
    """Return how many scans got a label; without the table of the propagation, of those whose labels were hidden."""
    if not (folder / CARRIED / TABLE).is_file():
        return len({row["case"] for row in rows if row["kept"]})
    return sum(any(row["kept"] == "true" for row in organs) for organs in _read_table(folder).values())


def _mean(rows: Sequence[Mapping[str, Any]]) -> str:
    return f"{np.mean([row['dice'] for row in rows]):.3f}" if rows else ""


def _correlation(rows: Sequence[Mapping[str, Any]]) -> str:
    return f"{found:.2f}" if (found := _rank_correlation(rows)) is not None else ""


def _within_organs(rows: Sequence[Mapping[str, Any]]) -> str:
    by_organ = [[row for row in rows if row["label"] == organ] for organ in {row["label"] for row in rows}]
    found = [each for own in by_organ if (each := _rank_correlation(own)) is not None]
    return f"{np.mean(found):.2f}" if found else ""


def _rank_correlation(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Return Spearman's correlation; None for fewer than three rows, or if one side is the same everywhere."""
    agreed, dice = ([row[name] for row in rows] for name in ("agreement", "dice"))
    if len(rows) < 3 or not np.ptp(agreed) or not np.ptp(dice):
        return None
    return float(spearmanr(agreed, dice).statistic)


def _names(run: Run) -> dict[str, str]:
    """Return the names that the propagation gives its scans, by file."""
    content = run.lists[CARRIED]
    return case_names([first_file(entry) for entry in (*content["training"], *content["unlabelled"])])


def _read_table(folder: Path) -> dict[str, list[dict[str, str]]]:
    found: dict[str, list[dict[str, str]]] = {}
    with open(folder / CARRIED / TABLE, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["organ"] != "*":
                found.setdefault(row["scan"], []).append(row)
    return found


def _reasons(folder: Path) -> dict[str, str]:
    """Return why scans were left out, by name."""
    with open(folder / CARRIED / TABLE, encoding="utf-8", newline="") as file:
        return {row["scan"]: row["reason"] for row in csv.DictReader(file) if row["organ"] == "*"}


def _truth(file: str, *, like: np.ndarray | None) -> tuple[np.ndarray, list[float]]:
    """Return the voxels of a label file as an evaluation reads them, on the axes of the grid ``like``, and their spacing."""
    volume = as_label(file)
    voxels, affine = volume.voxels, volume.affine
    if like is not None:
        voxels, affine = turned(voxels, affine, like=like)
    return voxels.astype(np.uint8), nib.affines.voxel_sizes(affine).tolist()
