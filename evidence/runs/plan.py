# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Plan which runs a study has: for its curve, ablation, headroom and search. `RunMaker` makes each of them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bundles.common.errors import InputError
from tools.bundle_runs import Run, unique

from ..study.study import (
    CONTROL,
    PROXY_TASKS,
    Ablation,
    Curve,
    Headroom,
    Study,
    paper_subsets,
    recipes_of,
    tried_options,
)
from ..study.subsets import Parts
from .headroom import PlannedChain, headroom_runs, planned_chain
from .run_maker import RunMaker


def subset_name(tasks: Sequence[str]) -> str:
    """Name a subset of the proxy tasks, such as ``inpainting-rotation``; ``none`` if it is empty."""
    return "-".join(task for task in PROXY_TASKS if task in tasks) or "none"


class Planner:
    """Lists the runs of a study.

    Args:
        study: the study.
        parts: its patients.
        row: the row of the task with the preset's changes (`bundles.segmentation.tasks.tasks.choose_task`).
        task: the value of ``--task``: a name, or a file relative to the folder of the study.
        absent: validation or tuning case to the names of the labels that its label file does not contain.
    """

    def __init__(
        self,
        study: Study,
        parts: Parts,
        *,
        row: Mapping[str, Any],
        task: str | Path,
        absent: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.study, self.parts, self.row, self.task = study, parts, row, task
        self.absent = dict(absent or {})
        if wrong := [name for name in study.first_figure or () if name not in self.labels]:
            raise InputError(
                f"{study.source}: first_figure {wrong[0]!r} is not a label of the data. Allowed are "
                f"{', '.join(self.labels)}."
            )

    @property
    def make(self) -> RunMaker:
        """Return the maker of single runs."""
        return RunMaker(self.study, self.parts, self.row, self.task)

    @property
    def labels(self) -> list[str]:
        """Return the names of the labels without the background."""
        return [name for value, name in self.row["labels"].items() if int(value)]

    @property
    def first_figure(self) -> list[str]:
        """Return the labels whose mean is the first figure, in the order of the row."""
        return [name for name in self.labels if self.study.first_figure is None or name in self.study.first_figure]

    def curve(self) -> list[Run]:
        """Return the runs of the curve: for every seed and n each arm, preceded by the pre-training it starts from."""
        curve, runs = self.study.curve, []
        for seed, n in itertools.product(curve.seeds, curve.n):
            for arm in self.study.arms:
                runs += self.arm(arm, n=n, seed=seed, encoder_seed=self._encoder_seed(curve, seed))
        return unique(runs)

    def ablation(self) -> list[Run]:
        """Return the runs of the ablation: for every seed from scratch, and from an encoder of each subset of tasks.

        Raises:
            InputError: if the study has no ablation.
        """
        ablation = self._part("ablation")
        runs = []
        for seed, tasks in itertools.product(ablation.seeds, self.subsets()):
            encoder_seed = self._encoder_seed(ablation, seed)
            arm = self.ablation_arm(tasks)
            changes = {} if arm in self.study.arms else {"like": ablation.arm, "tasks": tasks}
            runs += self.arm(arm, n=ablation.n, seed=seed, encoder_seed=encoder_seed, **changes)
        return unique(runs)

    def headroom(self) -> list[Run]:
        """Return the runs of floor and ceiling, and from scratch, see `headroom.headroom_runs`.

        Raises:
            InputError: if the study has no headroom.
        """
        return unique(headroom_runs(self, self._part("headroom")))

    def chains(self) -> dict[int, PlannedChain]:
        """Return the chain of doubled steps of each n; empty if the study has no chain."""
        headroom = self.study.headroom
        if not headroom or headroom.convergence is None:
            return {}
        return {n: planned_chain(self, headroom, n) for n in headroom.n}

    def search(self) -> list[Run]:
        """Return the runs of the search: the recipes of every arm, scored on the tuning patients.

        Raises:
            InputError: if the study has no search, or no tuning patients.
        """
        search = self._part("search")
        if not self.parts.tuning:
            raise InputError(
                f"Study {self.study.name}: a search scores the tuning patients, but tuning is 0. Set a larger number."
            )
        runs = []
        for seed, arm, recipe in ((s, a, r) for s in search.seeds for a in self.study.arms for r in self.recipes(a)):
            runs += self.arm(
                arm,
                n=search.n,
                seed=seed,
                encoder_seed=self.study.curve.seeds[0],
                recipe=recipe,
            )
        return unique(runs)

    def recipes(self, arm: str) -> list[dict[str, Any]]:
        """Return the recipes that the search tries for an arm, see `study.recipes_of`."""
        return recipes_of(self._part("search"), arm)

    def subsets(self) -> list[list[str]]:
        """Return the subsets of the proxy tasks that the ablation compares, including the empty one."""
        chosen = self._part("ablation").subsets
        return paper_subsets() if chosen is None else chosen if [] in chosen else [[], *chosen]

    def ablation_arm(self, tasks: Sequence[str]) -> str:
        """Return the name of the arm pre-trained with these tasks: ``ablation.arm`` itself for its own tasks."""
        arm = self._part("ablation").arm
        if not tasks:
            return CONTROL
        return arm if set(tasks) == set(self.study.pretraining_of(arm)["tasks"]) else subset_name(tasks)

    def outline(self) -> dict[str, Any]:
        """Return what the report covers, regardless of which runs are finished: labels, cases, arms, n and seeds."""
        curve = {"n": list(self.study.curve.n), **self._outline_of(self.study.curve)}
        outline = {"study": self.study.name, "labels": self.labels, "cases": sorted(self.parts.validation)}
        outline |= {"first_figure": self.first_figure}
        outline |= {"absent": {case: list(labels) for case, labels in sorted(self.absent.items())}}
        outline |= {"arms": list(self.study.arms), "curve": curve, "ablation": None, "headroom": None}
        outline["pretrainings"] = {
            arm: self.pretraining_name(arm) for arm, own in self.study.arms.items() if own.pretraining is not None
        }
        if self.study.ablation:
            ablation = self.study.ablation
            rows = [{"tasks": tasks, "arm": self.ablation_arm(tasks)} for tasks in self.subsets()]
            paper = {subset_name(each.tasks): each for each in ablation.paper}
            for row in rows:
                known = paper.get(subset_name(row["tasks"]))
                row |= {"paper_dice": known and known.dice, "paper_hd95": known and known.hd95}
                if row["arm"] not in self.study.arms:
                    shared = self.pretraining_name(row["arm"], like=ablation.arm, tasks=row["tasks"])
                    outline["pretrainings"][row["arm"]] = shared
            outline["ablation"] = {"n": ablation.n, **self._outline_of(ablation), "rows": rows}
        if headroom := self.study.headroom:
            steps = {str(n): self.study.steps_of(n) for n in headroom.n}
            entries = headroom.model_dump(exclude={"seeds"}) | self._outline_of(headroom)
            everyone = len(self.parts.training)
            entries |= {"all": everyone, "all_steps": self.study.steps_of(everyone) if headroom.ceiling else None}
            outline["headroom"] = entries | {"steps": steps}
            outline["headroom"]["tuning"] = sorted(self.parts.tuning)
        return outline

    def pretraining_name(self, arm: str, *, like: str | None = None, tasks: Sequence[str] | None = None) -> str:
        """Return the first arm whose pre-training has the same options: arms with equal options share its runs.

        Args:
            arm: name of an arm with a pre-training.
            like: the arm of the study whose options are used, if ``arm`` is only a name of the ablation.
            tasks: proxy tasks, instead of those of the arm.
        """
        own = _sorted_tasks(self.study.pretraining_of(like or arm, tasks=tasks))
        names = [name for name, each in self.study.arms.items() if each.pretraining is not None]
        return next((name for name in names if _sorted_tasks(self.study.pretraining_of(name)) == own), arm)

    @staticmethod
    def _outline_of(part: Curve | Ablation | Headroom) -> dict[str, Any]:
        return {"seeds": list(part.seeds), "encoder_per_seed": getattr(part, "encoder_per_seed", True)}

    def _part(self, name: str) -> Any:
        part = getattr(self.study, name)
        if not part:
            raise InputError(f"Study {self.study.name} has no {name}. Add the entry '{name}' to its file.")
        return part

    @staticmethod
    def _encoder_seed(part: Curve | Ablation, seed: int) -> int:
        return seed if part.encoder_per_seed else part.seeds[0]

    def arm(
        self,
        arm: str,
        *,
        n: int,
        seed: int,
        encoder_seed: int,
        like: str | None = None,
        tasks: Sequence[str] | None = None,
        recipe: Mapping[str, Any] | None = None,
    ) -> list[Run]:
        """Return the fine-tuning of an arm, preceded by its pre-training if it has one.

        Args:
            arm: name of the arm.
            n, seed: number of labelled patients, and the seed that draws them.
            encoder_seed: seed of the pre-training.
            like: the arm of the study whose options are used, if ``arm`` is only a name of the ablation.
            tasks: proxy tasks of the pre-training, instead of those of the study.
            recipe: options that the search tries; None: not a search.
        """
        entries = self.study.arms[like or arm]
        if recipe is None:
            finetuning = {**self.study.finetuning, **entries.finetuning}
        else:
            finetuning = tried_options(self.study, arm, recipe)
        options = {**self.study.network, **finetuning}
        prefix = "finetune" if recipe is None else "search"
        scored = self.parts.validation if recipe is None else self.parts.tuning
        if entries.pretraining is None:
            return [
                self.make.finetuning(arm, n=n, seed=seed, options=options, recipe=recipe, scored=scored, prefix=prefix)
            ]
        changes = self.study.pretraining_of(like or arm, tasks=tasks)
        before = self.make.pretraining(
            self.pretraining_name(arm, like=like, tasks=tasks), seed=encoder_seed, options=changes
        )
        if entries.masks_only:
            return [before, self.make.carried_masks(arm, n=n, seed=seed, before=before, scored=scored, prefix=prefix)]
        carrying = []
        if entries.propagation is not None:
            carrying = [self.make.propagation(self._propagation_name(arm), n=n, seed=seed, before=before)]
        return [
            before,
            *carrying,
            self.make.finetuning(
                arm,
                n=n,
                seed=seed,
                options=options,
                recipe=recipe,
                scored=scored,
                prefix=prefix,
                before=None if entries.starts_from == "nothing" else before,
                start=entries.starts_from,
                labels=carrying[0] if carrying else None,
            ),
        ]

    def _propagation_name(self, arm: str) -> str:
        """Return the first arm that carries labels in the same way: such arms share its runs."""
        own = (self.pretraining_name(arm), self.study.arms[arm].propagation)
        return next(
            name
            for name, each in self.study.arms.items()
            if each.propagation is not None
            and not each.masks_only
            and (self.pretraining_name(name), each.propagation) == own
        )


def _sorted_tasks(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a pre-training, in which the order of the proxy tasks does not matter."""
    return {**options, "tasks": sorted(options["tasks"])}
