# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The report finds a planted gain, and none without one; what is not finished stays empty."""

from __future__ import annotations

import csv
import json
import re

import pytest
from PIL import Image

from bundles.common.errors import InputError
from bundles.common.files import write_text
from evidence.report import main, write_report
from evidence.runs.study_plan import write_study_plan
from evidence.search import search_rows
from tools.bundle_runs import read_plan

from .made_up_study import (
    REPORT,
    finished,
    made_up_scores,
    one_sided,
    plan_of,
    planner,
    rescore,
    whole_plan,
    write_study,
)


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def row_of(rows, **wanted):
    (row,) = [row for row in rows if all(row[key] == str(value) for key, value in wanted.items())]
    return row


def test_a_planted_gain_is_found(tmp_path):
    write_study(tmp_path, whole_plan(), gain=0.05)
    text = write_report(tmp_path)
    for n in (2, 4):
        row = row_of(read(tmp_path / "curve.csv"), n=n, arm="pretrained", label="mean", metric="dice")
        assert float(row["low"]) > 0.03 and float(row["high"]) < 0.07
        assert float(row["low"]) < 0.05 * 39 / 40 < float(row["high"])  # of 40 scores, one is 0 in both arms
        assert int(row["higher"]) == 20 and row["pairs_of_seeds"] == "3"
        assert re.search(rf"n = {n}, pretrained: a gain is shown", text)


def test_every_score_behind_the_tables_is_written(tmp_path):
    plan = whole_plan()
    write_study(tmp_path, plan, gain=0.05)
    write_report(tmp_path)
    written = {(row["run"], row["case"], row["label"]): row for row in read(tmp_path / "scores.csv")}
    expected = {
        (run.name, each["case"], each["label"]): (run.facts, each)
        for run in plan.runs
        if run.kind == "finetuning" and "search" not in run.name
        for each in made_up_scores(run, gain=0.05)
        if each["dice"] is not None
    }
    assert written.keys() == expected.keys()
    for key, (facts, scored) in expected.items():
        row = written[key]
        assert (row["arm"], row["n"], row["seed"]) == (facts["arm"], str(facts["n"]), str(facts["seed"]))
        for metric in ("dice", "nsd", "hd95"):
            value = scored[metric]
            assert row[metric] == "" if value is None else float(row[metric]) == pytest.approx(value, abs=1e-6)


def test_a_planted_null_is_not_found(tmp_path):
    write_study(tmp_path, whole_plan(), gain=0.0)
    assert write_report(tmp_path).count("no difference shown") == 2


def test_a_planted_loss_is_stated_as_plainly(tmp_path):
    write_study(tmp_path, whole_plan(), gain=-0.05)
    assert write_report(tmp_path).count("a loss is shown") == 2


def test_means_are_over_runs_and_patients_and_then_over_labels(tmp_path):
    plan = whole_plan()
    write_study(tmp_path, plan, gain=0.05)
    write_report(tmp_path)
    rows = [
        each
        for run in plan.runs
        if run.kind == "finetuning" and run.facts["arm"] == "scratch" and run.facts["n"] == 4
        for each in made_up_scores(run, gain=0.05)
    ]
    means = []
    for label in ("liver", "left kidney"):
        values = [each["dice"] for each in rows if each["label"] == label and each["dice"] is not None]
        means.append(sum(values) / len(values))
        shown = row_of(read(tmp_path / "curve.csv"), n=4, arm="scratch", label=label, metric="dice")
        assert float(shown["mean"]) == pytest.approx(means[-1], abs=1e-6)
    shown = row_of(read(tmp_path / "curve.csv"), n=4, arm="scratch", label="mean", metric="dice")
    assert float(shown["mean"]) == pytest.approx(sum(means) / 2, abs=1e-6)
    hd95 = row_of(read(tmp_path / "curve.csv"), n=4, arm="scratch", label="mean", metric="hd95")
    assert hd95["missed"] == "3"  # one organ of one patient in three runs


def test_ablation_has_a_row_for_each_subset_with_the_papers_figures_beside(tmp_path):
    paper = [{"tasks": ["inpainting", "contrast"], "dice": 84.45}]
    ablation = {"n": 2, "seeds": [0, 1], "encoder_per_seed": False, "arm": "pretrained", "paper": paper}
    write_study(tmp_path, whole_plan(ablation=ablation), gain=0.05)
    text = write_report(tmp_path)
    lines = [line for line in (tmp_path / "ablation.md").read_text().splitlines() if line.startswith("|")][2:10]
    marks = [tuple(cell.strip() for cell in line.split("|")[1:4]) for line in lines]
    assert marks == [
        *[("", "", ""), ("x", "", ""), ("", "x", ""), ("", "", "x")],
        *[("x", "x", ""), ("x", "", "x"), ("", "x", "x"), ("x", "x", "x")],
    ]
    assert "| 84.45 |" in lines[4] and "84.45" not in lines[5] and lines[4] in text
    rows = read(tmp_path / "ablation.csv")
    for arm in ("inpainting", "contrast-rotation", "pretrained"):
        assert float(row_of(rows, arm=arm, label="mean", metric="dice")["low"]) > 0


def cells_of(text, *start):
    """Cells by heading, of the first row of a Markdown table that begins with these cells."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return dict(zip(rows[0], next(row for row in rows[2:] if row[: len(start)] == list(start)), strict=True))


def test_tables_have_nsd_and_the_paired_difference_of_hd95(tmp_path):
    write_study(tmp_path, whole_plan(), gain=0.05)
    write_report(tmp_path)
    for name, start, arm in (("curve", ("4", "pretrained"), "pretrained"), ("ablation", ("x", "", ""), "inpainting")):
        text = (tmp_path / f"{name}.md").read_text()
        cells, n = cells_of(text, *start), 4 if name == "curve" else 2
        nsd, hd95, dice = (
            row_of(read(tmp_path / f"{name}.csv"), n=n, arm=arm, label="mean", metric=metric)
            for metric in ("nsd", "hd95", "dice")
        )
        assert cells["NSD"].startswith(f"{float(nsd['mean']):.4f} ±")
        ends = [f"{float(hd95[key]):+.1f}" for key in ("difference", "low", "high")]
        assert cells["HD95, minus scratch (mm)"] == f"{ends[0]} [{ends[1]}, {ends[2]}]" and float(ends[2]) < 0
        assert cells["patients better / worse"] == f"{dice['higher']} / {dice['lower']}"
        assert "missed)" in cells["HD95 (mm)"] and "Missed: scores that HD95 lacks" in text


def test_unfinished_runs_leave_their_places_empty(tmp_path):
    plan = whole_plan()
    left = tuple(run.name for run in plan.runs if run.facts.get("n") == 4 and run.facts["arm"] == "pretrained")
    write_study(tmp_path, plan, gain=0.05, unfinished=left)
    text = write_report(tmp_path)
    row = row_of(read(tmp_path / "curve.csv"), n=4, arm="pretrained", label="mean", metric="dice")
    assert (row["mean"], row["difference"], row["low"], row["seeds"]) == ("", "", "", "0")
    assert "n = 4, pretrained: not measured yet" in text


def test_the_difference_is_of_the_seeds_that_both_arms_have_finished(tmp_path):
    write_study(
        tmp_path, whole_plan(), gain=0.05, unfinished=("finetune_scratch_n4_seed2", "finetune_pretrained_n4_seed0")
    )
    write_report(tmp_path)
    row = row_of(read(tmp_path / "curve.csv"), n=4, arm="pretrained", label="mean", metric="dice")
    assert row["seeds"] == "2" and row["pairs_of_seeds"] == "1"


def test_a_study_that_has_not_begun_is_all_empty(tmp_path):
    plan = whole_plan()
    write_study(tmp_path, plan, gain=0.0, unfinished=tuple(run.name for run in plan.runs))
    assert "not measured yet" in write_report(tmp_path)


def test_the_same_runs_give_the_same_files(tmp_path):
    plan = whole_plan()
    for name in ("one", "two"):
        write_study(tmp_path / name, plan, gain=0.05)
        write_report(tmp_path / name)
    for name in REPORT:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    for name in ("curve.png", "ablation.png"):
        assert Image.open(tmp_path / "one" / name).width > 1000


def test_a_folder_without_a_study_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path / "empty")])
    assert "contains no study" in capsys.readouterr().err


def test_scores_of_other_cases_are_refused(tmp_path):
    plan = whole_plan()
    write_study(tmp_path, plan, gain=0.0)
    path = tmp_path / "runs/finetune_scratch_n2_seed0/done.json"
    path.write_text(path.read_text().replace("val_03", "somebody_else"))
    with pytest.raises(InputError, match="finetune_scratch_n2_seed0.*somebody_else"):
        write_report(tmp_path)


def plan_with(absent, **changes):
    made = planner(**changes)
    made.absent = absent
    return plan_of(made, ["curve", "ablation"])


@pytest.mark.parametrize("absent", [{}, {"val_03": ["left kidney"]}])
def test_the_difference_is_that_of_the_means_where_one_arm_predicts_what_a_case_does_not_have(tmp_path, absent):
    plan = plan_with(absent)
    write_study(tmp_path, plan, gain=0.05)
    one_sided(tmp_path, plan)
    write_report(tmp_path)
    for label in ("mean", "left kidney"):
        scratch, pretrained = (
            row_of(read(tmp_path / "curve.csv"), n=2, arm=arm, label=label, metric="dice")
            for arm in ("scratch", "pretrained")
        )
        gap = float(pretrained["mean"]) - float(scratch["mean"])
        equal = float(pretrained["difference"]) == pytest.approx(gap, abs=2e-6)
        assert equal == bool(absent)  # otherwise the means are of different patients
    if absent:
        rows = [
            row_of(read(tmp_path / "curve.csv"), n=2, arm=arm, label="left kidney", metric="dice")
            for arm in plan.study.arms
        ]
        assert [row["patients"] for row in rows] == ["19", "19"]


def test_an_outline_of_an_earlier_version_leaves_nothing_out(tmp_path):
    plan = whole_plan()
    write_study(tmp_path, plan, gain=0.05)
    before = write_report(tmp_path)
    outline = {key: value for key, value in plan.outline.items() if key != "absent"}
    (tmp_path / "outline.json").write_text(json.dumps(outline))
    assert write_report(tmp_path) == before


def test_each_seed_is_stated_and_few_seeds_are_doubted(tmp_path):
    plan = whole_plan()
    write_study(tmp_path, plan, gain=0.05)
    lines = write_report(tmp_path).splitlines()
    (line,) = [line for line in lines if line.startswith("- n = 2, pretrained:")]
    difference = row_of(read(tmp_path / "curve.csv"), n=2, arm="pretrained", label="mean", metric="dice")["difference"]
    seeds = [float(each) for each in re.findall(r"seed \d ([+-][0-9.]+\d)", line)]
    assert len(seeds) == 3 and sum(seeds) / 3 == pytest.approx(float(difference), abs=1e-4)
    assert "only 3 seeds: the interval is too narrow if seeds differ" in line
    assert "one pre-training" not in line
    (line,) = [line for line in lines if line.startswith("- inpainting, rotation:")]  # of the ablation
    assert re.search(r"seed 0 \S+, seed 1 \S+; only 2 seeds: .*; one pre-training for all seeds", line)


def test_one_pretraining_for_all_seeds_is_doubted_and_five_seeds_are_not(tmp_path):
    curve = {"n": [2], "seeds": [0, 1, 2, 3, 4], "encoder_per_seed": False}
    plan = plan_of(planner(curve=curve, ablation=None), ["curve"])
    write_study(tmp_path, plan, gain=0.05)
    text = write_report(tmp_path)
    assert "the interval does not cover differences between pre-trainings" in text
    assert not re.search(r"only \d seeds", text)


def planned(made, out):
    """The content of plan.json."""
    write_study_plan(made, out)
    return read_plan(out)


def test_a_search_leaves_out_the_same_scores(tmp_path):
    made = planner()
    made.absent = {"tune_01": ["left kidney"], "tune_02": ["liver", "left kidney"]}
    plan = plan_of(made, ["search"])
    recipe = {"learning_rate": 0.01, "warmup_steps": 1}
    for run in plan.runs:
        done = finished(run)
        for row in done.get("scores", []):
            gone = row["label"] in made.absent.get(row["case"], [])
            row |= {"dice": 0.0 if gone else 0.4 if row["label"] == "liver" else 0.8}
        write_text(tmp_path / "runs" / run.name / "done.json", json.dumps(done))
    row = next(
        row
        for row in search_rows(planned(made, tmp_path), plan.outline, tmp_path)
        if row["recipe"] == "learning_rate 0.01, warmup_steps 1"
    )
    assert recipe == made.recipes("scratch")[0] and row["arm"] == "scratch"
    assert row["dice"] == pytest.approx((0.4 + 0.8) / 2)
    assert row["sd_patients"] == pytest.approx(abs(0.6 - 0.4) / 2**0.5)  # two patients; the third has no organ


SMALL = {"ablation": None, "curve": {"n": [2], "seeds": [0, 1, 2]}}


def rescored(tmp_path, gain, **changes):
    """The report of a study in which `gain(run, case, label)` is what pre-training adds to a Dice of 0.4."""
    plan = plan_of(planner(**SMALL, **changes), ["curve"])
    write_study(tmp_path, plan, gain=0.0)
    rescore(tmp_path, plan, lambda run, *at: 0.4 + (gain(run, *at) if run.facts["encoder"] else 0.0))
    return write_report(tmp_path), read(tmp_path / "curve.csv")


def by_label(run, case, label):
    """The liver gains 0.1 and the left kidney loses 0.2, a little more or less for each seed."""
    return (0.1 if label == "liver" else -0.2) + 0.002 * (run.facts["seed"] - 1)


def test_the_first_figure_leads_and_the_other_labels_are_apart(tmp_path):
    text, rows = rescored(tmp_path, by_label, first_figure=["liver"])
    wanted = {"n": 2, "arm": "pretrained", "metric": "dice"}
    found = {row["label"]: float(row["difference"]) for row in rows if wanted.items() <= {**row, "n": 2}.items()}
    assert found == pytest.approx({"first figure": 0.1, "mean": -0.05, "liver": 0.1, "left kidney": -0.2})
    assert "First figure: the mean over liver, as the study says." in text
    cells = cells_of(text[text.index("| n | arm | runs") :], "2", "pretrained")
    assert cells["Dice"].startswith("0.5000") and cells["Dice, minus scratch"].startswith("+0.1000")
    assert "- n = 2, pretrained: a gain is shown (+0.1000" in text
    together = cells_of(text[text.index("All 2 labels together:") :], "2", "pretrained")
    assert together["minus scratch"].startswith("-0.0500") and together["Dice"].startswith("0.3500")
    assert "apart from the first figure: left kidney:" in text and "| n | arm | liver | left kidney |" in text


def test_labels_that_are_lower_are_named_with_both_intervals(tmp_path):
    text, _ = rescored(tmp_path, by_label)
    (line,) = [line for line in text.splitlines() if "is lower" in line]
    assert line.startswith("| 2 | pretrained | left kidney is lower, -0.2000 [") and "liver" not in line
    reach = 4.302653 * 0.002 / 3**0.5
    assert f"t interval [{-0.2 - reach:+.4f}, {-0.2 + reach:+.4f}]" in line and "not by the t" not in line


def test_a_label_that_only_the_bootstrap_calls_lower_is_marked(tmp_path):
    gains = {0: -0.01, 1: -0.02, 2: -0.12}
    text, _ = rescored(tmp_path, lambda run, *_: gains[run.facts["seed"]])
    assert text.count("(not by the t interval)") == 2  # both labels


def test_no_lower_label_is_said_as_well(tmp_path):
    text, _ = rescored(tmp_path, lambda run, case, label: 0.02 if label == "liver" else 0.01)
    assert "no interval is below 0; the lowest difference is left kidney, +0.0100" in text


def test_t_intervals_stand_beside_those_of_the_bootstrap(tmp_path):
    gains = {0: 0.02, 1: 0.05, 2: 0.11}
    text, rows = rescored(tmp_path, lambda run, *_: gains[run.facts["seed"]])
    row = row_of(rows, n=2, arm="pretrained", label="mean", metric="dice")
    reach = 4.302653 * 0.0458258 / 3**0.5
    assert float(row["t_low"]) == pytest.approx(0.06 - reach, abs=1e-5)
    assert float(row["t_high"]) == pytest.approx(0.06 + reach, abs=1e-5)
    assert float(row["low"]) > 0 > float(row["t_low"])
    assert f"[{0.06 - reach:+.4f}, {0.06 + reach:+.4f}]" in text
    assert "a hint of a gain, not shown" in text and "the t interval over seeds contains 0" in text


def test_a_search_is_decided_by_the_first_figure(tmp_path):
    made = planner(first_figure=["liver"])
    plan = plan_of(made, ["search"])
    for run in plan.runs:
        done = finished(run)
        better = run.facts.get("recipe", {}).get("learning_rate") == 0.02
        for row in done.get("scores", []):
            row["dice"] = (0.6 if better else 0.5) if row["label"] == "liver" else (0.1 if better else 0.9)
        write_text(tmp_path / "runs" / run.name / "done.json", json.dumps(done))
    best = [row for row in search_rows(planned(made, tmp_path), plan.outline, tmp_path) if row["best"]]
    assert len(best) == 2 and all(row["recipe"].startswith("learning_rate 0.02") for row in best)
    assert [row["dice"] for row in best] == pytest.approx([0.6, 0.6])


def test_arms_that_share_a_pretraining_share_its_line(tmp_path):
    arms = {
        "scratch": {"pretraining": None},
        "one": {"pretraining": {}},
        "two": {"pretraining": {}, "finetuning": {"drop_path": 0.1}},
    }
    plan = plan_of(planner(arms=arms, search=None, **SMALL), ["curve"])
    write_study(tmp_path, plan, gain=0.0)
    assert "| one, two, seed 1 | 100 | 12.3 |" in write_report(tmp_path)
