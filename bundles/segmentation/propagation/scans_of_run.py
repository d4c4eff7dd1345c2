# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Which scans give their labels, which get labels, and which must stay apart."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...common.cases.failures import Failures
from ...common.data.case_names import case_names
from ...common.data.data_list import segmentation_scans
from ...common.data.list_forms.list_file import (
    UNLABELLED_SECTIONS,
    data_list_path,
    first_file,
    image_files,
    parse_data_list,
)
from ...common.data.partial_labels import refuse_partial
from ...common.errors import InputError
from ...common.files import absolute_path
from ...common.scans.nifti import open_scan
from ...common.value_rules import COUNT
from ..inference.inputs import segmentation_inputs
from .fusion import IGNORE
from .itk_images import as_label, as_volume

logger = logging.getLogger(__name__)

TRAINING, MASKS = "training", "masks"
PURPOSES = (TRAINING, MASKS)


@dataclass(frozen=True)
class Scan:
    """A scan of the run.

    Attributes:
        name: unique in the run; its output files have this name.
        image: its file.
        label: its label file; "" for a scan without one.
        patient: from the data list, "" if it names none.
        weight: weight of its loss, from the data list.
    """

    name: str
    image: str
    label: str = ""
    patient: str = ""
    weight: float = 1.0


@dataclass(frozen=True)
class ScansOfRun:
    """The scans of a run.

    Attributes:
        labelled: scans whose labels are carried.
        targets: scans that get labels.
        held_out: entries of the validation section or fold, and of the test section, as in the data list.
        unreadable: files and series among the unlabelled ones that cannot be read, with the reasons.
    """

    labelled: tuple[Scan, ...]
    targets: tuple[Scan, ...]
    held_out: Mapping[str, Sequence[Mapping[str, Any]]]
    unreadable: Mapping[str, str] = field(default_factory=dict)


def scans_of_run(
    *,
    dataset_dir: str,
    data_list: str | None = None,
    fold: int | str | None = None,
    folds: int | None = None,
    seed: int = 0,
    unlabelled: str | Sequence[str] | None = None,
    purpose: str = TRAINING,
    max_scans: int | None = None,
    output_dir: str,
) -> ScansOfRun:
    """List the scans of a run.

    Args:
        dataset_dir, data_list, fold, folds, seed: labelled scans are the training cases, see `segmentation_scans`; but
            without fold and folds, a list that names neither a validation section nor folds holds no case out.
        unlabelled: folders (NIfTI or DICOM), NIfTI files, or data lists (their ``unlabelled`` section; without one,
            the images of ``training``). None: the ``unlabelled`` section of the labelled scans' own list.
        purpose: ``training``: validation and test scans must not be among the unlabelled ones. ``masks``: they may be.
        max_scans: most unlabelled scans that get labels, drawn by the seed: with the same seed, a smaller number gives
            part of the scans of a larger one. None: all.
        output_dir: where converted DICOM series are written.

    Raises:
        InputError: there are no labelled or no unlabelled scans; ``max_scans`` is not a number of scans; or, for
            training, a validation or test scan is among the unlabelled ones, also as a copy under another name.
    """
    COUNT.or_null("all scans").check("max_scans", max_scans)
    path = data_list_path(dataset_dir, data_list)
    content = parse_data_list(path)
    if content.get("ignore_label") not in (None, IGNORE):
        raise InputError(
            f"{path} declares {content['ignore_label']} as the value of unknown voxels, and carried labels use {IGNORE}. Write "
            f"{IGNORE} instead in its labels and as ignore_label."
        )
    entries = content.get("training", []) + content.get("validation", [])
    divided = content.get("validation") or any("fold" in entry for entry in entries)
    if fold is None and folds is None and not divided:
        fold = "all"  # with two labels, none is to spare
    listed = {
        section: segmentation_scans(
            dataset_dir, data_list=data_list, section=section, fold=fold, folds=folds, seed=seed, may_be_empty=True
        )
        for section in ("training", "validation")
    }
    labelled = [entry for entry in listed["training"] if not entry.get("carried")]
    if not labelled:
        raise InputError(f"{path} has no training case with a label of its own: there is nothing to carry.")
    refuse_partial(labelled, where=f"{path}: carrying labels")
    if unlabelled is None:
        entries, unreadable = _unlabelled_entries(content), {}
        if not entries:
            raise InputError(
                f"{path} has no section 'unlabelled': name the unlabelled scans by --unlabelled, a folder or a data list."
            )
    else:
        entries, unreadable = _entries_of(unlabelled, output_dir)
    own = {_identity(entry) for entry in labelled}
    targets: dict[str, Mapping[str, Any]] = {}
    for entry in entries:
        if (identity := _identity(entry)) not in own:
            targets.setdefault(identity, entry)
    if not targets:
        raise InputError(
            f"All {len(entries)} unlabelled scans are labelled scans of {path}: there is nothing to label."
        )
    held_out = {"validation": listed["validation"], "test": content.get("test", [])}
    if purpose == TRAINING:
        _refuse_held_out(targets, held_out, path)
    names = case_names([first_file(entry) for entry in (*labelled, *targets.values())])
    unlabelled_scans = sorted(
        (_scan(entry, names, label=False) for entry in targets.values()), key=lambda scan: scan.name
    )
    return ScansOfRun(
        tuple(_scan(entry, names) for entry in labelled),
        _drawn(unlabelled_scans, max_scans, seed),
        held_out,
        unreadable,
    )


def _drawn(scans: Sequence[Scan], most: int | None, seed: int) -> tuple[Scan, ...]:
    """Return at most ``most`` of the scans, in their order."""
    if most is None or most >= len(scans):
        return tuple(scans)
    logger.info(
        "labels are carried to %d of the %d unlabelled scans (--max_scans), drawn by the seed", most, len(scans)
    )
    drawn = np.random.default_rng(seed).permutation(len(scans))[:most]
    return tuple(scans[index] for index in sorted(drawn))


def _scan(entry: Mapping[str, Any], names: Mapping[str, str], *, label: bool = True) -> Scan:
    if len(image_files(entry)) > 1:
        raise InputError(f"{first_file(entry)} is one of several channels: labels are carried between CT scans only.")
    file = first_file(entry)
    patient = str(entry.get("patient") or "")
    return Scan(names[file], file, str(entry["label"]) if label else "", patient, float(entry.get("weight", 1)))


def _unlabelled_entries(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [entry for section in UNLABELLED_SECTIONS for entry in content.get(section, [])]


def _entries_of(sources: str | Sequence[str], output_dir: str) -> tuple[list[Mapping[str, Any]], dict[str, str]]:
    """Return the entries of all sources, and the reason for each file or series that cannot be read."""
    sources = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    entries: list[Mapping[str, Any]] = []
    files = []
    for source in sources:
        path = absolute_path(source)
        path = path / "dataset.json" if (path / "dataset.json").is_file() else path
        if path.suffix == ".json":
            content = parse_data_list(path)
            found = _unlabelled_entries(content) or content.get("training", [])
            if not found:
                raise InputError(f"{path} has neither unlabelled nor training scans: it has nothing to label.")
            entries += found
        else:
            files.append(source)
    failures = Failures(output_dir)  # in failed.csv
    inputs = segmentation_inputs(files, output_dir=output_dir, failures=failures) if files else None
    failures.report(0 if inputs is None else inputs.count)
    found = [] if inputs is None else inputs.scans
    return [*entries, *found], {failure.scan: failure.reason for failure in failures.all()}


def _identity(entry: Mapping[str, Any]) -> str:
    """Return the real path of an entry's image: a file is the same through all links."""
    return os.path.realpath(first_file(entry))


def _refuse_held_out(
    targets: Mapping[str, Mapping[str, Any]], held_out: Mapping[str, Sequence[Mapping[str, Any]]], path: Path
) -> None:
    for section, entries in held_out.items():
        patients = {str(entry["patient"]) for entry in entries if entry.get("patient")}
        files = {_identity(entry) for entry in entries}
        both = [
            entry["image"]
            for identity, entry in targets.items()
            if identity in files or (entry.get("patient") and str(entry["patient"]) in patients)
        ]
        both = both or _copies(targets, files)
        if both:
            raise InputError(
                f"{len(both)} of the {len(targets)} unlabelled scans are {section} scans or patients of {path}, such as "
                f"{both[0]}: a network that is trained on them cannot be measured on them. Remove them from the "
                f"unlabelled scans. (--purpose {MASKS} writes masks of any scan, and no data list for training.)"
            )


def _copies(targets: Iterable[str], files: Iterable[str]) -> list[str]:
    """Return the targets whose voxels are those of one of the files. Only scans of equal shape are decoded."""
    by_shape: dict[tuple, list[str]] = {}
    for file in files:
        by_shape.setdefault(_shape(file), []).append(file)
    by_shape.pop((), None)
    digests = {
        shape: {digest for file in same if (digest := _digest(file))}
        for shape, same in by_shape.items()
        if shape in set(map(_shape, targets))
    }
    return [target for target in targets if (known := digests.get(_shape(target))) and _digest(target) in known]


def _shape(file: str) -> tuple[int, ...]:
    """Return the header's shape, sorted, since axes may be swapped; () if the file cannot be read (reported later)."""
    try:
        return tuple(sorted(open_scan(file).shape))
    except Exception:  # besides `RefusedScan`, what nibabel, gzip and zlib raise for broken files
        return ()


def _digest(file: str) -> str:
    try:
        return hashlib.sha256(as_volume(file).to_ras().voxels.astype("float32").tobytes()).hexdigest()
    except InputError:
        return ""


# ---- the labels of labelled scans ----------------------------------------------------------------------------------


def values_of_labels(scans: Sequence[Scan], labels: Mapping[int, str]) -> tuple[dict[Scan, set[int]], dict[str, str]]:
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
    label, image = as_label(scan.label), open_scan(scan.image)
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
