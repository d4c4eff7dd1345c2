# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The entries of a study: what is compared, on which data, with which options. `reading` reads and checks a file."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from bundles.common.errors import InputError
from bundles.common.run.mixed_precision import TYPES
from bundles.common.run.presets import choose
from bundles.common.value_rules import COUNT
from bundles.common.words import did_you_mean
from bundles.pretraining.proxy_tasks.losses import TASKS as PROXY_TASKS

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
PRETRAIN, SEGMENT = "swin_unetr_pretrain", "swin_unetr_msd"
CONTROL = "scratch"
# Arms of the part `headroom`; see `Headroom`.
FLOOR, CEILING, CONVERGED = "floor", "ceiling", "converged"
HEADROOM_ARMS = (FLOOR, CEILING, CONVERGED)
INPAINTING = "inpainting"
PAPER_TASKS = (INPAINTING, "contrast", "rotation")  # Tang et al., CVPR 2022, section 3.2
POSITION, WHOLE_HEAD = "position", "unet"  # the task, and the reconstruction head, that train the decoder as well
NETWORK = ("feature_size", "depths", "num_heads", "window_size")
# Options that the plan sets, so no study may set them.
OF_THE_PLAN = (
    *("task", "dataset_dir", "data_list", "output_dir", "pretrained_encoder", "pretrained_model", "resume", "seed"),
    *("fold", "folds", "labels", "bundle_root", "preset", "device"),
    *("position_network", "pretrain_scans", "pretrain_bundle", "unlabelled", "purpose", "workers"),
)
ENTRIES = "entries, 'key: value'"
RENAMED = {"encoder": "pretraining"}  # keys of earlier versions


def _is_subset(tasks: Any) -> bool:
    return isinstance(tasks, list) and all(task in PROXY_TASKS and tasks.count(task) == 1 for task in tasks)


# What values of single options must be, wherever a study sets them.
OPTION_VALUES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "roi_size": (
        "three whole numbers of voxels: [x, y, z]",
        lambda size: isinstance(size, list) and len(size) == 3 and all(map(COUNT.holds, size)),
    ),
    "tasks": (
        f"a list of {', '.join(PROXY_TASKS)}, at least one, each once",
        lambda tasks: _is_subset(tasks) and tasks,
    ),
    "amp": ("true or false, without quotes", lambda value: isinstance(value, bool)),
    "amp_type": (f"auto, {' or '.join(TYPES)}", lambda value: value in ("auto", *TYPES)),
    "cases": (ENTRIES, lambda value: value is None or isinstance(value, Mapping)),
}


def _wrong(problem: str, *below: str) -> PydanticCustomError:
    """Return the error of an entry, or of an entry below it."""
    return PydanticCustomError("entry", "{problem}", {"problem": problem, "below": below})


def _must_be(allowed: str, test: Callable[[Any], bool]) -> BeforeValidator:
    def check(value: Any) -> Any:
        if not test(value):
            raise _wrong(f"{value!r} must be {allowed}")
        return value

    return BeforeValidator(check)


def _check_different(values: list) -> list:
    if any(value in values[:place] for place, value in enumerate(values)):
        raise _wrong(f"{values!r} contains a value twice")
    return values


def _check_values(options: Mapping[str, Any], *below: str) -> None:
    for key, (allowed, test) in OPTION_VALUES.items():
        if key in options and not test(options[key]):
            raise _wrong(f"{options[key]!r} must be {allowed}", *below, key)


def _check_options(options: dict[str, Any]) -> dict[str, Any]:
    for key in OF_THE_PLAN:
        if key in options:
            raise _wrong("is set by the plan. Remove it", key)
    _check_values(options)
    return options


def _check_grid(grid: dict[str, list]) -> dict[str, list]:
    for key, values in grid.items():
        for value in values:
            _check_options({key: value})
    return grid


def _check_row(row: dict[str, Any]) -> dict[str, Any]:
    _check_values(row)
    for preset in presets():
        if isinstance(row.get(preset), Mapping):
            _check_values(row[preset], preset)
    return row


Name = Annotated[str, _must_be("text of letters, digits, _ and -", lambda name: re.fullmatch(r"[\w-]+", str(name)))]
TaskName = Annotated[str, _must_be("the name of a row of tasks.yaml", lambda name: isinstance(name, str))]
Count = Annotated[int, Field(ge=0)]
PositiveCount = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Figure = Annotated[float, Field(allow_inf_nan=False)]
Minutes = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PositiveCounts = Annotated[list[PositiveCount], Field(min_length=1), AfterValidator(_check_different)]
Seeds = Annotated[list[Seed], Field(min_length=1), AfterValidator(_check_different)]
Steps = Annotated[
    int | dict[int, int],
    _must_be(
        "a whole number, 1 or more, or one for each n, such as {8: 500, 32: 700}",
        lambda steps: (
            steps and all(map(COUNT.holds, [*steps, *steps.values()] if isinstance(steps, dict) else [steps]))
        ),
    ),
]
Subset = Annotated[list[Literal[*PROXY_TASKS]], AfterValidator(_check_different)]
Options = Annotated[dict[str, Any], AfterValidator(_check_options)]  # options of a bundle's command line
Grid = Annotated[
    dict[str, Annotated[list, Field(min_length=1), AfterValidator(_check_different)]], AfterValidator(_check_grid)
]


class Entries(BaseModel):
    """Entries of a study file, or of another that a workflow reads. Unknown keys are refused; null means the default."""

    what: ClassVar[str] = "a study"

    model_config = ConfigDict(frozen=True, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, content: Any) -> Any:
        if not isinstance(content, Mapping):
            return content
        known = cls.model_fields.keys() - {"source"}
        for key in content:
            if key not in known:
                hint = f"It is now called {RENAMED[key]}" if RENAMED.get(key) in known else suggestion(key, known)
                raise _wrong(f"is not a key of {cls.what}. {hint}", str(key))
        return {key: value for key, value in content.items() if value is not None}


class Synthetic(Entries):
    """Numbers of synthetic patients, as for `tools.synthetic_ct.write_dataset`."""

    unlabelled: Count | None = None
    training: Count | None = None
    validation: Count | None = None
    seed: Seed | None = None


class Split(Entries):
    """The options of the bundles that choose the validation patients."""

    fold: Any = None
    folds: Any = None


class Arm(Entries):
    """One side of the comparison.

    Attributes:
        pretraining: what it changes in the options of the pre-training; None: it has no pre-training.
        start: what the fine-tuning takes from the pre-training: its ``encoder``, the whole ``network`` except the
            output layer, or ``nothing``, if it only carries labels. None: the encoder, if there is a pre-training;
            nothing, if labels are carried.
        propagation: options of ``propagate.yaml``: the labels are carried to all other training and unlabelled scans, by
            the network of the pre-training, which needs the task position; the fine-tuning learns from real and carried
            labels. None: no labels are carried.
        masks_only: carry the labels to the scored patients and score these masks; there is no fine-tuning.
        finetuning: what it changes in the options of the fine-tuning.
    """

    pretraining: Options | None = None
    start: Literal["encoder", "network", "nothing"] | None = None
    propagation: Options | None = None
    masks_only: bool = False
    finetuning: Options = {}

    @property
    def starts_from(self) -> str:
        """Return ``encoder``, ``network`` or ``nothing``."""
        if self.start is not None:
            return self.start
        return "encoder" if self.pretraining is not None and self.propagation is None else "nothing"


class Curve(Entries):
    """The few-label curve: numbers of labelled patients, seeds, and whether each seed has its own pre-training."""

    n: PositiveCounts
    seeds: Seeds
    encoder_per_seed: bool = True


class PaperRow(Entries):
    """Published figures of one subset of the proxy tasks."""

    tasks: Subset
    dice: Figure | None = None
    hd95: Figure | None = None


class Ablation(Entries):
    """The ablation of the proxy tasks.

    ``arm`` has the options of all pre-trainings. ``subsets`` None means the eight subsets of `PAPER_TASKS`.
    """

    n: PositiveCount
    seeds: Seeds
    encoder_per_seed: bool = True
    arm: str
    subsets: list[Subset] | None = None
    paper: list[PaperRow] = []


class Convergence(Entries):
    """Training from scratch for 1, 2, 4, ... times the study's steps, each run with its own whole schedule.

    Attributes:
        seeds: seeds other than those whose runs are compared. The runs are scored on the tuning patients.
        gain: the steps are enough once twice as many gain less than this in the mean first figure.
        most: never train for more steps than this.
    """

    seeds: Seeds
    gain: Annotated[float, Field(gt=0, lt=1)] = 0.005
    most: PositiveCount


class Headroom(Entries):
    """What a pre-training could gain at most, and what it must beat.

    Attributes:
        n: numbers of labelled patients.
        seeds: seeds of the runs.
        floor: train only the decoder, on an encoder of random weights. A pre-training that is not above it is useless.
        ceiling: train from scratch with all labelled patients that are not set apart.
        convergence: train from scratch until more steps gain nothing; None: leave this out.
    """

    n: PositiveCounts
    seeds: Seeds
    floor: bool = True
    ceiling: bool = True
    convergence: Convergence | None = None


class Search(Entries):
    """The search for recipes, of which every arm tries the same number.

    Attributes:
        n: number of labelled patients.
        seeds: seeds other than those of curve and ablation.
        options: options of every fine-tuning of the search.
        grid: option to values; every combination is a recipe of every arm.
        grid_of: arm to a further grid, which is combined with ``grid``.
        recipes_of: arm to further single recipes.
    """

    n: PositiveCount
    seeds: Seeds
    options: Options = {}
    grid: Grid = {}
    grid_of: dict[str, Grid] = {}
    recipes_of: dict[str, list[Options]] = {}


class RunMinutes(Entries):
    """Rough minutes of a run of each kind with the study's own steps, used until some have finished."""

    pretraining: Minutes = 10.0
    finetuning: Minutes = 5.0
    propagation: Minutes = 60.0


class Study(Entries):
    """The entries of a study file; `studies/openkbp.yaml` explains each.

    Attributes:
        name: name of the study and of its MLflow experiment.
        preset: preset of both bundles.
        arms: name to `Arm`: `CONTROL`, and at least one with a pre-training.
        steps: fine-tuning steps: one number, or one for each n.
        curve: the few-label curve.
        synthetic: synthetic patients to generate where no data are passed; None: data are required.
        task: a row of the Decathlon's ``tasks.yaml``; None: ``row``, or a row that is proposed for the data.
        row: a row of its own.
        split: how the validation patients are chosen.
        tuning: number of training patients set apart: the search scores them, and no run trains on their labels.
        pretraining: options of swin_unetr_pretrain for every arm; its network size (`NETWORK`) also applies
            to every fine-tuning.
        finetuning: options of swin_unetr_msd for every arm.
        evaluation: options of its ``evaluate.yaml``.
        first_figure: labels whose mean is the first figure of the report; the others are reported apart. None: all.
        ablation: the ablation of the proxy tasks.
        headroom: floor, ceiling and training from scratch until it converges.
        search: the search for recipes.
        minutes: rough durations.
        source: path of the file; not an entry of it.
    """

    name: Name
    preset: Any
    arms: dict[str, Arm]
    steps: Steps
    curve: Curve
    synthetic: Synthetic | None = None
    task: TaskName | None = None
    row: Annotated[dict[str, Any], AfterValidator(_check_row)] | None = None
    split: Split = Split()
    tuning: Count = 0
    pretraining: Options = {}
    finetuning: Options = {}
    evaluation: Options = {}
    first_figure: Annotated[list[str], Field(min_length=1), AfterValidator(_check_different)] | None = None
    ablation: Ablation | None = None
    headroom: Headroom | None = None
    search: Search | None = None
    minutes: RunMinutes = RunMinutes()
    source: str = ""

    @property
    def network(self) -> dict[str, Any]:
        """Return the network size that ``pretraining`` sets; all arms have it, including the control."""
        return {key: self.pretraining[key] for key in NETWORK if self.pretraining.get(key) is not None}

    def pretraining_of(self, arm: str | None, *, tasks: Sequence[str] | None = None) -> dict[str, Any]:
        """Return the options of an arm's pre-training that the study sets, with its proxy tasks (or the preset's).

        Args:
            arm: an arm with a pre-training; None: what the study sets for all of them.
            tasks: proxy tasks instead of those of the arm.
        """
        options = {"tasks": list(preset_values(self.preset)["tasks"]), **self.pretraining}
        if arm is not None:
            options |= self.arms[arm].pretraining
        return options if tasks is None else {**options, "tasks": list(tasks)}

    def steps_of(self, n: int) -> int:
        """Return the fine-tuning steps with ``n`` labelled patients.

        Raises:
            InputError: if ``steps`` has no entry for ``n``.
        """
        if isinstance(self.steps, int):
            return self.steps
        if n not in self.steps:
            raise InputError(
                f"{self.source}: steps has no entry for n = {n}, only {self.steps}. Add one, or set one number for all."
            )
        return self.steps[n]


@cache
def preset_values(preset: str) -> Mapping[str, Any]:
    """Return the values of a preset of swin_unetr_pretrain.

    Raises:
        InputError: there is no such preset.
    """
    return choose(preset=preset, file=str(BUNDLES / PRETRAIN / "configs/presets.yaml"))


def presets() -> list[str]:
    """Return the names of the presets that both bundles have."""
    first, second = (
        yaml.safe_load((BUNDLES / bundle / "configs/presets.yaml").read_text(encoding="utf-8"))
        for bundle in (PRETRAIN, SEGMENT)
    )
    return [name for name in first if name in second]


def paper_subsets() -> list[list[str]]:
    """Return all subsets of the paper's proxy tasks: none, each alone, the pairs, all three."""
    sizes = range(len(PAPER_TASKS) + 1)
    return [list(each) for size in sizes for each in itertools.combinations(PAPER_TASKS, size)]


def trains_whole_network(tasks: Sequence[str], reconstruction_head: str | None) -> bool:
    """Return whether a pre-training trains the decoder as well, so that it writes ``network.pt``."""
    return POSITION in tasks or (INPAINTING in tasks and reconstruction_head == WHOLE_HEAD)


def suggestion(key: Any, known: Iterable[str]) -> str:
    """Return a sentence that names the most similar of the known keys, if any, and all of them."""
    return f"{did_you_mean(key, known)}Allowed are {', '.join(sorted(known))}"


def recipes_of(search: Search, arm: str) -> list[dict[str, Any]]:
    """Return the recipes of an arm: every combination of the grid for all arms and its own, then its single recipes."""
    grid = {**search.grid, **search.grid_of.get(arm, {})}
    combined = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())] if grid else []
    return combined + [dict(recipe) for recipe in search.recipes_of.get(arm, [])]


def tried_options(study: Study, arm: str, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fine-tuning options with which the search tries a recipe.

    They include the arm's own options, except those that any recipe of the arm sets: these are what is searched. The
    arm's own values are the winner of an earlier search, and a recipe that does not set the option must not inherit
    them.

    Args:
        study: a study with a search.
        arm: one of its arms.
        recipe: one of `recipes_of` that arm.
    """
    searched = {key for each in recipes_of(study.search, arm) for key in each}
    own = {key: value for key, value in study.arms[arm].finetuning.items() if key not in searched}
    return {**study.finetuning, **own, **study.search.options, **recipe}
