# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The runs of a study: pre-trainings, and fine-tunings with their scores; each a name, commands of the bundles, and what it needs.

Nothing is run and no scan is read here. Fine-tuning trains on all of its n patients (``--fold all``) for a fixed number
of steps and keeps the last weights: the patients that are scored choose no checkpoint. In both arms ``--seed`` decides the
subset, the crops, the augmentation and the initial weights; what an encoder file brings is laid over them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bundles.common.data.data_list import first_file
from bundles.common.errors import InputError
from bundles.common.files import write_text
from bundles.common.run.mixed_precision import precision
from bundles.common.run.presets import choose

from ..study.study import BUNDLES, CONTROL, NETWORK, PRETRAIN, PROXY_TASKS, SEGMENT, Study, recipes_of, tried_options
from ..study.subsets import Case, Parts, labelled_subset

Z_SCORE = Path(__file__).with_name("z_score.yaml")
LISTS = "lists"  # folder of a run's data lists, in its own


@dataclass(frozen=True, kw_only=True)
class Command:
    """One call of a bundle.

    Attributes:
        name: what it does: ``train`` or ``evaluate``.
        bundle: folder name.
        configs: config files, relative to the bundle or absolute.
        options: name to value, of plain types; paths as `Path`, relative to the study's folder, and those of data lists, ``lists/NAME.json``, to the run's.
        result: the file that it ends with, relative to the run's folder.
    """

    name: str
    bundle: str
    configs: tuple[str, ...]
    options: Mapping[str, Any]
    result: str


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one process carries out.

    Attributes:
        name: of the run and of its folder.
        kind: ``pretraining`` or ``finetuning``: runs of a kind and as many steps take about as long.
        facts: what the report needs to know: arm, n, seed, encoder, tasks, steps.
        commands: in their order.
        lists: name of a data list to its content, with paths of this machine; written before every command (`write_lists`).
        cases: names of the cases that train, and of those that are scored.
        row: of the task, with the preset's values.
        needs: names of runs that must be done before.
        precision: command, or ``encoder``, to what it computes in on this machine (`precision.precision_of`).
    """

    name: str
    kind: str
    facts: Mapping[str, Any]
    commands: tuple[Command, ...]
    lists: Mapping[str, Mapping[str, Any]]
    cases: Mapping[str, Sequence[str]]
    row: Mapping[str, Any]
    needs: tuple[str, ...] = ()
    precision: Mapping[str, str] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the result, without a path of this machine: equal settings, equal result."""
        return {**self.settings_of_study, "precision": dict(self.precision)}

    @property
    def settings_of_study(self) -> dict[str, Any]:
        """Those of the settings that are the same on every machine."""
        commands = {
            command.name: {"bundle": command.bundle, "configs": [Path(name).name for name in command.configs]}
            | {"options": {key: _plain(value) for key, value in command.options.items()}}
            for command in self.commands
        }
        settings = {"kind": self.kind, "facts": dict(self.facts), "commands": commands, "row": dict(self.row)}
        return json.loads(json.dumps({**settings, "cases": {k: list(v) for k, v in self.cases.items()}}))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be carried out, and what the report will be about.

    Attributes:
        study: the study.
        runs: of the parts that were asked for, each before those that need it.
        outline: see `Planner.outline`.
        beside: runs of the study's other parts, which the report draws if they are finished: none may be of other settings.
    """

    study: Study
    runs: tuple[Run, ...]
    outline: Mapping[str, Any] = field(default_factory=dict)
    beside: tuple[Run, ...] = ()


def subset_name(tasks: Sequence[str]) -> str:
    """Proxy tasks in their usual order, as in ``inpainting-rotation``; ``none`` without one."""
    return "-".join(task for task in PROXY_TASKS if task in tasks) or "none"


def all_subsets() -> list[list[str]]:
    """None, each proxy task alone, the pairs, all three."""
    return [list(each) for size in range(4) for each in itertools.combinations(PROXY_TASKS, size)]


class Planner:
    """Makes the runs of a study.

    Args:
        study: the study.
        parts: its patients.
        row: the row of the task (`bundles.segmentation.tasks.tasks.choose_task`, with what the preset changes).
        task: what ``--task`` is: a name, or a file relative to the folder of the study.
        absent: validation or tuning case to the names of the labels that its label file does not hold.
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
        self.preset_values = choose(preset=study.preset, file=str(BUNDLES / PRETRAIN / "configs/presets.yaml"))

    def curve(self) -> list[Run]:
        """For every seed and n: each arm; before them the encoders that they start from."""
        curve, runs = self.study.curve, []
        for seed, n in itertools.product(curve["seeds"], curve["n"]):
            for arm in self.study.arms:
                runs += self._arm(arm, n=n, seed=seed, encoder_seed=self._encoder_seed(curve, seed))
        return _once(runs)

    def ablation(self) -> list[Run]:
        """For every seed: from scratch, and from an encoder of each subset of the proxy tasks.

        Raises:
            InputError: if the study has no ablation.
        """
        ablation = self._part("ablation")
        runs = []
        for seed, tasks in itertools.product(ablation["seeds"], self.subsets()):
            encoder_seed = self._encoder_seed(ablation, seed)
            arm = self.ablation_arm(tasks)
            given = {} if arm in self.study.arms else {"like": ablation["arm"], "tasks": tasks}
            runs += self._arm(arm, n=ablation["n"], seed=seed, encoder_seed=encoder_seed, **given)
        return _once(runs)

    def search(self) -> list[Run]:
        """For both arms the same grid, scored on the tuning patients.

        Raises:
            InputError: if the study has no search, or no tuning patients.
        """
        search = self._part("search")
        if not self.parts.tuning:
            raise InputError(
                f"Study {self.study.name}: a search scores the tuning patients, and tuning is 0. Set some apart."
            )
        runs = []
        for seed, arm, recipe in ((s, a, r) for s in search["seeds"] for a in self.study.arms for r in self.recipes(a)):
            runs += self._arm(
                arm,
                n=search["n"],
                seed=seed,
                encoder_seed=self.study.curve["seeds"][0],
                recipe=recipe,
            )
        return _once(runs)

    def recipes(self, arm: str) -> list[dict[str, Any]]:
        """Every combination of the values of the search's grid, and of what it has for this arm alone; then the arm's single recipes."""
        return recipes_of(self._part("search"), arm)

    def subsets(self) -> list[list[str]]:
        """Subsets of the proxy tasks that the ablation compares, none among them."""
        chosen = self._part("ablation").get("subsets")
        return all_subsets() if chosen is None else chosen if [] in chosen else [[], *chosen]

    def ablation_arm(self, tasks: Sequence[str]) -> str:
        """Name of the arm with an encoder of these tasks: that of the curve where it is the same."""
        arm = self._part("ablation")["arm"]
        if not tasks:
            return CONTROL
        whole = {**(self.study.pretraining or {}), **self.study.arms[arm]["encoder"]}.get("tasks", PROXY_TASKS)
        return arm if set(tasks) == set(whole) else subset_name(tasks)

    def outline(self) -> dict[str, Any]:
        """What the report is about, whatever has been run."""
        names = [name for value, name in self.row["labels"].items() if int(value)]
        curve = {"n": list(self.study.curve["n"]), **self._outline_of(self.study.curve)}
        outline = {"study": self.study.name, "labels": names, "cases": sorted(self.parts.validation)}
        outline |= {"absent": {case: list(labels) for case, labels in sorted(self.absent.items())}}
        outline |= {"arms": list(self.study.arms), "curve": curve, "ablation": None}
        if self.study.ablation:
            ablation = self.study.ablation
            rows = [{"tasks": tasks, "arm": self.ablation_arm(tasks)} for tasks in self.subsets()]
            paper = {subset_name(each["tasks"]): each for each in ablation.get("paper") or []}
            for row in rows:
                known = paper.get(subset_name(row["tasks"]), {})
                row |= {"paper_dice": known.get("dice"), "paper_hd95": known.get("hd95")}
            outline["ablation"] = {"n": ablation["n"], **self._outline_of(ablation), "rows": rows}
        return outline

    @staticmethod
    def _outline_of(part: Mapping[str, Any]) -> dict[str, Any]:
        return {"seeds": list(part["seeds"]), "encoder_per_seed": bool(part.get("encoder_per_seed", True))}

    def _part(self, name: str) -> Mapping[str, Any]:
        part = getattr(self.study, name)
        if not part:
            raise InputError(f"Study {self.study.name} has no {name}. Add an entry '{name}' to its file.")
        return part

    @staticmethod
    def _encoder_seed(part: Mapping[str, Any], seed: int) -> int:
        return seed if part.get("encoder_per_seed", True) else part["seeds"][0]

    def _arm(
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
        """The fine-tuning of an arm, and the pre-training before it if it has one."""
        entries = self.study.arms[like or arm]
        if recipe is None:
            of_arm = {**(self.study.finetuning or {}), **(entries.get("finetuning") or {})}
        else:
            of_arm = tried_options(vars(self.study), arm, recipe)
        options = {**self.study.network, **of_arm}
        if entries["encoder"] is None:
            return [self._finetuning(arm, n, seed, options, recipe, None)]
        changes = dict(entries["encoder"]) | ({} if tasks is None else {"tasks": list(tasks)})
        encoder = self._pretraining(arm, encoder_seed, changes)
        return [encoder, self._finetuning(arm, n, seed, options, recipe, encoder)]

    def _pretraining(self, arm: str, seed: int, changes: Mapping[str, Any]) -> Run:
        name = f"pretrain_{arm}_seed{seed}"
        finetuned = {**self.row, **(self.study.finetuning or {})}
        options = {
            "spacing": finetuned["spacing"],
            "roi_size": square_roi(finetuned["roi_size"]),
            "foreground_hu": self.row["foreground"],
            "hu_window": finetuned["hu_window"],
            "tasks": list(PROXY_TASKS),
            **{key: self.row[key] for key in NETWORK if key in self.row},
            **(self.study.pretraining or {}),
            **changes,
        }
        configs = ("configs/train.yaml",)
        if options["hu_window"] is None:
            options |= {"hu_window": [0.0, 1.0], "in_channels": len(self.row["channels"])}
            configs += (str(Z_SCORE),)
        seen = [*self.parts.training.values(), *self.parts.unlabelled]
        content = self._list({"training": [{"image": case["image"]} for case in seen]})
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
            result="train/models/encoder.pt",
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
            precision={"train": precision_of(command.options)},
        )

    def _finetuning(
        self,
        arm: str,
        n: int,
        seed: int,
        options: Mapping[str, Any],
        recipe: Mapping[str, Any] | None,
        encoder: Run | None,
    ) -> Run:
        searching = recipe is not None
        scored: Mapping[str, Case] = self.parts.tuning if searching else self.parts.validation
        subset = labelled_subset(self.parts, n=n, seed=seed)
        name = f"{'search' if searching else 'finetune'}_{arm}_n{n}_seed{seed}"
        if encoder is not None and encoder.facts["seed"] != seed:
            name += f"_encoder{encoder.facts['seed']}"
        if recipe:
            name += "".join(f"_{key}={_word(value)}" for key, value in recipe.items())
        lists = {
            f"n{n}_seed{seed}": self._list({"training": [_pair(self.parts.training[case]) for case in subset]}),
            "tuning" if searching else "validation": self._list({"test": [_pair(case) for case in scored.values()]}),
        }
        training_list, scored_list = (Path(LISTS, f"{each}.json") for each in lists)
        steps = options["max_steps"] if "max_steps" in options else self.study.steps_of(n)
        start = {} if encoder is None else {"pretrained_encoder": Path("runs", encoder.name, "train/models/encoder.pt")}
        train = Command(
            name="train",
            bundle=SEGMENT,
            configs=("configs/train.yaml",),
            options={
                "task": self.task,
                "preset": self.study.preset,
                "dataset_dir": training_list,
                "fold": "all",
                "output_dir": Path("runs", name, "train"),
                "seed": seed,
                "resume": True,
                "tensorboard": False,
                "max_steps": steps,
                **start,
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
                **(self.study.evaluation or {}),
            },
            result="evaluation/scores.csv",
        )
        facts = {"arm": arm, "n": n, "seed": seed, "steps": steps, "encoder": encoder and encoder.name}
        facts |= {"encoder_seed": encoder and encoder.facts["seed"]}
        if encoder:  # another pre-training under the same name is another start
            facts["encoder_settings"] = _digest(encoder.settings_of_study)
        facts |= {"tasks": encoder.facts["tasks"] if encoder else []}
        return Run(
            name=name,
            kind="finetuning",
            facts=facts | ({"recipe": dict(recipe)} if recipe is not None else {}),
            commands=(train, evaluate),
            lists=lists,
            row=self.row,
            cases={"training": subset, "scored": list(scored)},
            needs=() if encoder is None else (encoder.name,),
            precision={each.name: precision_of(each.options) for each in (train, evaluate)}
            | ({} if encoder is None else {"encoder": encoder.precision["train"]}),
        )

    def _list(self, sections: Mapping[str, list[dict]]) -> dict[str, Any]:
        content = {"name": self.study.name, "labels": {str(k): v for k, v in self.row["labels"].items()}}
        return {**content, "modality": {str(i): name for i, name in enumerate(self.row["channels"])}, **sections}


def square_roi(roi_size: Sequence[int]) -> list[int]:
    """The fine-tuning's ROI for crops that are turned in the axial plane: x and y of one size, about as many voxels.

    ``[32, 64, 32]`` becomes ``[32, 32, 64]``: sides are exchanged rather than padded, where two are equal.
    """
    x, y, z = roi_size
    if x == y:
        return [x, y, z]
    if z in (x, y):
        return [z, z, x if z == y else y]
    return [min(x, y), min(x, y), z]


def write_lists(run: Run, out: Path) -> None:
    """Write the data lists of a run, where they are not as they should be, into its own folder: another machine may have the data elsewhere."""
    for name, content in run.lists.items():
        path, text = out / "runs" / run.name / LISTS / f"{name}.json", json.dumps(content, indent=1) + "\n"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)


def words_of(command: Command, out: Path, folder: Path) -> list[str]:
    """The words after ``python`` of a command, to be run in the bundle's folder.

    Args:
        command: of a run.
        out: folder of the study.
        folder: of the run.
    """
    configs = command.configs[0] if len(command.configs) == 1 else repr(list(command.configs))
    words = ["-W", "ignore", "-m", "monai.bundle", "run", "--config_file", configs]
    for name, value in command.options.items():
        if isinstance(value, Path):
            value = (folder if value.parts[0] == LISTS else out) / value
        word = "$None" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        words += [f"--{name}", word]
    return words


def _once(runs: Sequence[Run]) -> list[Run]:
    return list({run.name: run for run in runs}.values())


def _digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _pair(case: Case) -> dict[str, Any]:
    return {"image": case["image"], "label": case["label"]}


def _plain(value: Any) -> Any:
    return value.as_posix() if isinstance(value, Path) else value


def _word(value: Any) -> str:
    return "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in str(value))


def precision_of(options: Mapping[str, Any]) -> str:
    """``fp32``, ``bf16`` or ``fp16``, as the bundles resolve it here.

    Args:
        options: of a command; without ``amp`` it is mixed where there is a GPU, without ``amp_type`` of the kind that this GPU has.
    """
    # the defaults are those of the bundles' configs
    return precision(amp=options.get("amp", torch.cuda.is_available()), amp_type=options.get("amp_type", "auto"))
