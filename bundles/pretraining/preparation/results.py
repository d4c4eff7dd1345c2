# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Write the results of `prepare`: audit, data list and contact sheets. The same scans give the same bytes."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...common.scans.contact_sheet import write_sheets
from ...common.scans.search import Candidate, Found
from .audit import LEFT_OUT, QUANTILES, USED
from .one_scan import Outputs, Recipe, refused
from .patient_split import SECTIONS, Split

COLUMNS = [
    *("name", "verdict", "reason", "source", "kind", "shape", "spacing", "orientation"),
    *("hu_min", *QUANTILES, "hu_max", "body_share", "body_box", "body_mm"),
    *("patient", "section", "fold", "label", "series_uid", "modality", "sha256"),
]
SHEETS = {USED: ("contact_sheet", "dimgray"), LEFT_OUT: ("left_out", "firebrick")}


def audit_table(
    candidates: Sequence[Candidate], rows: Mapping[str, dict], split: Split, refused_files: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Return one row for each scan and for each file that could not be examined, sorted by name.

    Args:
        candidates: all scans.
        rows: rows of `prepare_scan`, by name.
        split: split of the used scans.
        refused_files: maps files to reasons.
    """
    table = []
    for candidate in candidates:
        name = candidate.name
        row = {
            **rows[name],
            "name": name,
            "source": candidate.source,
            "kind": candidate.kind,
            "label": candidate.label,
            "modality": candidate.series.modality if candidate.series else "",
            "section": split.sections.get(name, ""),
            "fold": split.folds.get(name, ""),
        }
        if name in split.twins:
            row |= {"verdict": LEFT_OUT, "reason": f"equal to another scan: the same voxels as {split.twins[name]}"}
        if candidate.remark and row["verdict"] == USED:
            row["reason"] = "; ".join(filter(None, (row["reason"], candidate.remark)))
        if candidate.notes.get("carried") and row["section"] in ("validation", "test"):
            told = "its carried label is left out: only labels that a person drew can be scored"
            row |= {"label": "", "reason": "; ".join(filter(None, (row["reason"], told)))}
        row["patient"] = split.patients.get(name, row.get("patient", ""))
        table.append(row)
    table += [
        {"name": path, "source": path, "kind": "file", **refused(reason)} for path, reason in refused_files.items()
    ]
    return sorted(table, key=lambda row: row["name"])


def audit_csv(table: Sequence[Mapping[str, Any]]) -> str:
    """Return the text of ``audit.csv``: lengths in mm, lists as ``AxBxC``, boxes as ``low:high`` per axis."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([_cell(column, row.get(column, "")) for column in COLUMNS] for row in table)
    return text.getvalue()


def _cell(column: str, value: Any) -> str:
    if column == "body_box" and value:
        return " ".join(f"{low}:{high}" for low, high in value)
    if isinstance(value, list):
        return "x".join(f"{number:.6g}" for number in value)
    return f"{value:.6g}" if isinstance(value, float) else " ".join(str(value).split())


def data_list_text(
    out: Path,
    found: Found,
    candidates: Sequence[Candidate],
    table: Sequence[Mapping[str, Any]],
    recipe: Recipe,
) -> str:
    """Return the text of ``dataset.json``, in the format of the Medical Segmentation Decathlon, for the scans used."""
    rows = {row["name"]: row for row in table}
    sections: dict[str, list[dict]] = {section: [] for section in SECTIONS}
    for candidate in candidates:
        row = rows[candidate.name]
        if row["verdict"] != USED:
            continue
        outputs = Outputs(out, candidate.name)
        store = outputs.store.relative_to(out).as_posix()
        entry = {"image": _place(out, Path(candidate.source))}
        if candidate.kind != "nifti":
            entry["image"] = outputs.nifti.relative_to(out).as_posix() if recipe.write_nifti else store
        if row["label"]:
            entry |= {"label": _place(out, Path(row["label"])), **candidate.notes}
        if recipe.write_store:
            entry["store"] = store
        entry |= {"patient": row["patient"]} | ({"fold": row["fold"]} if row["fold"] != "" else {})
        sections[row["section"]].append(entry)
    content = {"name": found.name, "modality": {"0": "CT"}} | ({"labels": found.labels} if found.labels else {})
    content |= {} if found.ignore_label is None else {"ignore_label": found.ignore_label}
    content |= {section: entries for section, entries in sections.items() if entries or section != "test"}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _place(out: Path, path: Path) -> str:
    """Return a path for the data list: relative if it is below the output, so that the folder can be moved."""
    return path.relative_to(out).as_posix() if path.is_relative_to(out) else str(path)


def write_contact_sheets(out: Path, table: Sequence[Mapping[str, Any]]) -> None:
    """Write pages of the used scans and of the left-out scans that could be read; remove old pages."""
    for verdict, (stem, colour) in SHEETS.items():
        scans = []
        for row in table:
            path = Outputs(out, row["name"]).thumbnail
            if row["verdict"] == verdict and row["kind"] != "file" and path.is_file():
                size = f"{_cell('shape', row['shape'])}, {_cell('spacing', row['spacing'])} mm"
                scans.append((row["name"], row["reason"] or size, np.load(path)))
        write_sheets(out, scans, stem=stem, colour=colour)
