# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Split scans by patient: no patient, and no duplicate of a scan, is on both sides of a split."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ...common.data.splits import draw_folds, draw_share
from ...common.value_rules import SHARE_BELOW_ONE, Rule, is_whole
from ...common.words import counted

RANK = ("patient", "scan", "series")  # which identifier names a patient, most preferred first
FOLDS = Rule(
    "must be a whole number, 2 or more, or 0 for none", lambda value: is_whole(value) and value >= 0 and value != 1
)
SECTIONS = ("training", "validation", "test")  # from the least to the most held out


@dataclass
class Split:
    """Patient, section and fold of each scan. The keys of all dicts are names of scans.

    Attributes:
        twins: for each duplicate that is left out, the scan with the same voxels that is kept.
        patients: patient of every scan; the name of a scan if no patient is known.
        sections: section of every kept scan: ``training``, ``validation`` or ``test``.
        folds: fold of every kept scan that is not in test; empty if no folds were requested or there are too few
            patients.
        notes: what the user should know.
    """

    twins: dict[str, str]
    patients: dict[str, str]
    sections: dict[str, str]
    folds: dict[str, int]
    notes: list[str] = field(default_factory=list)


def pseudonym(patient_id: str) -> str:
    """Return a pseudonym for a patient's ID or name: always the same for the same patient, and not readable.

    This does not protect against somebody who tries all IDs of a hospital: do not publish such pseudonyms, or assign
    new IDs to the patients.
    """
    patient_id = patient_id.strip()
    return f"p{hashlib.sha256(patient_id.encode()).hexdigest()[:12]}" if patient_id else ""


def check_split(*, validation_share: float, folds: int) -> None:
    """Check the options of `split_by_patient`, before hours of work.

    Raises:
        InputError: an option is out of range; the message names it and its value.
    """
    SHARE_BELOW_ONE.check("validation_share", validation_share)
    FOLDS.check("folds", folds)


def split_by_patient(
    scans: Sequence[Mapping[str, str]],
    *,
    validation_share: float,
    folds: int,
    seed: int,
    left_out: Sequence[Mapping[str, str]] = (),
) -> Split:
    """Split scans by patient. The split depends only on the seed and the patients, not on the order of the scans.

    Of several scans with equal voxels, one is kept: one with a label if there is one, else the first by name. They
    count as scans of one patient. If the source lists have a validation section, it is kept, and all other scans are
    for training; otherwise ``validation_share`` of the patients, at least one, are drawn. All scans of a patient in
    several sections go to the section that is held out most: test, then validation, then training.

    Args:
        scans: each with ``name``, ``sha256``, ``patient`` and ``series_uid`` ("" if unknown), ``section`` (that of its
            list, or "") and ``label`` (or "").
        validation_share: between 0 and 1; 0 for no validation.
        folds: number of folds for the scans that are not in test; 0 for none.
        seed: seed of the draws.
        left_out: scans that are not used, but show which scans belong to one patient: each with ``name``, ``patient``
            and ``series_uid``.

    Raises:
        InputError: see `check_split`.
    """
    check_split(validation_share=validation_share, folds=folds)
    twins = find_twins(scans)
    patients = _patients([*scans, *left_out], twins, left_out={scan["name"] for scan in left_out})
    sections, notes = _sections_of_patients(scans, patients)
    kept = sorted(scan["name"] for scan in scans if scan["name"] not in twins)
    held_out = {patient for patient, section in sections.items() if section == "validation"}
    pool = sorted({patients[name] for name in kept} - {p for p, section in sections.items() if section == "test"})
    if not held_out and validation_share and len(pool) > 1:
        held_out = draw_share(pool, share=validation_share, seed=seed)
    elif not held_out and validation_share:
        notes.append(f"{counted(len(pool), 'patient')} cannot be split: there is no validation section")
    section_of = {
        name: "test" if patients[name] not in pool else "validation" if patients[name] in held_out else "training"
        for name in kept
    }
    in_folds = [name for name in kept if section_of[name] != "test"]
    fold_of: dict[str, int] = {}
    if folds and len(pool) >= folds:
        drawn = draw_folds([patients[name] for name in in_folds], "--folds", folds=folds, seed=seed)
        fold_of = dict(zip(in_folds, drawn, strict=True))
    elif folds:
        notes.append(f"{counted(len(pool), 'patient')} cannot fill {folds} folds: none are written")
    return Split(twins, patients, section_of, fold_of, notes)


def find_twins(scans: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Map each duplicate to the scan with equal voxels that is kept."""
    by_hash = defaultdict(list)
    for scan in scans:
        by_hash[scan["sha256"]].append(scan)
    twins = {}
    for equal in by_hash.values():
        first, *others = sorted(equal, key=lambda scan: (not scan["label"], scan["name"]))
        twins.update({other["name"]: first["name"] for other in others})
    return twins


def _patients(
    scans: Sequence[Mapping[str, str]], twins: Mapping[str, str], *, left_out: Collection[str] = ()
) -> dict[str, str]:
    """Return the patient of each scan.

    Scans with the same patient ID, with equal voxels or of one series belong to one patient, also through other scans.
    """
    parent: dict[tuple[str, str], tuple[str, str]] = {}

    def end(node: tuple[str, str]) -> tuple[str, str]:
        while node in parent:
            node = parent[node]
        return node

    for scan in scans:
        own = ("scan", scan["name"])
        others = {
            "patient": scan["patient"],
            "series": scan["series_uid"],
            "scan": twins.get(scan["name"], scan["name"]),
        }
        for other in others.items():
            if other[1] and end(own) != end(other):
                # Sorted: a chain ends with the ID of the patient if there is one, else with the name of a kept scan.
                first, second = sorted(
                    (end(own), end(other)),
                    key=lambda node: (RANK.index(node[0]), node[1] in twins or node[1] in left_out, node[1]),
                )
                parent[second] = first
    return {scan["name"]: end(("scan", scan["name"]))[1] for scan in scans}


def _sections_of_patients(
    scans: Sequence[Mapping[str, str]], patients: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """Return the section of each patient with a scan in a list, and notes about patients in several sections."""
    members = defaultdict(dict)
    for scan in sorted(scans, key=lambda scan: scan["name"]):
        if scan["section"]:
            members[patients[scan["name"]]].setdefault(scan["section"], scan["name"])
    notes, sections = [], {}
    for patient, named in sorted(members.items()):
        sections[patient] = max(named, key=SECTIONS.index)
        if len(named) > 1:
            where = ", ".join(f"{name} ({section})" for section, name in sorted(named.items()))
            notes.append(
                f"patient {patient} is in {len(named)} sections of the source lists: {where}; all its scans go to "
                f"{sections[patient]}"
            )
    return sections, notes
