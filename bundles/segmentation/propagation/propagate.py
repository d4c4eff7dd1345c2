# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Carry labels from a few labelled scans to many unlabelled ones. Runs can be stopped and continued."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...common.errors import InputError
from ...common.files import folder_lock, write_text
from ...common.run.clean_stop import stops_cleanly
from ...common.run.progress import with_progress
from ...common.run.worker_pool import Died, in_processes
from ...common.scans.nifti import open_scan
from ...common.value_rules import ABOVE_ZERO, COUNT, SHARE, WORKERS, Rule, is_list
from .agreement import LeftOut, Relation, relation
from .fusion import IGNORE
from .itk_images import as_volume, simple_itk
from .one_scan import FORMAT, RECORDS, Job, Outputs, Recipe, file_identity, finished, label_scan, refused, with_limits
from .position_fit import Alignment, PositionFit, align
from .position_network import PositionNetwork, ScanPosition
from .results import DATA_LIST, summary_lines, write_results
from .scans_of_run import TRAINING, Scan, ScansOfRun

logger = logging.getLogger(__name__)

STATUS_LEFT_OUT = 3  # exit status if the run succeeded but some scans were left out
SCALES = Rule(
    "must be a number above 0, at most 1, then one of 1 or more",
    lambda value: is_list(value, 2) and 0 < value[0] <= 1 <= value[1],
)
MIN_PAIRS = 6  # organs with agreement and Dice, from which the threshold is derived


@dataclass(frozen=True)
class Selection:
    """Which scans take part, and which labelled scans serve which.

    Attributes:
        atlases: most labelled scans to carry from, for each scan.
        min_common: least share of a scan's length along the body that a labelled scan must cover.
        max_residual: mm; a labelled scan for which the network says other positions, by more than this in the mean over
            the axes, is not used; a scan without any is left out.
        scales: least and largest slope of the positions of a scan, in the network's mm per mm of the scan.
        min_agreement: Dice between copies that an organ needs; None: derived from the labelled scans, see ``wanted_dice``.
        wanted_dice: Dice that kept organs should have in the mean, when the labelled scans are left out one by one.
        otherwise: least ``min_agreement`` that is derived, and its value where fewer than three labelled scans, or too few
            organs, allow no derivation.
    """

    atlases: int = 5
    min_common: float = 0.3
    max_residual: float = 20.0
    scales: Sequence[float] = (0.2, 1.6)
    min_agreement: float | None = None
    wanted_dice: float = 0.6
    otherwise: float = 0.3

    def __post_init__(self) -> None:
        COUNT.check("atlases", self.atlases)
        SHARE.check("min_common", self.min_common)
        SHARE.check("wanted_dice", self.wanted_dice)
        SHARE.check("min_agreement_otherwise", self.otherwise)
        SHARE.or_null("the value derived from the labelled scans").check("min_agreement", self.min_agreement)
        SCALES.check("scales", self.scales)
        ABOVE_ZERO.check("max_residual", self.max_residual)


@dataclass(frozen=True)
class Summary:
    """Result of a run.

    Attributes:
        labelled: names of the scans that got a label.
        left_out: name to reason of the others.
        min_agreement: that was used.
        relation: of agreement and Dice, from the labelled scans; None without any measurement.
    """

    labelled: tuple[str, ...]
    left_out: dict[str, str]
    min_agreement: float
    relation: Relation | None


def propagate(
    *,
    scans: ScansOfRun,
    position_network: str,
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
        position_network: file of a position network.
        recipe: how labels are carried.
        selection: which scans take part.
        output_dir: where the results are written.
        purpose: ``training`` also writes a data list.
        workers: processes; None: one per core, at most 16; 0: none but this one. The results do not depend on it.
        device: of the position network.
        names: ``labels`` and ``modality`` of the data list.

    Raises:
        InputError: SimpleITK is missing, no labelled scan can be used, or the output cannot be written.
        SystemExit: after Ctrl-C or SIGTERM, with 128 + the number of the signal.
    """
    simple_itk()
    WORKERS.check("workers", workers)
    workers = min(len(os.sched_getaffinity(0)), 16) if workers is None else workers
    out = Path(output_dir).expanduser().absolute()
    if purpose != TRAINING:
        recipe = replace(recipe, min_organs=0.0)
    with stops_cleanly(), _alone_in(out):
        holds, faults = _labels_of(scans.labelled, recipe.labels)
        usable = [scan for scan in scans.labelled if scan in holds]
        labelled, reasons = _located(usable, position_network, selection, out, device)
        reasons = {**faults, **reasons}
        for name, reason in reasons.items():
            logger.warning("labelled scan %s is not used: %s", name, reason)
        if not labelled:
            name, reason = next(iter(reasons.items()))
            raise InputError(f"None of the {len(scans.labelled)} labelled scans can be used, such as {name}: {reason}.")
        targets, left_out = _located(scans.targets, position_network, selection, out, device)
        measured, found, min_agreement = _measured(labelled, recipe, selection, out, workers)
        held = tuple(sorted(set.union(*(values for scan, values in holds.items() if scan in labelled))))
        jobs = []
        for scan, position in targets.items():
            atlases, reason = _atlases(position, labelled, selection)
            if atlases:
                own = with_limits(recipe, min_agreement=min_agreement)
                jobs.append(Job(scan, atlases, own, str(out), masks_only=purpose != TRAINING, held=held))
            else:
                left_out[scan.name] = reason
        if any(finished(job) is None for job in jobs):
            (out / DATA_LIST).unlink(missing_ok=True)  # until its labels are complete again
        results = _all(jobs, workers, doing="carrying labels")
        results |= {name: refused(name, reason) for name, reason in left_out.items()}
        ordered = [results[scan.name] for scan in scans.targets]
        kept = {result["scan"] for result in ordered if result["labelled"]}
        for result in ordered:
            if not result["organs"]:  # files of an earlier run with other scans or options
                for path in Outputs(str(out), result["scan"]).all(masks_only=purpose != TRAINING):
                    path.unlink(missing_ok=True)
        summary = Summary(
            tuple(result["scan"] for result in ordered if result["labelled"]),
            {result["scan"]: result["reason"] for result in ordered if not result["labelled"]} | dict(scans.unreadable),
            min_agreement,
            found,
        )
        write_results(
            out,
            scans=scans,
            results=ordered,
            measured=measured,
            min_agreement=min_agreement,
            relation=found,
            real=usable,
            kept=kept if purpose == TRAINING else None,
            names=names or {},
        )
    for line in summary_lines(out, summary, purpose):
        logger.info("%s", line)
    if not summary.labelled:
        name, reason = next(iter(summary.left_out.items()))
        raise InputError(f"None of the {len(scans.targets)} scans got a label, such as {name}: {reason}.")
    return summary


def exit_if_scans_were_left_out(summary: Summary) -> None:
    """End the process with status 3 if scans were left out; last in a run list."""
    if summary.left_out:
        sys.exit(STATUS_LEFT_OUT)


def _labels_of(scans: Sequence[Scan], labels: Mapping[int, str]) -> tuple[dict[Scan, set[int]], dict[str, str]]:
    """Return the label values of each labelled scan, and by name why the label of another one cannot be carried."""
    holds: dict[Scan, set[int]] = {}
    faults: dict[str, str] = {}
    for scan in scans:
        try:
            holds[scan] = _values_of(scan, labels)
        except InputError as error:
            faults[scan.name] = str(error)
        except Exception as error:  # nibabel, gzip and zlib raise many kinds of errors for broken files
            faults[scan.name] = f"{scan.image} cannot be read: {error}"
    return holds, faults


def _values_of(scan: Scan, labels: Mapping[int, str]) -> set[int]:
    """Return which organs a label has.

    Raises:
        InputError: it is on another grid than its scan, has undeclared values, or no organ.
    """
    label, image = as_volume(scan.label), open_scan(scan.image)
    if image.shape[:3] != label.voxels.shape or not np.allclose(image.affine, label.affine, atol=1e-2):
        raise InputError(
            f"its label {scan.label} is on another grid, {label.voxels.shape} voxels of {_mm(label.spacing)} for "
            f"{image.shape[:3]} of {_mm(image.header.get_zooms()[:3])}"
        )
    values = {float(value) for value in np.unique(label.voxels)}
    if strange := sorted(values - {0.0, float(IGNORE), *map(float, labels)}):
        raise InputError(f"its label {scan.label} has the values {strange[:5]}, and {sorted(labels)} are declared")
    if not (found := {int(value) for value in values} & set(labels)):
        raise InputError(f"its label {scan.label} has no voxel of any organ")
    return found


def _mm(spacing: Sequence[float]) -> str:
    return "x".join(f"{size:.3g}" for size in spacing) + " mm"


# ---- where the scans are -------------------------------------------------------------------------------------------


def _located(
    scans: Sequence[Scan], network_file: str, selection: Selection, out: Path, device: str
) -> tuple[dict[Scan, ScanPosition], dict[str, str]]:
    """Return the position of each scan that fits, and the reason for each other one, by name."""
    network: PositionNetwork | None = None
    located: dict[Scan, ScanPosition] = {}
    reasons: dict[str, str] = {}

    network_identity = file_identity(network_file, out)

    def positions() -> Iterator[tuple[Scan, ScanPosition | str]]:
        nonlocal network
        for scan in scans:
            path = out / RECORDS / "positions" / f"{scan.name}.json"
            try:
                files = {"scan": file_identity(scan.image, out), "network": network_identity}
            except InputError as error:
                yield scan, str(error)
                continue
            identity = {"format": FORMAT, **files}
            if (known := _recorded_position(path, identity)) is not None:
                yield scan, known
                continue
            network = network or PositionNetwork(network_file, device=device)
            try:
                position = network.locate(as_volume(scan.image))
            except InputError as error:
                yield scan, str(error)
                continue
            except Exception as error:  # of a library, in one scan: the others go on
                logger.warning("%s", traceback.format_exc())
                yield scan, f"an unexpected error, {type(error).__name__}: {error}"
                continue
            write_text(path, json.dumps({"identity": identity, **asdict(position)}, indent=1) + "\n")
            yield scan, position

    for scan, position in with_progress(positions(), len(scans), doing="positions"):
        if isinstance(position, str):
            reasons[scan.name] = position
        elif problem := position.fit.problem(scales=tuple(selection.scales)):
            reasons[scan.name] = problem
        else:
            located[scan] = position
    return located, reasons


def _recorded_position(path: Path, identity: dict[str, Any]) -> ScanPosition | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if content.get("identity") != json.loads(json.dumps(identity)):
        return None
    fit = PositionFit(**{name: tuple(values) for name, values in content["fit"].items()})
    return ScanPosition(fit, tuple(tuple(map(tuple, profile)) for profile in content["profiles"]))


def _atlases(
    position: ScanPosition, labelled: dict[Scan, ScanPosition], selection: Selection, *, apart_from: Scan | None = None
) -> tuple[tuple[tuple[Scan, Alignment], ...], str]:
    """Return the labelled scans to carry from, best first, and how a scan lies over them; or why there is none."""
    scans = [scan for scan in labelled if scan != apart_from and not _same_patient(scan, apart_from)]
    if not scans:
        return (), "there is no labelled scan of another patient"
    lies = {scan: align(position.profiles, labelled[scan].profiles) for scan in scans}
    best = min(float(np.mean(each.residual)) for each in lies.values())
    if not math.isfinite(best):
        return (), "its positions overlap with those of no labelled scan: another region?"
    if best > selection.max_residual:
        return (), (
            f"its positions differ from those of every labelled scan, by {best:.0f} mm on average, more than "
            f"{selection.max_residual:g}: another region?"
        )
    fitting = [scan for scan in scans if np.mean(lies[scan].residual) <= selection.max_residual]
    common = max(lies[scan].common for scan in fitting)
    if common < selection.min_common:
        return (), (
            f"no labelled scan covers enough of it: {common:.0%} of its length at most, and {selection.min_common:.0%} "
            "are needed"
        )
    covering = [scan for scan in fitting if lies[scan].common >= selection.min_common]
    covering.sort(key=lambda scan: (-round(lies[scan].common, 1), float(np.mean(lies[scan].residual))))
    return tuple((scan, lies[scan]) for scan in covering[: selection.atlases]), ""


def _same_patient(scan: Scan, other: Scan | None) -> bool:
    return other is not None and bool(scan.patient) and scan.patient == other.patient


# ---- how good carried labels are -----------------------------------------------------------------------------------


def _leave_out_jobs(labelled: dict[Scan, ScanPosition], recipe: Recipe, selection: Selection, out: Path) -> list[Job]:
    """One job for each labelled scan, to which the others carry their labels."""
    jobs = []
    for scan, position in labelled.items():
        atlases, _ = _atlases(position, labelled, selection, apart_from=scan)
        if atlases:
            jobs.append(Job(scan, atlases, recipe, str(out), leave_out=True))
    return jobs


def _measured(
    labelled: dict[Scan, ScanPosition], recipe: Recipe, selection: Selection, out: Path, workers: int
) -> tuple[list[dict[str, Any]], Relation | None, float]:
    """Leave out one labelled scan after another.

    Returns:
        Rows with ``scan``, ``organ``, ``agreement`` and ``dice``; how agreement tells the Dice; the least agreement.
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
                reason = "its process died, most likely for lack of memory: use fewer --workers"
                result = refused(job.target.name, reason)
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


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Lock the output folder: two runs at once would replace each other's files."""
    with ExitStack() as stack:
        try:
            stack.enter_context(folder_lock(out / RECORDS / "lock", wait=False))
        except BlockingIOError:
            raise InputError(
                f"Another run is already writing to {out}: wait until it ends, or choose another --output_dir."
            ) from None
        except OSError as error:
            raise InputError(
                f"--output_dir {out} cannot be written: {error.strerror}. Choose another folder."
            ) from None
        yield
