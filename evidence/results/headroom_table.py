# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Table of the headroom: floor, scratch, scratch until it converges, and scratch with all labels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..study.study import CEILING, CONTROL, CONVERGED, FLOOR
from .convergence import Chain
from .records import Result
from .table import FIGURES, cells_of, explanation, main_label, row_of, rows_of


def headroom_rows(
    outline: Mapping[str, Any], results: Sequence[Result], chains: Mapping[int, Chain]
) -> list[dict[str, Any]]:
    """Return the rows of the headroom, see `table.rows_of`: at each n its arms, in the order of `arms_of`.

    Args:
        outline: outline of a study with a headroom.
        results: finished runs.
        chains: n to its chain.
    """
    rows = []
    for n in outline["headroom"]["n"]:
        own = results_at(outline, results, chains, n)
        rows += rows_of(outline, own, outline["headroom"], n=n, arms=arms_of(outline))
    return rows


def results_at(
    outline: Mapping[str, Any], results: Sequence[Result], chains: Mapping[int, Chain], n: int
) -> list[Result]:
    """Return the results of the headroom at n: those with all labels as `CEILING`, those of enough steps as `CONVERGED`.

    Args:
        outline, results, chains: as for `headroom_rows`.
        n: number of labelled patients.
    """
    headroom = outline["headroom"]
    own = [*results, *_renamed(results, CONTROL, CEILING, n=n, where={"n": headroom["all"]})]
    chosen = chains[n].chosen if n in chains else None
    own = [result for result in own if result.facts["arm"] != CONVERGED or result.facts["steps"] == chosen]
    if chosen == headroom["steps"][str(n)]:
        own += _renamed(results, CONTROL, CONVERGED, n=n, where={"n": n})
    return own


def arms_of(outline: Mapping[str, Any]) -> list[str]:
    """Return the arms of the headroom that a study measures, and the control."""
    headroom = outline["headroom"]
    wanted = {FLOOR: headroom["floor"], CONTROL: True, CONVERGED: headroom["convergence"], CEILING: headroom["ceiling"]}
    return [arm for arm, used in wanted.items() if used]


def _renamed(results: Sequence[Result], arm: str, name: str, *, n: int, where: Mapping[str, Any]) -> list[Result]:
    """Return the results of an arm under the name of another, at n."""
    found = [result for result in results if {"arm": arm, **where}.items() <= result.facts.items()]
    return [dataclasses.replace(result, facts={**result.facts, "arm": name, "n": n}) for result in found]


def headroom_markdown(
    outline: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], chains: Mapping[int, Chain]
) -> str:
    """Return the headroom in Markdown: its table, and what each chain of doubled steps found.

    Args:
        outline: outline of a study with a headroom.
        rows: `headroom_rows`.
        chains: n to its chain.
    """
    headroom, main = outline["headroom"], main_label(outline)
    lines = [
        f"## {outline['study']}: headroom",
        "",
        f"| n | arm | steps | runs | {' | '.join(FIGURES)} |",
        "|---|---|---|---|" + "---|" * len(FIGURES),
    ]
    for n in headroom["n"]:
        for arm in arms_of(outline):
            steps = headroom["steps"][str(n)]
            if arm == CONVERGED:
                steps = (chains[n].chosen if n in chains else None) or ""
            elif arm == CEILING:
                steps = headroom["all_steps"]
            name = f"{arm} ({headroom['all']} labelled)" if arm == CEILING else arm
            lines.append(f"| {' | '.join([str(n), name, str(steps), *cells_of(rows, n, arm, main)])} |")
    meanings = {
        FLOOR: "the decoder alone, on a frozen encoder of random weights",
        CONVERGED: "from scratch, with as many steps as the tuning patients show to be enough",
        CEILING: "from scratch, with all labelled patients",
    }
    meaning = [f"{arm}: {what}" for arm, what in meanings.items() if arm in arms_of(outline)]
    lines += ["", f"{'; '.join(meaning)}. {explanation(outline)}", ""]
    for n, chain in chains.items():
        lines.append(f"- n = {n}: {chain_text(chain, headroom['convergence'])}")
    return "\n".join([*lines, ""])


def chain_text(chain: Chain, limits: Mapping[str, Any]) -> str:
    """Describe what a chain of doubled steps has found so far."""
    if not chain.tried:
        return "from scratch with more steps: not measured yet."
    tried = ", ".join(f"{steps} steps {figure:.4f}" for steps, figure in chain.tried.items())
    if chain.next:
        end = f"{chain.next} steps are next"
    elif chain.converged:
        end = f"twice {chain.chosen} steps gain less than {limits['gain']:g}: {chain.chosen} are enough"
    else:
        end = f"{chain.chosen} may not be enough either, but {limits['most']} is the limit of the study"
    return f"from scratch on the tuning patients: {tried}; {end}."


def headroom_of(outline: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], n: int) -> float:
    """Return the ceiling minus scratch in the first figure, for the same seeds; NaN if it is not measured."""
    if not outline["headroom"] or n not in outline["headroom"]["n"] or CEILING not in arms_of(outline):
        return math.nan
    return row_of(rows, n, CEILING, main_label(outline), "dice")["difference"]
