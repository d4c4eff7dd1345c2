# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Training from scratch until more steps gain nothing: a chain of runs with 1, 2, 4, ... times the steps.

Each run of the chain starts again from step 0 and has its own whole learning-rate schedule: a run that is only
continued after its rate has fallen to 0 shows less than one that was planned that long. The runs are scored on the
tuning patients, so that the steps are not chosen on the patients who are compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .paired_bootstrap import figure_of
from .records import read_done, table_of


@dataclass(frozen=True)
class Chain:
    """State of a chain.

    Attributes:
        tried: steps to the mean first figure over the seeds, for each finished member of the chain, in order.
        next: steps of the next member; None if the chain has ended.
        chosen: the fewest steps whose doubling gained less than the limit, or the last ones if even these may not be
            enough; None before the chain has ended.
        converged: whether doubling ``chosen`` was tried and gained less than the limit.
    """

    tried: Mapping[int, float]
    next: int | None
    chosen: int | None
    converged: bool


def chain_of(first: int, figures: Mapping[int, float], *, gain: float, most: int) -> Chain:
    """Follow a chain as far as its scores go.

    Args:
        first: its first number of steps.
        figures: steps to figure of what is finished. Entries beyond the end of the chain are ignored.
        gain: the chain ends when a doubling gains less than this.
        most: no member has more steps.
    """
    tried: dict[int, float] = {}
    steps = first
    while True:
        if steps not in figures:
            return Chain(tried, steps, None, False)
        tried[steps] = figures[steps]
        if steps > first and tried[steps] - tried[steps // 2] < gain:
            return Chain(tried, None, steps // 2, True)
        if 2 * steps > most:
            return Chain(tried, None, steps, False)
        steps *= 2


def chain_run(n: int, seed: int, steps: int) -> str:
    """Return the name of a run of a chain."""
    return f"converge_scratch_n{n}_seed{seed}_steps{steps}"


def read_chain(out: Path, outline: Mapping[str, Any], n: int) -> Chain:
    """Return the chain of an n, from the finished runs of a study's folder.

    Args:
        out: folder of the study.
        outline: its outline, with a headroom that has a convergence.
        n: number of labelled patients.

    Raises:
        InputError: ``done.json`` of a run is damaged, or has scores of other patients.
    """
    headroom = outline["headroom"]
    limits, first = headroom["convergence"], headroom["steps"][str(n)]
    columns = [outline["labels"].index(name) for name in outline["first_figure"]]
    figures: dict[int, float] = {}
    steps = first
    while steps <= limits["most"]:
        found = [read_done(out / "runs" / chain_run(n, seed, steps)) for seed in limits["seeds"]]
        if None in found:
            break
        figures[steps] = first_figure_of(
            found, cases=headroom["tuning"], labels=outline["labels"], absent=outline["absent"], columns=columns
        )
        steps *= 2
    return chain_of(first, figures, gain=limits["gain"], most=limits["most"])


def first_figure_of(
    done: Sequence[Mapping[str, Any]],
    *,
    cases: Sequence[str],
    labels: Sequence[str],
    absent: Mapping[str, Sequence[str]],
    columns: Sequence[int],
) -> float:
    """Return the mean Dice over runs and patients, then over the labels of the first figure.

    Args:
        done: content of ``done.json`` of each run.
        cases, labels, absent: see `records.table_of`.
        columns: places of the labels that count.
    """
    tables = [table_of(each["scores"], cases=cases, labels=labels, absent=absent)["dice"] for each in done]
    return figure_of(np.stack(tables)[:, :, list(columns)])
