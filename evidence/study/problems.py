# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Find entries of a study that contradict each other, or make a comparison unfair. Each problem is a sentence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .study import (
    CONTROL,
    HEADROOM_ARMS,
    INPAINTING,
    NETWORK,
    POSITION,
    WHOLE_HEAD,
    Study,
    paper_subsets,
    preset_values,
    presets,
    recipes_of,
    suggestion,
    trains_whole_network,
    tried_options,
)


def arm_problems(study: Study) -> Iterator[str]:
    """Yield what is wrong with preset, task and arms."""
    names = presets()
    if study.preset not in names:
        yield (
            f"preset {study.preset!r} must be one that both bundles have: {', '.join(names)}. Single values of other "
            "presets can be set in 'pretraining' and 'finetuning'"
        )
    if study.task and study.row:
        yield f"task {study.task} and row exclude each other. Keep one of them"
    rows: list[list[str]] = []
    if study.ablation:
        rows = paper_subsets() if study.ablation.subsets is None else study.ablation.subsets
    for name, arm in study.arms.items():
        if name in HEADROOM_ARMS:
            yield f"arm {name!r} has the name of an arm of 'headroom'. Choose another"
        if not name.replace("_", "").isalnum():  # a hyphen joins the proxy tasks of an ablation row
            yield f"arm {name!r} must be text of letters, digits and _"
        if [name] in rows and study.ablation.arm != name:
            yield (
                f"arm {name!r} has the name of an ablation row, the pre-training with only that proxy task. Choose "
                f"another, such as {name}_only"
            )
        if (name == CONTROL) != (arm.pretraining is None):
            yield (
                f"arms.{name}.pretraining is {arm.pretraining!r}. It must be null for {CONTROL} and entries for every "
                "other arm; {} means the options of 'pretraining' of the study"
            )
        elif name == CONTROL and arm.start is not None:
            yield f"arms.{name}.start is {arm.start!r}, but {CONTROL} has no pre-training. Remove it"
        elif arm.propagation is None and (arm.start == "nothing" or arm.masks_only):
            yield f"arms.{name} carries no labels: start 'nothing' and masks_only need the entry 'propagation'"
        elif name == CONTROL and arm.propagation is not None:
            yield f"arms.{name}.propagation is set, but {CONTROL} has no pre-training. Remove it"
        elif arm.propagation is not None and POSITION not in study.pretraining_of(name)["tasks"]:
            yield (
                f"arms.{name}.propagation needs a network that was pre-trained with the task {POSITION}, and tasks is "
                f"{study.pretraining_of(name)['tasks']!r}. Add it in arms.{name}.pretraining"
            )
        elif arm.masks_only and "max_scans" in arm.propagation:
            yield f"arms.{name} has masks_only: every scored patient gets a mask. Remove propagation.max_scans"
        elif arm.masks_only and (arm.start is not None or arm.finetuning):
            yield f"arms.{name} has masks_only, so that nothing is trained: remove its start and finetuning"
        elif arm.start == "network":
            yield from _whole_network_problems(f"arms.{name}.start", study.pretraining_of(name), study.preset)
    if CONTROL not in study.arms or len(study.arms) < 2:
        yield f"arms must have {CONTROL} and at least one arm with a pre-training, not {list(study.arms)}"
    pretrained = [name for name in study.arms if name != CONTROL]
    if study.ablation and study.ablation.arm not in pretrained:
        yield f"ablation.arm {study.ablation.arm!r} must be an arm with a pre-training: {', '.join(pretrained)}"


def _whole_network_problems(place: str, options: Mapping[str, Any], preset: str) -> Iterator[str]:
    """Yield what keeps a pre-training from writing ``network.pt``, which holds everything but the output layer."""
    head = options.get("reconstruction_head") or preset_values(preset)["reconstruction_head"]
    if not trains_whole_network(options["tasks"], head):
        yield (
            f"{place} is 'network', but its pre-training trains the encoder alone: tasks {options['tasks']}, "
            f"reconstruction_head {head!r}. Add the task {POSITION}, or {INPAINTING} with reconstruction_head "
            f"{WHOLE_HEAD}; or set 'start: encoder'"
        )


def comparison_problems(study: Study) -> Iterator[str]:
    """Yield options that would make arms differ in more than they should: network, steps or precision."""
    common = [("search.options", study.search.options)] if study.search else []
    common += [(f"arms.{name}.pretraining", arm.pretraining or {}) for name, arm in study.arms.items()]
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


def search_problems(study: Study) -> Iterator[str]:
    """Yield what makes a search unfair, empty or biased."""
    search = study.search
    if not search:
        return
    for part, names in (("grid_of", search.grid_of), ("recipes_of", search.recipes_of)):
        for name in names:
            if name not in study.arms:
                yield f"search.{part}.{name} is not an arm. {suggestion(name, study.arms)}"
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
    yield from _seed_problems(study, "search", search.seeds, "recipes")


def _seed_problems(study: Study, chooser: str, seeds: Sequence[int], chosen: str) -> Iterator[str]:
    """Yield seeds that both choose something and are compared afterwards."""
    for part, entries in (("curve", study.curve), ("ablation", study.ablation), ("headroom", study.headroom)):
        if entries and (shared := sorted({*entries.seeds} & {*seeds})):
            yield (
                f"{chooser}.seeds {list(seeds)} and {part}.seeds {entries.seeds} share {', '.join(map(str, shared))}: "
                f"{chosen} would be chosen on the subsets and draws that are compared afterwards. Use other seeds for the "
                f"{chooser}"
            )


def part_problems(study: Study) -> Iterator[str]:
    """Yield what is wrong with the first figure, the ablation's subsets and the headroom."""
    labels = [name for value, name in ((study.row or {}).get("labels") or {}).items() if str(value) != "0"]
    for name in study.first_figure or () if labels else ():
        if name not in labels:
            yield f"first_figure {name!r} is not a label of the row. {suggestion(name, labels)}"
    ablation = study.ablation
    if ablation and study.arms[ablation.arm].start == "network":
        for tasks in filter(None, paper_subsets() if ablation.subsets is None else ablation.subsets):
            options = study.pretraining_of(ablation.arm, tasks=tasks)
            place = f"ablation.arm is {ablation.arm}, whose start"
            yield from _whole_network_problems(place, options, study.preset)
    if ablation and study.arms[ablation.arm].propagation is not None:
        yield f"ablation.arm {ablation.arm!r} carries labels: an ablation compares pre-trainings. Choose another arm"
    headroom = study.headroom
    if headroom and not (headroom.floor or headroom.ceiling or headroom.convergence):
        yield "headroom measures nothing: floor and ceiling are false and convergence is null. Remove it"
    if headroom and (convergence := headroom.convergence):
        yield from _seed_problems(study, "headroom.convergence", convergence.seeds, "steps")
        if not study.tuning:
            yield "headroom.convergence scores the tuning patients, but tuning is 0. Set a larger number"
        for n in headroom.n:
            if convergence.most < 2 * study.steps_of(n):
                yield (
                    f"headroom.convergence.most {convergence.most} allows no doubling of the {study.steps_of(n)} steps "
                    f"with n = {n}. Set at least {2 * study.steps_of(n)}"
                )


def _finetuning_options(study: Study) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield fine-tuning options with their places in the file: of all arms, of each arm, and what the search tries."""
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
