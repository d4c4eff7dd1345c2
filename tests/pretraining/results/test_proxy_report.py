# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Metrics of batches of any size are those of the whole, against numbers worked out by hand."""

from __future__ import annotations

import json
import logging
import math

import numpy as np
import pytest
import torch
from monai.data import DataLoader
from monai.engines import SupervisedEvaluator

from bundles.common.errors import InputError
from bundles.pretraining.network import SwinPretrainer
from bundles.pretraining.proxy_tasks.losses import ProxyTaskLoss
from bundles.pretraining.proxy_tasks.tasks import PAPER_TASKS as TASKS
from bundles.pretraining.results.proxy_report import ProxyInferer, ProxyReport, higher_is_better, measure


def pair(right, error, hidden):
    """Two views of one crop of 2 x 1 x 1 voxels: outputs that are right or wrong, off by ``error``, and the masked voxels."""
    logits = torch.zeros(2, 4)
    logits[:, 2 if right else 1] = 5.0
    crop = torch.full((2, 1, 2, 1, 1), 0.5)
    mask = torch.tensor([hidden, hidden]).reshape(2, 1, 2, 1, 1)
    outputs = {"rotation": logits, "inpainting": crop + error}
    return outputs, {"crop": crop, "mask": mask, "turns": torch.tensor([2, 2])}


def join(pairs):
    """One batch of several crops: all first views, then all second views."""
    return tuple(
        {name: torch.cat([p[part][name][view, None] for view in (0, 1) for p in pairs]) for name in pairs[0][part]}
        for part in (0, 1)
    )


PAIRS = [
    pair(True, 0.1, [True, False]),
    pair(False, 0.2, [True, True]),
    pair(True, 0.4, [False, True]),
    pair(True, 0.0, [True, True]),
    pair(False, 0.3, [False, False]),
]


class Whole(torch.nn.Module):
    """Hands the outputs that stand in the batch on."""

    def __init__(self):
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(1))


def evaluate(batches, loss, path=None, order=None):
    report = ProxyReport(loss=loss, path=path)
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader([{"draw": draw} for draw in order or range(len(batches))], batch_size=1),
        network=Whole(),
        prepare_batch=lambda batch, *_, **__: batches[int(batch["draw"])],
        inferer=lambda outputs, network: outputs,
        val_handlers=[report],
        decollate=False,
    )
    evaluator.run()
    return evaluator


@pytest.mark.parametrize("cuts", [[5], [1, 4], [2, 2, 1], [1, 1, 1, 1, 1]])
def test_metrics_over_batches_of_different_size_equal_the_hand_computed_whole(cuts):
    batches, start = [], 0
    for cut in cuts:
        batches.append(join(PAIRS[start : start + cut]))
        start += cut
    metrics = evaluate(
        batches, ProxyTaskLoss(tasks=["inpainting", "rotation"], weights={"inpainting": 2.0})
    ).state.metrics
    inpainting = (0.1 + 0.2 + 0.4 + 0.0 + 0.3) / 5
    right = -math.log(math.exp(5) / (math.exp(5) + 3))
    rotation = (3 * right + 2 * (right + 5)) / 5
    # per view: one voxel off by 0.1, two by 0.2, one by 0.4, two by 0
    squared = (0.1**2 + 2 * 0.2**2 + 0.4**2) / 6
    assert metrics == pytest.approx(
        {
            "loss": 2 * inpainting + rotation,
            "loss_inpainting": inpainting,
            "loss_rotation": rotation,
            "rotation_accuracy": 0.6,
            "masked_psnr": -10 * math.log10(squared),
        },
        rel=1e-5,
    )


def test_psnr_of_a_tenth_off_is_20_db_and_that_of_a_perfect_reconstruction_is_bounded():
    loss = ProxyTaskLoss(tasks=["inpainting"])

    def psnr(*pairs):
        outputs, targets = join(pairs)
        return evaluate([({"inpainting": outputs["inpainting"]}, targets)], loss).state.metrics["masked_psnr"]

    assert psnr(pair(True, 0.1, [True, False])) == pytest.approx(20.0, abs=1e-4)
    assert psnr(pair(True, 0.0, [True, False])) == pytest.approx(120.0)
    assert math.isnan(psnr(pair(True, 0.5, [False, False])))  # nothing was hidden


def test_a_contrast_that_gives_all_crops_one_vector_is_warned_of(caplog):
    loss, turns = ProxyTaskLoss(tasks=["contrast"]), torch.zeros(8, dtype=torch.long)

    def said(embeddings):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            metrics = evaluate([({"contrast": embeddings}, {"turns": turns})], loss).state.metrics
        assert set(metrics) == {"loss", "loss_contrast", "contrast_top1"}
        return metrics["loss_contrast"], [record.getMessage() for record in caplog.records]

    equal = torch.ones(8, 6) + 1e-4 * torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    value, messages = said(equal)
    assert value == pytest.approx(math.log(7), abs=1e-4)
    assert len(messages) == 1 and "contrast: NOT LEARNT, the loss is 1.95, that of equal embeddings 1.95" in messages[0]
    value, messages = said(torch.cat([torch.eye(4, 6), torch.eye(4, 6)]))
    assert value < math.log(7) - 0.1 and messages == []


def test_contrast_top1_counts_the_views_whose_nearest_is_the_partner():
    first = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    # views of crop 0 are alike; the second view of crop 1 looks like the first of crop 2, and the other way round
    second = torch.tensor([[1.0, 0.1, 0.0], [0.0, 0.1, 1.0], [0.0, 1.0, 0.1]])
    outputs = {"contrast": torch.cat([first, second])}
    loss = ProxyTaskLoss(tasks=["contrast"])
    sums = measure(outputs, {"turns": torch.zeros(6, dtype=torch.long)}, loss)
    assert sums["number"] == 6
    assert sums["views"]["contrast_top1"] / 6 == pytest.approx(2 / 6)
    assert sums["views"]["loss_contrast"] / 6 == pytest.approx(loss.contrast(first, second).item(), rel=1e-6)


def test_the_report_is_written_and_logged(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        outputs, targets = join(PAIRS)
        evaluator = evaluate(
            [(outputs, targets)], ProxyTaskLoss(tasks=["rotation"]), path=str(tmp_path / "new" / "validation.json")
        )
    report = json.loads((tmp_path / "new" / "validation.json").read_text())
    assert report.pop("verdicts")["rotation"]["learnt"]  # 6 of 10
    assert report.pop("masked_psnr_of_a_constant") == 120  # all masked voxels are equal
    assert report == {"views": 10, **evaluator.state.metrics}
    assert any(
        "validation over 10 views" in r.getMessage() and "rotation_accuracy 0.6000" in r.getMessage()
        for r in caplog.records
    )


def test_the_report_says_what_the_contrast_is_without_learning(tmp_path):
    loss = ProxyTaskLoss(tasks=["contrast"])

    def report_of(embedding):
        batches = [
            ({"contrast": embedding(views)}, {"turns": torch.zeros(views, dtype=torch.long)}) for views in (8, 8, 4)
        ]
        evaluate(batches, loss, path=str(tmp_path / "validation.json"))
        return json.loads((tmp_path / "validation.json").read_text())

    equal = report_of(lambda views: torch.ones(views, 6))
    assert equal["contrast_without_learning"] == pytest.approx((16 * math.log(7) + 4 * math.log(3)) / 20)
    assert equal["contrast_without_learning"] == pytest.approx(equal["loss_contrast"], abs=1e-6)
    random = report_of(lambda views: torch.randn(views, 6, generator=torch.Generator().manual_seed(0)))
    assert random["contrast_without_learning"] == equal["contrast_without_learning"] != random["loss_contrast"]


def test_a_second_validation_starts_from_zero():
    loss = ProxyTaskLoss(tasks=["rotation"])
    report = ProxyReport(loss=loss)
    batches = [join(PAIRS[:1]), join(PAIRS[1:2])]
    which = []
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader([{"draw": 0}], batch_size=1),
        network=Whole(),
        prepare_batch=lambda batch, *_, **__: batches[len(which)],
        inferer=lambda outputs, network: outputs,
        val_handlers=[report],
        decollate=False,
    )
    evaluator.run()
    assert evaluator.state.metrics["rotation_accuracy"] == 1.0
    which.append(1)
    evaluator.run()
    assert evaluator.state.metrics["rotation_accuracy"] == 0.0


def test_the_inferer_runs_all_heads_in_eval_mode(record):
    network = SwinPretrainer(encoder=record, tasks=TASKS).eval()
    with torch.no_grad():
        outputs = ProxyInferer()(torch.rand(1, 1, 64, 64, 32), network)
    assert set(outputs) == {*TASKS, "embedding"} and outputs["inpainting"].shape == (1, 1, 64, 64, 32)


def test_a_batch_that_is_seen_twice_counts_once_and_the_order_does_not_matter():
    loss = ProxyTaskLoss(tasks=["inpainting", "rotation"])
    batches = [join(PAIRS[:2]), join(PAIRS[2:])]
    once = evaluate(batches, loss).state.metrics
    assert evaluate(batches, loss, order=[1, 0, 1]).state.metrics == once


@pytest.mark.parametrize(
    ("select_by", "higher"),
    [("loss", False), ("loss_rotation", False), ("rotation_accuracy", True), ("masked_psnr", True)],
)
def test_losses_are_better_low_and_accuracies_high(select_by, higher):
    assert higher_is_better(select_by, TASKS) is higher


def test_a_metric_that_is_not_there_cannot_select():
    with pytest.raises(InputError, match="--select_by 'dice' is not one of loss, .*masked_psnr"):
        higher_is_better("dice", TASKS)
    for name in ("contrast_top1", "loss_contrast"):
        with pytest.raises(InputError, match=f"--select_by {name} belongs to contrast"):
            higher_is_better(name, ["rotation"])


def test_the_standard_error_of_the_contrast_is_over_the_crops_of_all_batches(tmp_path):
    loss, path = ProxyTaskLoss(tasks=["contrast"]), tmp_path / "validation.json"
    batches = [torch.randn(views, 6, generator=torch.Generator().manual_seed(views)) for views in (8, 4)]
    evaluate(
        [({"contrast": each}, {"turns": torch.zeros(len(each), dtype=torch.long)}) for each in batches], loss, path
    )
    of_crops = []
    for views in batches:
        near = torch.nn.functional.normalize(views, dim=1)
        near = (near @ near.T / 0.5).fill_diagonal_(-math.inf).log_softmax(1)
        half = len(views) // 2
        of_crops += [-(near[i, i + half] + near[i + half, i]).item() / 2 for i in range(half)]
    report = json.loads(path.read_text())
    assert report["loss_contrast"] == pytest.approx(np.mean(of_crops), rel=1e-5)
    assert report["contrast_standard_error"] == pytest.approx(np.std(of_crops, ddof=1) / 6**0.5, rel=1e-5)


def test_a_figure_that_is_no_number_is_null_in_the_file(tmp_path):
    outputs, targets = pair(True, math.nan, [True, True])
    evaluate([(outputs, targets)], ProxyTaskLoss(tasks=["rotation"]), path=str(tmp_path / "validation.json"))

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    report = json.loads((tmp_path / "validation.json").read_text(), parse_constant=refuse)
    assert report["masked_psnr"] is None and not report["verdicts"]["inpainting"]["learnt"]
