# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The options of a run: the top-level entries of its config above the entry ``components``.

Everything about an option is derived from here and from the config:

- how it is checked: `RULES` by name; an option without a rule must have the type of its value in the first preset;
- whether it identifies the run (is kept in checkpoints and compared on resume): every option except `NOT_SETTINGS`;
- whether a change makes validation scores incomparable: whether the validation refers to it (`RunSettings`).
"""

from __future__ import annotations

import ast
import json
import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from monai.bundle.utils import DEFAULT_EXP_MGMT_SETTINGS

from ..errors import InputError
from ..networks.roi_size import check_roi_size
from ..value_rules import (
    ABOVE_ZERO,
    COUNT,
    NUMBER,
    SEED,
    SHARE_BELOW_ONE,
    SWITCH,
    WHOLE,
    WORKERS,
    ZERO_OR_ABOVE,
    Rule,
    is_list,
    is_share,
    one_of,
    whole_from,
)
from ..words import did_you_mean
from .presets import first_preset

#: The config entry that ends the options.
END = "components"

#: Options that may differ between two runs with the same results: where files are, how fast it runs, what is printed.
#: The network's shape and start weights are recorded elsewhere (encoder record, ``trained``).
NOT_SETTINGS = frozenset(
    {
        *("bundle_root", "preset", "task", "resume", "resume_changes", "distributed", "device"),
        *("dataset_dir", "data_list", "data", "validation_share", "output_dir", "check_data"),
        "probe_list",
        *("pretrained_encoder", "pretrained_model", "merging", "patch_embed", "allow_partial"),
        *("in_channels", "feature_size", "depths", "num_heads", "window_size", "reconstruction_head", "pooling"),
        *("cache_num", "num_workers", "sw_batch_size", "gradient_checkpointing", "fast", "global_batch_size"),
        *("log_every", "tensorboard", "max_skipped_steps", "amp", "amp_type", "position_scans"),
        *("backend", "deterministic", "store_on_device", "compile"),
    }
)
#: A setting that is not an option: how many processes share the work.
PROCESSES = "processes"
#: Parts of the evaluator that do not decide what a score measures.
NOT_MEASURED = ("network", "device", "amp", "amp_kwargs")


def _shares(value: Any) -> bool:
    values = value if isinstance(value, (list, tuple)) else [value]
    return len(values) in (1, 3) and all(map(SHARE_BELOW_ONE.holds, values))


MAX_NORM = ABOVE_ZERO.or_null("no clipping")
SPACING = Rule(
    "must be three sizes in mm above 0, such as [1.5,1.5,2.0], and each from 0.05 to 20",  # as the voxels of scans
    lambda value: value is None or (is_list(value, 3) and min(value) >= 0.05 and max(value) <= 20),
)
WINDOW = Rule(
    "must be two values in HU, the lower one first, such as [-175.0,250.0]",
    lambda value: value is None or (is_list(value, 2) and value[0] < value[1]),
)
IGNORED = Rule("must be the label value of unknown voxels, a whole number from 1, such as 255", COUNT.holds).or_null(
    "no such voxels"
)
OVERLAP = Rule("must be a share of the window, 0 or above and below 1, or a list of one for each axis", _shares)

PER_STAGE = Rule(
    "must be four whole numbers, one for each stage, such as [2,2,2,2]",
    lambda value: isinstance(value, (list, tuple)) and len(value) == 4 and all(map(COUNT.holds, value)),
).or_null("those of the file, or of the preset")
BOUNDS = Rule("must be [low, high], two numbers", lambda value: is_list(value, 2))
WEIGHTS = Rule(
    "must be a number for each task, such as {'contrast':0.5}",
    lambda value: isinstance(value, dict) and all(map(ZERO_OR_ABOVE.holds, value.values())),
)

#: How options are checked. A new option of a plain type needs no entry: see `check_options`.
RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ("batch_size", "crops_per_volume", "max_steps", "val_interval", "sw_batch_size", "validation_draws"), COUNT
    ),
    **dict.fromkeys(("learning_rate", "encoder_lr_factor", "temperature", "max_spacing"), ABOVE_ZERO),
    "probe_voxels": COUNT,
    **dict.fromkeys(
        ("weight_decay", "end_learning_rate", "class_balance", "background_weight", "min_body"), ZERO_OR_ABOVE
    ),
    **dict.fromkeys(("warmup_steps", "cache_num", "min_slices"), WHOLE),
    "num_workers": whole_from(0, 256),  # many more than a machine has cores would fill its memory
    "workers": WORKERS,
    **dict.fromkeys(("resume", "amp", "fast", "gradient_checkpointing", "freeze_encoder", "tensorboard"), SWITCH),
    **dict.fromkeys(("batch_dice", "background_in_dice", "masked_only", "skip_air"), SWITCH),
    "foreground_hu": NUMBER,
    **dict.fromkeys(("deterministic", "distributed", "straighten_tilt"), SWITCH),
    **dict.fromkeys(("accumulation_steps", "max_skipped_steps"), COUNT),
    "global_batch_size": COUNT.or_null("batch_size on each GPU"),
    "seed": SEED.or_null("that of the model"),
    "early_stopping": COUNT.or_null("no early stopping"),
    "max_gradient_norm": MAX_NORM,
    "ignore_label": IGNORED,
    **dict.fromkeys(("log_every", "average_steps"), COUNT),
    "new_parts_steps": WHOLE,
    "real_repeats": whole_from(1, 1000),
    "real_only_steps": WHOLE,
    **dict.fromkeys(("depths", "num_heads"), PER_STAGE),
    **dict.fromkeys(("mask_ratio", "mask_block"), BOUNDS),
    "task_weights": WEIGHTS,
    "spacing": SPACING,
    "hu_window": WINDOW,
    "sheet_window": WINDOW,
    "overlap": OVERLAP,
    "position_scans": WHOLE,
    "intensity_change": SHARE_BELOW_ONE,
    "mask_rule": one_of("official", "covered"),
    "zoom": SHARE_BELOW_ONE,
    "check_data": one_of("full", "headers", "none"),
    "crop_sampling": one_of("pos_neg", "classes"),
    "mask_interpolation": one_of("linear", "nearest"),
    "store_on_device": Rule("must be a share from 0 (off) to 1", is_share),
    "compile": one_of("decoder", "network", "graphs").or_null("no compilation"),
    "backend": one_of("torch", "openvino", "openvino_bf16"),
    "amp_type": one_of("auto", "bf16", "fp16"),
    "data": one_of("nifti", "store"),
    "patch_embed": one_of("repeat", "fresh").or_null("that of the file"),
}


def _is_path(value: Any) -> bool:
    """Return whether a value is a path; the command line makes a number of the folder 5."""
    return isinstance(value, (str, os.PathLike, int)) and not isinstance(value, bool)


def _are_texts(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value))


PATH = Rule("must be a path", _is_path)
SEVERAL_PATHS = Rule(
    "must be a path, or a list of paths, such as \"['a','b']\"",
    lambda value: (
        _is_path(value) or (isinstance(value, (list, tuple)) and len(value) > 0 and all(map(_is_path, value)))
    ),
)
TEXT = Rule("must be text", lambda value: isinstance(value, str))
TEXTS = Rule("must be a list of names, such as \"['a','b']\"", _are_texts)

#: Rules of options whose default is often an expression. Only values that are written out are checked: an expression is
#: not computed for it.
WRITTEN: dict[str, Rule] = {
    "preset": TEXT.or_null("that of the model"),
    "task": PATH.or_null("the only one of the table, or that of the model"),
    "dataset_dir": SEVERAL_PATHS,
    "data_list": PATH.or_null("dataset.json"),
    "output_dir": PATH,
    "pretrained_model": SEVERAL_PATHS.or_null("none"),
    "pretrained_encoder": PATH.or_null("none"),
    "unlabelled": SEVERAL_PATHS.or_null("the section 'unlabelled' of the list"),
    "position_network": PATH.or_null("none"),
    "pretrain_scans": SEVERAL_PATHS.or_null("none"),
    "pretrain_bundle": PATH,
    "merging": TEXT.or_null("what the file records"),
    "in_channels": COUNT.or_null("that of the task or the file"),
    "rotation_plane": TEXT,
    **dict.fromkeys(("tasks", "mask_fill", "resume_changes", "allow_partial"), TEXTS),
    "labels": Rule(
        "must map values to names, such as \"{'0':'background','1':'liver'}\"",
        lambda value: isinstance(value, Mapping) and len(value) > 0,
    ),
    "mirror_axes": Rule(
        'must be a list of axes, such as "[0,1]"; [] for none',
        lambda value: isinstance(value, (list, tuple)) and all(each in (0, 1, 2) for each in value),
    ),
    "betas": Rule(
        "must be two numbers, 0 or above and below 1", lambda v: is_list(v, 2) and all(map(SHARE_BELOW_ONE.holds, v))
    ),
}

#: The rule of an option without an entry above, by the type of its value in the first preset.
RULES_OF_TYPES = {bool: SWITCH, int: WHOLE, float: NUMBER}


def check_option(name: str, value: Any, *, not_null: bool = False) -> None:
    """Check one value by its rule in `RULES`.

    Args:
        name: the option's name.
        value: its value.
        not_null: see `Rule.check`.

    Raises:
        InputError: names the option, the value and what it must be.
    """
    RULES[name].check(name, value, not_null=not_null)


def check_options(not_null: Sequence[str] = (), one_file: Sequence[str] = ()) -> None:
    """Check every option of the running config, so that a bad value stops the run at once and not hours later.

    An option without a rule is checked by its type where the first preset has a switch or a number for it. Values are
    converted to their type first (see `_plain_value`). Unknown entries are refused, wherever they come from: the
    command line, a further config file or Python.

    Args:
        not_null: options that must not be null in this config, although their rule accepts it.
        one_file: options that take one file in this config, although their rule accepts several.

    Raises:
        InputError: names the option, the value and what it must be; or an unknown entry, with the nearest known ones.
    """
    parser = running_config()
    _check_entries(parser)
    typical = first_preset(str(Path(parser.get_parsed_content("bundle_root")) / "configs" / "presets.yaml"))
    names = option_names(parser.config)
    rules = {name: RULES.get(name) or RULES_OF_TYPES.get(type(typical.get(name))) for name in names}
    _make_plain(parser, rules)
    for name in names:
        if name in WRITTEN and not _is_computed(parser.config[name]):
            rule = PATH.or_null("none") if name in one_file else WRITTEN[name]
            rule.check(name, parser.config[name], not_null=name in not_null)
    for name, rule in rules.items():
        if name == "roi_size":
            check_roi_size(parser.get_parsed_content(name))
        elif rule is not None:
            value = parser.get_parsed_content(name)
            if name in RULES or value is not None:
                rule.check(name, value, not_null=name in not_null)
    if "resume_changes" in names:
        settings = (set(names) - NOT_SETTINGS) | set(parser.config["settings"]["facts"]) | {PROCESSES}
        check_resume_changes(parser.get_parsed_content("resume_changes"), settings)


def check_resume_changes(changes: str | Sequence[str], settings: Collection[str]) -> list[str]:
    """Return the settings that may differ from those of the resumed run.

    Args:
        changes: their names, or one name.
        settings: names of all settings of the run.

    Raises:
        InputError: one of them is not a setting.
    """
    changes = [changes] if isinstance(changes, str) else list(changes)
    if unknown := sorted(set(changes) - set(settings)):
        raise InputError(
            f"--resume_changes names {', '.join(unknown)}; the settings of this run are {', '.join(sorted(settings))}."
        )
    return changes


def _is_computed(value: Any) -> bool:
    """Return whether an entry is an expression, a reference or a component, not a value that is written out."""
    if isinstance(value, str):
        return value.startswith(("$", "@", "%"))
    return isinstance(value, Mapping) and "_target_" in value


#: Options that are a path, or a list of paths.
PATHS = frozenset(
    {
        *("bundle_root", "dataset_dir", "data_list", "output_dir", "pretrained_encoder", "pretrained_model"),
        *("probe_list", "unlabelled", "position_network", "pretrain_scans", "pretrain_bundle"),
    }
)
#: Top-level entries that MONAI reads or adds itself.
ENTRIES_OF_MONAI = frozenset({"imports", "initialize", "run", "finalize", "displayable_configs"})


def _check_entries(parser: ConfigParser) -> None:
    """Refuse top-level entries that no config of the bundle has and nothing refers to."""
    if "monailabel" in sys.modules:  # its entries are its own
        return
    folder = Path(parser.get_parsed_content("bundle_root")) / "configs"
    known = set(ENTRIES_OF_MONAI)
    for file in folder.glob("*.yaml"):
        known.update(re.findall(r"^(\w+):", file.read_text(encoding="utf-8"), re.MULTILINE))
    for tracking in DEFAULT_EXP_MGMT_SETTINGS.values():
        known.update(tracking["configs"])
    unknown = [str(name) for name in parser.config if str(name) not in known and not str(name).startswith("_")]
    for name in set(unknown) - _direct_references(parser, parser.config):
        hint = did_you_mean(name, option_names(parser.config), most=3)
        raise InputError(
            f"The config has an entry {name!r}, which is no option of this bundle and which nothing refers to: it would "
            f"have no effect. {hint}Correct its name, or remove it."
        )


def _make_plain(parser: ConfigParser, rules: Mapping[str, Rule | None]) -> None:
    """Convert the values of options that are written out to their type, before anything uses them."""
    for name, rule in rules.items():
        value = _plain_value(name, parser.config[name], rule)
        if value is not parser.config[name]:
            parser.config[name] = value
            parser.ref_resolver.resolved_content[name] = value


def _plain_value(name: str, value: Any, rule: Rule | None) -> Any:
    """Return a value of an option in its type; the value itself if it has the type, or is an expression.

    - ``null`` becomes None.
    - A path becomes text: python-fire turns a folder named 2026 into a number; ``~`` is the home folder.
    - Text that reads as a value of the rule's type becomes that value: YAML reads ``1e-4`` as text.

    Raises:
        InputError: a path is empty, or cannot be passed through MONAI.
    """
    if name in WRITTEN and value == "null":  # as MONAI reads it where it is used
        return None
    if name in PATHS:
        if isinstance(value, (list, tuple)):
            paths = [_plain_value(name, one, rule) for one in value]
            return value if all(one is other for one, other in zip(paths, value, strict=True)) else paths
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if isinstance(value, (bool, float)):
            raise InputError(f"--{name} {value!r} must be a path; quote a name that is a number: \"'{value}'\".")
        if not isinstance(value, str) or value.startswith(("$", "@")):
            return value
        if not value.strip():
            raise InputError(f"--{name} is empty: pass a path, or leave it out.")
        if "::" in value:
            raise InputError(
                f"--{name} {value}: MONAI reads # and :: in a value as a reference between entries. Rename the folder or "
                "file, or make a link without them."
            )
        return str(Path(value).expanduser()) if value.startswith("~") else value
    if rule is None or not isinstance(value, str) or _is_computed(value) or rule.holds(value):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if rule.holds(found):
            return found
    return value


@dataclass(frozen=True)
class RunSettings:
    """What identifies a run.

    Attributes:
        values: setting to value.
        of_the_scores: names of the settings on which validation scores depend; with any of them changed, scores
            before and after a resume cannot be compared.
    """

    values: dict[str, Any]
    of_the_scores: frozenset[str] = frozenset()


def run_settings(
    *, facts: Mapping[str, Any], leave_out: Collection[str] = (), chosen_by: Collection[str] = ()
) -> RunSettings:
    """Return the settings of the running config: all its options except `NOT_SETTINGS`, and facts derived from them.

    Args:
        facts: further settings, or other values for options (such as those after parsing). Must be the entry
            ``settings::facts`` of the config.
        leave_out: options that are not settings in this workflow.
        chosen_by: options that name the score by which the best weights are chosen.
    """
    parser = running_config()
    names = [name for name in option_names(parser.config) if name not in {*NOT_SETTINGS, *leave_out, *facts}]
    values = {name: parser.get_parsed_content(name) for name in names} | dict(facts)
    measured = set(chosen_by)
    evaluator = parser.config.get("validate", {}).get("evaluator", {})
    for part, content in evaluator.items():
        if part not in NOT_MEASURED:
            measured |= _references(parser, content)
    of_facts = parser.config["settings"]["facts"]
    decisive = {name for name in values if name in measured}
    decisive |= {name for name in facts if measured & _direct_references(parser, of_facts[name])}
    return RunSettings(values, frozenset(decisive))


def plain_lists(value: Any) -> Any:
    """Return a value with tuples as lists and text keys, as it comes back from a file."""
    if isinstance(value, Mapping):
        return {str(key): plain_lists(part) for key, part in value.items()}
    return [plain_lists(part) for part in value] if isinstance(value, (list, tuple)) else value


def option_names(config: Mapping[str, Any]) -> list[str]:
    """Return the options of a config in their order: the entries above ``components``."""
    names = list(config)
    if END not in names:
        raise ValueError(f"The config has no entry {END!r} to end its options; its entries: {', '.join(names)}.")
    return [name for name in names[: names.index(END)] if name != "imports" and not name.startswith("_")]


def running_config() -> ConfigParser:
    """Return the MONAI config parser that is resolving the call to this function.

    MONAI does not pass the parser to the components that it builds, so it is looked for in the calls above.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if isinstance(parser := frame.f_locals.get("self"), ConfigParser):
            return parser
        frame = frame.f_back
    raise RuntimeError("This function works only as a component of a MONAI bundle config.")


def _direct_references(parser: ConfigParser, content: Any) -> set[str]:
    """Return the ids that a part of the config refers to."""
    resolver, todo, found = parser.ref_resolver, [content], set()
    while todo:
        part = todo.pop()
        if isinstance(part, Mapping):
            todo += part.values()
        elif isinstance(part, list):
            todo += part
        elif isinstance(part, str):
            found |= {resolver.normalize_id(name.removeprefix("@")) for name in resolver.match_refs_pattern(part)}
    return found


def _references(parser: ConfigParser, content: Any) -> set[str]:
    """Return the ids that a part of the config refers to, directly or through other entries."""
    todo, found = _direct_references(parser, content), set()
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo |= _direct_references(parser, parser.get(name))
    return found
