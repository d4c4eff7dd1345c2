# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Cases whose label shows only some of the structures: ``"labelled": ["liver", "spleen"]`` in an entry of a data list.

Where such a label says background, there may be any other structure. These are left out of the loss and of the scores
of the case. Entries without ``labelled`` show all structures.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ..errors import InputError
from ..words import counted, plain_name

logger = logging.getLogger(__name__)

#: Key of an entry: names or values of the structures that its label shows.
LABELLED = "labelled"


def check_labelled(entry: Mapping[str, Any], where: str) -> None:
    """Raise `InputError` unless ``labelled``, where it is set, is a list of names or label values, at least one."""
    named = entry.get(LABELLED, ["all"])
    if (
        isinstance(named, list)
        and named
        and all(isinstance(one, (str, int)) and not isinstance(one, bool) for one in named)
    ):
        return
    raise InputError(
        f"{where} has labelled {named!r}: it must be a list of the structures that its label shows, "
        '["liver", "spleen"], by name or value. Leave it out for a label that shows all of them; to leave out the case, '
        "remove its entry."
    )


def with_values(
    scans: Sequence[dict], *, labels: Mapping[Any, str], declared: Mapping[Any, str] | None = None, where: str
) -> list[dict]:
    """Return the entries with ``labelled`` as sorted label values, or without it if their label shows all structures.

    Args:
        scans: entries of a data list.
        labels: label names of this run by value, including the background 0.
        declared: label names of the data list by value, which may differ from those of this run.
        where: begins messages: the data list.

    Raises:
        InputError: an entry names an unknown structure, or only the background.
    """
    values = {int(value) for value in labels}
    by_name = {plain_name(name): int(value) for names in (labels, declared or {}) for value, name in names.items()}

    def value_of(one: str | int, scan: Mapping[str, Any]) -> int:
        value = by_name.get(plain_name(one)) if isinstance(one, str) else one
        value = int(one) if value is None and isinstance(one, str) and one.strip().isdecimal() else value
        if value not in values:
            raise InputError(
                f"{where}: the entry of {scan['image']} has labelled {scan[LABELLED]!r}, but {one!r} is none of the "
                f"labels {dict(labels)}. Correct the name or value."
            )
        return value

    entries = []
    for scan in scans:
        if LABELLED not in scan:
            entries.append(scan)
            continue
        shown = {value_of(one, scan) for one in scan[LABELLED]} - {0}
        if not shown:
            raise InputError(
                f"{where}: the entry of {scan['image']} has labelled {scan[LABELLED]!r}, which names no structure beside "
                "the background: nothing can be learnt from it. Name the structures, or remove the entry."
            )
        entry = {key: value for key, value in scan.items() if key != LABELLED}
        entries.append(entry if shown == values - {0} else entry | {LABELLED: sorted(shown)})
    return entries


def shown_classes(scan: Mapping[str, Any], *, classes: int) -> torch.Tensor:
    """Return which classes the label of a case shows, bool (classes,). The background is always one of them.

    Args:
        scan: an item; its ``labelled`` holds label values, see `with_values`.
        classes: number of classes, background included.
    """
    shown = torch.ones(classes, dtype=torch.bool)
    if LABELLED in scan:
        shown[1:] = False
        shown[[int(value) for value in scan[LABELLED]]] = True
    return shown


def refuse_partial(scans: Iterable[Mapping[str, Any]], *, where: str) -> None:
    """Raise `InputError` if a label shows only some structures, for a use that treats the rest as background.

    Args:
        scans: entries of a data list.
        where: begins the message: data list and use.
    """
    partial = [scan for scan in scans if LABELLED in scan]
    if partial:
        raise InputError(
            f"{where} needs labels that show all structures, but {counted(len(partial), 'case is', 'cases are')} labelled in part, such as "
            f"{partial[0]['image']}, which shows {', '.join(map(str, partial[0][LABELLED]))} only. Remove these entries."
        )
