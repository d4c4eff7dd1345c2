# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""What a run could not do for single scans: listed in a table while the others continue, and reported at the end."""

from __future__ import annotations

import csv
import logging
import os
import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import InputError, find_input_error
from ..files import absolute_path, atomic_path, full_disk
from ..run.distributed import gather_lists, rank, world_size
from ..words import counted

logger = logging.getLogger(__name__)

TABLE = "failed.csv"
RESULTS = ("mask", "score", "reconstruction")  # without one of these a scan has no result
STATUS_FAILED = 3  # exit status of a run that succeeded for some scans
TRACEBACK = "Traceback (most recent call last):"
NAMED = 20  # failures in the summary; the table has all


@dataclass(frozen=True)
class Failure:
    """One thing that was not done.

    Attributes:
        scan: file or folder of the scan.
        missing: what the scan lacks now: ``mask``, ``DICOM SEG``, ``picture``, ...
        reason: why.
    """

    scan: str
    missing: str
    reason: str


class Failures:
    """The failures of a run, in ``failed.csv`` of its output folder.

    The table is rewritten after each failure, so that a stopped run keeps it. A run without failures leaves no table.

    Args:
        output_dir: folder of the results.
        resume: this run continues an earlier one, whose rows stay until `report`; `earlier` does the same later.
    """

    def __init__(self, output_dir: str | os.PathLike, *, resume: bool = False) -> None:
        self.file = Path(output_dir).expanduser() / TABLE
        self.failed = False
        self._found: list[Failure] = []
        self._earlier: list[Failure] = []
        self._others: list[Failure] = []
        if resume:
            self.earlier()

    def earlier(self) -> set[str]:
        """Return the scans in the table of an earlier run.

        Until `report`, their rows stay in the table: if this run is stopped, the next one still knows them. `report`
        then replaces them with the rows of this run, except for those that `keep_others` keeps.

        Raises:
            InputError: the table has other columns, or cannot be read as text.
        """
        names = [field.name for field in fields(Failure)]
        try:
            with open(self.file, newline="", encoding="utf-8-sig") as table:  # spreadsheets write a byte order mark
                reader = csv.DictReader(table)
                rows = [[row[name] or "" for name in names] for row in reader if row[names[0]]]
        except FileNotFoundError:
            return set()
        except (KeyError, ValueError, csv.Error) as error:
            raise InputError(
                f"{self.file} is not the table that a run wrote, with the columns {','.join(names)} in UTF-8: was it saved by a "
                "spreadsheet? Save it with commas in UTF-8 or rename it, then repeat the command. Without it, finished scans "
                "that lack something are not tried again."
            ) from error
        self._earlier = [Failure(*row) for row in rows]
        return {failure.scan for failure in self._earlier}

    def keep_others(self, tried: Collection[str], searched: Sequence[str | os.PathLike] = ()) -> None:
        """Keep the rows of `earlier` about scans that this run does not try and that still exist.

        Args:
            tried: files and folders of the scans of this run.
            searched: folders in which this run has looked for scans; what is in there and was not tried is no scan now.
        """
        folders = [absolute_path(folder) for folder in searched]
        self._others = [
            each
            for each in self._earlier
            if each.scan not in tried
            and os.path.exists(each.scan)
            and not any(absolute_path(each.scan).is_relative_to(folder) for folder in folders)
        ]

    def add(self, scan: str, missing: str, error: Exception | str) -> None:
        """Log a failure as a WARNING and write the table.

        Args:
            scan: file or folder of the scan.
            missing: what it lacks now.
            error: what was raised, or the reason.

        Raises:
            InputError: the disk is full or cannot be written: the run cannot continue.
        """
        if isinstance(error, Exception) and (full := full_disk(error)) is not None:  # each scan would fail
            raise InputError(
                f"{full.filename or self.file.parent} cannot be written: {full.strerror}. Make room, then repeat the "
                "command, a segmentation with --resume true."
            ) from error
        texts = (scan, missing, error if isinstance(error, str) else reason_of(error))
        failure = Failure(
            *(text.encode(errors="backslashreplace").decode() for text in texts)
        )  # not every name is text
        self._found.append(failure)
        logger.warning("%s has no %s: %s", failure.scan, failure.missing, failure.reason)
        if isinstance(error, Exception):
            logger.debug("what was raised for %s", scan, exc_info=error)
        if world_size() == 1:
            again = {failure.scan for failure in self._found}
            self._write([*(each for each in self._earlier if each.scan not in again), *self._found])

    def all(self) -> list[Failure]:
        """Return the failures of all processes. All must call it."""
        return list(dict.fromkeys(gather_lists(self._found)))

    def report(self, scans: int) -> None:
        """Write the table and log a summary. All processes must call it, when the work is done.

        Args:
            scans: number of scans in the run, including those that failed.

        Raises:
            InputError: no scan has a result.
        """
        failures = self.all()
        if rank() == 0:
            self._write([*self._others, *failures])
            if self._others:
                others = counted(len({failure.scan for failure in self._others}), "scan")
                logger.info("%s also lists %s of earlier runs, which this run did not try", self.file, others)
        self._refuse_if_all(failures, scans)
        failed = {failure.scan for failure in failures}
        lines = self._lines(failures)
        if failures and rank() == 0:
            logger.warning(
                "%d of %s done; %s (%s):\n%s",
                *(scans - len(failed), counted(scans, "scan is", "scans are")),
                counted(len(failed), "scan is not, or lacks something", "scans are not, or lack something"),
                *(self.file, "\n".join(lines)),
            )
        self.failed = bool(failures)

    def exit_status(self) -> None:
        """End the process with status 3 if `report` found failures; call it last."""
        if self.failed:
            sys.exit(STATUS_FAILED)

    def refuse_if_all(self, scans: Sequence[Any]) -> None:
        """Raise an error if all scans of the run have failed already. All processes must call it.

        Raises:
            InputError: no scan is left.
        """
        self._refuse_if_all(self.all(), len(scans))

    def _refuse_if_all(self, failures: Sequence[Failure], scans: int) -> None:
        without = {failure.scan for failure in failures if failure.missing in RESULTS}
        if scans and len(without) == scans:
            raise InputError("\n".join([f"None of the {scans} scans has a result:", *self._lines(failures)]))

    def _lines(self, failures: Sequence[Failure]) -> list[str]:
        lines = [f"  {failure.scan}: no {failure.missing}: {failure.reason}" for failure in failures[:NAMED]]
        return lines + ([f"  ... and {len(failures) - NAMED} more in {self.file}"] if len(failures) > NAMED else [])

    def _write(self, failures: Sequence[Failure]) -> None:
        if not failures:
            self.file.unlink(missing_ok=True)
            return
        with atomic_path(self.file) as path, open(path, "w", newline="", encoding="utf-8") as table:
            writer = csv.DictWriter(table, [field.name for field in fields(Failure)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(failure) for failure in failures)


def reason_of(error: Exception) -> str:
    """Return one line: the message of the first `InputError` among the causes, else type and text of the last one."""
    if (known := find_input_error(error)) is not None:
        return " ".join(str(known).split())
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):  # MONAI's transforms wrap errors
        error = error.__cause__
    raised = re.findall(r"^\w[\w.]*(?:Error|Exception|Exit): .*", str(error), re.MULTILINE)
    if TRACEBACK in str(error) and raised:  # MONAI's writers quote what went wrong after advice to install others
        return raised[-1].strip()
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return "it does not fit into memory"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
