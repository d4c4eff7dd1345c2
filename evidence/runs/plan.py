# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Plan the runs of a study: pre-trainings, and fine-tunings with their evaluation.

A run has a name, commands of the bundles, and the runs it needs. Nothing runs here, and no scan is read. A fine-tuning
trains on all of its n patients (``--fold all``) for a fixed number of steps and keeps the last weights, so the scored
patients do not select a checkpoint. In all arms ``--seed`` determines the subset, the crops, the augmentation and the
initial weights; the weights of a file then replace those of the encoder, or of the whole network.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bundles.common.data.data_list import first_file
from bundles.common.errors import InputError
from tools.bundle_runs import LISTS, Command, Run, unique

from ..results.carried_labels import CARRIED, TRUTH
from ..study.study import (
    CONTROL,
    NETWORK,
    PRETRAIN,
    PROXY_TASKS,
    SEGMENT,
    Ablation,
    Curve,
    Headroom,
    Study,
    paper_subsets,
    preset_values,
    recipes_of,
    trains_whole_network,
    tried_options,
)
from ..study.subsets import Case, Parts, labelled_subset
from .headroom import PlannedChain, headroom_runs, planned_chain

Z_SCORE = Path(__file__).with_name("z_score.yaml")
CARRIED_LIST = f"{CARRIED}/dataset.json"  # what a propagation writes for the training
# What a pre-training writes, relative to its folder: its encoder, and, if it trained it, the whole network.
WEIGHTS = {"encoder": "train/models/encoder.pt", "network": "train/models/network.pt"}


def subset_name(tasks: Sequence[str]) -> str:
    """Name a subset of the proxy tasks, such as ``inpainting-rotation``; ``none`` if it is empty."""
    return "-".join(task for task in PROXY_TASKS if task in tasks) or "none"


class Planner:
    """Makes the runs of a study.

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
        self.preset_values = preset_values(study.preset)
        if wrong := [name for name in study.first_figure or () if name not in self.labels]:
            raise InputError(
                f"{study.source}: first_figure {wrong[0]!r} is not a label of the data. Allowed are "
                f"{', '.join(self.labels)}."
            )

    @property
    def labels(self) -> list[str]:
        """Names of the labels without the background."""
        return [name for value, name in self.row["labels"].items() if int(value)]

    @property
    def first_figure(self) -> list[str]:
        """The labels whose mean is the first figure, in the order of the row."""
        return [name for name in self.labels if self.study.first_figure is None or name in self.study.first_figure]

    def curve(self) -> list[Run]:
        """Runs of the curve: for every seed and n each arm, preceded by the pre-training it starts from."""
        curve, runs = self.study.curve, []
        for seed, n in itertools.product(curve.seeds, curve.n):
            for arm in self.study.arms:
                runs += self.arm(arm, n=n, seed=seed, encoder_seed=self._encoder_seed(curve, seed))
        return unique(runs)

    def ablation(self) -> list[Run]:
        """Runs of the ablation: for every seed from scratch, and from an encoder of each subset of the proxy tasks.

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
        """Runs of floor and ceiling, and from scratch, see `headroom.headroom_runs`.

        Raises:
            InputError: if the study has no headroom.
        """
        return unique(headroom_runs(self, self._part("headroom")))

    def chains(self) -> dict[int, PlannedChain]:
        """The chain of doubled steps of each n; empty if the study has none."""
        headroom = self.study.headroom
        if not headroom or headroom.convergence is None:
            return {}
        return {n: planned_chain(self, headroom, n) for n in headroom.n}

    def search(self) -> list[Run]:
        """Runs of the search: the recipes of every arm, scored on the tuning patients.

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
        """Recipes that the search tries for an arm, see `study.recipes_of`."""
        return recipes_of(self._part("search"), arm)

    def subsets(self) -> list[list[str]]:
        """Subsets of the proxy tasks that the ablation compares, including the empty one."""
        chosen = self._part("ablation").subsets
        return paper_subsets() if chosen is None else chosen if [] in chosen else [[], *chosen]

    def ablation_arm(self, tasks: Sequence[str]) -> str:
        """Name of the arm pre-trained with these tasks. ``ablation.arm`` itself is used again for its own tasks."""
        arm = self._part("ablation").arm
        if not tasks:
            return CONTROL
        return arm if set(tasks) == set(self.study.pretraining_of(arm)["tasks"]) else subset_name(tasks)

    def outline(self) -> dict[str, Any]:
        """What the report covers, regardless of which runs are finished: labels, cases, arms, n and seeds."""
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
        """The fine-tuning of an arm, preceded by its pre-training if it has one.

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
            return [self.finetuning(arm, n=n, seed=seed, options=options, recipe=recipe, scored=scored, prefix=prefix)]
        changes = self.study.pretraining_of(like or arm, tasks=tasks)
        before = self.pretraining(
            self.pretraining_name(arm, like=like, tasks=tasks), seed=encoder_seed, options=changes
        )
        if entries.masks_only:
            return [before, self.carried_masks(arm, n=n, seed=seed, before=before, scored=scored, prefix=prefix)]
        carrying = []
        if entries.propagation is not None:
            carrying = [self.propagation(self._propagation_name(arm), n=n, seed=seed, before=before)]
        return [
            before,
            *carrying,
            self.finetuning(
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

    def propagation(self, arm: str, *, n: int, seed: int, before: Run) -> Run:
        """The labels of n patients, carried to all other training and unlabelled scans.

        The labels of the other training patients are not read. They are compared with the carried ones when the run is
        finished (`carried_labels.compare_with_truth`).

        Args:
            arm: name of the first arm that uses them.
            n, seed: number of labelled patients, and the seed that draws them.
            before: the pre-training of the position network.
        """
        subset = labelled_subset(self.parts, n=n, seed=seed)
        others = {name: case for name, case in self.parts.training.items() if name not in subset}
        images = [{"image": case["image"]} for case in (*others.values(), *self.parts.unlabelled)]
        if not images:
            raise InputError(
                f"{self.study.source}: with n = {n} no scan is left to which arm {arm} could carry labels."
            )
        name = self._run_name(f"carry_{arm}", n, seed, before)
        content = self._list(
            {
                "training": [_pair(self.parts.training[case]) for case in subset],
                "unlabelled": images,
                "test": [_pair(case) for case in (*self.parts.validation.values(), *self.parts.tuning.values())],
            }
        )
        options = self.study.arms[arm].propagation
        command = self._propagate(Path("runs", name, "carried"), before, options=options, seed=seed, purpose="training")
        most = options.get("max_scans")
        number = len(images) if most is None else min(most, len(images))
        return Run(
            name=name,
            kind="propagation",
            facts={"arm": arm, "n": n, "seed": seed, "steps": number, **_start_facts(before)},
            commands=(replace(command, result=CARRIED_LIST),),
            lists={CARRIED: content, TRUTH: self._list({"test": [_pair(case) for case in others.values()]})},
            row=self.row,
            cases={"training": subset, "unlabelled": list(others)},
            needs=(before.name,),
        )

    def carried_masks(
        self, arm: str, *, n: int, seed: int, before: Run, scored: Mapping[str, Case], prefix: str
    ) -> Run:
        """The labels of n patients, carried to the scored patients: masks without any training on labels.

        Args:
            arm: name of the arm.
            n, seed: number of labelled patients, and the seed that draws them.
            before: the pre-training of the position network.
            scored: the validation or the tuning patients, by name.
            prefix: first word of the run's name.
        """
        subset = labelled_subset(self.parts, n=n, seed=seed)
        name = self._run_name(f"{prefix}_{arm}", n, seed, before)
        training = [_pair(self.parts.training[case]) for case in subset]
        lists = {
            CARRIED: self._list({"training": training, "unlabelled": [{"image": c["image"]} for c in scored.values()]}),
            "scored": self._list({"test": [_pair(case) for case in scored.values()]}),
        }
        command = self._propagate(
            Path("runs", name, "carried"), before, options=self.study.arms[arm].propagation, seed=seed, purpose="masks"
        )
        return Run(
            name=name,
            kind="finetuning",
            facts={"arm": arm, "n": n, "seed": seed, "steps": self.study.steps_of(n), **_start_facts(before)},
            commands=(replace(command, result="carried/propagation.csv"),),
            lists=lists,
            row=self.row,
            cases={"training": subset, "scored": list(scored)},
            needs=(before.name,),
        )

    def _propagate(self, output: Path, before: Run, *, options: Mapping[str, Any], seed: int, purpose: str) -> Command:
        return Command(
            name="propagate",
            bundle=SEGMENT,
            configs=("configs/propagate.yaml",),
            options={
                "task": self.task,
                "dataset_dir": Path(LISTS, f"{CARRIED}.json"),
                "fold": "all",
                "position_network": Path("runs", before.name, WEIGHTS["network"]),
                "purpose": purpose,
                "output_dir": output,
                "seed": seed,
                "workers": 0,  # processes work on runs, not on scans
                **options,
            },
            result="",
            statuses=(0, 3),  # 3: some scans were left out
        )

    @staticmethod
    def _run_name(beginning: str, n: int, seed: int, before: Run | None) -> str:
        name = f"{beginning}_n{n}_seed{seed}"
        return name if before is None or before.facts["seed"] == seed else f"{name}_encoder{before.facts['seed']}"

    def pretraining(self, arm: str, *, seed: int, options: Mapping[str, Any]) -> Run:
        """A pre-training.

        Args:
            arm: name of the arm, or of the first arm that shares it.
            seed: its seed.
            options: options of the bundle that the study sets, with ``tasks``.
        """
        name = f"pretrain_{arm}_seed{seed}"
        finetuning = {**self.row, **self.study.finetuning}
        options = {
            "spacing": finetuning["spacing"],
            "roi_size": square_roi(finetuning["roi_size"]),
            "foreground_hu": self.row["foreground"],
            "hu_window": finetuning["hu_window"],
            **{key: self.row[key] for key in NETWORK if key in self.row},
            **options,
        }
        head = options.get("reconstruction_head") or self.preset_values.get("reconstruction_head")
        whole = trains_whole_network(options["tasks"], head)
        configs = ("configs/train.yaml",)
        if options["hu_window"] is None:
            options |= {"hu_window": [0.0, 1.0], "in_channels": len(self.row["channels"])}
            configs += (str(Z_SCORE),)
        training = [*self.parts.training.values(), *self.parts.unlabelled]
        content = self._list({"training": [{"image": case["image"]} for case in training]})
        if self.parts.tuning:
            content["validation"] = [{"image": case["image"]} for case in self.parts.tuning.values()]
        command = Command(
            name="train",
            bundle=PRETRAIN,
            configs=configs,
            options={
                "preset": self.study.preset,
                "dataset_dir": Path(LISTS, "pretraining.json"),
                "output_dir": Path("runs", name, "train"),
                "seed": seed,
                "resume": True,
                "tensorboard": False,
                **options,
            },
            result=WEIGHTS["network" if whole else "encoder"],
        )
        unlabelled = [Path(first_file(case)).name for case in self.parts.unlabelled]
        return Run(
            name=name,
            kind="pretraining",
            facts={
                "arm": arm,
                "seed": seed,
                "tasks": options["tasks"],
                "steps": {**self.preset_values, **options}["max_steps"],
            },
            commands=(command,),
            lists={"pretraining": content},
            row=self.row,
            cases={"training": [*self.parts.training, *unlabelled], "validation": list(self.parts.tuning)},
        )

    def finetuning(
        self,
        arm: str,
        *,
        n: int,
        seed: int,
        options: Mapping[str, Any],
        scored: Mapping[str, Case],
        prefix: str,
        recipe: Mapping[str, Any] | None = None,
        before: Run | None = None,
        start: str = "encoder",
        labels: Run | None = None,
        steps: int | None = None,
    ) -> Run:
        """A fine-tuning and its evaluation.

        Args:
            arm: name of the arm.
            n, seed: number of labelled patients, and the seed that draws them.
            options: options of the bundle that the study sets.
            scored: the validation or the tuning patients, by name.
            prefix: first word of the run's name. The report reads the runs with ``finetune``.
            recipe: options that the search tries; None: not a search.
            before: the pre-training.
            start: ``encoder`` or ``network``: what it takes from ``before``.
            labels: the propagation whose labels it learns from as well; None: real labels alone.
            steps: its steps, which are then part of its name; None: those of the study.
        """
        subset = labelled_subset(self.parts, n=n, seed=seed)
        name = self._run_name(f"{prefix}_{arm}", n, seed, before)
        if recipe:
            name += "".join(f"_{key}={_name_part(value)}" for key, value in recipe.items())
        if steps is not None:
            name += f"_steps{steps}"
        lists = {
            f"n{n}_seed{seed}": self._list({"training": [_pair(self.parts.training[case]) for case in subset]}),
            "tuning" if scored is self.parts.tuning else "validation": self._list(
                {"test": [_pair(case) for case in scored.values()]}
            ),
        }
        training_list, scored_list = (Path(LISTS, f"{each}.json") for each in lists)
        if steps is None:
            steps = options["max_steps"] if "max_steps" in options else self.study.steps_of(n)
        weights = {}
        if before is not None:
            weights = {
                {"encoder": "pretrained_encoder", "network": "pretrained_model"}[start]: Path(
                    "runs", before.name, WEIGHTS[start]
                )
            }
        train = Command(
            name="train",
            bundle=SEGMENT,
            configs=("configs/train.yaml",),
            options={
                "task": self.task,
                "preset": self.study.preset,
                "dataset_dir": training_list if labels is None else Path("runs", labels.name, CARRIED_LIST),
                "fold": "all",
                "output_dir": Path("runs", name, "train"),
                "seed": seed,
                "resume": True,
                "tensorboard": False,
                "max_steps": steps,
                **weights,
                **options,
            },
            result="train/models/model.pt",
        )
        shared = {key: options[key] for key in ("spacing", "hu_window", "roi_size") if key in options}
        evaluate = Command(
            name="evaluate",
            bundle=SEGMENT,
            configs=("configs/evaluate.yaml",),
            options={
                "preset": self.study.preset,
                "dataset_dir": scored_list,
                "section": "test",
                "pretrained_model": Path("runs", name, "train/models/model.pt"),
                "output_dir": Path("runs", name, "evaluation"),
                **shared,
                **self.study.evaluation,
            },
            result="evaluation/scores.csv",
        )
        facts = {"arm": arm, "n": n, "seed": seed, "steps": steps, "encoder": before and before.name}
        facts |= {"encoder_seed": before and before.facts["seed"]}
        if before:
            facts |= _start_facts(before)
        if labels:
            facts |= {"labels": labels.name, "labels_settings": _digest(labels.settings)}
        facts |= {"tasks": before.facts["tasks"] if before else []}
        return Run(
            name=name,
            kind="finetuning",
            facts=facts | ({"recipe": dict(recipe)} if recipe is not None else {}),
            commands=(train, evaluate),
            lists=lists,
            row=self.row,
            cases={"training": subset, "scored": list(scored)},
            needs=tuple(each.name for each in (before, labels) if each is not None),
        )

    def _list(self, sections: Mapping[str, list[dict]]) -> dict[str, Any]:
        content = {"name": self.study.name, "labels": {str(k): v for k, v in self.row["labels"].items()}}
        return {**content, "modality": {str(i): name for i, name in enumerate(self.row["channels"])}, **sections}


def square_roi(roi_size: Sequence[int]) -> list[int]:
    """Change a ROI so that its x and y sides are equal, as the rotation task requires, with about as many voxels.

    If z equals x or y, the sides are permuted: ``[32, 64, 32]`` becomes ``[32, 32, 64]``.
    """
    x, y, z = roi_size
    if x == y:
        return [x, y, z]
    if z in (x, y):
        return [z, z, x if z == y else y]
    return [min(x, y), min(x, y), z]


def _sorted_tasks(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a pre-training, in which the order of the proxy tasks does not matter."""
    return {**options, "tasks": sorted(options["tasks"])}


def _start_facts(before: Run) -> dict[str, Any]:
    """Facts about the pre-training of a run. One with other settings but the same name must not match."""
    return {
        "encoder": before.name,
        "encoder_seed": before.facts["seed"],
        "encoder_settings": _digest(before.settings),
    }


def _digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _pair(case: Case) -> dict[str, Any]:
    return {"image": case["image"], "label": case["label"]}


def _name_part(value: Any) -> str:
    """A value as part of a file name."""
    return "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in str(value))
