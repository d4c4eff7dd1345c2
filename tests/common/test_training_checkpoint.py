# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A resumed run is the same run, the best weights are the result, and a half-trained result never has its name."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader
from monai.engines import SupervisedTrainer
from monai.handlers import LrScheduleHandler

from bundles.common.checkpoint_file import load_checkpoint_file, save_atomically
from bundles.common.input_error import InputError
from bundles.common.seeded_crops import DrawSampler
from bundles.common.training_checkpoint import TrainingCheckpoint, random_states, restore_random_states

EPOCHS, EPOCH_LENGTH, BATCH = 5, 3, 2


class KilledError(Exception):
    """Stands for a power cut."""


class TinyNetwork(torch.nn.Module):
    """Has dropout, so that a run is the same only if torch's generator is too."""

    def __init__(self) -> None:
        super().__init__()
        self.swinViT = torch.nn.Linear(4, 16)
        self.decoder = torch.nn.Sequential(torch.nn.BatchNorm1d(16), torch.nn.Dropout(0.5), torch.nn.Linear(16, 1))

    def forward(self, x):
        return self.decoder(self.swinViT(x).relu())


class Draws:
    """Item of draw i is fixed by i."""

    def __getitem__(self, draw):
        values = np.random.default_rng(draw).normal(size=5).astype(np.float32)
        return {"image": torch.from_numpy(values[:4]), "label": torch.from_numpy(values[4:])}

    def __len__(self):
        return EPOCHS * EPOCH_LENGTH * BATCH


def train(
    folder,
    record,
    *,
    scores=(0.1, 0.5, 0.3, 0.4, 0.2),
    resume=False,
    killed_in_step=None,
    epoch_length=EPOCH_LENGTH,
    **options,
):
    """Run to the end, or to the step in which the run is killed. Returns the trainer and the steps that it made."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    network = TinyNetwork()
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    sampler = DrawSampler(steps=EPOCHS * EPOCH_LENGTH, batch_size=BATCH)
    evaluator = None if scores is None else SimpleNamespace(state=SimpleNamespace(metrics={}))
    steps, noise = [], []

    class Validate:
        def attach(self, engine):
            engine.add_event_handler(Events.ITERATION_STARTED, self.step)
            engine.add_event_handler(Events.EPOCH_COMPLETED, self)

        def step(self, engine):
            if engine.state.iteration == killed_in_step:
                raise KilledError
            steps.append(engine.state.iteration)
            noise.append((random.random(), float(np.random.rand())))

        def __call__(self, engine):
            if evaluator is not None:
                evaluator.state.metrics["dice"] = torch.tensor(scores[engine.state.epoch - 1])

    checkpoint = TrainingCheckpoint(
        folder=str(folder),
        network=network,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        sampler=sampler,
        encoder=record,
        **{"details": {"out_channels": 1}, "trained": {"preset": "cpu"}, "score": "dice", "resume": resume, **options},
        evaluator=evaluator,
    )
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=EPOCHS,
        epoch_length=epoch_length,
        train_data_loader=DataLoader(Draws(), sampler=sampler, batch_size=BATCH),
        network=network,
        optimizer=optimizer,
        loss_function=torch.nn.MSELoss(),
        train_handlers=[LrScheduleHandler(lr_scheduler, print_lr=False, epoch_level=False), Validate(), checkpoint],
        decollate=False,
    )
    if killed_in_step is None:
        trainer.run()
    else:
        with pytest.raises(KilledError):
            trainer.run()
    return SimpleNamespace(network=network, optimizer=optimizer, steps=steps, noise=noise, checkpoint=checkpoint)


def same(one, other):
    """Equal to the bit, in depth."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return one == other


@pytest.mark.parametrize("killed_in_step", [4, 8, 15])
def test_a_killed_and_resumed_run_equals_the_unbroken_one_to_the_bit(tmp_path, record, killed_in_step):
    unbroken = train(tmp_path / "unbroken", record)
    killed = train(tmp_path / "killed", record, killed_in_step=killed_in_step)
    assert not (tmp_path / "killed" / "model.pt").exists()
    resumed = train(tmp_path / "killed", record, resume=True)
    saved_step = (killed_in_step - 1) // EPOCH_LENGTH * EPOCH_LENGTH
    assert killed.steps[:saved_step] + resumed.steps == unbroken.steps == list(range(1, 16))
    assert resumed.noise == unbroken.noise[saved_step:]
    assert same(resumed.network.state_dict(), unbroken.network.state_dict())
    assert same(resumed.optimizer.state_dict(), unbroken.optimizer.state_dict())
    for name in ("last.pt", "best.pt", "model.pt"):
        one, other = (load_checkpoint_file(tmp_path / run / name) for run in ("killed", "unbroken"))
        assert same(one, other), name


def test_resuming_a_complete_run_makes_no_step_and_keeps_the_result(tmp_path, record):
    train(tmp_path, record)
    before = load_checkpoint_file(tmp_path / "model.pt")
    assert train(tmp_path, record, resume=True).steps == []
    assert same(load_checkpoint_file(tmp_path / "model.pt"), before)


def test_resuming_without_a_checkpoint_starts_at_the_first_step(tmp_path, record):
    assert train(tmp_path, record, resume=True).steps == list(range(1, 16))


@pytest.mark.parametrize(
    ("scores", "higher_is_better", "best_epoch"),
    [
        ((0.1, 0.5, 0.3, 0.5, 0.2), True, 2),
        ((0.1, 0.5, 0.3, 0.5, 0.2), False, 1),
        ((float("nan"), 0.5, float("nan"), 0.6, float("nan")), True, 4),
        ((float("nan"), 0.5, float("nan"), 0.6, float("nan")), False, 2),
        (None, True, 5),
    ],
)
def test_the_best_validation_is_the_result(tmp_path, record, scores, higher_is_better, best_epoch):
    train(tmp_path / "all", record, scores=scores, higher_is_better=higher_is_better)
    result = load_checkpoint_file(tmp_path / "all" / "model.pt")
    assert result["trained"]["steps"] == best_epoch * EPOCH_LENGTH
    expected = None if scores is None else pytest.approx(scores[best_epoch - 1])
    assert result["trained"]["score"] == {"dice": expected}
    # the weights are those after that epoch: the last ones of a run that was killed right behind it
    killed_in_step = best_epoch * EPOCH_LENGTH + 1 if best_epoch < EPOCHS else None
    train(tmp_path / "part", record, killed_in_step=killed_in_step)
    assert same(result["model"], load_checkpoint_file(tmp_path / "part" / "last.pt")["network"])


def test_a_resumed_run_remembers_the_best_score(tmp_path, record):
    scores = (0.9, 0.1, 0.2, 0.3, 0.4)
    train(tmp_path, record, scores=scores, killed_in_step=5)
    train(tmp_path, record, scores=scores, resume=True)
    assert load_checkpoint_file(tmp_path / "model.pt")["trained"]["steps"] == EPOCH_LENGTH


def test_no_finite_score_means_no_result_even_beside_an_older_run(tmp_path, record):
    train(tmp_path, record)
    (tmp_path / "model.pt").unlink()
    with pytest.raises(InputError, match="no validation of this run gave a finite dice"):
        train(tmp_path, record, scores=[float("nan")] * EPOCHS)
    assert not (tmp_path / "model.pt").exists()


def test_the_result_says_what_it_is(tmp_path, record):
    train(tmp_path, record, encoder_file=True)
    model = load_checkpoint_file(tmp_path / "model.pt")
    assert set(model) == {"model", "encoder", "out_channels", "trained"}
    assert model["encoder"] == record and model["out_channels"] == 1
    assert model["trained"]["preset"] == "cpu" and set(model["trained"]["versions"]) == {"monai", "torch", "ignite"}
    TinyNetwork().load_state_dict(model["model"])
    encoder = load_checkpoint_file(tmp_path / "encoder.pt")
    assert set(encoder) == {"state_dict", "encoder", "trained"}
    assert encoder["encoder"] == record and encoder["trained"] == model["trained"]
    assert list(encoder["state_dict"]) == ["swinViT.weight", "swinViT.bias"]
    assert all(torch.equal(tensor, model["model"][name]) for name, tensor in encoder["state_dict"].items())


def test_an_encoder_file_is_written_on_demand_only_and_no_litter_stays(tmp_path, record):
    train(tmp_path, record)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "last.pt", "model.pt"]


def test_a_checkpoint_of_another_run_is_refused_with_both_values(tmp_path, record):
    train(tmp_path, record, killed_in_step=5)
    before = load_checkpoint_file(tmp_path / "last.pt")
    with pytest.raises(InputError, match="last.pt belongs to another run.*'window_size': 4.*'window_size': 7"):
        train(tmp_path, record | {"window_size": 7}, resume=True)
    with pytest.raises(InputError, match="with 3 steps between validations.* with 5.*--output_dir"):
        train(tmp_path, record, resume=True, epoch_length=5)
    assert same(load_checkpoint_file(tmp_path / "last.pt"), before)


def test_only_rank_0_writes(tmp_path, record, monkeypatch):
    monkeypatch.setattr("bundles.common.training_checkpoint.rank", lambda: 1)
    train(tmp_path / "run", record)
    assert not (tmp_path / "run").exists()


def test_random_states_survive_a_file_that_runs_no_code(tmp_path):
    random.gauss(0, 1)  # leaves a second normal number behind, which is part of the state
    np.random.normal()
    save_atomically(random_states(), tmp_path / "states.pt")

    def draws():
        return (
            random.gauss(0, 1),
            random.random(),
            np.random.normal(),
            np.random.rand(3).tolist(),
            torch.rand(3).tolist(),
        )

    expected = draws()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert draws() != expected
    restore_random_states(load_checkpoint_file(tmp_path / "states.pt"))
    assert draws() == expected


def test_a_fresh_run_sets_an_earlier_one_aside_and_never_continues_it(tmp_path, record):
    train(tmp_path, record, killed_in_step=EPOCH_LENGTH + 1)
    earlier = (tmp_path / "last.pt").read_bytes()
    train(tmp_path, record, killed_in_step=1)  # stopped before its first checkpoint
    assert (tmp_path / "previous_last.pt").read_bytes() == earlier
    resumed = train(tmp_path, record, resume=True)
    assert resumed.steps[0] == 1  # from the start, not from where the earlier run was
