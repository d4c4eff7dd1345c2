# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A misspelt option of the command line is refused; everything that MONAI accepts passes."""

from __future__ import annotations

import json

import pytest

from bundles.common.errors import InputError
from bundles.common.run.command_line import check_command_line

MAIN = "/somewhere/site-packages/monai/bundle/__main__.py"


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text("max_steps: 5\nlearning_rate: 0.1\noutput_dir: out\ntrain:\n  trainer: {amp: false}\nrun: []\n")
    return str(path)


def check(config, *words):
    return check_command_line([MAIN, "run", "--config_file", config, *words])


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--max_steps", "10"),
        ("--max_steps=10",),
        ("--max-steps", "10"),
        ("--learning_rate", "-1"),
        ("--train#trainer#amp", "True"),
        ("--train::trainer::amp=True",),
        ("--meta_file", "metadata.json", "--logging_file", "logging.conf"),
        ("--run_id", "run", "--init_id", "start", "--final_id", "end"),
        ("--tracking", "mlflow", "--tracking_uri", "sqlite:///x.db", "--experiment_name", "a", "--run_name", "b"),
        ("--_private", "1"),
    ],
)
def test_options_that_monai_takes_pass(config, words):
    check(config, *words)


@pytest.mark.parametrize(
    ("words", "option", "near"),
    [
        (("--max_step", "10"), "--max_step ", "--max_steps"),
        (("--max-stesp=10",), "--max_stesp ", "--max_steps"),
        (("--learningrate", "1"), "--learningrate ", "--learning_rate"),
        (("--trian#trainer#amp", "True"), "--trian#trainer#amp ", "--train"),
        (("--max_steps", "3", "--outputdir", "x"), "--outputdir ", "--output_dir"),
    ],
)
def test_a_typo_is_refused_with_the_nearest_option_and_the_file(config, words, option, near):
    with pytest.raises(InputError) as caught:
        check(config, *words)
    said = str(caught.value)
    assert said.startswith(f"{option}is not an option of {config}.")
    assert f"Did you mean {near}" in said


def test_a_word_like_no_option_is_refused_without_a_guess(config):
    with pytest.raises(InputError, match="--zzzz is not an option of .*train.yaml") as caught:
        check(config, "--zzzz", "1")
    assert "Did you mean" not in str(caught.value)


def test_tracking_options_need_tracking(config):
    with pytest.raises(InputError, match="--tracking_uri"):
        check(config, "--tracking_uri", "sqlite:///x.db")


def test_options_of_any_file_of_a_list_pass(config, tmp_path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("distributed: true\n+train: {sampler: {}}\n")
    files = str([config, str(overlay)])
    check(files, "--distributed", "False", "--max_steps", "1")
    check(f"['{config}']", "--max_steps", "1")
    with pytest.raises(InputError, match="overlay.yaml"):
        check(files, "--distribute", "False")


def test_an_args_file_is_read_and_checked(config, tmp_path):
    file = tmp_path / "args.json"
    file.write_text(json.dumps({"config_file": config, "max_steps": 3}))
    check_command_line([MAIN, "run", "--args_file", str(file), "--learning_rate", "1"])
    with pytest.raises(InputError, match="--max_step is not an option"):
        check_command_line([MAIN, "run", "--args_file", str(file), "--max_step", "1"])
    file.write_text(json.dumps({"config_file": config, "max_step": 3}))
    with pytest.raises(InputError, match="--max_step is not an option"):
        check_command_line([MAIN, "run", "--args_file", str(file)])


@pytest.mark.parametrize(
    "argv",
    [
        ["/usr/bin/monailabel", "run", "--config_file", "CONFIG", "--max_step", "1"],
        [MAIN, "ckpt_export", "--config_file", "CONFIG", "--max_step", "1"],
        ["-c"],
        [MAIN],
        [MAIN, "run"],
    ],
)
def test_other_processes_are_left_alone(config, argv):
    check_command_line([config if word == "CONFIG" else word for word in argv])


def test_the_command_line_of_the_process_is_the_default(config, monkeypatch):
    monkeypatch.setattr("sys.argv", [MAIN, "run", "--config_file", config, "--max_step", "1"])
    with pytest.raises(InputError, match="--max_steps"):
        check_command_line()


def test_words_of_yaml_mean_what_they_mean_there(config, tmp_path):
    assert check(config, "--max_steps", "null") == {"max_steps": None}
    assert check(config, "--max_steps", "None", "--tracking", "None") == {"max_steps": None}
    assert check(config, "--max_steps=false") == {"max_steps": False}
    assert check(config, "--max_steps", "true") == {"max_steps": True}
    assert (
        check(config, "--max_steps", "True") == check(config, "--max_steps", "$None") == {}
    )  # fire and MONAI know these
    file = tmp_path / "args.json"
    file.write_text(json.dumps({"config_file": config, "max_steps": None}))
    assert check_command_line([MAIN, "run", "--args_file", str(file)]) == {"max_steps": None}


@pytest.mark.parametrize(("word", "better"), [("true", "True"), ("false", "False"), ("null", "'[$]None'")])
def test_a_nested_entry_wants_them_as_python_writes_them(config, word, better):
    with pytest.raises(
        InputError, match=f"--train#trainer#amp {word} would not reach .* Write --train#trainer#amp {better}"
    ):
        check(config, "--train#trainer#amp", word)


@pytest.fixture
def governed(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text(
        "batch_size: 2\nlearning_rate: 0.1\ndrop_path: 0.0\ncomponents: the options end here\n"
        "optimizer: {lr: '@learning_rate', fused: true}\nnetwork_def: {_target_: Net}\n"
        "train:\n  dataloader: {batch_size: '$@batch_size * 2', num_workers: 1}\n  parts: ['@batch_size', 3]\nrun: []\n"
    )
    return str(path)


@pytest.mark.parametrize(
    ("option", "better"),
    [
        ("--optimizer#lr", "--learning_rate"),
        ("--optimizer::lr", "--learning_rate"),
        ("--train#dataloader#batch_size", "--batch_size"),
        ("--train#parts#0", "--batch_size"),
        ("--network_def#drop_path", "--drop_path"),  # not there yet, but the option has this name
    ],
)
def test_a_nested_entry_that_an_option_governs_is_refused_with_the_option(governed, option, better):
    with pytest.raises(InputError, match=f"{option} would replace what {better} sets.*pass {better} instead"):
        check(governed, option, "1")


@pytest.mark.parametrize("option", ["--optimizer#fused", "--train#dataloader#num_workers", "--train#parts#1"])
def test_other_nested_entries_pass(governed, option):
    assert check(governed, option, "1") == {}
