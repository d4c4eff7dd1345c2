# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Cases with carried labels, which no person drew: how often they are visited, and what is recorded about them.

Labels are carried from another scan (registration) or from another network (pseudo-labels). An entry of the data list
says so with ``"carried": true``; all other cases are called real here. ``carried_from`` lists the images of the cases
whose labels were carried. ``"weight": 0.5`` halves the loss of a case.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..run.distributed import world_size
from ..value_rules import ABOVE_ZERO, SWITCH
from ..words import counted
from .partial_labels import LABELLED

#: Keys of an entry that say how its label is used. No transform of a crop reads them.
NOTES = ("carried", "carried_from", "weight", LABELLED)


@dataclass(frozen=True)
class Visits:
    """Which volumes are visited by the draws of a training.

    Attributes:
        each_pass: indices of the volumes of one pass over the data; a volume may occur several times.
        last: indices of the volumes of a pass from draw ``last_from`` on.
        last_from: None: never.
    """

    each_pass: tuple[int, ...]
    last: tuple[int, ...] = ()
    last_from: int | None = None


def visits(
    scans: Sequence[Mapping[str, Any]],
    *,
    real_repeats: int,
    real_only_steps: int,
    steps: int,
    accumulation_steps: int,
    batch_size: int,
) -> Visits:
    """Plan the visits to real cases and to cases with carried labels.

    Args:
        scans: training items; those with a true ``carried`` have carried labels.
        real_repeats: visits to each real case per pass; cases with carried labels are visited once.
        real_only_steps: number of last steps that visit only real cases.
        steps: steps of the run.
        accumulation_steps: iterations per step.
        batch_size: volumes per iteration and process.

    Raises:
        InputError: an option differs from its default, but no case has carried labels, or all have; or
            ``real_only_steps`` leaves no step for carried labels.
    """
    real = [i for i, scan in enumerate(scans) if not scan.get("carried")]
    if real_repeats == 1 and real_only_steps == 0:
        return Visits(tuple(range(len(scans))))
    option = f"--real_repeats {real_repeats}" if real_repeats != 1 else f"--real_only_steps {real_only_steps}"
    if not 0 < len(real) < len(scans):
        raise InputError(
            f"{option} weighs real labels against carried ones, but {len(scans) - len(real)} of the {len(scans)} "
            'training cases are marked "carried": true. Mark them in the data list, or remove the option. Carried cases are '
            "left out of a fold that one of their sources validates: --fold all validates none, or carry the labels with the "
            "same --fold."
        )
    if real_only_steps >= steps:
        raise InputError(
            f"--real_only_steps {real_only_steps} leaves none of the {steps} steps for carried labels: choose fewer, "
            "or remove these cases from the data list."
        )
    repeated = [i for i, scan in enumerate(scans) for _ in range(1 if scan.get("carried") else real_repeats)]
    draws_per_step = accumulation_steps * batch_size * world_size()
    last_from = (steps - real_only_steps) * draws_per_step if real_only_steps else None
    return Visits(tuple(repeated), last=tuple(real), last_from=last_from)


def cases_record(scans: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return how many cases have real and carried labels, and a checksum of their notes; None if there are none.

    Args:
        scans: training items.
    """
    notes = [
        [bool(scan.get("carried")), float(scan.get("weight", 1)), *([scan[LABELLED]] if LABELLED in scan else [])]
        for scan in scans
    ]
    carried = sum(mark for mark, *_ in notes)
    plain = all(note == [False, 1.0] for note in notes)
    checksum = None if plain else hashlib.sha256(json.dumps(notes).encode()).hexdigest()[:16]
    return {"real": len(notes) - carried, "carried": carried, "sha256": checksum}


def refuse_carried(scans: Iterable[Mapping[str, Any]], *, where: str) -> None:
    """Raise `InputError` if a case has carried labels: a score against them says nothing.

    Args:
        scans: entries of a data list.
        where: begins the message: data list and section.
    """
    carried = [scan for scan in scans if scan.get("carried")]
    if carried:
        file = carried[0].get("label", carried[0]["image"])
        raise InputError(
            f"{where} has {counted(len(carried), 'case')} with carried labels, such as {file}: a network must be measured "
            "against labels that a person drew. Remove these entries there; carried labels belong in 'training'."
        )


def check_notes(entry: Mapping[str, Any], where: str) -> None:
    """Raise `InputError` if ``weight``, ``carried`` or ``carried_from`` is set but not valid."""
    weight, carried, sources = entry.get("weight", 1), entry.get("carried", False), entry.get("carried_from", [])
    if not ABOVE_ZERO.holds(weight):
        raise InputError(
            f"{where} has the weight {weight!r}: it must be a number above 0, by which the loss of this case is "
            "multiplied. To leave a case out, remove its entry."
        )
    if not SWITCH.holds(carried):
        raise InputError(f"{where} has carried {carried!r}: it must be true (no person drew the label) or false.")
    if not isinstance(sources, list) or not all(isinstance(source, str) and source for source in sources):
        raise InputError(
            f"{where} has carried_from {sources!r}: it must list the images of the cases whose labels were carried."
        )
