# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The split is told by names if they are few, and stands in a file."""

from __future__ import annotations

import json

import pytest
from ignite.engine import Engine, Events

from bundles.common.training.split_record import SplitRecord, record_split


def cases(*names: str) -> list[dict]:
    return [{"image": f"/data/{name}.nii.gz", "label": f"/labels/{name}.nii.gz"} for name in names]


@pytest.fixture
def said(tmp_path, caplog):
    def say(training, validation) -> str:
        caplog.clear()
        with caplog.at_level("INFO"):
            record_split(output_dir=str(tmp_path), training=training, validation=validation)
        (line,) = caplog.messages
        return line.replace(str(tmp_path), "OUT")

    return say


def test_few_validation_cases_are_named(said, tmp_path):
    line = said(cases("a", "b"), cases("c"))
    assert line == "training on 2 cases, validation on 1 case: c (OUT/split.json)"
    assert json.loads((tmp_path / "split.json").read_text()) == {
        "training": {"a": "/data/a.nii.gz", "b": "/data/b.nii.gz"},
        "validation": {"c": "/data/c.nii.gz"},
    }


def test_equal_file_names_are_told_apart_across_the_split(said):
    site = [{"image": f"/data/{number}/ct.nii.gz"} for number in range(3)]
    assert "validation on 2 cases: 1/ct, 2/ct (" in said(site[:1], site[1:])


def test_many_validation_cases_are_counted_and_stand_in_the_file(said, tmp_path):
    held_out = [f"v{number}" for number in range(11)]
    assert said(cases("a"), cases(*held_out)) == "training on 1 case, validation on 11 cases (OUT/split.json)"
    assert list(json.loads((tmp_path / "split.json").read_text())["validation"]) == held_out


def started(folder, *, training, resume=False, refused=False) -> None:
    trainer = Engine(lambda engine, batch: None)
    if refused:
        trainer.add_event_handler(Events.STARTED, lambda engine: 1 / 0)  # as by TrainingCheckpoint
    SplitRecord(output_dir=str(folder), training=training, validation=cases("v"), resume=resume).attach(trainer)
    trainer.run(range(1), max_epochs=1)


def test_a_training_that_is_refused_leaves_the_split_of_the_earlier_run(tmp_path):
    file, earlier = tmp_path / "split.json", tmp_path / "previous_split.json"
    started(tmp_path, training=cases("a"))
    first = file.read_text()
    with pytest.raises(ZeroDivisionError):
        started(tmp_path, training=cases("b"), resume=True, refused=True)
    assert file.read_text() == first and not earlier.exists()
    started(tmp_path, training=cases("a"), resume=True)
    assert file.read_text() == first and not earlier.exists()
    started(tmp_path, training=cases("b"))
    assert earlier.read_text() == first and "/data/b.nii.gz" in file.read_text()


def test_no_validation_is_said(said):
    assert said(cases("a", "b"), []) == "training on 2 cases, no validation (OUT/split.json)"


def test_a_case_of_several_files_is_its_first(said, tmp_path):
    said([{"image": ["/d/a_0000.nii.gz", "/d/a_0001.nii.gz"]}], [])
    assert json.loads((tmp_path / "split.json").read_text())["training"] == {"a_0000": "/d/a_0000.nii.gz"}


def test_only_rank_0_writes(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr("bundles.common.training.split_record.rank", lambda: 1)
    record_split(output_dir=str(tmp_path), training=cases("a"), validation=[])
    assert list(tmp_path.iterdir()) == [] and caplog.messages == []
