# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Plan what a pre-training could gain at most: floor, ceiling, and training from scratch until it converges.

- **Floor**: only the decoder is trained, on a frozen encoder of random weights. The encoder's file comes from a
  pre-training of one step, the first of its warm-up, whose learning rate is 0: it leaves the weights that the seed drew.
- **Ceiling**: training from scratch with all labelled patients.
- **Converged**: training from scratch for as many steps as the tuning patients show to be enough (`convergence`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tools.bundle_runs import Run

from ..results.convergence import chain_run
from ..study.study import CONTROL, CONVERGED, FLOOR, Headroom

if TYPE_CHECKING:
    from .plan import Planner

# One step at rate 0: the warm-up is linear from 0, so its first step changes nothing.
UNTRAINED = {"max_steps": 1, "val_interval": 1, "warmup_steps": 1}


@dataclass(frozen=True)
class PlannedChain:
    """All runs that a chain of doubled steps may need; the scores decide how many of them are carried out.

    Attributes:
        links: steps to the runs on the tuning patients, in order.
        converged: steps to the runs on the scored patients, should these steps be chosen. Those of the study itself are
            the runs of `CONTROL`.
    """

    links: Mapping[int, list[Run]]
    converged: Mapping[int, list[Run]]


def untrained(run: Run) -> bool:
    """Return whether a run only writes the random weights of the floor."""
    return run.kind == "pretraining" and run.facts["arm"] == FLOOR


def headroom_runs(planner: Planner, headroom: Headroom) -> list[Run]:
    """Return the runs of the headroom without its chains.

    Args:
        planner: planner of the study.
        headroom: what to measure.
    """
    runs: list[Run] = []
    for seed, n in itertools.product(headroom.seeds, headroom.n):
        runs += planner.arm(CONTROL, n=n, seed=seed, encoder_seed=seed)
        if headroom.floor:
            runs += _floor(planner, n, seed)
    if headroom.ceiling:
        for seed in headroom.seeds:
            runs += planner.arm(CONTROL, n=len(planner.parts.training), seed=seed, encoder_seed=seed)
    return runs


def planned_chain(planner: Planner, headroom: Headroom, n: int) -> PlannedChain:
    """Return the runs that the chain of an n may need.

    Args:
        planner: planner of the study.
        headroom: what to measure, with a convergence.
        n: number of labelled patients.
    """
    limits, first = headroom.convergence, planner.study.steps_of(n)
    doubled = [first << power for power in range(limits.most.bit_length()) if first << power <= limits.most]
    return PlannedChain(
        links={steps: [_link(planner, n, seed, steps) for seed in limits.seeds] for steps in doubled},
        converged={steps: [_converged(planner, n, seed, steps) for seed in headroom.seeds] for steps in doubled[1:]},
    )


def _link(planner: Planner, n: int, seed: int, steps: int) -> Run:
    """Return a run of a chain."""
    run = planner.make.finetuning(
        CONTROL,
        n=n,
        seed=seed,
        options=_options(planner),
        scored=planner.parts.tuning,
        prefix="converge",
        steps=steps,
    )
    assert run.name == chain_run(n, seed, steps)
    return run


def _converged(planner: Planner, n: int, seed: int, steps: int) -> Run:
    return planner.make.finetuning(
        CONVERGED,
        n=n,
        seed=seed,
        options=_options(planner),
        scored=planner.parts.validation,
        prefix="finetune",
        steps=steps,
    )


def _floor(planner: Planner, n: int, seed: int) -> list[Run]:
    untrained = planner.study.pretraining_of(None) | UNTRAINED
    before = planner.make.pretraining(FLOOR, seed=seed, options=untrained)
    run = planner.make.finetuning(
        FLOOR,
        n=n,
        seed=seed,
        options={**_options(planner), "freeze_encoder": True},
        scored=planner.parts.validation,
        prefix="finetune",
        before=before,
    )
    return [before, run]


def _options(planner: Planner) -> dict[str, Any]:
    """Return the fine-tuning options of the control, with which all arms of the headroom train."""
    study = planner.study
    return {**study.network, **study.finetuning, **study.arms[CONTROL].finetuning}
