# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Carry labels from a few labelled scans to many unlabelled ones. Runs can be stopped and continued."""

from __future__ import annotations

import errno
import logging
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...common.cases.output_lock import alone_in
from ...common.errors import InputError
from ...common.files import absolute_path
from ...common.run.clean_stop import stops_cleanly
from ...common.run.progress import with_progress
from ...common.run.worker_pool import Died, available_cores, in_processes
from ...common.value_rules import WORKERS
from ...common.words import counted, sentence
from .agreement import LeftOut, Relation, relation
from .atlas_choice import Selection, choose_atlases
from .itk_images import simple_itk
from .locations import locate
from .one_scan import Job, Recipe, finished, label_scan, refused, with_limits
from .outputs import Outputs
from .position.network import ScanPosition
from .records import RECORDS, read_record
from .results import DATA_LIST, summary_lines, write_results
from .scans_of_run import TRAINING, Scan, ScansOfRun, values_of_labels

logger = logging.getLogger(__name__)

STATUS_LEFT_OUT = 3  # exit status if the run succeeded but some scans were left out
MIN_PAIRS = 6  # organs with agreement and Dice, from which the threshold is derived


@dataclass(frozen=True)
class Summary:
    """Result of a run.

    Attributes:
        labelled: names of the scans that got a label.
        left_out: name to reason of the others.
        min_agreement: the value that was used.
        relation: relation of agreement and Dice, from the labelled scans; None without any measurement.
    """

    labelled: tuple[str, ...]
    left_out: dict[str, str]
    min_agreement: float
    relation: Relation | None


def propagate(
    *,
    scans: ScansOfRun,
    position_network: str | Callable[[], str],
    recipe: Recipe,
    selection: Selection,
    output_dir: str,
    purpose: str = TRAINING,
    workers: int | None = None,
    device: str = "cpu",
    names: dict[str, Any] | None = None,
) -> Summary:
    """Give every unlabelled scan labels, and report what came of each; propagate.yaml explains the options.

    Args:
        scans: from `scans_of_run`.
        position_network: file of a position network, or what returns it: called once the labelled scans and the output
            folder are known to be usable, since it may train for hours.
        recipe: how labels are carried.
        selection: which scans take part.
        output_dir: where the results are written.
        purpose: ``training`` also writes a data list.
        workers: processes; None: one per core, at most 16; 0: none but this one. The results do not depend on it.
        device: the position network's device.
        names: ``labels`` and ``modality`` of the data list.

    Raises:
        InputError: SimpleITK is missing, no labelled scan can be used, or the output cannot be written or holds a data
            list of another origin.
        SystemExit: after Ctrl-C or SIGTERM, with 128 + the number of the signal.
    """
    simple_itk()
    WORKERS.check("workers", workers)
    workers = min(available_cores(), 16) if workers is None else workers
    check_output(output_dir)
    out = absolute_path(output_dir)
    masks_only = purpose != TRAINING
    recipe = replace(recipe, min_organs=0.0) if masks_only else recipe
    written = (out, *(out / name for name in ("labels", "masks", "confidence")), *(out / RECORDS).glob("**/"))
    with (
        stops_cleanly(),
        alone_in(out, lock=out / RECORDS / "lock", doing="writing to", option="--output_dir", folders=written),
    ):
        holds, faults = values_of_labels(scans.labelled, recipe.labels)
        _check_labelled(scans, holds, faults, out)
        network = position_network() if callable(position_network) else position_network
        labelled, reasons = locate(list(holds), network, selection, out, device)
        _check_labelled(scans, labelled, reasons, out)
        targets, left_out = locate(scans.targets, network, selection, out, device)
        measured, found, min_agreement = _measured(labelled, recipe, selection, out, workers)
        recipe = with_limits(recipe, min_agreement=min_agreement)
        held = tuple(sorted(set().union(*(holds[scan] for scan in labelled))))
        jobs = []
        for scan, position in targets.items():
            atlases, reason = choose_atlases(position, labelled, selection)
            if atlases:
                jobs.append(Job(scan, atlases, recipe, str(out), masks_only=masks_only, held=held))
            else:
                left_out[scan.name] = reason
        if not masks_only and any(finished(job) is None for job in jobs):
            (out / DATA_LIST).unlink(missing_ok=True)  # until its labels are complete again
        results = _all(jobs, workers, doing="carrying labels")
        results |= {name: refused(name, reason) for name, reason in left_out.items()}
        ordered = [results[scan.name] for scan in scans.targets]
        _set_aside(ordered, out, masks_only=masks_only)
        summary = _summary(ordered, scans, min_agreement, found)
        write_results(
            out,
            scans=scans,
            results=ordered,
            measured=measured,
            min_agreement=min_agreement,
            relation=found,
            real=list(holds),
            kept=None if masks_only else set(summary.labelled),
            names=names or {},
        )
    for line in summary_lines(out, summary, purpose, held_out=bool(scans.held_out["validation"])):
        logger.info("%s", line)
    if not summary.labelled:
        name, reason = next(iter(summary.left_out.items()))
        raise InputError(f"None of the {len(scans.targets)} scans got a label, such as {name}: {sentence(reason)}")
    return summary


def check_output(output_dir: str | os.PathLike) -> None:
    """Make the output folder and check that it can hold the results, before anything is read.

    Use it as an entry of the config's `run`.

    Raises:
        InputError: it is a file, cannot be written, or holds a data list that no run of propagate.yaml wrote.
    """
    out = absolute_path(output_dir)
    if out.exists() and not out.is_dir():
        raise InputError(f"--output_dir {out} is a file: choose a folder.")
    if (out / DATA_LIST).exists() and not (out / RECORDS).is_dir():  # this run would replace it, and files in labels/
        raise InputError(
            f"--output_dir {out} holds a {DATA_LIST} that no run of propagate.yaml wrote, such as that of your labelled scans. "
            "Choose another folder."
        )
    try:  # only the folder: one with records counts as the output of such a run
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise InputError(f"--output_dir {out} cannot be written: {error.strerror}. Choose another folder.") from None


def _check_labelled(scans: ScansOfRun, labelled: Collection[Scan], reasons: Mapping[str, str], out: Path) -> None:
    """Warn about labelled scans that are not used, with the reason by name.

    Raises:
        InputError: none can be used, or one from which labels of an earlier run were carried: all would be made again.
    """
    carried = _carried_from(out) if reasons else {}
    for name, reason in reasons.items():
        if carried.get(name):
            raise InputError(
                f"The labelled scan {name} cannot be used: {sentence(reason)} {counted(carried[name], 'label')} in {out} "
                f"{'was' if carried[name] == 1 else 'were'} carried from it, and would be made again without it. Fix it; or, to "
                "go on without it, remove it from the data list."
            )
        logger.warning("labelled scan %s is not used: %s", name, reason)
    if not labelled:
        name, reason = next(iter(reasons.items()))
        raise InputError(
            f"None of the {len(scans.labelled)} labelled scans can be used, such as {name}: {sentence(reason)}"
        )


def _set_aside(results: Sequence[dict[str, Any]], out: Path, *, masks_only: bool) -> None:
    """Set aside what an earlier run wrote for scans now left out; a run with the earlier options takes it back."""
    for result in results:
        if not result["organs"]:
            Outputs(str(out), result["scan"]).set_aside(masks_only=masks_only)


def _carried_from(out: Path) -> Counter[str]:
    """Return how many finished labels were carried from each labelled scan, by its name."""
    found: Counter[str] = Counter()
    for file in (out / RECORDS / "labels").glob("*.json"):
        pairs = (read_record(file, ("result",)) or {"result": {}})["result"].get("pairs") or ()
        found.update(pair["atlas"] for pair in pairs if isinstance(pair, dict) and not pair.get("reason"))
    return found


def _summary(
    results: Sequence[dict[str, Any]], scans: ScansOfRun, min_agreement: float, found: Relation | None
) -> Summary:
    labelled = tuple(result["scan"] for result in results if result["labelled"])
    left_out = {result["scan"]: result["reason"] for result in results if not result["labelled"]}
    return Summary(labelled, left_out | dict(scans.unreadable), min_agreement, found)


def exit_if_scans_were_left_out(summary: Summary) -> None:
    """End the process with status 3 if scans were left out. Use it as the last entry of the config's `run`."""
    if summary.left_out:
        sys.exit(STATUS_LEFT_OUT)


# ---- how good carried labels are -----------------------------------------------------------------------------------


def _leave_out_jobs(labelled: dict[Scan, ScanPosition], recipe: Recipe, selection: Selection, out: Path) -> list[Job]:
    """Return one job for each labelled scan, to which the others carry their labels."""
    jobs = []
    for scan, position in labelled.items():
        atlases, _ = choose_atlases(position, labelled, selection, apart_from=scan)
        if atlases:
            jobs.append(Job(scan, atlases, recipe, str(out), leave_out=True))
    return jobs


def _measured(
    labelled: dict[Scan, ScanPosition], recipe: Recipe, selection: Selection, out: Path, workers: int
) -> tuple[list[dict[str, Any]], Relation | None, float]:
    """Leave out one labelled scan after another.

    Returns:
        Rows with ``scan``, ``organ``, ``agreement`` and ``dice``; how agreement predicts the Dice; the least agreement.
    """
    jobs = _leave_out_jobs(labelled, recipe, selection, out)
    results = _all(jobs, workers, doing="measuring on labelled scans")
    for name, result in results.items():
        if result["reason"]:
            logger.warning("labelled scan %s cannot be measured: %s", name, result["reason"])
    rows = [
        {"scan": name, "organ": organ, **values}
        for name, result in results.items()
        for organ, values in result.get("measured", {}).items()
    ]
    known = [
        LeftOut(row["scan"], row["organ"], _nan(row["agreement"]), row["dice"])
        for row in rows
        if row["dice"] is not None
    ]
    found = relation(known, dice=selection.wanted_dice) if known else None
    if selection.min_agreement is not None:
        return rows, found, selection.min_agreement
    if found is None or found.pairs < MIN_PAIRS:
        return rows, found, selection.otherwise
    if math.isnan(found.min_agreement):
        largest = max(row.agreement for row in known if not math.isnan(row.agreement))
        logger.warning(
            "no agreement gives a Dice of %.2f (--wanted_dice) on the labelled scans: only organs that agree as well as the "
            "best of theirs, by %.2f, are kept. Labels carried in this way are poor; look at agreement.png.",
            *(selection.wanted_dice, largest),
        )
        return rows, found, max(largest, selection.otherwise)
    return rows, found, max(found.min_agreement, selection.otherwise)


def _nan(value: float | None) -> float:
    return math.nan if value is None else value


# ---- the work ------------------------------------------------------------------------------------------------------


def _all(jobs: Sequence[Job], workers: int, *, doing: str) -> dict[str, dict[str, Any]]:
    """Do the jobs that are not finished; return the result of each by name."""
    results = {job.target.name: result for job in jobs if (result := finished(job)) is not None}
    todo = [job for job in jobs if job.target.name not in results]
    if results:
        logger.info("%s: %d of %d scans are finished already", doing, len(results), len(jobs))
    with closing(in_processes(label_scan, todo, workers=workers)) as done:
        for job, result in with_progress(done, len(todo), doing=doing):
            if isinstance(result, Died):
                result = refused(job.target.name, Died.reason)
            results[job.target.name] = result
            logger.info("%s", _line(result))
            if "traceback" in result:
                logger.warning("%s", result.pop("traceback"))
    return {job.target.name: results[job.target.name] for job in jobs}


def _line(result: dict[str, Any]) -> str:
    """Return what came of a scan, in one line."""
    name = result["scan"]
    if result["reason"]:
        return f"{name}: left out, {result['reason']}"
    if "measured" in result:
        dice = [values["dice"] for values in result["measured"].values() if values["dice"] is not None]
        mean = f"{sum(dice) / len(dice):.2f}" if dice else "no value"
        return f"{name}: carried from the other labelled scans, Dice {mean} with its own label"
    kept = [row for row in result["organs"] if row["kept"]]
    return f"{name}: {len(kept)} of {len(result['organs'])} organs kept, from {len(result['pairs'])} labelled scans"
