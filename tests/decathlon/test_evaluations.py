# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Task and arm of an evaluation are read from its summary; evaluations that do not fit into one table are refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from bundles.common.errors import InputError
from bundles.decathlon.evaluations import check_together, doubts_of, find_evaluations, read_evaluation


def write_evaluation(folder: Path, *, cases=("c0", "c1"), fold=0, start="encoder", tolerance=3.0, **facts) -> str:
    """Write the files of an evaluation of Task09_Spleen."""
    folder.mkdir(parents=True)
    with open(folder / "scores.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows(
            [["case", "label", "dice", "nsd", "hd95"], *([case, "spleen", 0.5, 0.6, ""] for case in cases)]
        )
    model = {"file": f"{folder}.pt", "start": start, "start_file": None, "held_out": facts.pop("held_out", True)}
    evaluated = {"task": "Task09_Spleen", "section": "validation", "split": {"fold": fold}, "models": [model], **facts}
    summary = {"tolerance": {"spleen": tolerance}, "cases": list(cases), "evaluated": evaluated}
    (folder / "summary.json").write_text(json.dumps(summary))
    return str(folder)


def test_folders_patterns_and_lists_of_them_give_each_evaluation_once(tmp_path):
    a, b = write_evaluation(tmp_path / "runs" / "a" / "scores"), write_evaluation(tmp_path / "runs" / "b" / "scores")
    assert find_evaluations(a) == [a]
    assert find_evaluations(str(tmp_path / "runs")) == [a, b]
    assert find_evaluations(str(tmp_path / "runs" / "*" / "scores")) == [a, b]
    assert find_evaluations([b, str(tmp_path / "*"), a]) == [b, a]
    with pytest.raises(InputError, match="runs/c.*run configs/evaluate.yaml first"):
        find_evaluations([a, str(tmp_path / "runs" / "c*")])


def test_task_arm_and_scores_are_read(tmp_path):
    one = read_evaluation(write_evaluation(tmp_path / "x", start="scratch"))
    assert (one.task, one.arm) == ("Task09_Spleen", "scratch")
    assert [(row["case"], row["label"], row["dice"], row["nsd"]) for row in one.rows] == [
        ("c0", "spleen", 0.5, 0.6),
        ("c1", "spleen", 0.5, 0.6),
    ]
    assert one.rows[0]["hd95"] != one.rows[0]["hd95"]  # NaN


@pytest.mark.parametrize("start", ["model", None])
def test_an_arm_that_the_model_does_not_tell_must_be_said(tmp_path, start):
    folder = write_evaluation(tmp_path / "x", start=start)
    with pytest.raises(InputError, match=r"x\.pt started from.*--arms \"\{'.*x': 'pretrained'\}\""):
        read_evaluation(folder)
    assert read_evaluation(folder, arm="scratch").arm == "scratch"
    with pytest.raises(InputError, match="'zero' is not one of pretrained, scratch"):
        read_evaluation(folder, arm="zero")


def test_an_arm_that_contradicts_the_model_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"is scratch, but its model contradicts that: .*x\.pt started from encoder"):
        read_evaluation(write_evaluation(tmp_path / "x"), arm="scratch")


def test_an_ensemble_of_both_arms_is_refused(tmp_path):
    models = [
        {"file": f"{start}.pt", "start": start, "start_file": None, "held_out": True}
        for start in ("encoder", "scratch")
    ]
    with pytest.raises(InputError, match="ensemble of both arms: encoder.pt started from encoder; scratch.pt"):
        read_evaluation(write_evaluation(tmp_path / "x", models=models))


def test_a_summary_that_does_not_say_its_task_is_refused_with_the_way_out(tmp_path):
    folder = write_evaluation(tmp_path / "x")
    summary = json.loads((tmp_path / "x" / "summary.json").read_text())
    (tmp_path / "x" / "summary.json").write_text(json.dumps(summary | {"evaluated": {}}))
    with pytest.raises(InputError, match="x/summary.json does not record task.*Run configs/evaluate.yaml"):
        read_evaluation(folder)


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("summary.json", "{", "damaged.*JSONDecodeError"),
        ("scores.csv", "case,label\nc0,spleen\n", "damaged.*KeyError: 'dice'"),
        ("scores.csv", "case,label,dice,nsd,hd95\nc7,spleen,1,1,0\n", "from different runs"),
    ],
)
def test_damaged_files_are_named(tmp_path, file, text, words):
    folder = write_evaluation(tmp_path / "x")
    (tmp_path / "x" / file).write_text(text)
    with pytest.raises(InputError, match=f"{folder}.*{words}"):
        read_evaluation(folder)


def test_one_case_twice_in_an_arm_names_both_evaluations(tmp_path):
    folders = [
        write_evaluation(tmp_path / "first"),
        write_evaluation(tmp_path / "again", cases=("c1", "c2"), fold=1),
        write_evaluation(tmp_path / "control", start="scratch"),
    ]
    read = [read_evaluation(folder) for folder in folders]
    check_together([read[0], read[2]])  # the other arm may contain the same cases
    with pytest.raises(
        InputError, match=r"first and .*again both contain the case c1 of Task09_Spleen, pretrained \(fold 0 and 1\)"
    ):
        check_together(read)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tolerance": 2.0}, "NSD tolerances: {'spleen': 3.0} and {'spleen': 2.0}"),
        ({"section": "all"}, "section: validation and all"),
    ],
)
def test_evaluations_of_one_task_that_were_scored_otherwise_are_refused(tmp_path, change, words):
    a = read_evaluation(write_evaluation(tmp_path / "a"))
    b = read_evaluation(write_evaluation(tmp_path / "b", cases=("d0",), start="scratch", **change))
    with pytest.raises(InputError, match=f"a and .*b are both evaluations of Task09_Spleen, .* different .*{words}"):
        check_together([a, b])


def test_scores_that_may_flatter_are_doubted(tmp_path):
    def doubts(name, **facts):
        return doubts_of(read_evaluation(write_evaluation(tmp_path / name, **facts)))

    assert doubts("held out") == []
    assert doubts("tested", section="test", held_out=False) == []
    (seen,), (open_question,) = doubts("seen", held_out=False), doubts("silent", held_out=None)
    assert "seen.pt held out other cases" in seen and "does not record" in open_question


def test_cases_that_were_not_scored_are_told(tmp_path):
    folder = Path(write_evaluation(tmp_path / "some", section="test"))
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"not_scored": ["/data/c7.nii.gz"]}))
    (doubt,) = doubts_of(read_evaluation(str(folder)))
    assert "1 case was not scored, such as /data/c7.nii.gz" in doubt


def test_a_summary_without_scores_is_named(tmp_path):
    folder = write_evaluation(tmp_path / "x")
    (tmp_path / "x" / "scores.csv").unlink()
    with pytest.raises(InputError, match="damaged.*FileNotFoundError"):
        read_evaluation(folder)
