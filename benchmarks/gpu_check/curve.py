# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Part 7: Dice over the number of labelled patients, with pre-training and from scratch, in the time that is left.

Every arm is trained again from step 0 with 1, 2, 4, ... times the first number of steps, until training from scratch
gains less than `GAIN` by doubling on the tuning patients (`evidence.results.convergence`). The arms are compared on the
validation patients.

As many runs go at once as the card holds. The order is useful when the time ends early: the pre-trainings first,
together with the shortest runs from scratch; then, for each number of steps, one seed after the other with all n and
both arms. Each run is reported when it ends, each comparison when all its seeds are there, and the longest comparisons
again when the time is over.
"""

from __future__ import annotations

import json
import multiprocessing
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evidence.results.convergence import Chain, chain_of
from evidence.results.paired_bootstrap import figure_of, paired_difference
from evidence.results.power import smallest_difference, t_interval
from tools.child_process import available_cores

from .curve_data import CONTENTS, PATIENTS, synthetic, write_contents
from .curve_runs import Recipe, finetune, is_finite, pack, pretrain
from .parts import Settings, tell

GAIN = 0.005  # Dice that scratch must gain at least by doubling the steps
MEMORY = 4 * 2**30  # bytes of a GPU for one run with its CUDA context
MARGIN = 8.0  # seconds before the end of the part in which it reports what it has
SCRATCH, PRETRAINED = ARMS = ("scratch", "pre-trained")


@dataclass(frozen=True)
class Plan:
    """What the curve consists of.

    Attributes:
        n: numbers of labelled patients; those above the number of training patients become that number.
        seeds: seeds of subsets, weights and draws; each has a pre-training of its own.
        first, most: fewest and most steps of a fine-tuning.
        pretraining: steps of a pre-training.
        batch: see `Recipe`.
        network: see `Recipe`.
        patients: patients of the synthetic pack.
        spacing, roi: spacing and ROI of the synthetic pack.
    """

    n: tuple[int, ...] = (2, 8, 32)
    seeds: tuple[int, ...] = (0, 1, 2)
    first: int = 100
    most: int = 3200
    pretraining: int = 400
    batch: int = 4
    network: dict[str, Any] = field(
        default_factory=lambda: {"feature_size": 24, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8]}
    )
    patients: dict[str, int] = field(default_factory=lambda: PATIENTS)
    spacing: tuple[float, float, float] = (4.0, 4.0, 5.0)
    roi: tuple[int, int, int] = (64, 64, 32)


DRY = Plan(
    n=(1, 2),
    seeds=(0, 1),
    first=1,
    most=2,
    pretraining=2,
    batch=1,
    network={"feature_size": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8]},
    patients={"unlabelled": 2, "training": 2, "tuning": 1, "validation": 2},
    spacing=(8.0, 8.0, 10.0),
)


@dataclass(frozen=True, order=True)
class Job:
    """A fine-tuning; jobs are carried out in their order: shorter first, then seed by seed, n by n.

    Attributes:
        steps, seed, n: see `curve_runs.finetune`.
        pretrained: whether it starts from the encoder of its seed.
    """

    steps: int
    seed: int
    n: int
    pretrained: bool

    @property
    def name(self) -> str:
        """Return one line for people, unique."""
        return f"{ARMS[self.pretrained]}, n = {self.n}, {self.steps} steps, seed {self.seed}"


class Curve:
    """The state of the curve: what is done, what may start, and what it says so far.

    Args:
        plan: the plan.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.encoders: dict[int, bool] = {}  # seed: whether it is there; no entry: not started
        self.started: set[Job] = set()
        self.scores: dict[Job, dict[str, np.ndarray]] = {}

    def chain(self, n: int) -> Chain:
        """Return the chain of doubled steps of an n, by the tuning scores from scratch."""
        figures = {}
        steps = self.plan.first
        while steps <= self.plan.most:
            jobs = [Job(steps, seed, n, False) for seed in self.plan.seeds]
            if not all(job in self.scores for job in jobs):
                break
            figures[steps] = figure_of(np.stack([self.scores[job]["tuning"] for job in jobs]))
            steps *= 2
        return chain_of(self.plan.first, figures, gain=GAIN, most=self.plan.most)

    def ready(self) -> list[Job]:
        """Return the fine-tunings that may start now, in order."""
        found = []
        for n in self.plan.n:
            chain = self.chain(n)
            for steps in [*chain.tried, *([] if chain.next is None else [chain.next])]:
                found += [Job(steps, seed, n, arm) for seed in self.plan.seeds for arm in (False, True)]
        return sorted(
            job for job in found if job not in self.started and (not job.pretrained or self.encoders.get(job.seed))
        )

    def waits(self) -> bool:
        """Return whether anything is left to do, now or later."""
        chains = [self.chain(n) for n in self.plan.n]
        jobs = {Job(s, seed, n, arm) for n, chain in zip(self.plan.n, chains, strict=True) for s in chain.tried
                for seed in self.plan.seeds for arm in (False, True)}  # fmt: skip
        return any(chain.next is not None for chain in chains) or not jobs <= self.scores.keys()

    def pairs(self, n: int, steps: int) -> list[int]:
        """Return the seeds of which both arms are done."""
        return [s for s in self.plan.seeds if all(Job(steps, s, n, arm) in self.scores for arm in (False, True))]

    def compare(self, n: int, steps: int) -> dict[str, Any]:
        """Compare the arms on the validation patients over the seeds of which both are done."""
        seeds = self.pairs(n, steps)
        scratch, pretrained = (
            np.stack([self.scores[Job(steps, seed, n, arm)]["validation"] for seed in seeds]) for arm in (False, True)
        )
        found = paired_difference(pretrained, scratch)
        spread = float(np.std(found.by_seed, ddof=1)) if len(seeds) > 1 else float("nan")
        return {
            "n": n,
            "steps": steps,
            "seeds": seeds,
            "patients": found.patients,
            SCRATCH: figure_of(scratch),
            PRETRAINED: figure_of(pretrained),
            "difference": found.difference,
            "interval": found.interval,
            "by_seed": list(found.by_seed),
            "seeds_interval": t_interval(found.by_seed),
            "smallest": smallest_difference(sd=spread, number=len(seeds)),
        }


def comparison_line(found: dict[str, Any], *, rest: str = "") -> str:
    """Return a comparison as one line for people."""
    interval = found["interval"]
    shown = f" [{interval[0]:+.3f}, {interval[1]:+.3f}]" if interval else ""
    by_seed = ", ".join(f"{each:+.3f}" for each in found["by_seed"])
    return (
        f"n = {found['n']}, {found['steps']} steps{rest}: scratch {found[SCRATCH]:.3f}, pre-trained {found[PRETRAINED]:.3f}, "
        f"difference {found['difference']:+.3f}{shown} over {found['patients']} patients; by seed {by_seed}"
    )


def run(settings: Settings) -> None:
    """Draw or read the patients, then carry out runs until no run is left or the time is over."""
    ends = time.monotonic() + settings.left - MARGIN
    plan = DRY if settings.dry_run else Plan()
    folder = settings.curve_data or settings.work / "curve"
    folder.mkdir(parents=True, exist_ok=True)
    at_once = workers(settings)
    results: queue.Queue = queue.Queue()
    # spawn: a process that was forked from one that had looked for GPUs could not use them
    with multiprocessing.get_context("spawn").Pool(at_once) as pool:

        def start(name: Any, function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
            done = partial(_put, results, name)
            pool.apply_async(function, arguments, options, callback=done, error_callback=done)

        if not (folder / CONTENTS).exists():
            contents, sources = synthetic(plan.patients, spacing=plan.spacing, roi=plan.roi)
            begin = time.monotonic()
            for source in sources:
                start(source.name, pack, folder, contents, source)
            for _ in sources:
                _, found = results.get(timeout=max(1.0, ends - time.monotonic()))
                if isinstance(found, BaseException):
                    raise found
            write_contents(folder, contents)
            drawn = f", drawn in {time.monotonic() - begin:.0f} s"
        else:
            drawn = ""
        contents = json.loads((folder / CONTENTS).read_text(encoding="utf-8"))
        sizes = {part: len(names) for part, names in contents["sections"].items()}
        kind = "synthetic patients" if contents["synthetic"] else "scans of the kit's user"
        tell(
            "patients",
            ok=None,
            text=f"{kind}: {', '.join(f'{number} {part}' for part, number in sizes.items())}{drawn}; {at_once} runs at once",
            synthetic=contents["synthetic"],
            sizes=sizes,
            at_once=at_once,
        )
        n = tuple(dict.fromkeys(min(number, sizes["training"]) for number in plan.n))
        recipe = Recipe(folder, settings.device, plan.network, plan.batch, plan.pretraining)
        carry_out(
            Curve(replace(plan, n=n)),
            recipe,
            work=settings.work,
            ends=ends,
            at_once=at_once,
            start=start,
            results=results,
        )
        pool.terminate()


def _put(results: queue.Queue, name: Any, found: Any) -> None:
    results.put((name, found))


def workers(settings: Settings) -> int:
    """Return how many runs go at once: one on each core except one, as long as the card has memory for them."""
    cores = available_cores()
    if settings.dry_run:
        return min(2, cores)
    return max(1, min(cores - 1, int(0.9 * torch.cuda.mem_get_info()[0] // MEMORY)))


def carry_out(
    curve: Curve,
    recipe: Recipe,
    *,
    work: Path,
    ends: float,
    at_once: int,
    start: Callable[..., None],
    results: queue.Queue,
) -> None:
    """Start what may start, report what ends, until nothing is left or the time is over."""
    running, told, over = 0, set(), False
    todo = list(curve.plan.seeds)  # pre-trainings
    while True:
        while running < at_once:
            if todo:
                seed = todo.pop(0)
                curve.encoders[seed] = False
                start(seed, pretrain, recipe, seed, work / f"encoder_{seed}.pt")
            elif ready := curve.ready():
                job = ready[0]
                curve.started.add(job)
                encoder = work / f"encoder_{job.seed}.pt" if job.pretrained else None
                start(job, finetune, recipe, n=job.n, seed=job.seed, steps=job.steps, encoder=encoder)
            else:
                break
            running += 1
        if not running:
            break
        try:
            name, found = results.get(timeout=max(0.0, ends - time.monotonic()))
        except queue.Empty:
            over = True
            break
        running -= 1
        tell_run(curve, name, found)
        for n in curve.plan.n:
            tell_progress(curve, n, told)
    tell_curve(curve, over=over, lacking=curve.waits())


def tell_run(curve: Curve, name: int | Job, found: Any) -> None:
    """Report the result of a run, or the error that ended it, and note it in the curve."""
    label = name.name if isinstance(name, Job) else f"pre-training, seed {name}"
    if isinstance(found, BaseException):
        first = str(found).strip().partition("\n")[0]
        tell(label, ok=False, text=f"{label}: {type(found).__name__}: {first}")
        return
    text = f"{label}: {found['seconds']:.0f} s, loss {found['loss']:.3f}"
    text += f", {found['peak'] / 2**30:.1f} GiB" if found["peak"] else ""
    if isinstance(name, Job):
        scores = {part: np.array(found.pop(part), dtype=float) for part in ("tuning", "validation")}
        curve.scores[name] = scores
        text += f", Dice {figure_of(scores['validation'][None]):.3f}"
        found["dice"] = [[round(each, 4) if each == each else None for each in row] for row in scores["validation"]]
    else:
        curve.encoders[name] = True
    tell(label, ok=is_finite(found), text=text, **found)


def tell_progress(curve: Curve, n: int, told: set) -> None:
    """Report each comparison of an n once, when all its seeds are done, and the end of its chain."""
    chain = curve.chain(n)
    for steps in chain.tried:
        if (n, steps) not in told and curve.pairs(n, steps) == list(curve.plan.seeds):
            told.add((n, steps))
            found = curve.compare(n, steps)
            tell(f"compared, n = {n}, {steps} steps", ok=None, text=comparison_line(found), **found)
    if chain.next is None and n not in told:
        told.add(n)
        how = f"doubling gained less than {GAIN:g}" if chain.converged else "no longer training is planned"
        figures = ", ".join(f"{steps}: {figure:.3f}" for steps, figure in chain.tried.items())
        text = f"n = {n}: {chain.chosen} steps are enough, {how} (tuning Dice from scratch by steps: {figures})"
        tell(f"steps, n = {n}", ok=None, text=text, converged=chain.converged, chosen=chain.chosen)


def tell_curve(curve: Curve, *, over: bool, lacking: bool) -> None:
    """Report the curve: for each n the comparison at the steps that are enough, else at the most steps with a pair."""
    if lacking:
        why = "the time was over before the last run" if over else "runs failed, and those after them were not started"
        tell("cut", ok=None, text=f"{why}: the curve below is what there is")
    for n in curve.plan.n:
        chain = curve.chain(n)
        levels = [chain.chosen] if chain.chosen else sorted({job.steps for job in curve.scores if job.n == n})[::-1]
        levels = [steps for steps in levels if curve.pairs(n, steps)]
        if not levels:
            tell(f"curve, n = {n}", ok=None, text=f"n = {n}: no pair of runs was finished")
            continue
        found = curve.compare(n, levels[0])
        rest = "" if chain.converged else ", not yet converged"
        tell(f"curve, n = {n}", ok=None, text=comparison_line(found, rest=rest), converged=chain.converged, curve=found)
