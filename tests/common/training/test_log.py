# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The table holds means over stretches of steps, each step once, resumed or not; the curves become a picture."""

from __future__ import annotations

import csv
import logging
import math
import re

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Events
from monai.data import DataLoader
from monai.engines import SupervisedTrainer
from torch.multiprocessing import spawn

from bundles.common.training.log import TrainingLog, loss_figure, read_log


class Loss(torch.nn.Module):
    """Loss of step s is s, with parts s / 4 and 3 s / 4."""

    def __init__(self, first_step=0):
        super().__init__()
        self.step = first_step
        self.parts = {}

    def forward(self, output, target):
        self.step += 1
        self.parts = {"inpainting": torch.tensor(self.step / 4), "rotation": torch.tensor(3 * self.step / 4)}
        return 0 * output.sum() + self.step


def train(folder, *, steps, every, resumed_from=0, total=None, handler_order="log first", first_loss=0):
    network = torch.nn.Linear(1, 1)
    total = steps if total is None else total
    log = TrainingLog(output_dir=str(folder), total_steps=total, every=every)

    class Resume:
        def attach(self, engine):
            engine.add_event_handler(Events.STARTED, self)

        def __call__(self, engine):
            engine.state.epoch = engine.state.iteration = resumed_from

    handlers = [Resume(), log] if handler_order == "resume first" else [log, Resume()]
    SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=steps,
        epoch_length=1,
        train_data_loader=DataLoader([{"image": torch.zeros(1), "label": torch.zeros(1)}] * 3, batch_size=3),
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.25),
        loss_function=Loss(resumed_from + first_loss),
        train_handlers=handlers,
        decollate=False,
    ).run()
    return log


def test_a_row_holds_the_means_since_the_row_before(tmp_path):
    log = train(tmp_path, steps=7, every=3)
    rows = read_log(log.path)
    assert [row["step"] for row in rows] == [3, 6, 7]
    assert [row["loss"] for row in rows] == pytest.approx([2, 5, 7])
    assert [row["loss_inpainting"] for row in rows] == pytest.approx([0.5, 1.25, 1.75])
    assert [row["loss_rotation"] for row in rows] == pytest.approx([1.5, 3.75, 5.25])
    assert all(row["learning_rate"] == 0.25 and row["crops_per_second"] > 0 for row in rows)


def test_a_line_says_step_losses_and_learning_rate(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="bundles.common.training.log"):
        train(tmp_path, steps=2, every=1)
    lines = [record.getMessage() for record in caplog.records if record.name == "bundles.common.training.log"]
    assert lines[0].startswith("step 1/2  loss 1.0000 inpainting 0.2500 rotation 0.7500  lr 2.50e-01  ")
    assert lines[1].endswith("left 0:00")


def test_the_first_step_has_a_line_with_the_time_left_and_no_row(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        log = train(tmp_path, steps=6, every=3, resumed_from=1)
    assert [line.split()[1] for line in caplog.messages if line.startswith("step")] == ["2/6", "3/6", "6/6"]
    assert " loss 2.0000 " in next(line for line in caplog.messages if line.startswith("step 2/6"))
    assert [(row["step"], row["loss"]) for row in read_log(log.path)] == [(3, 2.5), (6, 5.0)]


@pytest.mark.parametrize(
    ("total", "days"), [(10**9, r"about \d+ days on this CPU. --preset cpu is for a CPU"), (2, None)]
)
def test_a_run_of_more_than_a_day_on_a_cpu_is_told_after_the_first_step(tmp_path, caplog, total, days):
    train(tmp_path, steps=2, every=1, total=total)
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == (days is not None)
    assert days is None or re.search(days, warned[0])


@pytest.mark.parametrize("order", ["resume first", "log first"])
def test_rows_after_the_step_that_a_run_resumes_from_are_not_doubled(tmp_path, order):
    train(tmp_path, steps=6, every=2, total=10)  # killed after step 6, its last checkpoint was of step 4
    log = train(tmp_path, steps=10, every=2, resumed_from=4, handler_order=order)
    rows = read_log(log.path)
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10]
    assert [row["loss"] for row in rows] == pytest.approx([1.5, 3.5, 5.5, 7.5, 9.5])
    assert [line.partition(",")[0] for line in log.path.read_text().splitlines()] == ["step", "2", "4", "6", "8", "10"]


def test_a_run_that_goes_on_with_or_without_a_gpu_keeps_all_rows(tmp_path, monkeypatch):
    train(tmp_path, steps=2, every=1, total=6)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**31)
    train(tmp_path, steps=4, every=1, resumed_from=2, total=6)
    monkeypatch.undo()
    rows = read_log(train(tmp_path, steps=6, every=1, resumed_from=4, total=6).path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    memory = [row["gpu_memory_gib"] for row in rows]
    assert memory[2:4] == [2.0, 2.0] and all(map(math.isnan, memory[:2] + memory[4:]))


def test_a_run_that_starts_anew_starts_a_new_table(tmp_path):
    train(tmp_path, steps=4, every=1)
    assert [row["step"] for row in read_log(train(tmp_path, steps=2, every=1).path)] == [1, 2]


@pytest.mark.parametrize("order", ["resume first", "log first"])
def test_resuming_a_complete_run_leaves_its_table(tmp_path, order):
    before = train(tmp_path, steps=4, every=2).path.read_text()
    assert train(tmp_path, steps=4, every=2, resumed_from=4, handler_order=order).path.read_text() == before


@pytest.mark.parametrize("cut", ["6,5.0", "6,5.0,1.2", "6", "6,5.0,1.25,"])
def test_a_last_line_cut_off_by_a_kill_is_left_out(tmp_path, cut):
    path = tmp_path / "training_log.csv"
    path.write_text("step,loss,loss_rotation,learning_rate\n2,3.0,1.0,0.1\n4,2.0,1.5,0.1\n" + cut)
    assert read_log(path) == [
        {"step": 2.0, "loss": 3.0, "loss_rotation": 1.0, "learning_rate": 0.1},
        {"step": 4.0, "loss": 2.0, "loss_rotation": 1.5, "learning_rate": 0.1},
    ]


def test_a_picture_of_the_curves_is_written_at_the_end(tmp_path):
    train(tmp_path, steps=4, every=1)
    assert (tmp_path / "loss_curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not list(tmp_path.glob(".*"))


def test_the_figure_has_a_panel_per_loss_with_the_values_of_the_table(tmp_path):
    rows = read_log(train(tmp_path, steps=4, every=1).path)
    figure = loss_figure(rows, "title")
    assert [axes.get_title() for axes in figure.axes] == ["loss", "inpainting", "rotation"]
    assert figure.axes[1].lines[0].get_xdata().tolist() == [1, 2, 3, 4]
    assert figure.axes[1].lines[0].get_ydata().tolist() == [0.25, 0.5, 0.75, 1.0]


def test_only_rank_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("bundles.common.training.log.rank", lambda: 1)
    train(tmp_path, steps=2, every=1)
    assert list(tmp_path.iterdir()) == []


def of_one_rank(rank, folder):
    """The losses of rank 1 are 10 higher."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    train(folder / f"rank{rank}", steps=5, every=2, first_loss=10 * rank)
    dist.barrier()
    dist.destroy_process_group()


def test_a_row_holds_the_means_over_all_processes(tmp_path):
    spawn(of_one_rank, (tmp_path,), nprocs=2)
    rows = read_log(tmp_path / "rank0" / "training_log.csv")
    assert [row["loss"] for row in rows] == pytest.approx([1.5 + 5, 3.5 + 5, 5 + 5])
    assert [row["loss_rotation"] for row in rows] == pytest.approx([0.75 * (mean + 5) for mean in (1.5, 3.5, 5)])
    assert not (tmp_path / "rank1").exists()


def test_the_table_is_plain_csv(tmp_path):
    log = train(tmp_path, steps=2, every=1)
    with open(log.path, newline="") as file:
        header = next(csv.reader(file))
    assert header == ["step", "loss", "loss_inpainting", "loss_rotation", "learning_rate", "crops_per_second"]


class SometimesNan(Loss):
    def forward(self, output, target):
        loss = super().forward(torch.nan_to_num(output), target)
        bad = self.step in (2, 4, 5, 6)
        self.parts["rotation"] = torch.tensor(float("nan")) if bad else self.parts["rotation"]
        return loss * float("nan") if bad else loss


def test_losses_that_are_not_finite_are_left_out_and_none_is_no_zero(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.common.training.test_log.Loss", SometimesNan)
    train(tmp_path, steps=6, every=3)
    first, second = read_log(tmp_path / "training_log.csv")
    assert first["loss"] == pytest.approx((1 + 3) / 2)
    assert first["loss_rotation"] == pytest.approx(3 / 4 * (1 + 3) / 2)
    assert first["loss_inpainting"] == pytest.approx((1 + 2 + 3) / 3 / 4)
    assert math.isnan(second["loss"]) and math.isnan(second["loss_rotation"])
    assert second["loss_inpainting"] == pytest.approx((4 + 5 + 6) / 3 / 4)
