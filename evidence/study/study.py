# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A study: what is compared, on which data, with which options. Read from a YAML file and checked before anything runs."""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from bundles.common.errors import InputError
from bundles.common.run.mixed_precision import TYPES

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
PRETRAIN, SEGMENT = "swin_unetr_pretrain", "swin_unetr_msd"
STUDIES = Path(__file__).parents[1] / "studies"
CONTROL = "scratch"
PROXY_TASKS = ("inpainting", "contrast", "rotation")
NETWORK = ("feature_size", "depths", "num_heads", "window_size")
# What the plan itself decides, and no study may set.
OF_THE_PLAN = (
    *("task", "dataset_dir", "data_list", "output_dir", "pretrained_encoder", "pretrained_model", "resume", "seed"),
    *("fold", "folds", "labels", "bundle_root", "preset", "device"),
)


@dataclass(frozen=True, kw_only=True)
class Study:
    """The entries of a study file; `studies/openkbp.yaml` has a comment for each.

    Attributes:
        name: of the study, and of its experiment in MLflow.
        synthetic: how many patients of `tools.synthetic_ct` to make where no data are given; None: data must be given.
        task: a row of the Decathlon's ``tasks.yaml``; None: ``row``, or one that is proposed for the data.
        row: a row of its own.
        preset: of both bundles.
        split: ``fold`` and ``folds`` of the untouched validation patients, as the bundles have them.
        tuning: number of training patients that no run trains on with labels: those that the search scores.
        pretraining: options of swin_unetr_pretrain for every encoder; its size of the network (`NETWORK`) holds for every fine-tuning, too.
        finetuning: options of swin_unetr_msd for every arm.
        evaluation: options of its ``evaluate.yaml``.
        arms: name to ``encoder`` (None, or what of ``pretraining`` it changes) and ``finetuning`` (likewise).
        steps: fine-tuning steps, one number or one for each n.
        curve: ``n``, ``seeds``, ``encoder_per_seed``.
        ablation: ``n``, ``seeds``, ``encoder_per_seed``, ``arm``, ``subsets`` of the proxy tasks.
        search: ``n``, ``seeds``, ``options``, ``grid`` for all arms, ``grid_of`` single ones, and their further ``recipes_of`` options;
            equally many recipes for each arm.
        minutes: rough minutes of a pre-training and of a fine-tuning, until some have finished.
        source: the study's file, no entry of it.
    """

    name: str
    preset: str
    arms: Mapping[str, Mapping[str, Any]]
    steps: int | Mapping[int, int]
    curve: Mapping[str, Any]
    synthetic: Mapping[str, int] | None = None
    task: str | None = None
    row: Mapping[str, Any] | None = None
    split: Mapping[str, Any] | None = None
    tuning: int = 0
    pretraining: Mapping[str, Any] | None = None
    finetuning: Mapping[str, Any] | None = None
    evaluation: Mapping[str, Any] | None = None
    ablation: Mapping[str, Any] | None = None
    search: Mapping[str, Any] | None = None
    minutes: Mapping[str, float] | None = None
    source: str = ""

    @property
    def network(self) -> dict[str, Any]:
        """The size of the network that ``pretraining`` asks for: every arm has it, the control among them."""
        return {key: self.pretraining[key] for key in NETWORK if (self.pretraining or {}).get(key) is not None}

    def steps_of(self, n: int) -> int:
        """Fine-tuning steps with ``n`` labelled patients.

        Raises:
            InputError: if the study does not say.
        """
        if isinstance(self.steps, int):
            return self.steps
        if n not in self.steps:
            raise InputError(
                f"Study {self.name}: steps has no entry for n = {n}, only {dict(self.steps)}. Add one, or give one number."
            )
        return self.steps[n]


REQUIRED = ("name", "preset", "arms", "steps", "curve")
PARTS = {
    "split": {"fold", "folds"},
    "curve": {"n", "seeds", "encoder_per_seed"},
    "ablation": {"n", "seeds", "encoder_per_seed", "arm", "subsets", "paper"},
    "search": {"n", "seeds", "grid", "grid_of", "recipes_of", "options"},
    "synthetic": {"unlabelled", "training", "validation", "seed"},
    "minutes": {"pretraining", "finetuning"},
}


def read_study(name: str) -> Study:
    """Read a study file.

    Args:
        name: one of `studies/`, such as ``openkbp``, or the path of a YAML file.

    Raises:
        InputError: the file is not there, is no YAML, or says what a study cannot be; names the key, the value and the file.
    """
    path = Path(name) if Path(name).suffix in (".yaml", ".yml") else STUDIES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(each.stem for each in STUDIES.glob("*.yaml")))
        raise InputError(f"There is no study {name} ({path}). Known are {known}; or give the path of a YAML file.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text in UTF-8 ({error}). Save it as UTF-8.") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is no YAML: {error}") from None
    if not isinstance(content, Mapping):
        raise InputError(f"{path} must hold entries such as 'name: openkbp', not {content!r}.")
    return check_study(content, source=str(path))


def check_study(content: Mapping[str, Any], *, source: str) -> Study:
    """Make a study of the entries of a file.

    Raises:
        InputError: see `read_study`.
    """
    _check_keys(content, {field.name for field in fields(Study)} - {"source"}, source, "")
    if missing := [key for key in REQUIRED if content.get(key) is None]:
        raise InputError(f"{source} lacks {', '.join(missing)}.")
    for part, known in PARTS.items():
        if content.get(part) is not None:
            _check_keys(_mapping(content[part], source, part), known, source, f"{part}.")
    for part in ("pretraining", "finetuning", "evaluation"):
        _check_options(content.get(part) or {}, source, part)
    presets = _presets()
    if content["preset"] not in presets:
        raise InputError(
            f"{source}: preset {content['preset']!r} is none that both bundles have: {', '.join(presets)}. Single values of another one can be set in "
            "'pretraining' and 'finetuning'."
        )
    if content.get("row") is not None:
        cases = _mapping(content["row"], source, "row").get("cases")
        if cases is not None:
            _mapping(cases, source, "row.cases")
    if not isinstance(content.get("task", ""), str | None):
        raise InputError(f"{source}: task {content['task']!r} must be the name of a row of tasks.yaml.")
    _numbers([content.get("tuning") or 0], source, "tuning", least=0)
    for key, number in (content.get("synthetic") or {}).items():
        _numbers([number], source, f"synthetic.{key}", least=0)
    for key, minutes in (content.get("minutes") or {}).items():
        if not _is_number(minutes) or minutes <= 0:
            raise InputError(f"{source}: minutes.{key} {minutes!r} must be a number above 0.")
    if content.get("task") and content.get("row"):
        raise InputError(f"{source}: task {content['task']} and row exclude each other. Keep one of them.")
    _check_arms(content["arms"], source)
    _numbers(content["curve"].get("n"), source, "curve.n", least=1)
    _numbers(content["curve"].get("seeds"), source, "curve.seeds", least=0)
    _check_switch(content["curve"], source, "curve")
    if content.get("ablation"):
        _check_ablation(content["ablation"], content["arms"], source)
    if content.get("search"):
        _check_search(content["search"], content["arms"], source)
    _check_sizes(content, source)
    _check_network(content, source)
    _check_steps(content, source)
    _check_precision(content, source)
    if content.get("search"):
        _check_recipes(content, source)
        _check_seeds(content, source)
    if not isinstance(content["steps"], Mapping):
        _numbers([content["steps"]], source, "steps", least=1)
    else:
        _numbers(list(content["steps"].values()), source, "steps", least=1)
    if not isinstance(content["name"], str) or not content["name"].replace("_", "").replace("-", "").isalnum():
        raise InputError(f"{source}: name {content['name']!r} must be of letters, digits, _ and - alone.")
    return Study(**{key: value for key, value in content.items() if value is not None}, source=source)


def recipes_of(search: Mapping[str, Any], arm: str) -> list[dict[str, Any]]:
    """Every combination of the values of a search's grid, and of what it has for this arm alone; then the arm's single recipes."""
    grid = {**(search.get("grid") or {}), **((search.get("grid_of") or {}).get(arm) or {})}
    combined = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())] if grid else []
    return combined + [dict(recipe) for recipe in (search.get("recipes_of") or {}).get(arm) or []]


def tried_options(study: Mapping[str, Any], arm: str, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Fine-tuning options with which the search tries a recipe.

    Of the arm's own options those that any of its recipes names are left out: they are what is searched, and hold the winner of an earlier search,
    which a recipe that says nothing of them would inherit.

    Args:
        study: its entries.
        arm: one of its arms.
        recipe: one of `recipes_of` that arm.
    """
    search, own = study["search"], study["arms"][arm].get("finetuning") or {}
    searched = {key for each in recipes_of(search, arm) for key in each}
    kept = {key: value for key, value in own.items() if key not in searched}
    return {**(study.get("finetuning") or {}), **kept, **(search.get("options") or {}), **recipe}


def _mapping(value: Any, source: str, key: str) -> Mapping:
    if not isinstance(value, Mapping):
        raise InputError(f"{source}: {key} must be entries, 'key: value', not {value!r}.")
    return value


def _check_keys(content: Mapping[str, Any], known: set[str], source: str, prefix: str) -> None:
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {prefix}{near[0]}?" if near else ""
            raise InputError(
                f"{source}: {prefix}{key} is no key of a study.{hint} Known are {', '.join(sorted(known))}."
            )


def _check_options(options: Any, source: str, part: str) -> None:
    for key in _mapping(options, source, part):
        if key in OF_THE_PLAN:
            raise InputError(f"{source}: {part}.{key} is set by the plan of the study. Take it out.")


def _check_arms(arms: Any, source: str) -> None:
    _mapping(arms, source, "arms")
    for name, arm in arms.items():
        _check_keys(_mapping(arm, source, f"arms.{name}"), {"encoder", "finetuning"}, source, f"arms.{name}.")
        _check_options({} if arm.get("encoder") is None else arm["encoder"], source, f"arms.{name}.encoder")
        _check_options(arm.get("finetuning") or {}, source, f"arms.{name}.finetuning")
        if not str(name).replace("_", "").isalnum():
            raise InputError(f"{source}: arm {name!r} must be of letters, digits and _ alone.")
        if name in PROXY_TASKS:  # other subsets have a hyphen
            raise InputError(
                f"{source}: arm {name!r} has the name of an ablation row, the encoder of that proxy task alone. Choose another, such as {name}_only."
            )
        if (name == CONTROL) != (arm.get("encoder") is None):
            raise InputError(
                f"{source}: arms.{name}.encoder is {arm.get('encoder')!r}; the arm {CONTROL}, and no other, has null; "
                "{} pre-trains as 'pretraining' says."
            )
    if CONTROL not in arms or len(arms) < 2:
        raise InputError(f"{source}: arms must have {CONTROL} and at least one arm with an encoder, got {list(arms)}.")


def _check_ablation(ablation: Mapping[str, Any], arms: Mapping[str, Any], source: str) -> None:
    _numbers([ablation.get("n")], source, "ablation.n", least=1)
    _numbers(ablation.get("seeds"), source, "ablation.seeds", least=0)
    _check_switch(ablation, source, "ablation")
    arm = ablation.get("arm")
    if arm not in list(arms) or arm == CONTROL:
        raise InputError(f"{source}: ablation.arm {arm!r} must be an arm with an encoder: {', '.join(arms)}.")
    for subset in _entries(ablation.get("subsets"), source, "ablation.subsets"):
        if not _is_subset(subset):
            raise InputError(f"{source}: ablation.subsets has {subset!r}; each is a list of {', '.join(PROXY_TASKS)}.")
    for row in _entries(ablation.get("paper"), source, "ablation.paper"):
        _check_keys(
            _mapping(row, source, "each of ablation.paper"), {"tasks", "dice", "hd95"}, source, "ablation.paper."
        )
        figures = [value for key, value in row.items() if key != "tasks" and value is not None]
        if not _is_subset(row.get("tasks")) or not all(map(_is_number, figures)):
            raise InputError(
                f"{source}: ablation.paper has {row!r}; each is as {{tasks: [inpainting, contrast], dice: 84.45}}, hd95 if known."
            )


def _check_search(search: Mapping[str, Any], arms: Mapping[str, Any], source: str) -> None:
    _numbers([search.get("n")], source, "search.n", least=1)
    _numbers(search.get("seeds"), source, "search.seeds", least=0)
    _check_options(search.get("options") or {}, source, "search.options")
    grids = {"search.grid": search.get("grid") or {}}
    own = _mapping(search.get("grid_of") or {}, source, "search.grid_of")
    _check_keys(own, set(arms), source, "search.grid_of.")
    grids |= {f"search.grid_of.{arm}": grid for arm, grid in own.items()}
    for part, grid in grids.items():
        _check_options(grid, source, part)
        for key, values in grid.items():
            if not isinstance(values, list) or not values:
                raise InputError(f"{source}: {part}.{key} {values!r} must be a list of values to try.")
            if any(value in values[:place] for place, value in enumerate(values)):
                raise InputError(f"{source}: {part}.{key} {values!r} names a value twice.")
    single = _mapping(search.get("recipes_of") or {}, source, "search.recipes_of")
    _check_keys(single, set(arms), source, "search.recipes_of.")
    for arm, recipes in single.items():
        if not isinstance(recipes, list):
            raise InputError(f"{source}: search.recipes_of.{arm} {recipes!r} must be a list of recipes.")
        for recipe in recipes:
            _check_options(recipe, source, f"search.recipes_of.{arm}")
    efforts = {arm: len(recipes_of(search, arm)) for arm in arms}
    if len(set(efforts.values())) > 1:
        raise InputError(
            f"{source}: the search gives the arms unequal numbers of recipes, {efforts}: a fair one tries as many for each. "
            "See search.grid_of and search.recipes_of."
        )
    if not any(efforts.values()):
        raise InputError(f"{source}: the search tries nothing. See search.grid and search.recipes_of.")


def _check_recipes(content: Mapping[str, Any], source: str) -> None:
    """Refuse recipes that come to the same options: an arm would have fewer tries than it seems."""
    for arm in content["arms"]:
        tried: list[tuple[dict, dict]] = []
        for recipe in recipes_of(content["search"], arm):
            options = tried_options(content, arm, recipe)
            if same := [each for each, before in tried if before == options]:
                raise InputError(
                    f"{source}: the search tries {same[0]!r} and {recipe!r} for {arm}, which are equal with what else holds for them (finetuning, "
                    f"arms.{arm}.finetuning, search.options): {options!r}. Change or remove one of them."
                )
            tried.append((recipe, options))


def _check_sizes(content: Mapping[str, Any], source: str) -> None:
    """Refuse a ROI and proxy tasks that the plan cannot read."""
    row, preset = content.get("row") or {}, content["preset"]
    encoders = [(f"arms.{name}.encoder", arm.get("encoder")) for name, arm in content["arms"].items()]
    encoders.append(("pretraining", content.get("pretraining")))
    others = [("row", row), (f"row.{preset}", row.get(preset)), ("evaluation", content.get("evaluation"))]
    others.append(("search.options", (content.get("search") or {}).get("options")))
    for part, options in [*_finetunings(content), *encoders, *others]:
        if isinstance(options, Mapping) and "roi_size" in options:
            size = options["roi_size"]
            if not (isinstance(size, list) and len(size) == 3 and all(type(side) is int and side > 0 for side in size)):
                raise InputError(
                    f"{source}: {part}.roi_size {size!r} must be three whole numbers of voxels: [x, y, z]."
                )
    for part, options in encoders:
        if options and "tasks" in options and not (options["tasks"] and _is_subset(options["tasks"])):
            raise InputError(
                f"{source}: {part}.tasks {options['tasks']!r} must be a list of {', '.join(PROXY_TASKS)}, at least one."
            )


def _check_network(content: Mapping[str, Any], source: str) -> None:
    """Refuse a network for some runs alone: what arms differ in is their start."""
    asked = content.get("pretraining") or {}
    parts = [("search.options", (content.get("search") or {}).get("options"))]
    parts += [(f"arms.{name}.encoder", arm.get("encoder")) for name, arm in content["arms"].items()]
    for part, options in [*_finetunings(content), *parts]:
        for key in NETWORK:
            if options and key in options and options[key] != asked.get(key):
                raise InputError(
                    f"{source}: {part} has {key} {options[key]!r}, pretraining {asked.get(key, 'none')!r}. All arms have one network: set "
                    f"pretraining.{key}, which holds for every fine-tuning, and take it out here."
                )


def _check_steps(content: Mapping[str, Any], source: str) -> None:
    """Refuse steps of fine-tuning for some runs alone: arms are compared after equally many."""
    for part, options in _finetunings(content):
        if "max_steps" in options:
            raise InputError(
                f"{source}: {part} has max_steps {options['max_steps']!r}. All arms are trained for equally many steps: set 'steps', or "
                "search.options.max_steps for all runs of the search, and take it out here."
            )


def _check_precision(content: Mapping[str, Any], source: str) -> None:
    """Refuse what is no precision, and one for some fine-tunings alone."""
    parts = [(part, content.get(part)) for part in ("pretraining", "finetuning", "evaluation")]
    parts += [("search.options", (content.get("search") or {}).get("options"))]
    parts += [(f"arms.{name}.encoder", arm.get("encoder")) for name, arm in content["arms"].items()]
    for part, options in parts:
        options = options or {}
        if not isinstance(options.get("amp", True), bool):
            raise InputError(f"{source}: {part}.amp {options['amp']!r} must be true or false, without quotes.")
        if options.get("amp_type", "auto") not in ("auto", *TYPES):
            raise InputError(f"{source}: {part}.amp_type {options['amp_type']!r} must be auto, {' or '.join(TYPES)}.")
    for part, options in _finetunings(content):
        for key in ("amp", "amp_type"):
            if key in options and part != "finetuning":
                raise InputError(
                    f"{source}: {part} has {key} {options[key]!r}. All arms compute in one precision: set finetuning.{key}, and take it out here."
                )


def _check_seeds(content: Mapping[str, Any], source: str) -> None:
    """Refuse a search on the labelled subsets that are compared afterwards."""
    for part in ("curve", "ablation"):
        seeds = (content.get(part) or {}).get("seeds") or []
        if common := sorted({*seeds} & {*content["search"]["seeds"]}):
            raise InputError(
                f"{source}: search.seeds {content['search']['seeds']} and {part}.seeds {seeds} share {', '.join(map(str, common))}: recipes would be "
                "chosen on the very subsets and draws that are compared afterwards. Give the search other seeds."
            )


def _finetunings(content: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Options of fine-tuning, by where the study has them: of all arms, of each, and what the search tries."""
    search = content.get("search") or {}
    parts = [("finetuning", content.get("finetuning"))]
    parts += [(f"arms.{name}.finetuning", arm.get("finetuning")) for name, arm in content["arms"].items()]
    for name, recipes in (search.get("recipes_of") or {}).items():
        parts += [(f"search.recipes_of.{name}", recipe) for recipe in recipes]
    grids = {"grid": search.get("grid")}
    grids |= {f"grid_of.{name}": grid for name, grid in (search.get("grid_of") or {}).items()}
    for name, grid in grids.items():
        parts += [(f"search.{name}", {key: value}) for key, values in (grid or {}).items() for value in values]
    return [(name, options or {}) for name, options in parts]


def _check_switch(part: Mapping[str, Any], source: str, name: str) -> None:
    if not isinstance(part.get("encoder_per_seed", True), bool):
        raise InputError(
            f"{source}: {name}.encoder_per_seed {part['encoder_per_seed']!r} must be true or false, without quotes."
        )


def _presets() -> list[str]:
    """Names of the presets that both bundles have."""
    first, second = (
        yaml.safe_load((BUNDLES / bundle / "configs/presets.yaml").read_text(encoding="utf-8"))
        for bundle in (PRETRAIN, SEGMENT)
    )
    return [name for name in first if name in second]


def _entries(value: Any, source: str, key: str) -> list:
    if value is not None and not isinstance(value, list):
        raise InputError(f"{source}: {key} must be a list, not {value!r}.")
    return value or []


def _is_subset(tasks: Any) -> bool:
    """A list of proxy tasks, none of them twice."""
    return isinstance(tasks, list) and all(task in PROXY_TASKS and tasks.count(task) == 1 for task in tasks)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _numbers(values: Any, source: str, key: str, *, least: int) -> None:
    whole = isinstance(values, Sequence) and not isinstance(values, str) and values
    if not whole or not all(isinstance(v, int) and not isinstance(v, bool) and v >= least for v in values):
        raise InputError(f"{source}: {key} {values!r} must be whole numbers, {least} or more.")
    if key.rpartition(".")[2] in ("seed", "seeds") and max(values) >= 2**32:
        raise InputError(f"{source}: {key} {values!r} must be below 2^32 = {2**32}.")
    if len(set(values)) < len(values) and key.endswith(("seeds", ".n")):
        raise InputError(f"{source}: {key} {values!r} names a number twice.")
