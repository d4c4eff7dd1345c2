# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Check, load and evaluate scans one at a time, so that one that fails does not stop the others."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ignite.engine import Events
from monai.data import Dataset, list_data_collate
from monai.engines import SupervisedEvaluator

from ..data.case_names import image_file
from ..run.mlflow_server import tolerate_lost_servers
from ..run.progress import duration
from ..scans.checks import examine_scans
from ..value_rules import check_choice
from .failures import Failures, reason_of

logger = logging.getLogger(__name__)

SCAN = "scan_of_case"  # key of an item's image file


def good_cases(
    cases: Sequence[dict[str, Any]],
    *,
    failures: Failures,
    check_data: str,
    channels: int,
    hounsfield: bool,
    labels: Iterable[int | str] | None = None,
    ignore_label: int | None = None,
    keep: bool = True,
    missing: str = "mask",
) -> list[dict[str, Any]]:
    """Return the cases whose files pass the checks; the others become `Failures`.

    Args:
        cases: ``{"image": ..., "label": ...}``; ``label`` is optional.
        failures: takes the cases that cannot be used.
        check_data: ``full`` (voxels as well), ``headers`` or ``none``.
        channels: number of image channels that the network expects.
        hounsfield: warn about scans that do not look like CT in HU.
        labels, ignore_label, keep: see `check_scans`.
        missing: what a bad case lacks, as recorded in ``failures``, such as ``mask``.

    Raises:
        InputError: ``check_data`` is something else.
    """
    check_choice(name="check_data", value=check_data, choices=("full", "headers", "none"))
    if not cases or check_data == "none":
        return list(cases)
    good, reasons = examine_scans(
        cases,
        channels=channels,
        labels=labels,
        ignore_label=ignore_label,
        voxels=check_data == "full",
        hounsfield=hounsfield,
        keep=keep,
    )
    for file, reason in reasons.items():
        failures.add(file, missing, reason)
    return good


@dataclass(frozen=True)
class NotLoaded:
    """Stands for an item that could not be loaded, on its way from the data set to the evaluator.

    Attributes:
        scan: its image file.
        reason: why; text, since not every error can come back from a loading process.
    """

    scan: str
    reason: str


class CaseDataset(Dataset):
    """`Dataset` that returns a `NotLoaded` where loading or preprocessing raises.

    Args:
        data: one dictionary per case.
        transform: as in `Dataset`.
        image_key: key of the image file or files.
    """

    def __init__(
        self, data: Sequence[Mapping[str, Any]], transform: Callable | None = None, *, image_key: str = "image"
    ) -> None:
        super().__init__(data, transform)
        self.image_key = image_key

    def _transform(self, index: int) -> Any:
        scan = image_file(self.data[index][self.image_key])
        try:
            item = super()._transform(index)
        except Exception as error:  # each reader and transform raises its own errors for odd files
            return NotLoaded(scan, reason_of(error))
        return {**item, SCAN: scan}


def collate_case(items: Sequence[Mapping[str, Any] | NotLoaded]) -> Any:
    """Collate a batch of one case; a `NotLoaded` is passed on.

    Raises:
        ValueError: the batch has several cases.
    """
    if len(items) != 1:
        raise ValueError(f"{len(items)} cases in one batch: scans are evaluated one at a time, set batch_size to 1")
    return items[0] if isinstance(items[0], NotLoaded) else list_data_collate(items)


class CaseEvaluator(SupervisedEvaluator):
    """`SupervisedEvaluator` that continues with the next case if one cannot be loaded, segmented or saved.

    For each case it logs its number, its file and, from the second one on, how long the rest will take. Handlers see no
    item of such a case. Its data set is a `CaseDataset`, its loader has ``batch_size`` 1 and ``collate_fn``
    `collate_case`.

    Args:
        failures: takes what failed.
        missing: what a case that fails lacks, such as ``mask``.
        arguments: those of `SupervisedEvaluator`.
    """

    def __init__(self, *, failures: Failures, missing: str = "mask", **arguments: Any) -> None:
        super().__init__(**arguments | {"val_handlers": tolerate_lost_servers(arguments.get("val_handlers"))})
        self.failures = failures
        self.missing = missing
        self.started = 0.0
        self.add_event_handler(Events.EPOCH_STARTED, self._start)

    def _start(self, engine: SupervisedEvaluator) -> None:
        self.started = time.monotonic()

    def finish_without_cases(self) -> None:
        """Let the handlers end a run in which no case is left to do: they write their tables and pictures once more."""
        self.state.epoch_length = 0
        for event in (Events.STARTED, Events.EPOCH_STARTED, Events.EPOCH_COMPLETED, Events.COMPLETED):
            self.fire_event(event)

    def _tell(self, scan: str) -> None:
        number, count = self.state.iteration, self.state.epoch_length
        rate = (time.monotonic() - self.started) / max(1, number - 1)
        left = f", about {duration(rate * (count - number + 1))} left" if number > 1 else ""
        logger.info("scan %d of %d: %s%s", number, count, scan, left)

    def _iteration(self, engine: SupervisedEvaluator, batchdata: Any) -> Any:
        if isinstance(batchdata, NotLoaded):
            return self._without(engine, batchdata.scan, batchdata.reason)
        scan = batchdata.pop(SCAN)[0]
        self._tell(scan)
        try:
            return super()._iteration(engine, batchdata)
        except Exception as error:  # network, transforms and writers raise their own errors for odd scans
            return self._without(engine, scan, error)

    def _without(self, engine: SupervisedEvaluator, scan: str, error: Exception | str) -> list:
        self.failures.add(scan, self.missing, error)
        engine.state.batch, engine.state.output = [], []
        return engine.state.output
