# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Options are checked by one table, and what identifies a run is derived from the config."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from monai.bundle import ConfigParser

from bundles.common.errors import InputError
from bundles.common.run.options import RunSettings, check_option, option_names, plain_lists

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
        ("depths", None),
        ("num_heads", [3, 6, 12, 24]),
        ("mask_block", [0.05, 0.25]),
        ("task_weights", {"contrast": 0.5}),
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
        ("overlap", [], r"--overlap \[\] must be a share"),
        ("overlap", [0.5, 0.5], r"--overlap \[0.5, 0.5\] must be a share .* one for each axis"),
        ("warmup_steps", 0.5, "--warmup_steps 0.5 must be a whole number, 0 or more"),
        ("zoom", 1, "--zoom 1 must be a number, 0 or above and below 1"),
        ("max_gradient_norm", 0, "--max_gradient_norm 0 must be a number above 0"),
        ("depths", 2, "--depths 2 must be four whole numbers"),
        ("num_heads", [3, 6, 12], r"--num_heads \[3, 6, 12\] must be four whole numbers"),
        ("mask_ratio", ["a", "b"], r"--mask_ratio \['a', 'b'\] must be \[low, high\]"),
        ("task_weights", 2, "--task_weights 2 must be a number for each task"),
        ("check_data", "ful", "--check_data 'ful' is not one of full, headers, none"),
        ("num_workers", 10**9, "--num_workers 1000000000 must be a whole number, 0 or more, at most 256"),
        ("max_skipped_steps", None, "--max_skipped_steps None must be a whole number, 1 or more"),
        ("real_repeats", 10**12, "--real_repeats 1000000000000 must be a whole number, 1 or more, at most 1000"),
        ("accumulation_steps", 0, "--accumulation_steps 0 must be a whole number, 1 or more"),
        ("deterministic", "yes", "--deterministic 'yes' must be true or false"),
    ],
)
def test_bad_values_are_named(name, value, words):
    with pytest.raises(InputError, match=words):
        check_option(name, value)


@pytest.mark.parametrize("name", ["spacing", "hu_window", "max_gradient_norm", "seed"])
def test_null_is_refused_where_it_has_no_meaning(name):
    check_option(name, None)
    with pytest.raises(InputError, match=f"--{name} None must be") as refused:
        check_option(name, None, not_null=True)
    assert "or null" not in str(refused.value)


def config(tmp_path, *, added: dict | None = None, **changed):
    """A small config with options, a training and a validation; ``added`` are entries that no file of the bundle has."""
    (tmp_path / "configs").mkdir(parents=True)
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
    (tmp_path / "configs/train.yaml").write_text("".join(f"{name}: 0\n" for name in content))
    parser = ConfigParser(content | (added or {}))
    parser.parse()
    return parser


def refusal(parser) -> str:
    with pytest.raises(RuntimeError) as caught:
        parser.get_parsed_content("check")
    error = caught.value
    while error.__cause__ is not None:
        error = error.__cause__
    assert isinstance(error, InputError)
    return str(error)


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
        ({"early_stopping": 0}, "--early_stopping 0 must be a whole number, 1 or more, or null for no early stopping"),
        ({"spacing": [1, 2]}, "--spacing .* must be three sizes"),
        ({"roi_size": [64, 64, 33]}, "roi_size .* divisible by 32"),
    ],
)
def test_all_options_are_checked_those_without_a_rule_by_their_type_in_the_first_preset(tmp_path, changed, words):
    assert re.search(words, refusal(config(tmp_path, **changed)))


@pytest.mark.parametrize(
    ("name", "value", "plain"),
    [
        ("learning_rate", "1e-4", 1e-4),  # YAML takes it for a text
        ("learning_rate", "0.5", 0.5),
        ("num_workers", "2", 2),
        ("sharp", "false", False),
        ("spacing", "[1, 1, 2.5]", [1, 1, 2.5]),
        ("output_dir", 20261128, "20261128"),
        ("output_dir", "~/runs", str(Path.home() / "runs")),
        ("dataset_dir", ["~/a", 7, "b"], [str(Path.home() / "a"), "7", "b"]),
        ("output_dir", "a/b", "a/b"),
        ("output_dir", "$'~' + '/x'", "~/x"),  # an expression says what it says
    ],
)
def test_values_are_brought_into_their_type(tmp_path, name, value, plain):
    parser = config(tmp_path, **{name: value}, used=f"$[@{name}]")
    parser.get_parsed_content("check")
    found = parser.get_parsed_content(name)
    assert found == plain and type(found) is type(plain) and parser.get_parsed_content("used") == [plain]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("output_dir", "", "--output_dir is empty: pass a path, or leave it out"),
        ("pretrained_encoder", " ", "--pretrained_encoder is empty"),
        ("pretrained_model", ["a.pt", ""], "--pretrained_model is empty"),
        ("output_dir", "runs::3", "--output_dir runs::3: MONAI reads # and ::"),
        ("output_dir", 1.5, "--output_dir 1.5 must be a path; quote a name that is a number"),
        ("learning_rate", "1e-4x", "--learning_rate '1e-4x' must be a number above 0"),
        ("sharp", "maybe", "--sharp 'maybe' must be true or false"),
    ],
)
def test_values_that_are_no_path_or_of_no_type_are_refused(tmp_path, name, value, words):
    assert words in refusal(config(tmp_path, **{name: value}))


def test_an_entry_that_nothing_knows_is_refused_wherever_it_comes_from(tmp_path):
    said = refusal(config(tmp_path, added={"learning_rat": 0.2}))
    assert "'learning_rat'" in said and "Did you mean learning_rate?" in said
    assert "refers to" in said


@pytest.mark.parametrize("added", [{"mine": 3, "_note_": 1}, {"run": [], "finalize": []}, {"MY": 1}])
def test_entries_that_something_refers_to_pass(tmp_path, added):
    used = {"train": {"scans": "$[@mine]"}} if "mine" in added else {"train": {"scans": "$['a', @MY]"}}
    config(tmp_path, added=added | (used if "MY" in added or "mine" in added else {})).get_parsed_content("check")


@pytest.mark.parametrize(
    ("name", "good", "bad", "words"),
    [
        ("dataset_dir", ["a", ["a", "b"], 5], [None, {"a": 1}, [], [None]], "must be a path, or a list of paths"),
        ("output_dir", ["a"], [None, ["a"], True], "must be a path"),
        ("data_list", ["a.json", None], [["a"], {"a": 1}], "must be a path, or null for dataset.json"),
        ("preset", ["cpu", None], [["cpu"], {"a": 1}, 3], "must be text"),
        ("tasks", [["a"], "a", "$['a']"], [None, 5, [1]], "must be a list of names"),
        ("labels", [{"0": "background"}, "@row"], [None, [], {}, 5], "must map values to names"),
        ("mirror_axes", [[], [0, 2]], [5, {"a": 1}, [3]], "must be a list of axes"),
        ("betas", [[0.9, 0.999]], [None, 5, [0.9], [0.9, 1]], "must be two numbers"),
    ],
)
def test_values_that_are_written_out_have_the_form_of_their_option(tmp_path, name, good, bad, words):
    for number, value in enumerate([*good, *bad]):
        parser = config(tmp_path / str(number), used=f"$[@{name}]", **{name: value})
        if number < len(good):
            parser.get_parsed_content("check")
        else:
            assert f"--{name} {value!r} {words}" in refusal(parser)


def test_several_files_are_refused_for_the_options_that_take_one(tmp_path):
    check = {"_target_": f"{OPTIONS}.check_options", "one_file": ["pretrained_model"]}
    said = refusal(config(tmp_path, pretrained_model=["a.pt", "b.pt"], added={"check": check}))
    assert "--pretrained_model ['a.pt', 'b.pt'] must be a path" in said
    config(tmp_path / "1", pretrained_model="a.pt", added={"check": check}).get_parsed_content("check")


def test_null_is_refused_for_the_options_that_a_config_names(tmp_path):
    check = {"_target_": f"{OPTIONS}.check_options", "not_null": ["spacing"]}
    assert "--spacing None must be three sizes" in refusal(
        config(tmp_path, spacing=None, added={"check": check, "grid": 2.0})
    )


@pytest.mark.parametrize("value", [["depth", "rates"], "rates"])
def test_changes_that_name_no_setting_are_refused_before_the_scans_are_read(tmp_path, value):
    said = refusal(config(tmp_path, resume_changes=value, output_dir="a"))
    assert said == (
        "--resume_changes names rates; the settings of this run are depth, dropout, grid, learning_rate, overlap, "
        "processes, scans, select_by, sharp, size, spacing, turn."
    )
    for number, good in enumerate((["depth", "scans", "processes"], "depth", [])):
        config(tmp_path / str(number), resume_changes=good).get_parsed_content("check")


def test_good_options_pass(tmp_path):
    config(tmp_path).get_parsed_content("check")


def test_options_end_at_the_entry_components():
    assert option_names({"imports": [], "a": 1, "b": 2, "components": "", "c": 3}) == ["a", "b"]
    with pytest.raises(ValueError, match="no entry 'components'"):
        option_names({"a": 1})


def test_values_are_as_they_come_back_from_a_file():
    assert plain_lists({"a": (1, [2, (3,)]), 4: {"b": ()}}) == {"a": [1, [2, [3]]], "4": {"b": []}}
