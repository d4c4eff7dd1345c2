# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Turn raw scans into a data list, an audit, contact sheets and a patch store. Runs can be stopped and continued."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...common.cases.output_lock import alone_in
from ...common.errors import InputError
from ...common.files import absolute_path, write_text
from ...common.run.clean_stop import stops_cleanly
from ...common.run.progress import with_progress
from ...common.run.worker_pool import Died, available_cores, in_processes
from ...common.scans.search import PREPARED, Candidate, Found, find_candidates, scan_in
from ...common.value_rules import WORKERS
from ...common.words import counted
from .audit import LEFT_OUT, USED
from .known_collection import differences, find_collection
from .one_scan import Outputs, Recipe, Task, identity, prepare_scan, read_record, refused, source_of, writing
from .patient_split import Split, check_split, split_by_patient
from .results import audit_csv, audit_table, data_list_text, write_contact_sheets

logger = logging.getLogger(__name__)

STATUS_LEFT_OUT = 3  # exit status if the run succeeded but some scans were left out


@dataclass(frozen=True)
class Summary:
    """Result of a run: number of scans used and left out, and how often each reason occurs."""

    used: int
    left_out: int
    reasons: dict[str, int]


def prepare(
    *,
    source: str | Sequence[str],
    dataset_dir: str,
    recipe: Recipe,
    workers: int | None = None,
    validation_share: float = 0.05,
    folds: int = 5,
    seed: int = 0,
    patient_pattern: str | None = None,
    collection: str | None = None,
    collections_file: str | None = None,
) -> Summary:
    """Prepare every scan below the sources and report the result for each; prepare.yaml explains the options.

    Writes below ``dataset_dir``: ``audit.csv``, ``dataset.json``, ``contact_sheet_NNN.png``, ``left_out_NNN.png``,
    ``store/NAME.b2nd``, ``nifti/NAME.nii.gz`` (for scans in other formats), and ``.prepared/``, which records what is
    done for later runs. The same sources and options give the same bytes, however often the run was interrupted.

    Raises:
        InputError: there is no scan, an option is out of range, or the output cannot be written, contains raw scans or
            belongs to something else.
        SystemExit: after Ctrl-C or SIGTERM, with 128 + the number of the signal.
    """
    if not isinstance(dataset_dir, (str, os.PathLike)):
        raise InputError(f"--dataset_dir {dataset_dir!r} must be a folder; quote a name that is a number: \"'2023'\".")
    out = absolute_path(dataset_dir)
    if os.path.exists(out / "dataset.json") and not os.path.isdir(out / PREPARED):
        raise InputError(
            f"{out} has a dataset.json that prepare did not write: choose another --dataset_dir for the output."
        )
    if not recipe.write_store and not recipe.write_nifti:
        raise InputError("--write_store and --write_nifti are both false: nothing would be written. Set one to true.")
    check_split(validation_share=validation_share, folds=folds)
    WORKERS.check("workers", workers)
    _check_pattern(patient_pattern)
    known = find_collection(collection, collections_file) if collection else None
    # The output is created only after the sources are known to be good: a wrong folder must not be marked as an output.
    with stops_cleanly():
        logger.info("searching for scans below %s", source)
        found = _found_outside(out, source)
        candidates = _with_patients(found.candidates, patient_pattern)
    lock, folders = out / PREPARED / "lock", (out, out / "store", out / "nifti", out / PREPARED)
    with writing(out):
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    with (
        stops_cleanly(),
        alone_in(out, lock=lock, doing="preparing", option="--dataset_dir", folders=folders),
    ):
        tasks = [Task(candidate, recipe, str(out)) for candidate in candidates]
        kept = _check_records(out, candidates, found.refused, source)
        rows = {task.candidate.name: row for task in tasks if (row := read_record(task))}
        logger.info(
            "%s found (%d NIfTI, %d MetaImage, %d DICOM series), %d already prepared; "
            "%d files cannot be examined, %d files and folders are left out by their names",
            counted(len(tasks), "scan"),
            *(sum(candidate.kind == kind for candidate in candidates) for kind in ("nifti", "metaimage", "dicom")),
            *(len(rows), len(found.refused), len(found.left_out)),
        )
        workers = min(available_cores(), 16) if workers is None else workers
        rows |= _prepare_all([task for task in tasks if task.candidate.name not in rows], workers)
        split = _split(candidates, rows, validation_share=validation_share, folds=folds, seed=seed)
        # Files that were deleted by hand are written again, as are those of a duplicate whose kept scan is gone. If
        # that fails, the next duplicate is tried.
        tried: set[str] = set()
        while again := [
            task for task in tasks if task.candidate.name in split.sections.keys() - tried and not _is_complete(task)
        ]:
            tried |= {task.candidate.name for task in again}
            rows |= _prepare_all(again, workers)
            split = _split(candidates, rows, validation_share=validation_share, folds=folds, seed=seed)
        table = audit_table(candidates, rows, split, found.refused | found.left_out)
        with writing(out):
            _remove_unused(out, candidates, split, kept)
            write_text(out / "audit.csv", audit_csv(table))
            write_text(out / "dataset.json", data_list_text(out, found, candidates, table, recipe))
            write_contact_sheets(out, table)
    return _report(out, table, found.notes + split.notes + (differences(known, table) if known else []))


def exit_if_scans_were_left_out(summary: Summary) -> None:
    """End the process with status 3 if scans were left out. Use it as the last entry of the config's `run`."""
    if summary.left_out:
        sys.exit(STATUS_LEFT_OUT)


# ---- the run -------------------------------------------------------------------------------------------------------


def _prepare_all(tasks: list[Task], workers: int) -> dict[str, dict]:
    """Prepare the scans and return the row of each."""
    rows: dict[str, dict] = {}
    if not tasks:
        return rows
    try:
        with closing(in_processes(prepare_scan, tasks, workers=workers)) as results:
            for task, row in with_progress(results, len(tasks), doing="preparing"):
                if isinstance(row, Died):
                    Outputs(task.folder, task.candidate.name).set_aside()
                    row = identity(task) | refused(Died.reason)
                rows[task.candidate.name] = row
    except InputError as error:
        raise InputError(f"{error} ({len(rows)} of {len(tasks)} scans were finished in this run.)") from error
    return rows


def _found_outside(out: Path, source: str | Sequence[str]) -> Found:
    """Find the scans; refuse an output folder with raw scans, which would count as results from then on."""
    sources = [source] if isinstance(source, (str, os.PathLike)) else source
    is_new = os.path.isdir(out) and not os.path.isdir(out / PREPARED)
    if is_new and isinstance(sources, (list, tuple)) and out.resolve() in map(_resolved, sources):
        raise InputError(f"{out} is one of the sources: choose another --dataset_dir, or a new folder in it.")
    found = find_candidates(source, skip=out)
    if is_new and (scan := scan_in(out, apart_from=sources)):
        raise InputError(
            f"{out} contains raw scans, such as {scan}: choose another --dataset_dir, or a new folder in it."
        )
    return found


def _resolved(source: Any) -> Path | None:
    return Path(source).expanduser().resolve() if isinstance(source, (str, os.PathLike)) else None


def _check_records(
    out: Path, candidates: Sequence[Candidate], refused_files: Iterable[str], source: str | Sequence[str]
) -> set[str]:
    """Compare the records with the scans found; return the names of scans to keep although they were not found.

    Raises:
        InputError: all scans of the records would be removed, or all of one source.
    """
    records = {path.stem: path for path in (out / PREPARED).glob("*.json")}
    known = set(records)
    gone = known - {candidate.name for candidate in candidates}
    unreadable = set(refused_files)
    # The folder of a series without a readable slice is above its files.
    above = {str(folder) for file in unreadable for folder in Path(file).parents}
    sources = {name: source_of(records[name]) for name in gone}
    kept = {name for name, place in sources.items() if _lies_in(place, unreadable) or place in above}
    gone -= kept
    if kept:
        logger.warning(
            "%d scans prepared earlier, such as %s, are in folders that cannot be read now: they are kept for the next "
            "run, but not listed",
            *(len(kept), min(kept)),
        )
    if gone and gone == known:
        raise InputError(
            f"{out} has {len(gone)} scans of other sources, such as {min(gone)}, which would be removed. Choose "
            "another --dataset_dir, or pass all sources: --source \"['a','b']\"."
        )
    for one in [source] if isinstance(source, (str, os.PathLike)) else source:
        place = str(absolute_path(one))
        lost = sorted(name for name in gone if _lies_in(sources[name], {place}))
        if lost and not any(_lies_in(candidate.source, {place}) for candidate in candidates):
            raise InputError(
                f"{place} holds no scan now, and {counted(len(lost), 'scan', 'scans')} in {out}, such as {lost[0]}, came from "
                "it. Is it a folder of a disk that is not mounted? To go on without these scans, which are then removed, "
                "leave it out of --source."
            )
    if gone:
        logger.warning(
            "%s no longer in the sources: removed, such as %s",
            counted(len(gone), "scan prepared earlier is", "scans prepared earlier are"),
            min(gone),
        )
    return kept


def _lies_in(source: str, paths: set[str]) -> bool:
    """Return whether a path or one of its parent folders is one of ``paths``."""
    return bool(source) and any(str(path) in paths for path in (Path(source), *Path(source).parents))


def _remove_unused(out: Path, candidates: Sequence[Candidate], split: Split, kept: set[str]) -> None:
    names = {candidate.name for candidate in candidates} | kept
    for record in (out / PREPARED).glob("*.json"):
        if record.stem not in names:
            Outputs(out, record.stem).remove()
        elif record.stem not in split.sections and record.stem not in kept:
            Outputs(out, record.stem).remove_data()


def _is_complete(task: Task) -> bool:
    return Outputs(task.folder, task.candidate.name).are_complete(task.candidate, task.recipe)


# ---- patients and sections -----------------------------------------------------------------------------------------


def _with_patients(candidates: list[Candidate], pattern: str | None) -> list[Candidate]:
    """Read the patient from the path of each scan: the first group that matched, or the whole match without groups."""
    if pattern is None:
        return candidates
    matches = [re.search(pattern, candidate.source) for candidate in candidates]
    if candidates and not any(matches):
        raise InputError(f"--patient_pattern {pattern!r} matches none of the paths, such as {candidates[0].source}.")
    logger.info("--patient_pattern matches %d of %d paths", sum(map(bool, matches)), len(matches))
    return [
        replace(candidate, patient=next(filter(None, match.groups()), "") if match.re.groups else match[0])
        if match
        else candidate
        for candidate, match in zip(candidates, matches, strict=True)
    ]


def _check_pattern(pattern: str | None) -> None:
    try:
        if pattern is not None:
            re.compile(pattern)
    except (re.error, TypeError) as error:
        raise InputError(f"--patient_pattern {pattern!r} is not a valid regular expression: {error}.") from None


def _split(candidates: Sequence[Candidate], rows: Mapping[str, dict], **options: Any) -> Split:
    scans = [
        {
            "name": candidate.name,
            "label": candidate.label,
            "section": candidate.section,
            "patient": rows[candidate.name]["patient"],
            "sha256": rows[candidate.name]["sha256"],
            "series_uid": candidate.series_uid,
        }
        for candidate in candidates
        if rows[candidate.name]["verdict"] == USED
    ]
    left_out = [
        {"name": candidate.name, "patient": rows[candidate.name]["patient"], "series_uid": candidate.series_uid}
        for candidate in candidates
        if rows[candidate.name]["verdict"] != USED and (rows[candidate.name]["patient"] or candidate.series_uid)
    ]
    return split_by_patient(scans, left_out=left_out, **options)


def _report(out: Path, table: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> Summary:
    reasons = Counter(_kind_of(row["reason"]) for row in table if row["verdict"] == LEFT_OUT)
    left_out = reasons.total()
    for note in notes:
        logger.warning("%s", note)
    for reason, number in reasons.most_common():
        logger.info("left out: %5d  %s", number, reason)
    sections = Counter(row["section"] for row in table if row["verdict"] == USED)
    logger.info(
        "data list %s: %s",
        out / "dataset.json",
        ", ".join(f"{number} {name}" for name, number in sorted(sections.items())),
    )
    logger.info(
        "%d of %d scans used, %d left out; each has a row in %s",
        len(table) - left_out,
        len(table),
        left_out,
        out / "audit.csv",
    )
    return Summary(len(table) - left_out, left_out, dict(reasons))


def _kind_of(reason: str) -> str:
    """Return a reason without the numbers and names of the individual scan, for counting."""
    return re.sub(r"-?\d[\d.]*", "N", re.split(r"[:(\[]", reason)[0]).strip(" ,")
