# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""How large each organ of each predicted mask is, as a table."""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.utils import convert_to_numpy

from ...common.data.case_names import case_name, image_file_of, items_of
from ...common.errors import InputError
from ...common.files import atomic_path
from ...common.run.distributed import gather_lists, rank
from ..models.label_names import organ_names

logger = logging.getLogger(__name__)

TABLE = "volumes.csv"
COLUMNS = ("case", "label", "voxels", "ml", "image")


def organ_volumes(label_map: MetaTensor, *, labels: Mapping[int, str]) -> list[dict[str, Any]]:
    """Return the size of each organ, 0 for one that is not there.

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
    """Return the rows of each image in a table that `OrganVolumes` wrote; none where it does not exist."""
    if not Path(file).exists():
        return {}
    volumes: dict[str, list[dict[str, Any]]] = {}
    with open(file, newline="", encoding="utf-8") as table:
        for row in csv.DictReader(table):
            size = {"label": row["label"], "voxels": int(row["voxels"]), "ml": float(row["ml"])}
            volumes.setdefault(row["image"], []).append(size)
    return volumes


class OrganVolumes:
    """Handler of an evaluator, the last one: writes ``volumes.csv``, one row ``case,label,voxels,ml,image`` per case and organ.

    That a scan stands in the table means that all else about it was written.

    ``image`` is the file of the scan, which tells cases of one name in several folders apart. The table is written anew
    after every case, so that a stopped run keeps what it has. Of several processes the first writes: its own cases
    during the run, all cases at the end of the epoch.

    A mask that is all background is warned of, with the file of its scan.

    Args:
        labels: organ name of each label value; text keys, as in a JSON file, are taken as numbers, and a name for the
            background 0 is left out.
        output_dir: the folder of the table.
        pred_key: key of the predicted label map, a MetaTensor (1, X, Y, Z) in the geometry of the scan.
        image_key: key of the image, which gives the case its name.
        resume: keep the rows of a table that is there already.

    Raises:
        InputError: during the run, if a case has no label map with its geometry.
    """

    def __init__(
        self,
        labels: Mapping[int | str, str],
        output_dir: str | Path,
        pred_key: str = "pred",
        image_key: str = "image",
        resume: bool = False,
    ) -> None:
        self.labels = organ_names(labels)
        self.file = Path(output_dir) / TABLE
        self.pred_key = pred_key
        self.image_key = image_key
        self.resume = resume
        self.volumes: dict[str, list[dict[str, Any]]] = {}

    def attach(self, engine: Engine) -> None:
        """Register the handler at an evaluator."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._clear)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._measure)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._finish)

    def _clear(self, engine: Engine) -> None:
        self.volumes = read_volumes(self.file) if self.resume else {}

    def _measure(self, engine: Engine) -> None:
        for item in items_of(engine):
            file = image_file_of(item, self.image_key, self.pred_key)
            label_map = item.get(self.pred_key)
            if not isinstance(label_map, MetaTensor) or label_map.ndim != 4 or len(label_map) != 1:
                found = f"{type(label_map).__name__} of shape {tuple(getattr(label_map, 'shape', ()))}"
                raise InputError(
                    f"'{self.pred_key}' of the case {file} must be a label map with its geometry, a MetaTensor of shape "
                    f"(1, X, Y, Z), but is {found}: check the evaluator's postprocessing."
                )
            self.volumes[file] = organ_volumes(label_map, labels=self.labels)
            if not any(row["voxels"] for row in self.volumes[file]):
                logger.warning(
                    "%s: the mask is all background. Does the scan show any of %s, and are the options "
                    "(--spacing, the intensity window) those of the model's training?",
                    *(file, ", ".join(self.labels.values())),
                )
        if rank() == 0:
            self._write(self.volumes)

    def _finish(self, engine: Engine) -> None:
        volumes = dict(gather_lists(list(self.volumes.items())))  # a case that the sampler repeated comes once
        if rank() == 0:
            self._write(volumes)
            logger.info("wrote %s (%d cases)", self.file, len(volumes))

    def _write(self, volumes: Mapping[str, list[dict[str, Any]]]) -> None:
        with atomic_path(self.file) as path, open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=COLUMNS, lineterminator="\n")
            writer.writeheader()
            for image in sorted(volumes, key=lambda image: (case_name(image), image)):
                for row in volumes[image]:
                    writer.writerow({"case": case_name(image), **row, "ml": f"{row['ml']:.3f}", "image": image})
