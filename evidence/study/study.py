# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A study: what is compared, on which data, with which options. Read from YAML and checked before anything runs."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from bundles.common.errors import InputError
from bundles.common.run.mixed_precision import TYPES

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
PRETRAIN, SEGMENT = "swin_unetr_pretrain", "swin_unetr_msd"
STUDIES = Path(__file__).parents[1] / "studies"
CONTROL = "scratch"
PROXY_TASKS = ("inpainting", "contrast", "rotation")
NETWORK = ("feature_size", "depths", "num_heads", "window_size")
# Options that the plan sets, so no study may set them.
OF_THE_PLAN = (
    *("task", "dataset_dir", "data_list", "output_dir", "pretrained_encoder", "pretrained_model", "resume", "seed"),
    *("fold", "folds", "labels", "bundle_root", "preset", "device"),
)
ENTRIES = "entries, 'key: value'"


def _is_whole(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_subset(tasks: Any) -> bool:
    return isinstance(tasks, list) and all(task in PROXY_TASKS and tasks.count(task) == 1 for task in tasks)


# What values of single options must be, wherever a study sets them.
OPTION_VALUES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "roi_size": (
        "three whole numbers of voxels: [x, y, z]",
        lambda size: isinstance(size, list) and len(size) == 3 and all(map(_is_whole, size)),
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
    """The error of an entry, or of an entry below it."""
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
            raise _wrong("is set by the plan of the study. Remove it", key)
    _check_values(options)
    return options


def _check_grid(grid: dict[str, list]) -> dict[str, list]:
    for key, values in grid.items():
        for value in values:
            _check_options({key: value})
    return grid


def _check_row(row: dict[str, Any]) -> dict[str, Any]:
    _check_values(row)
    for preset in _presets():
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
        lambda steps: steps and all(map(_is_whole, [*steps, *steps.values()] if isinstance(steps, dict) else [steps])),
    ),
]
Subset = Annotated[list[Literal[*PROXY_TASKS]], AfterValidator(_check_different)]
Options = Annotated[dict[str, Any], AfterValidator(_check_options)]  # of a bundle's command line
Grid = Annotated[
    dict[str, Annotated[list, Field(min_length=1), AfterValidator(_check_different)]], AfterValidator(_check_grid)
]


class Entries(BaseModel):
    """Entries of a study file. Unknown keys are refused; null means the default."""

    model_config = ConfigDict(frozen=True, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, content: Any) -> Any:
        if not isinstance(content, Mapping):
            return content
        known = cls.model_fields.keys() - {"source"}
        for key in content:
            if key not in known:
                raise _wrong(f"is not a key of a study. {_suggestion(key, known)}", str(key))
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
    """What an arm changes in the pre-training (None: it has none) and in the fine-tuning."""

    encoder: Options | None = None
    finetuning: Options = {}


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
    """The ablation of the proxy tasks: ``arm`` has the options of all encoders; ``subsets`` None means all subsets."""

    n: PositiveCount
    seeds: Seeds
    encoder_per_seed: bool = True
    arm: str
    subsets: list[Subset] | None = None
    paper: list[PaperRow] = []


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
    """Rough minutes of a run of each kind, used until some have finished."""

    pretraining: Minutes = 10.0
    finetuning: Minutes = 5.0


class Study(Entries):
    """The entries of a study file; `studies/openkbp.yaml` explains each.

    Attributes:
        name: name of the study and of its MLflow experiment.
        preset: preset of both bundles.
        arms: name to `Arm`: `CONTROL`, and at least one with an encoder.
        steps: fine-tuning steps: one number, or one for each n.
        curve: the few-label curve.
        synthetic: synthetic patients to generate where no data are passed; None: data are required.
        task: a row of the Decathlon's ``tasks.yaml``; None: ``row``, or a row that is proposed for the data.
        row: a row of its own.
        split: how the validation patients are chosen.
        tuning: number of training patients set apart: the search scores them, and no run trains on their labels.
        pretraining: options of swin_unetr_pretrain for every encoder; its network size (`NETWORK`) also applies
            to every fine-tuning.
        finetuning: options of swin_unetr_msd for every arm.
        evaluation: options of its ``evaluate.yaml``.
        ablation: the ablation of the proxy tasks.
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
    ablation: Ablation | None = None
    search: Search | None = None
    minutes: RunMinutes = RunMinutes()
    source: str = ""

    @property
    def network(self) -> dict[str, Any]:
        """The network size that ``pretraining`` sets; all arms have it, including the control."""
        return {key: self.pretraining[key] for key in NETWORK if self.pretraining.get(key) is not None}

    def steps_of(self, n: int) -> int:
        """Fine-tuning steps with ``n`` labelled patients.

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


def read_study(name: str) -> Study:
    """Read a study file.

    Args:
        name: one of `studies/`, such as ``openkbp``, or the path of a YAML file.

    Raises:
        InputError: the file does not exist, is not YAML, or has wrong entries. Names the file, each wrong entry, its
            value and what is allowed.
    """
    path = Path(name) if Path(name).suffix in (".yaml", ".yml") else STUDIES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(each.stem for each in STUDIES.glob("*.yaml")))
        raise InputError(f"There is no study {name} ({path}). Pass {known}, or the path of a YAML file.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}). Save it as UTF-8.") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, Mapping):
        raise InputError(f"{path} must contain entries such as 'name: openkbp', not {content!r}.")
    return check_study(content, source=str(path))


def check_study(content: Mapping[str, Any], *, source: str) -> Study:
    """Build a study from the entries of a file.

    Args:
        content: the entries.
        source: path of the file.

    Raises:
        InputError: see `read_study`.
    """
    try:
        study = Study.model_validate(content).model_copy(update={"source": source})
    except ValidationError as error:
        raise InputError("\n".join(f"{source}: {_describe(each)}." for each in error.errors())) from None
    for problem in itertools.chain(_arm_problems(study), _comparison_problems(study), _search_problems(study)):
        raise InputError(f"{source}: {problem}.")
    return study


# Texts for errors of pydantic; the others read "Input should be ALLOWED".
ALLOWED = {
    **{"dict_type": ENTRIES, "model_type": ENTRIES, "list_type": "a list", "string_type": "text"},
    **{"too_short": "a list of at least one value", "bool_type": "true or false, without quotes"},
}


def _describe(error: Mapping[str, Any]) -> str:
    """An error of pydantic in words: the entry, its value and what is allowed."""
    location = [*error["loc"], *error.get("ctx", {}).get("below", ())]
    if location[-1] == "[key]":
        return f"{'.'.join(map(str, location[:-2]))} has the key {error['input']!r}: keys must be text"
    entry = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in location).removeprefix(".")
    if error["type"] == "missing":
        return f"{entry} is missing"
    if error["type"] == "entry":
        return f"{entry} {error['msg']}"
    allowed = ALLOWED.get(error["type"], error["msg"].removeprefix("Input should be "))
    return f"{entry} {error['input']!r} must be {allowed}"


def _suggestion(key: Any, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(key), known, n=1)
    return "".join(f"Did you mean {name}? " for name in near) + f"Allowed are {', '.join(sorted(known))}"


def recipes_of(search: Search, arm: str) -> list[dict[str, Any]]:
    """The recipes of an arm: every combination of the grid for all arms and its own, then its single recipes."""
    grid = {**search.grid, **search.grid_of.get(arm, {})}
    combined = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())] if grid else []
    return combined + [dict(recipe) for recipe in search.recipes_of.get(arm, [])]


def tried_options(study: Study, arm: str, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Fine-tuning options with which the search tries a recipe.

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


def _arm_problems(study: Study) -> Iterator[str]:
    """What is wrong with preset, task and arms."""
    presets = _presets()
    if study.preset not in presets:
        yield (
            f"preset {study.preset!r} must be one that both bundles have: {', '.join(presets)}. Single values of other "
            "presets can be set in 'pretraining' and 'finetuning'"
        )
    if study.task and study.row:
        yield f"task {study.task} and row exclude each other. Keep one of them"
    for name, arm in study.arms.items():
        if not name.replace("_", "").isalnum():  # a hyphen joins the proxy tasks of an ablation row
            yield f"arm {name!r} must be text of letters, digits and _"
        if name in PROXY_TASKS:
            yield (
                f"arm {name!r} has the name of an ablation row, the encoder of that proxy task alone. Choose another, "
                f"such as {name}_only"
            )
        if (name == CONTROL) != (arm.encoder is None):
            yield (
                f"arms.{name}.encoder is {arm.encoder!r}. It must be null for {CONTROL} and entries for every other "
                "arm; {} means the options of 'pretraining'"
            )
    if CONTROL not in study.arms or len(study.arms) < 2:
        yield f"arms must have {CONTROL} and at least one arm with an encoder, not {list(study.arms)}"
    with_encoder = [name for name in study.arms if name != CONTROL]
    if study.ablation and study.ablation.arm not in with_encoder:
        yield f"ablation.arm {study.ablation.arm!r} must be an arm with an encoder: {', '.join(with_encoder)}"


def _comparison_problems(study: Study) -> Iterator[str]:
    """Options that would make arms differ in more than they should: network, steps or precision."""
    common = [("search.options", study.search.options)] if study.search else []
    common += [(f"arms.{name}.encoder", arm.encoder or {}) for name, arm in study.arms.items()]
    for part, options in [*_finetuning_options(study), *common]:
        for key in NETWORK:
            if key in options and options[key] != study.pretraining.get(key):
                yield (
                    f"{part} has {key} {options[key]!r}, pretraining {study.pretraining.get(key, 'none')!r}. All arms "
                    f"have the same network: set pretraining.{key}, which also applies to every fine-tuning, and remove it "
                    "here"
                )
    for part, options in _finetuning_options(study):
        if "max_steps" in options:
            yield (
                f"{part} has max_steps {options['max_steps']!r}. All arms train for the same number of steps: set "
                "'steps', or search.options.max_steps for all runs of the search, and remove it here"
            )
        for key in ("amp", "amp_type") if part != "finetuning" else ():
            if key in options:
                yield (
                    f"{part} has {key} {options[key]!r}. All arms compute in the same precision: set finetuning.{key}, "
                    "and remove it here"
                )


def _search_problems(study: Study) -> Iterator[str]:
    """What makes a search unfair, empty or biased."""
    search = study.search
    if not search:
        return
    for part, names in (("grid_of", search.grid_of), ("recipes_of", search.recipes_of)):
        for name in names:
            if name not in study.arms:
                yield f"search.{part}.{name} is not an arm. {_suggestion(name, study.arms)}"
    numbers = {arm: len(recipes_of(search, arm)) for arm in study.arms}
    if len(set(numbers.values())) > 1:
        yield (
            f"the arms have different numbers of recipes in the search, {numbers}. A fair search tries the same number "
            "for each: see search.grid_of and search.recipes_of"
        )
    if not any(numbers.values()):
        yield "the search tries nothing: set search.grid or search.recipes_of"
    for arm in study.arms:
        tried: list[tuple[dict, dict]] = []
        for recipe in recipes_of(search, arm):
            options = tried_options(study, arm, recipe)
            if same := [each for each, before in tried if before == options]:
                yield (
                    f"the search tries {same[0]!r} and {recipe!r} for {arm}, which are equal together with its other "
                    f"options (finetuning, arms.{arm}.finetuning, search.options): {options!r}. Change or remove one of "
                    "them"
                )
            tried.append((recipe, options))
    for part, entries in (("curve", study.curve), ("ablation", study.ablation)):
        if entries and (shared := sorted({*entries.seeds} & {*search.seeds})):
            yield (
                f"search.seeds {search.seeds} and {part}.seeds {entries.seeds} share {', '.join(map(str, shared))}: "
                "recipes would be chosen on the subsets and draws that are compared afterwards. Use other seeds for the "
                "search"
            )


def _finetuning_options(study: Study) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Fine-tuning options with their places in the file: of all arms, of each arm, and what the search tries."""
    yield "finetuning", study.finetuning
    for name, arm in study.arms.items():
        yield f"arms.{name}.finetuning", arm.finetuning
    if study.search:
        for name, recipes in study.search.recipes_of.items():
            yield from ((f"search.recipes_of.{name}", recipe) for recipe in recipes)
        grids = {"search.grid": study.search.grid}
        grids |= {f"search.grid_of.{name}": grid for name, grid in study.search.grid_of.items()}
        for place, grid in grids.items():
            yield from ((place, {key: value}) for key, values in grid.items() for value in values)


def _presets() -> list[str]:
    """Names of the presets that both bundles have."""
    first, second = (
        yaml.safe_load((BUNDLES / bundle / "configs/presets.yaml").read_text(encoding="utf-8"))
        for bundle in (PRETRAIN, SEGMENT)
    )
    return [name for name in first if name in second]
