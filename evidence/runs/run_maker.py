# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Make one run of a study: a pre-training, carried labels, or a fine-tuning with its evaluation.

A run has a name, commands of the bundles, and the runs it needs. Nothing runs here, and no scan is read. A fine-tuning
trains on all of its n patients (``--fold all``) for a fixed number of steps and keeps the last weights, so the scored
patients do not select a checkpoint. In all arms ``--seed`` determines the subset, the crops, the augmentation and the
initial weights; the weights of a file then replace those of the encoder, or of the whole network.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bundles.common.data.list_forms.list_file import first_file
from bundles.common.errors import InputError
from tools.bundle_runs import LISTS, Command, Run

from ..results.carried_labels import CARRIED, TRUTH
from ..study.study import NETWORK, PRETRAIN, SEGMENT, Study, preset_values, trains_whole_network
from ..study.subsets import Case, Parts, labelled_subset

Z_SCORE = Path(__file__).with_name("z_score.yaml")
CARRIED_LIST = f"{CARRIED}/dataset.json"  # what a propagation writes for the training
# What a pre-training writes, relative to its folder: its encoder, and, if it trained it, the whole network.
WEIGHTS = {"encoder": "train/models/encoder.pt", "network": "train/models/network.pt"}
OPTION_OF = {"encoder": "pretrained_encoder", "network": "pretrained_model"}  # options that take them


@dataclass(frozen=True)
class RunMaker:
    """Makes the runs of a study, one at a time.

    Attributes:
        study: the study.
        parts: its patients.
        row: the row of the task with the preset's changes (`bundles.segmentation.tasks.tasks.choose_task`).
        task: the value of ``--task``: a name, or a file relative to the folder of the study.
    """

    study: Study
    parts: Parts
    row: Mapping[str, Any]
    task: str | Path

    def pretraining(self, arm: str, *, seed: int, options: Mapping[str, Any]) -> Run:
        """Return the run of a pre-training.

        Args:
            arm: name of the arm, or of the first arm that shares it.
            seed: seed of the pre-training.
            options: options of the bundle that the study sets, with ``tasks``.
        """
        name, values = f"pretrain_{arm}_seed{seed}", preset_values(self.study.preset)
        finetuning = {**self.row, **self.study.finetuning}
        options = {
            "spacing": finetuning["spacing"],
            "roi_size": square_roi(finetuning["roi_size"]),
            "foreground_hu": self.row["foreground"],
            "hu_window": finetuning["hu_window"],
            **{key: self.row[key] for key in NETWORK if key in self.row},
            **options,
        }
        head = options.get("reconstruction_head") or values.get("reconstruction_head")
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
                "steps": {**values, **options}["max_steps"],
            },
            commands=(command,),
            lists={"pretraining": content},
            row=self.row,
            cases={"training": [*self.parts.training, *unlabelled], "validation": list(self.parts.tuning)},
        )

    def propagation(self, arm: str, *, n: int, seed: int, before: Run) -> Run:
        """Return the run that carries the labels of n patients to all other training and unlabelled scans.

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
        name = _run_name(f"carry_{arm}", n, seed, before)
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
        """Return the run that carries the labels of n patients to the scored patients, without training on labels.

        Args:
            arm: name of the arm.
            n, seed: number of labelled patients, and the seed that draws them.
            before: the pre-training of the position network.
            scored: the validation or the tuning patients, by name.
            prefix: first word of the run's name.
        """
        subset = labelled_subset(self.parts, n=n, seed=seed)
        name = _run_name(f"{prefix}_{arm}", n, seed, before)
        training = [_pair(self.parts.training[case]) for case in subset]
        lists = {
            CARRIED: self._list({"training": training, "unlabelled": [{"image": c["image"]} for c in scored.values()]}),
            "scored": self._list({"test": [_pair(case) for case in scored.values()]}),
        }
        command = self._propagate(
            Path("runs", name, "carried"), before, options=self.study.arms[arm].propagation, seed=seed, purpose="masks"
        )
        tolerance = self.study.evaluation.get("nsd_tolerance", self.row["nsd_tolerance"])
        return Run(
            name=name,
            kind="finetuning",
            facts={"arm": arm, "n": n, "seed": seed, "steps": self.study.steps_of(n), **_start_facts(before)},
            commands=(replace(command, result="carried/propagation.csv"),),
            lists=lists,
            row={**self.row, "nsd_tolerance": tolerance},
            cases={"training": subset, "scored": list(scored)},
            needs=(before.name,),
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
        """Return the run of a fine-tuning and its evaluation.

        Args:
            arm: name of the arm.
            n, seed: number of labelled patients, and the seed that draws them.
            options: options of the bundle that the study sets.
            scored: the validation or the tuning patients, by name.
            prefix: first word of the run's name. The report reads the runs with ``finetune``.
            recipe: options that the search tries; None: not a search.
            before: the pre-training.
            start: ``encoder`` or ``network``: what it takes from ``before``.
            labels: the propagation whose labels it learns from as well; None: only real labels.
            steps: its steps, which are then part of its name; None: those of the study.
        """
        subset = labelled_subset(self.parts, n=n, seed=seed)
        name = _run_name(f"{prefix}_{arm}", n, seed, before)
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
        weights = {} if before is None else {OPTION_OF[start]: Path("runs", before.name, WEIGHTS[start])}
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
            commands=(train, self._evaluate(name, scored_list, options)),
            lists=lists,
            row=self.row,
            cases={"training": subset, "scored": list(scored)},
            needs=tuple(each.name for each in (before, labels) if each is not None),
        )

    def _evaluate(self, name: str, scored: Path, options: Mapping[str, Any]) -> Command:
        shared = {key: options[key] for key in ("spacing", "hu_window", "roi_size") if key in options}
        return Command(
            name="evaluate",
            bundle=SEGMENT,
            configs=("configs/evaluate.yaml",),
            options={
                "preset": self.study.preset,
                "dataset_dir": scored,
                "section": "test",
                "pretrained_model": Path("runs", name, "train/models/model.pt"),
                "output_dir": Path("runs", name, "evaluation"),
                **shared,
                **self.study.evaluation,
            },
            result="evaluation/scores.csv",
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


def _run_name(beginning: str, n: int, seed: int, before: Run | None) -> str:
    name = f"{beginning}_n{n}_seed{seed}"
    return name if before is None or before.facts["seed"] == seed else f"{name}_encoder{before.facts['seed']}"


def _start_facts(before: Run) -> dict[str, Any]:
    """Return facts about the pre-training of a run. One with other settings but the same name must not match."""
    return {
        "encoder": before.name,
        "encoder_seed": before.facts["seed"],
        "encoder_settings": _digest(before.settings),
    }


def _digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _pair(case: Case) -> dict[str, Any]:
    return {key: case[key] for key in ("image", "label", "weight") if key in case}


def _name_part(value: Any) -> str:
    """Return a value as part of a file name."""
    return "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in str(value))
