# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Options are checked by one table, and what identifies a run is derived from the config."""

from __future__ import annotations

import pytest
from monai.bundle import ConfigParser

from bundles.common.errors import InputError
from bundles.common.run.options import RunSettings, check_choice, check_option, option_names, plain_lists

OPTIONS = "bundles.common.run.options"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sw_batch_size", 4),
        ("learning_rate", 1e-4),
        ("warmup_steps", 0),
        ("weight_decay", 1e-5),
        ("resume", False),
        ("spacing", [1.5, 1.5, 2]),
        ("spacing", None),
        ("hu_window", [-175.0, 250.0]),
        ("overlap", 0.5),
        ("overlap", [0.5, 0.5, 0.25]),
        ("max_gradient_norm", None),
        ("check_data", "headers"),
    ],
)
def test_good_values_pass(name, value):
    check_option(name, value)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("sw_batch_size", 0, "--sw_batch_size 0 must be a whole number, 1 or more"),
        ("batch_size", "x", "--batch_size 'x' must be a whole number"),
        ("batch_size", 1.5, "--batch_size 1.5 must be a whole number"),
        ("batch_size", True, "--batch_size True must be a whole number"),
        ("learning_rate", "abc", "--learning_rate 'abc' must be a number above 0"),
        ("learning_rate", 0, "--learning_rate 0 must be a number above 0"),
        ("background_weight", -3, "--background_weight -3 must be a number, 0 or above"),
        ("background_weight", float("nan"), "--background_weight nan must be"),
        ("resume", "yes", "--resume 'yes' must be true or false"),
        ("spacing", [1.5, 0, 2], r"--spacing \[1.5, 0, 2\] must be three sizes"),
        ("spacing", "x", "--spacing 'x' must be three sizes"),
        ("spacing", [1.5], r"--spacing \[1.5\] must be three sizes"),
        ("hu_window", [250, -175], r"--hu_window \[250, -175\] must be two values"),
        ("hu_window", 5, "--hu_window 5 must be two values"),
        ("overlap", 1.0, "--overlap 1.0 must be a share"),
        ("overlap", "x", "--overlap 'x' must be a share"),
        ("zoom", 1, "--zoom 1 must be a number, 0 or above and below 1"),
        ("max_gradient_norm", 0, "--max_gradient_norm 0 must be a number above 0"),
        ("check_data", "ful", "--check_data 'ful' is not one of full, headers, none"),
    ],
)
def test_bad_values_are_named(name, value, words):
    with pytest.raises(InputError, match=words):
        check_option(name, value)


def test_a_choice_is_checked_where_its_values_are_known():
    check_choice(name="layout", value="official", choices=["official", "encoder"])
    with pytest.raises(InputError, match="--layout 'new' is not one of official, encoder"):
        check_choice(name="layout", value="new", choices=["official", "encoder"])


def config(tmp_path, **changed):
    """A small config with options, a training and a validation."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/presets.yaml").write_text("full: {dropout: 0.1, depth: 2, sharp: true, name: x, size: null}\n")
    content = {
        "bundle_root": str(tmp_path),
        "num_workers": 2,
        "learning_rate": 0.1,
        "dropout": 0.1,
        "depth": 2,
        "sharp": True,
        "size": None,
        "overlap": 0.5,
        "spacing": [1.0, 1.0, 2.0],
        "turn": 0.2,
        "select_by": "dice",
        **{name: value for name, value in changed.items() if name != "facts"},
        "components": "the options end here",
        "grid": "$@spacing[0] * 2",
        "settings": {
            "_target_": f"{OPTIONS}.run_settings",
            "chosen_by": ["select_by"],
            "facts": {"scans": "@train::scans", "grid": "@grid", "turn": "$@turn * 2"},
        },
        "train": {"scans": "$['a', @turn]"},
        "validate": {
            "scans": "$['b', @grid]",
            "evaluator": {"loader": "@validate::scans", "inferer": "$@overlap", "network": "$@dropout", "amp": False},
        },
        "check": {"_target_": f"{OPTIONS}.check_options"},
    }
    parser = ConfigParser(content)
    parser.parse()
    return parser


def test_settings_are_all_options_but_those_that_change_no_result_and_the_facts(tmp_path):
    settings = config(tmp_path).get_parsed_content("settings")
    assert isinstance(settings, RunSettings)
    assert settings.values == {
        **{"learning_rate": 0.1, "dropout": 0.1, "depth": 2, "sharp": True, "size": None, "overlap": 0.5},
        **{"spacing": [1.0, 1.0, 2.0], "select_by": "dice", "scans": ["a", 0.2], "grid": 2.0, "turn": 0.4},
    }


def test_scores_depend_on_what_the_validation_refers_to_and_on_nothing_else(tmp_path):
    # through other entries, too (grid, spacing); the network's own options leave scores comparable
    settings = config(tmp_path).get_parsed_content("settings")
    assert settings.of_the_scores == {"spacing", "grid", "overlap", "select_by"}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"learning_rate": 0}, "--learning_rate 0 must be a number above 0"),
        ({"dropout": "high"}, "--dropout 'high' must be a number"),
        ({"depth": 1.5}, "--depth 1.5 must be a whole number, 0 or more"),
        ({"sharp": "yes"}, "--sharp 'yes' must be true or false"),
        ({"spacing": [1, 2]}, "--spacing .* must be three sizes"),
        ({"roi_size": [64, 64, 33]}, "roi_size .* divisible by 32"),
    ],
)
def test_all_options_are_checked_those_without_a_rule_by_their_type_in_the_first_preset(tmp_path, changed, words):
    parser = config(tmp_path, **changed)
    with pytest.raises(RuntimeError) as caught:
        parser.get_parsed_content("check")
    causes, error = [], caught.value
    while error is not None:
        causes.append(error)
        error = error.__cause__
    assert isinstance(causes[-1], InputError)
    with pytest.raises(InputError, match=words):
        raise causes[-1]


def test_good_options_pass(tmp_path):
    config(tmp_path).get_parsed_content("check")


def test_options_end_at_the_entry_components():
    assert option_names({"imports": [], "a": 1, "b": 2, "components": "", "c": 3}) == ["a", "b"]
    with pytest.raises(ValueError, match="no entry 'components'"):
        option_names({"a": 1})


def test_values_are_as_they_come_back_from_a_file():
    assert plain_lists({"a": (1, [2, (3,)]), 4: {"b": ()}}) == {"a": [1, [2, [3]]], "4": {"b": []}}
