# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A task counts as learnt only if its figures are better than those of no learning."""

from __future__ import annotations

import json
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine

from bundles.pretraining.results.learning import LearningVerdict, effective_rank, verdicts
from bundles.pretraining.results.proxy_report import ProxyReport


@pytest.mark.parametrize(
    ("report", "task", "learnt"),
    [
        ({"views": 48, "rotation_accuracy": 17 / 48}, "rotation", False),  # P(X >= 17) = 0.07 by chance
        ({"views": 48, "rotation_accuracy": 18 / 48}, "rotation", True),  # 0.039
        ({"views": 12, "rotation_accuracy": 0.5}, "rotation", False),  # 0.054
        ({"views": 8, "loss_contrast": 1.91, "contrast_without_learning": math.log(7)}, "contrast", False),
        ({"views": 8, "loss_contrast": 1.89, "contrast_without_learning": math.log(7)}, "contrast", True),
        ({"views": 8, "masked_psnr": 14.4, "masked_psnr_of_a_constant": 14.0}, "inpainting", False),
        ({"views": 8, "masked_psnr": 14.6, "masked_psnr_of_a_constant": 14.0}, "inpainting", True),
        ({"views": 8, "position_mm": 41.0, "position_mm_of_a_constant": 45.0}, "position", False),
        ({"views": 8, "position_mm": 40.0, "position_mm_of_a_constant": 45.0}, "position", True),
    ],
)
def test_a_task_is_learnt_from_its_margin_on(report, task, learnt):
    (name, verdict), *others = verdicts(report).items()
    assert (name, verdict["learnt"], others) == (task, learnt, [])


def test_figures_that_are_not_numbers_are_not_learnt():
    report = {"views": 8, "loss_contrast": math.nan, "contrast_without_learning": 1.9}
    report |= {"masked_psnr": math.nan, "masked_psnr_of_a_constant": 14.0}
    assert [each["learnt"] for each in verdicts(report).values()] == [False, False]


def test_the_effective_rank_counts_the_directions_of_the_embeddings():
    assert effective_rank(torch.eye(6, 20)) == pytest.approx(6)
    assert effective_rank(torch.ones(6, 20)) == pytest.approx(1, abs=1e-5)
    near = torch.ones(6, 20) + 1e-4 * torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    assert effective_rank(near) < 1.01
    values = torch.tensor([3.0, 1.0])
    share = values / 4
    expected = math.exp(-sum(p * math.log(p) for p in share.tolist()))
    assert effective_rank(torch.diag(values)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("accuracy", "level", "last"),
    [(0.25, logging.WARNING, "This pre-training did not learn rotation"), (0.9, logging.INFO, "learnt all its tasks")],
)
def test_the_last_line_of_a_run_says_what_was_not_learnt(caplog, accuracy, level, last):
    report = SimpleNamespace(verdicts=verdicts({"views": 48, "rotation_accuracy": accuracy}))
    engine = Engine(lambda engine, batch: None)
    LearningVerdict(report=report).attach(engine)
    with caplog.at_level(logging.INFO):
        engine.run([0], max_epochs=1)
    ours = [record for record in caplog.records if record.name.startswith("bundles")]
    assert ours[-1].levelno == level and last in ours[-1].getMessage()
    assert ours[0].getMessage().startswith("rotation: ")


def test_the_effective_rank_of_a_diverged_network_is_no_number():
    for bad in (math.nan, math.inf):
        assert math.isnan(effective_rank(torch.tensor([[1.0, bad], [0.0, 1.0]])))


@pytest.mark.parametrize(
    ("views", "error", "learnt"),
    [
        (8, 0.15, False),  # t = 2.3 with 3 degrees of freedom: p 0.05
        (8, 0.10, True),  # t = 3.5: p 0.02
        (48, 0.15, True),  # t = 2.3 with 23: p 0.015
        (2, math.nan, False),  # one crop: nothing can be shown
    ],
)
def test_a_contrast_that_chance_explains_is_not_learnt(views, error, learnt):
    report = {"views": views, "loss_contrast": 1.60, "contrast_without_learning": math.log(7)}
    verdict = verdicts({**report, "contrast_standard_error": error})["contrast"]
    assert verdict["learnt"] is learnt and "p 0." in verdict["because"] or views == 2


def test_a_run_with_nothing_left_to_do_says_what_was_learnt(tmp_path, caplog):
    file = tmp_path / "validation.json"
    file.write_text(json.dumps({"verdicts": {"rotation": {"learnt": False, "because": "25% are right"}}}))
    engine = Engine(lambda engine, batch: None)
    LearningVerdict(report=ProxyReport(loss=torch.nn.Identity(), path=str(file))).attach(engine)
    engine.run([0], max_epochs=1)
    assert "This pre-training did not learn rotation" in caplog.text
