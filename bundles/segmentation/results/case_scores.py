# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Score label maps in the scan's own geometry, with Dice, surface Dice (NSD) and HD95 per case and organ."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.utils import ensure_tuple

from ...common.cases.case_handler import CaseHandler
from ...common.data.case_names import case_name, case_names
from ...common.data.partial_labels import LABELLED
from ...common.errors import InputError
from ...common.files import file_stamp, save_figure, write_text
from ...common.run.distributed import gather_lists, rank
from ...common.words import counted
from ..models.label_names import organ_names
from .metrics import OTHERWISE, _tolerance_of, score_case
from .score_plots import score_figure
from .score_summary import METRICS, format_summary, summarise
from .scores_table import write_scores

RECORDS = "cases"  # folder in the output folder with the recorded scores, one file per case

logger = logging.getLogger(__name__)


class CaseScores(CaseHandler):
    """Handler of an evaluator: scores each case in its own geometry, and writes the table when the epoch ends.

    The evaluator's output or batch must contain the label file's own voxels, as well as the prediction.

    At the end of the epoch the rows of all processes are gathered, cases that the distributed sampler repeated are
    dropped, and the first process writes to ``output_dir``

    - ``scores.csv``: ``case,label,dice,nsd,hd95``, one row for each case and organ, an empty field for NaN;
    - ``summary.json``: see `summarise`, with the tolerance in mm, the names of the cases, and ``details`` under
      ``evaluated``; null for NaN; the files of cases that could not be scored under ``not_scored``, if there are any;
    - ``scores.png``: see `score_figure`.

    Every process has ``mean_dice``, ``mean_nsd``, ``mean_hd95`` and ``dice_<organ>`` in ``engine.state.metrics``. That
    is at ``EPOCH_COMPLETED``, since the loggers (MLflow, StatsHandler) read the metrics at this event: list them after
    it.

    With ``items`` a stopped evaluation can be resumed: the scores of a case are written to ``cases/<case>.json`` at
    once, with everything that decides them. With ``resume`` the evaluator's dataset is `unscored`; if nothing is left,
    call `CaseEvaluator.finish_without_cases`, as MONAI's engines skip an empty loader with all its events. List a
    handler that writes something else for each case before this one: a recorded case is not run again.

    Args:
        labels: organ name of each label value; text keys, as in a JSON file, are read as numbers, and a name for the
            background 0 is ignored.
        tolerance: NSD tolerance in mm, one for all organs or one for each organ name.
        output_dir: the folder of the files.
        label_key: key of the true label map, a MetaTensor (1, X, Y, Z) of the label file's own voxels.
        ignore_label: value of unknown voxels in the label file, which are not scored (see `score_case`); None: none.
        items: all cases of the evaluation, the same in all processes: dictionaries with the files of ``image_key`` and
            ``label_key``; organs that an item's ``labelled`` does not hold score NaN. None: no case is recorded, and
            none can be resumed.
        settings: everything else that affects the scores, such as spacing and overlap, of JSON types.
        model: file of the network, or files of an ensemble. Path, size and modification time identify the model.
        resume: keep cases that were scored with equal settings and the same model and files.
        details: description of the evaluation, for programs that collect several: task, split, training of the model.
            Functions are called at the end. Changing it does not invalidate scores.
        options: ``pred_key``, ``image_key`` and ``failures`` of `CaseHandler`.

    Raises:
        InputError: here if a label or tolerance is invalid or the model's file is missing; during the run if a case's
            prediction and truth differ in shape or orientation, or an item lacks a key.
        ValueError: ``resume`` without ``items``.
    """

    product = "score"

    def __init__(
        self,
        labels: Mapping[int | str, str],
        tolerance: float | Mapping[str, float],
        output_dir: str | Path,
        *,
        label_key: str = "reference",
        ignore_label: int | None = None,
        items: Sequence[Mapping[str, Any]] | None = None,
        settings: Mapping[str, Any] | None = None,
        model: str | Path | Sequence[str | Path] | None = None,
        resume: bool = False,
        details: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if resume and items is None:
            raise ValueError("resume needs items, the list of all cases.")
        super().__init__(output_dir, label_key=label_key, items=items, **options)
        self.labels = organ_names(labels)
        unknown = sorted(set(tolerance) - {OTHERWISE, *self.labels.values()}) if isinstance(tolerance, Mapping) else []
        if unknown:
            raise InputError(
                f"--nsd_tolerance names {', '.join(unknown)}; the organs are {', '.join(self.labels.values())}."
            )
        self.ignore_label = ignore_label
        self.tolerance = {organ: _tolerance_of(organ, tolerance) for organ in self.labels.values()}
        decisive = {"labels": self.labels, "tolerance": self.tolerance, "metrics": METRICS}
        decisive |= {"model": None if model is None else _stamps(ensure_tuple(model))} | dict(settings or {})
        self.settings = json.loads(json.dumps(decisive, default=str))  # the form in which a record is read back
        self.resume = resume
        self.details = dict(details or {})
        self.kept: dict[str, dict[str, dict[str, float]]] = {}
        self.scores: dict[str, dict[str, dict[str, float]]] = {}

    def attach(self, engine: Engine) -> None:
        """Register the handler with an evaluator."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._clear)
        super().attach(engine)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.finish)

    def unscored(self) -> list[Mapping[str, Any]]:
        """Return the items that are not scored yet or lack something, such as a picture; keep the scores of the others.

        In a distributed run every process must call it. The first process decides for all, because a late process might
        already see records that another one has written.
        """
        if self.resume:
            self.kept = gather_lists([self._recorded()] if rank() == 0 else [])[0]
            self.scores = dict(self.kept)
        return [item for file, item in self.items.items() if file not in self.kept]

    def finish(self, engine: Engine) -> None:
        """Gather the scores of all processes, put the means into ``engine.state.metrics`` and write the files."""
        scores = dict(gather_lists(list(self.scores.items())))  # a file that several processes scored appears once
        names = self.names or case_names(scores)
        rows = [
            {"case": names[file], "label": organ, **score}
            for file in sorted(scores, key=names.__getitem__)
            for organ, score in scores[file].items()
        ]
        failed = [] if self.failures is None else self.failures.all()
        not_scored = sorted({failure.scan for failure in failed if failure.missing == self.product})
        summary = summarise(rows, organs=self.labels.values())
        engine.state.metrics |= {f"mean_{metric}": summary[f"mean_{metric}"] for metric in METRICS}
        for organ, moments in summary["labels"].items():
            engine.state.metrics["dice_" + re.sub(r"\W+", "_", organ)] = moments["dice"]["mean"]

        if rank() == 0:
            summary |= {"tolerance": self.tolerance, "cases": sorted({row["case"] for row in rows})}
            details = {name: value() if callable(value) else value for name, value in self.details.items()}
            summary |= {"evaluated": json.loads(json.dumps(details, default=str))}
            summary |= {"not_scored": not_scored} if not_scored else {}
            self._write(rows, summary)
            logger.info("%s", format_summary(summary))
            logger.info("wrote scores.csv, summary.json and scores.png to %s", self.output_dir)

    def _clear(self, engine: Engine) -> None:
        self.scores = dict(self.kept)

    def case_completed(self, item: Mapping[str, Any], file: str) -> None:
        """Score one case."""
        prediction, truth = (self.label_map(item, key, file) for key in (self.pred_key, self.label_key))
        _check_geometry(file, prediction, truth)
        self.scores[file] = score_case(
            prediction[0],
            truth[0],
            labels=self.labels,
            spacing=truth.pixdim.tolist(),
            tolerance=self.tolerance,
            ignore_label=self.ignore_label,
            labelled=self._labelled(file),
        )
        if self.items is not None:
            self._record(file)

    def _labelled(self, file: str) -> list[int] | None:
        """Return the label values of the organs that the case's label shows; None: all."""
        return (self.items or {}).get(file, {}).get(LABELLED)

    def _record(self, file: str) -> None:
        if file not in self.items:
            raise InputError(
                f"The case {file} is none of the {len(self.items)} items of the evaluation: pass all cases."
            )
        record = {"files": self._files(file), "settings": self.settings, "scores": _nan_to_none(self.scores[file])}
        labelled = self._labelled(file)
        record |= {} if labelled is None else {LABELLED: labelled}
        _write_json(self._record_path(file), record)

    def _recorded(self) -> dict[str, dict[str, dict[str, float]]]:
        """Return the recorded scores of all cases whose settings and files are unchanged."""
        kept, outdated = {}, []
        lacking = set() if self.failures is None else self.failures.earlier()
        for file in self.items:
            if file in lacking:
                continue
            try:
                record = json.loads(self._record_path(file).read_text(encoding="utf-8"))
            except (FileNotFoundError, ValueError):
                continue
            if not isinstance(record, dict) or not {"settings", "files", "scores"} <= set(record):
                continue  # damaged: the case is scored again
            same_organs = record.get(LABELLED) == self._labelled(file)
            try:
                files = self._files(file)
            except InputError:  # one is gone: loading the case will say so, and the others are scored
                files = {}
            if record["settings"] == self.settings and record["files"] == files and same_organs:
                kept[file] = {organ: _none_to_nan(score) for organ, score in record["scores"].items()}
            else:
                outdated.append((file, record))
        if tried_again := len(self.items.keys() & lacking):
            lack = counted(tried_again, "case lacks", "cases lack")
            logger.info("%s something (%s): once more", lack, self.failures.file)
        if kept:
            of = counted(len(self.items), "case is", "cases are")
            logger.info("%d of %s already scored (%s)", len(kept), of, self.output_dir / RECORDS)
        if outdated:
            file, record = outdated[0]
            keys = sorted(record["settings"].keys() | self.settings.keys())
            changed = [key for key in keys if record["settings"].get(key) != self.settings.get(key)]
            reason = f"with different {', '.join(changed)}" if changed else "before its files or 'labelled' changed"
            again = f"{counted(len(outdated), 'case')} {'is' if len(outdated) == 1 else 'are'} scored again"
            logger.info("%s, such as %s: it was scored %s", again, file, reason)
        return kept

    def _record_path(self, file: str) -> Path:
        return self.output_dir / RECORDS / f"{self.names[file]}.json"

    def _files(self, file: str) -> dict[str, list[int]]:
        """Return the stamps that identify the case's files, to detect changes since they were scored."""
        item = self.items[file]
        return _stamps(path for key in (self.image_key, self.label_key) for path in ensure_tuple(item.get(key, ())))

    def _write(self, rows: list[dict[str, Any]], summary: dict[str, Any]) -> None:
        write_scores(rows, self.output_dir / "scores.csv")
        _write_json(self.output_dir / "summary.json", _nan_to_none(summary))
        save_figure(score_figure(rows, organs=self.labels.values()), self.output_dir / "scores.png")


def _check_geometry(file: str, prediction: MetaTensor, truth: MetaTensor) -> None:
    shapes = tuple(prediction.shape[1:]), tuple(truth.shape[1:])
    if shapes[0] != shapes[1]:
        raise InputError(
            f"The prediction of case {case_name(file)} has the shape {shapes[0]}, its label file {shapes[1]}: both "
            f"must have the shape of the scan {file}. Check that the label belongs to the scan, and that the "
            "postprocessing inverts the preprocessing."
        )
    # Shapes do not reveal a flipped axis. Compare only the orientation, as the headers of a scan and its label often
    # differ slightly in origin and rotation.
    axes = ["".join(nib.aff2axcodes(volume.affine.numpy(force=True))) for volume in (prediction, truth)]
    if axes[0] != axes[1]:
        raise InputError(
            f"The prediction of case {case_name(file)} has {axes[0]} orientation, its label file {axes[1]}: their voxels "
            f"do not correspond. Both must have the orientation of the scan {file}."
        )


def _stamps(files: Iterable[str | Path]) -> dict[str, list[int]]:
    """Return the stamp (size and modification time) of each file by its path."""
    try:
        return {os.path.abspath(file): file_stamp(file) for file in files}
    except OSError as error:
        raise InputError(f"The file {error.filename} cannot be read: {error.strerror}. Check the path.") from error


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=4, allow_nan=False) + "\n")


def _nan_to_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nan_to_none(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _none_to_nan(score: Mapping[str, float | None]) -> dict[str, float]:
    return {metric: math.nan if value is None else value for metric, value in score.items()}
