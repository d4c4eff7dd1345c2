# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The report shows what the pre-trainings learned, and names the proxy tasks that they did not learn."""

from __future__ import annotations

import json
import math

from bundles.common.files import write_text
from bundles.common.weights.checkpoint_file import save_atomically
from evidence.report import write_report
from evidence.results.encoder_figures import doubts_of, figures_of
from evidence.results.records import read_figures

from ..made_up_study import encoder_file, finished, made_up_figures, planner, whole_plan, write_study

# Written by a pre-training whose embeddings had collapsed.
COLLAPSED = {
    "views": 64,
    "loss": 3.454139530658722,
    "loss_inpainting": 0.10519972816109657,
    "loss_contrast": 1.9459099024534225,
    "loss_rotation": 1.4030299633741379,
    "rotation_accuracy": 0.125,
    "contrast_top1": 0.25,
    "masked_psnr": 11.915464225808305,
    "contrast_without_learning": math.log(7),
}


def pretraining(**options):
    """The settings of a pre-training of the made-up study."""
    made = planner(pretraining={"max_steps": 100, **options})
    return next(run for run in made.curve() if run.kind == "pretraining")


def test_figures_are_those_of_the_last_validation_and_its_steps(tmp_path):
    verdicts = {"verdicts": {"rotation": {"learnt": False, "because": "of chance"}}}  # no figure: MLflow takes numbers
    write_text(tmp_path / "train/validation.json", json.dumps({**COLLAPSED, **verdicts}))
    assert figures_of(tmp_path, pretraining().settings) == {**COLLAPSED, "steps": 100}
    assert figures_of(tmp_path / "empty", pretraining().settings) == {}


def test_figures_name_the_step_of_the_weights_that_are_kept(tmp_path, record):
    write_text(tmp_path / "train/validation.json", json.dumps(COLLAPSED))
    save_atomically(encoder_file(record, steps=50), tmp_path / "train/models/encoder.pt")
    assert figures_of(tmp_path, pretraining().settings) == {**COLLAPSED, "steps": 100, "steps_kept": 50}


def test_tasks_that_were_not_learned_are_named():
    rotation, contrast = doubts_of(COLLAPSED)
    assert rotation.startswith("rotation was not learnt: 12% of 64 angles are right, 25% by chance")
    assert contrast == "contrast was not learnt: the loss is 1.95, that of equal embeddings 1.95"
    assert doubts_of(made_up_figures(["contrast", "rotation"], seed=0)) == []
    assert doubts_of({"position_mm": 80.0, "position_mm_of_a_constant": 85.0}) == [
        "position was not learnt: the error is 80 mm, that of a constant 85 mm"
    ]
    assert doubts_of({}) == []


def test_the_report_shows_the_encoders_of_each_part(tmp_path):
    plan = whole_plan()
    write_study(tmp_path, plan, gain=0.0)
    bad = "pretrain_pretrained_seed2"
    done = json.loads((tmp_path / "runs" / bad / "done.json").read_text())
    done["figures"] |= {**COLLAPSED, "steps_kept": 50}
    write_text(tmp_path / "runs" / bad / "done.json", json.dumps(done))
    write_report(tmp_path)
    curve, ablation = ((tmp_path / f"{part}.md").read_text() for part in ("curve", "ablation"))
    assert "| pretrained, seed 1 | 100 | 12.3 | 1.3429 | 0.600 | 0.500 |  |" in curve
    assert "| pretrained, seed 2 | 100 (weights of 50) | 11.9 | 1.9459 | 0.250 | 0.125 |  |" in curve
    assert "contrast loss 1.9459 (ln of the number of other views in a batch), rotation accuracy 0.25" in curve
    (doubt,) = [line for line in curve.splitlines() if "not learnt" in line]
    assert doubt.startswith("- pretrained, seed 2: rotation was not learnt") and "contrast was not learnt" in doubt
    assert "| inpainting-rotation, seed 0 | 100 | 12.0 |  |  | 0.500 |  |" in ablation
    assert "seed 1 |" not in ablation and "not learnt" not in ablation  # encoder_per_seed: false


def test_runs_of_earlier_versions_are_read_from_their_training_or_left_empty(tmp_path):
    plan = whole_plan()
    write_study(tmp_path, plan, gain=0.0)
    for run in plan.runs:
        if run.kind == "pretraining":
            done = {key: value for key, value in finished(run).items() if key != "figures"}
            write_text(tmp_path / "runs" / run.name / "done.json", json.dumps(done))
    write_text(tmp_path / "runs/pretrain_pretrained_seed1/train/validation.json", json.dumps(COLLAPSED))
    figures = read_figures(tmp_path)
    assert figures["pretrain_pretrained_seed1"]["rotation_accuracy"] == 0.125
    assert figures["pretrain_pretrained_seed0"] == {}
    write_report(tmp_path)
    text = (tmp_path / "curve.md").read_text()
    assert "| pretrained, seed 0 |  |  |  |  |  |  |" in text and "| pretrained, seed 1 | 100 | 11.9 |" in text
