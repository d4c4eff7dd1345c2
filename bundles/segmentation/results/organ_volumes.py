# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Table of the volume of each organ in each predicted mask."""

from __future__ import annotations

import csv
import logging
import statistics
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.utils import convert_to_numpy

from ...common.cases.case_handler import CaseHandler
from ...common.errors import InputError
from ...common.files import atomic_path
from ...common.run.distributed import gather_lists, rank
from ...common.words import counted
from ..models.label_names import organ_names
from .colour_table import write_colour_table

logger = logging.getLogger(__name__)

TABLE = "volumes.csv"
COLUMNS = ("case", "label", "voxels", "ml", "image")
ABSENT = "-"
MOST_COLUMNS = 8  # columns of a table in the log
MOST_CASES = 20  # cases named in the log; the file has all


def organ_volumes(label_map: MetaTensor, *, labels: Mapping[int, str]) -> list[dict[str, Any]]:
    """Return the size of each organ; 0 for organs that are absent.

    Args:
        label_map: (1, X, Y, Z) with the affine of its voxels, in mm.
        labels: organ name of each label value.

    Returns:
        ``{"label": organ, "voxels": int, "ml": float}`` in the order of ``labels``.
    """
    voxels = convert_to_numpy(label_map)
    millilitres = abs(np.linalg.det(convert_to_numpy(label_map.affine)[:3, :3])) / 1000
    counts = {organ: int(np.count_nonzero(voxels == value)) for value, organ in labels.items()}
    return [{"label": organ, "voxels": count, "ml": count * millilitres} for organ, count in counts.items()]


def read_volumes(file: str | Path) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each image in a table that `OrganVolumes` wrote; empty if the file does not exist.

    Raises:
        InputError: it is another table.
    """
    volumes: dict[str, list[dict[str, Any]]] = {}
    for row in _rows(file):
        size = {"label": row["label"], "voxels": row["voxels"], "ml": row["ml"]}
        volumes.setdefault(row["image"], []).append(size)
    return volumes


def read_cases(file: str | Path) -> dict[str, str]:
    """Return the name of each image's case in a table that `OrganVolumes` wrote; empty if the file does not exist.

    Raises:
        InputError: it is another table.
    """
    return {row["image"]: row["case"] for row in _rows(file)}


def _rows(file: str | Path) -> list[dict[str, Any]]:
    if not Path(file).exists():
        return []
    try:
        with open(file, newline="", encoding="utf-8-sig") as table:  # spreadsheets write a byte order mark
            rows = [{name: row[name] for name in COLUMNS} for row in csv.DictReader(table)]
        return [row | {"voxels": int(row["voxels"]), "ml": float(row["ml"])} for row in rows]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise InputError(
            f"{file} is not a table that an inference wrote, with the columns {', '.join(COLUMNS)}: was it saved by another "
            "program? Rename it, then run with --resume false, or use another --output_dir."
        ) from error


def volumes_table(volumes: Mapping[str, list[dict[str, Any]]]) -> str:
    """Return volumes in ml as a plain-text table for the log.

    A row is a case and a column an organ; with many organs and few cases it is the other way round. Many cases are
    summarised: a row is an organ, with the median, the smallest and the largest volume of the cases that have it, and
    the number of those that do not. An organ that is absent has a dash, which the last line explains.

    Args:
        volumes: the rows of `organ_volumes` of each case, by its name.
    """
    organs = [row["label"] for row in next(iter(volumes.values()))]
    sizes = {case: [row["ml"] if row["voxels"] else None for row in rows] for case, rows in volumes.items()}
    if len(organs) <= MOST_COLUMNS and len(sizes) <= MOST_CASES:
        return _table([["ml", *organs], *([case, *map(_ml, of_case)] for case, of_case in sizes.items())])
    by_organ = dict(zip(organs, zip(*sizes.values(), strict=True), strict=True))
    if len(sizes) <= MOST_COLUMNS:
        return _table([["ml", *sizes], *([organ, *map(_ml, of_organ)] for organ, of_organ in by_organ.items())])
    rows = []
    for organ, of_organ in by_organ.items():
        present = [size for size in of_organ if size is not None]
        figures = [statistics.median(present), min(present), max(present)] if present else [None] * 3
        rows.append([organ, *map(_ml, figures), str(len(of_organ) - len(present))])
    return _table([["ml", "median", "smallest", "largest", "absent in"], *rows])


def _ml(size: float | None) -> str:
    return ABSENT if size is None else f"{size:.1f}"


def _table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        [f"{row[0]:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in rows
    ]
    legend = [f"{ABSENT}  not found"] if any(ABSENT in row for row in rows) else []
    return "\n".join([*map("  ".join, lines), *legend])


class OrganVolumes(CaseHandler):
    """Handler of an evaluator: writes ``volumes.csv`` with one row ``case,label,voxels,ml,image`` per case and organ.

    It also writes the names of the label values for 3D Slicer, see `write_colour_table`.

    List it last, after the handlers that write something else for each case. A scan is then added to the table
    only after its other outputs are written. ``image`` is the file of the scan, which distinguishes cases with the same
    name in several folders. The table is rewritten after every case, so that a stopped run keeps its rows. With several
    processes the first one writes: its own cases during the run, all cases at the end of the epoch. A mask without
    foreground is logged as a warning, with the file of its scan.

    Args:
        labels: organ name of each label value; text keys, as in a JSON file, are read as numbers, and a name for the
            background 0 is ignored.
        output_dir: the folder of the table.
        resume: keep the rows of an existing table.
        again: images of this run; rows that the table has of them are removed when it starts, since their masks may be
            replaced.
        options: ``pred_key``, ``image_key`` and ``failures`` of `CaseHandler`.

    Raises:
        InputError: during the run, if a case has no label map with its geometry.
    """

    product = "row of volumes"

    def __init__(
        self,
        labels: Mapping[int | str, str],
        output_dir: str | Path,
        *,
        resume: bool = False,
        again: Collection[str] = (),
        **options: Any,
    ) -> None:
        super().__init__(output_dir, **options)
        self.labels = organ_names(labels)
        self.file = self.output_dir / TABLE
        self.resume = resume
        self.again = frozenset(again)
        self.volumes: dict[str, list[dict[str, Any]]] = {}
        self.cases: dict[str, str] = {}  # names of earlier runs

    def attach(self, engine: Engine) -> None:
        """Register the handler with an evaluator."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._clear)
        super().attach(engine)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._finish)

    def _clear(self, engine: Engine) -> None:
        earlier = read_volumes(self.file) if self.resume else {}
        kept = read_cases(self.file) if self.resume else {}
        replaced = {self.name_of(image) for image in self.again}  # by the mask of a scan that was moved, too
        self.volumes = {
            image: rows for image, rows in earlier.items() if image not in self.again and kept[image] not in replaced
        }
        self.cases = {image: case for image, case in kept.items() if image not in self.names}
        if rank() == 0:
            write_colour_table(self.output_dir, labels=self.labels)
            if len(self.volumes) < len(earlier):
                self._write(self.volumes)

    def iteration_completed(self, engine: Engine) -> None:
        """Measure the cases of the iteration and write the table."""
        super().iteration_completed(engine)
        if rank() == 0:
            self._write(self.volumes)

    def case_completed(self, item: Mapping[str, Any], file: str) -> None:
        """Measure one case."""
        self.volumes[file] = organ_volumes(self.label_map(item, self.pred_key, file), labels=self.labels)
        if not any(row["voxels"] for row in self.volumes[file]):
            logger.warning(
                "%s: the mask is all background. Does the scan show any of %s, and are the options "
                "(--spacing, the intensity window) those of the model's training?",
                *(file, ", ".join(self.labels.values())),
            )

    def _finish(self, engine: Engine) -> None:
        volumes = dict(gather_lists(list(self.volumes.items())))  # a case that the sampler repeated appears once
        if rank() == 0:
            self._write(volumes)
            logger.info("wrote %s (%s)", self.file, counted(len(volumes), "case"))
            if volumes:
                named = {self.cases.get(image, self.name_of(image)): rows for image, rows in volumes.items()}
                logger.info(
                    "volumes of %s:\n%s", counted(len(named), "scan"), volumes_table(dict(sorted(named.items())))
                )

    def _write(self, volumes: Mapping[str, list[dict[str, Any]]]) -> None:
        with atomic_path(self.file) as path, open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=COLUMNS, lineterminator="\n")
            writer.writeheader()
            cases = {image: self.cases.get(image, self.name_of(image)) for image in volumes}
            for image in sorted(volumes, key=lambda image: (cases[image], image)):
                for row in volumes[image]:
                    writer.writerow({"case": cases[image], **row, "ml": f"{row['ml']:.3f}", "image": image})
