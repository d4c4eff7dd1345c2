# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A stage runs once, and again when its command, code, inputs or outputs have changed."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest

from bundles.common.errors import InputError
from demo.stage import Records, Stage, code_hash


@pytest.fixture
def records(tmp_path):
    (tmp_path / "out").mkdir()
    return Records(tmp_path / "out")


@pytest.fixture
def code(tmp_path):
    folder = tmp_path / "bundle"
    (folder / "scripts").mkdir(parents=True)
    (folder / "scripts/network.py").write_text("depth = 2\n")
    return folder


@pytest.fixture
def first(code):
    return Stage(name="first", title="First", command=["-m", "first"], outputs=["a/*.txt"], code=[code], folder="a")


@pytest.fixture
def second():
    return Stage(name="second", title="Second", command=["-m", "second"], outputs=["b.txt"], needs=["first"])


def finish(records, stage, seconds=1.0, **files):
    attempt = records.begin(stage)
    for name, text in (files or {"one": "1"}).items():
        path = records.out / stage.outputs[0].replace("*", name)
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    records.finish(attempt, seconds)
    return attempt


def test_finished_stage_is_done(records, first):
    assert not records.is_done(first)
    finish(records, first, seconds=12.34)

    assert records.is_done(first)
    record = json.loads((records.out / ".stages/first.json").read_text())
    assert record["seconds"] == 12.3
    assert record["key"]["command"] == ["-m", "first"]
    assert record["outputs"].keys() == {"a/one.txt"}
    assert record["outputs"]["a/one.txt"][0] == 1
    assert [path.name for path in records.folder.iterdir()] == ["first.json"]


def test_begun_stage_is_not_done(records, first):
    finish(records, first)
    records.begin(first)
    assert not records.is_done(first)


def test_changed_command_makes_it_stale(records, first):
    finish(records, first)
    assert not records.is_done(replace(first, command=["-m", "first", "--max_steps", "5"]))


@pytest.mark.parametrize("name", ["scripts/network.py", "scripts/new.py", "presets.yaml"])
def test_changed_code_makes_it_stale(records, first, code, name):
    finish(records, first)
    (code / name).write_text("depth = 3\n")
    assert not records.is_done(first)


def test_files_that_are_no_code_do_not_matter(records, first, code):
    finish(records, first)
    for name in ("models/model.pt", "scripts/__pycache__/network.cpython-311.pyc", "docs/a.md", "README.md"):
        (code / name).parent.mkdir(parents=True, exist_ok=True)
        (code / name).write_text("x")
    assert records.is_done(first)


@pytest.mark.parametrize("change", ["remove", "edit", "touch"])
def test_changed_output_makes_it_stale(records, first, change):
    finish(records, first, one="1", two="2")
    path = records.out / "a/two.txt"
    if change == "remove":
        path.unlink()
    elif change == "edit":
        path.write_text("22")
    else:
        os.utime(path, ns=(0, 0))
    assert not records.is_done(first)


def test_new_files_of_the_stage_before_make_it_stale(records, first, second):
    finish(records, first)
    finish(records, second)
    assert records.is_done(second)
    finish(records, first, one="other")
    assert records.is_done(first) and not records.is_done(second)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": 1}'])
def test_damaged_record_counts_as_none(records, first, content):
    finish(records, first)
    (records.folder / "first.json").write_text(content)
    assert not records.is_done(first)


def test_interrupted_stage_resumes_with_its_resume_words(records, first):
    stage = replace(first, resume=["--resume", "true"])
    attempt = records.begin(stage)
    assert attempt.words == ["-m", "first"]
    (records.out / "a").mkdir()
    (records.out / "a/last.pt").touch()
    records.note(attempt, 40.0)

    again = records.begin(stage)
    assert again.resumed and again.words == ["-m", "first", "--resume", "true"]
    assert (records.out / "a/last.pt").exists()
    records.note(again, 2.0)
    (records.out / "a/one.txt").touch()
    records.finish(again, 5.0)
    record = json.loads((records.folder / "first.json").read_text())
    assert record["seconds"] == 45.0
    assert record["key"]["command"] == ["-m", "first"]
    assert records.is_done(stage)


def test_interrupted_stage_of_another_command_starts_anew(records, first):
    stage = replace(first, resume=["--resume", "true"])
    records.note(records.begin(stage), 40.0)
    (records.out / "a").mkdir()
    (records.out / "a/last.pt").touch()

    again = records.begin(replace(stage, command=["-m", "first", "--seed", "1"]))
    assert not again.resumed and again.spent == 0
    assert not (records.out / "a").exists()


def test_stage_that_cannot_go_on_starts_anew(records, first):
    records.begin(first)
    (records.out / "a").mkdir()
    (records.out / "a/half.txt").touch()
    attempt = records.begin(first)
    assert attempt.words == ["-m", "first"]
    assert not (records.out / "a").exists()


def test_stage_without_a_folder_keeps_what_is_there(records, first):
    stage = replace(first, folder=None)
    (records.out / "a").mkdir()
    (records.out / "a/kept.txt").touch()
    records.begin(stage)
    assert (records.out / "a/kept.txt").exists()


def test_change_while_it_runs_makes_it_stale(records, first, code):
    attempt = records.begin(first)
    (records.out / "a").mkdir()
    (records.out / "a/one.txt").touch()
    (code / "scripts/network.py").write_text("depth = 4\n")
    records.finish(attempt, 1.0)
    assert not records.is_done(first)


def test_missing_output_is_an_error(records, first):
    attempt = records.begin(replace(first, outputs=["a/*.txt", "a/model.pt"]))
    (records.out / "a").mkdir()
    (records.out / "a/one.txt").touch()
    with pytest.raises(InputError, match=r"first ended without an error but did not write a/model\.pt"):
        records.finish(attempt, 1.0)
    assert not (records.folder / "first.json").exists()


def test_hidden_files_are_no_output(records, first):
    (records.out / "a").mkdir()
    (records.out / "a/.half.txt").touch()
    assert records.outputs(first) is None


def test_code_hash_sees_names_and_contents(tmp_path):
    one, other = tmp_path / "one/bundle", tmp_path / "other/bundle"
    for folder in (one, other):
        folder.mkdir(parents=True)
        (folder / "a.py").write_text("1")
    assert code_hash([one]) == code_hash([other])  # wherever the repository is
    (other / "a.py").rename(other / "b.py")
    assert code_hash([one]) != code_hash([other])
