# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A resumed run is the same run, the best weights are the result, and a half-trained result never has its name."""

from __future__ import annotations

import ast
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader
from monai.optimizers import WarmupCosineSchedule

from bundles.common.data.seeded_crops import DrawSampler
from bundles.common.errors import InputError
from bundles.common.run.options import RunSettings
from bundles.common.training.checkpoint import TrainingCheckpoint, random_states, restore_random_states
from bundles.common.training.lr_schedule import CosineToFloor, StepSchedule
from bundles.common.training.trainer import supervised_trainer
from bundles.common.training.weight_average import UpdateAverage, WeightAverage
from bundles.common.weights.checkpoint_file import load_checkpoint_file, save_atomically

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


class Scaled:
    """Gives a trainer its scaler; MONAI makes one of its own when the run begins."""

    def __init__(self, scaler):
        self.scaler = scaler

    def attach(self, engine):
        engine.add_event_handler(Events.STARTED, lambda engine: setattr(engine, "scaler", self.scaler))


def train(
    folder,
    record,
    *,
    scores=(0.1, 0.5, 0.3, 0.4, 0.2),
    resume=False,
    killed_in_step=None,
    stopped_behind_step=None,
    stopped_in_validation=None,
    more=(),
    epochs=EPOCHS,
    lr=0.1,
    fused=True,
    settings=None,
    average_steps=1,
    new_parts_steps=None,
    accumulation_steps=1,
    scaler=None,
    network=None,
    **options,
):
    """Run to the end, or to the step in which the run is killed. Returns the trainer and the steps that it made."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    network = network or TinyNetwork()
    plan = {"warmup_steps": 2, "t_total": epochs * EPOCH_LENGTH}
    if new_parts_steps is None:
        optimizer = torch.optim.AdamW(network.parameters(), lr=lr, fused=fused)
        lr_scheduler = WarmupCosineSchedule(optimizer, **plan)
    else:  # the decoder is new
        parts = [{"params": part.parameters()} for part in (network.swinViT, network.decoder)]
        parts = [{**part, "starts_anew": anew} for part, anew in zip(parts, (False, True), strict=True)]
        optimizer = torch.optim.AdamW(parts, lr=lr, fused=fused)
        plan |= {"learning_rate": lr, "end_learning_rate": 0.0, "new_parts_steps": new_parts_steps}
        lr_scheduler = CosineToFloor(optimizer, **plan)
    sampler = DrawSampler(iterations=epochs * EPOCH_LENGTH, batch_size=BATCH)
    average = WeightAverage(network=network, steps=average_steps)
    evaluator = None if scores is None else Engine(lambda engine, batch: None)
    steps, noise, rates, new_rates = [], [], [], []

    class Validate:
        def attach(self, engine):
            engine.add_event_handler(Events.ITERATION_STARTED, self.step)
            engine.add_event_handler(Events.ITERATION_COMPLETED, self.stop)
            if evaluator is not None:
                engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: evaluator.run(e.state.epoch))
                evaluator.run = lambda epoch: self.validate(engine, epoch)

        def step(self, engine):
            if engine.state.iteration == killed_in_step:
                raise KilledError
            steps.append(engine.state.iteration)
            rates.append(optimizer.param_groups[0]["lr"])
            new_rates.append(optimizer.param_groups[-1]["lr"])
            noise.append((random.random(), float(np.random.rand())))

        def stop(self, engine):
            if engine.state.iteration == stopped_behind_step:
                engine.terminate(skip_completed=True)  # as a signal does

        def validate(self, engine, epoch):
            if epoch == stopped_in_validation:
                engine.terminate(skip_completed=True)
            else:
                evaluator.state.metrics["dice"] = torch.tensor(scores[epoch - 1])

    checkpoint = TrainingCheckpoint(
        folder=str(folder),
        network=network,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        sampler=sampler,
        encoder=record,
        settings=RunSettings(
            settings or {"learning_rate": lr, "max_steps": epochs * EPOCH_LENGTH, "roi_size": (96, 96, 96)},
            of_the_scores=frozenset({"task_weights", "roi_size"}),
        ),
        **{"details": {"out_channels": 1}, "trained": {"preset": "cpu"}, "score": "dice", "resume": resume, **options},
        evaluator=evaluator,
        average=average,
    )
    trainer = supervised_trainer(
        device=torch.device("cpu"),
        max_epochs=epochs,
        epoch_length=EPOCH_LENGTH,
        train_data_loader=DataLoader(Draws(), sampler=sampler, batch_size=BATCH),
        network=network,
        optimizer=optimizer,
        loss_function=torch.nn.MSELoss(),
        train_handlers=[
            Scaled(scaler),
            StepSchedule(lr_scheduler=lr_scheduler),
            UpdateAverage(average=average),
            *(more(network) if callable(more) else more),
            Validate(),
            checkpoint,
        ],
        decollate=False,
        accumulation_steps=accumulation_steps,
        amp=scaler is not None,
    )
    if killed_in_step is None:
        trainer.run()
    else:
        with pytest.raises(KilledError):
            trainer.run()
    return SimpleNamespace(
        network=network,
        optimizer=optimizer,
        steps=steps,
        noise=noise,
        rates=rates,
        new_rates=new_rates,
        checkpoint=checkpoint,
        trainer=trainer,
    )


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


@pytest.mark.parametrize("killed_in_step", [5, 11])
def test_a_run_that_accumulates_goes_on_at_its_iteration(tmp_path, record, killed_in_step):
    unbroken = train(tmp_path / "unbroken", record, accumulation_steps=3)
    train(tmp_path / "killed", record, accumulation_steps=3, killed_in_step=killed_in_step)
    epochs = (killed_in_step - 1) // EPOCH_LENGTH
    assert load_checkpoint_file(tmp_path / "killed" / "last.pt")["step"] == epochs  # one step an epoch
    resumed = train(tmp_path / "killed", record, accumulation_steps=3, resume=True)
    assert resumed.steps == unbroken.steps[epochs * EPOCH_LENGTH :]
    for name in ("last.pt", "best.pt", "model.pt"):
        one, other = (load_checkpoint_file(tmp_path / run / name) for run in ("killed", "unbroken"))
        assert same(one, other), name
    assert one["trained"]["steps"] == 2


@pytest.mark.filterwarnings("ignore")
def test_a_gradient_scaler_goes_on_with_its_scale_and_its_count(tmp_path, record):
    """The scale doubles every four steps, here in steps 4, 8 and 12; the run is killed between two of them."""

    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=4)

    train(tmp_path / "unbroken", record, scaler=scaler())
    train(tmp_path / "killed", record, scaler=scaler(), killed_in_step=8)
    scale = load_checkpoint_file(tmp_path / "killed" / "last.pt")["scaler"]
    assert (scale["scale"], scale["_growth_tracker"]) == (16.0, 2)
    train(tmp_path / "killed", record, scaler=scaler(), resume=True)
    one, other = (load_checkpoint_file(tmp_path / run / "last.pt") for run in ("killed", "unbroken"))
    assert same(one, other) and (one["scaler"]["scale"], one["scaler"]["_growth_tracker"]) == (64.0, 3)


@pytest.mark.parametrize("killed_in_step", [5, 13])
def test_a_mean_of_weights_goes_on_and_is_the_result(tmp_path, record, killed_in_step):
    scores = (0.1, 0.2, 0.3, 0.4, 0.5)
    unbroken = train(tmp_path / "unbroken", record, scores=scores, average_steps=4)
    train(tmp_path / "killed", record, scores=scores, average_steps=4, killed_in_step=killed_in_step)
    train(tmp_path / "killed", record, scores=scores, average_steps=4, resume=True)
    for name in ("last.pt", "best.pt", "model.pt"):
        one, other = (load_checkpoint_file(tmp_path / run / name) for run in ("killed", "unbroken"))
        assert same(one, other), name
    last, model = (load_checkpoint_file(tmp_path / "killed" / name) for name in ("last.pt", "model.pt"))
    mean = {name.removeprefix("module."): tensor for name, tensor in last["average"].items() if name != "n_averaged"}
    assert same(model["model"], mean) and last["average"]["n_averaged"] == 15
    assert same(last["network"], unbroken.network.state_dict()) and not same(model["model"], last["network"])


def test_a_mean_may_begin_with_a_resumed_run(tmp_path, record):
    settings = {"average_steps": 1}
    train(tmp_path, record, settings=settings, killed_in_step=14)
    options = {"settings": {"average_steps": 4}, "average_steps": 4, "resume": True}
    with pytest.raises(InputError, match="average_steps was 1, now 4"):
        train(tmp_path, record, **options)
    resumed = train(tmp_path, record, resume_changes=["average_steps"], **options)
    assert resumed.steps == [13, 14, 15]
    assert load_checkpoint_file(tmp_path / "last.pt")["average"]["n_averaged"] == 3


@pytest.mark.parametrize("was_fused", [False, True])
def test_a_run_goes_on_with_its_own_kind_of_optimiser(tmp_path, record, was_fused):
    """Fused, an optimiser keeps its count of steps on the GPU; which one a file was written by is no setting."""
    train(tmp_path, record, killed_in_step=8, fused=was_fused)
    resumed = train(tmp_path, record, resume=True, fused=not was_fused)
    assert [group["fused"] for group in resumed.optimizer.param_groups] == [not was_fused]
    assert {float(state["step"]) for state in resumed.optimizer.state.values()} == {15.0}
    assert all(torch.isfinite(parameter).all() for parameter in resumed.network.parameters())


def test_resuming_a_complete_run_makes_no_step_and_keeps_the_result(tmp_path, record):
    train(tmp_path, record)
    before = load_checkpoint_file(tmp_path / "model.pt")
    assert train(tmp_path, record, resume=True).steps == []
    assert same(load_checkpoint_file(tmp_path / "model.pt"), before)
    assert not (tmp_path / "previous_model.pt").exists()


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


@pytest.mark.parametrize("killed_in_step", [None, 5])
def test_a_score_that_never_moves_chooses_nothing(tmp_path, record, caplog, killed_in_step):
    """As of a validation without any foreground: the last weights are kept, no run ends early, and the log says so."""
    options = {"scores": (0.0,) * EPOCHS, "early_stopping": 2}
    if killed_in_step is not None:
        train(tmp_path, record, **options, killed_in_step=killed_in_step)
    train(tmp_path, record, **options, resume=killed_in_step is not None)
    assert load_checkpoint_file(tmp_path / "model.pt")["trained"]["steps"] == EPOCHS * EPOCH_LENGTH
    assert f"dice was 0.0 in all {EPOCHS} validations, so it chose nothing" in caplog.text


def test_a_score_that_moves_once_has_chosen(tmp_path, record, caplog):
    train(tmp_path, record, scores=(0.0, 0.0, 0.2, 0.2, 0.2))
    assert load_checkpoint_file(tmp_path / "model.pt")["trained"]["steps"] == 3 * EPOCH_LENGTH
    train(tmp_path / "down", record, scores=(0.3, 0.0, 0.3, 0.0, 0.3))
    assert load_checkpoint_file(tmp_path / "down" / "model.pt")["trained"]["steps"] == EPOCH_LENGTH
    assert "chose nothing" not in caplog.text


def test_a_resumed_run_remembers_the_best_score(tmp_path, record):
    scores = (0.9, 0.1, 0.2, 0.3, 0.4)
    train(tmp_path, record, scores=scores, killed_in_step=5)
    train(tmp_path, record, scores=scores, resume=True)
    assert load_checkpoint_file(tmp_path / "model.pt")["trained"]["steps"] == EPOCH_LENGTH


def test_no_finite_score_means_no_result_even_beside_an_older_run(tmp_path, record):
    train(tmp_path, record)
    (tmp_path / "model.pt").unlink()
    with pytest.raises(InputError, match="No validation of this run gave a finite dice"):
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


class WithDecoder(TinyNetwork):
    """Has a part with a name of Swin UNETR's decoder."""

    def __init__(self, trained: bool) -> None:
        super().__init__()
        self.decoder5 = torch.nn.Linear(1, 1).requires_grad_(trained)

    def forward(self, x):
        return self.decoder5(super().forward(x))


@pytest.mark.parametrize("trained", [True, False])
def test_the_whole_network_is_written_if_its_decoder_was_trained(tmp_path, record, trained):
    train(tmp_path, record, encoder_file=True, network=WithDecoder(trained))
    assert (tmp_path / "network.pt").exists() == trained
    if trained:
        assert {"swinViT.weight", "decoder5.weight"} <= set(load_checkpoint_file(tmp_path / "network.pt")["state_dict"])


def test_an_encoder_file_is_written_on_demand_only_and_no_litter_stays(tmp_path, record):
    train(tmp_path, record)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "last.pt", "model.pt"]


def test_a_checkpoint_of_another_run_is_refused_with_both_values(tmp_path, record):
    train(tmp_path, record, killed_in_step=5)
    before = load_checkpoint_file(tmp_path / "last.pt")
    with pytest.raises(InputError, match="last.pt belongs to another run.*window_size: 4.*window_size: 7"):
        train(tmp_path, record | {"window_size": 7}, resume=True)
    with pytest.raises(InputError, match="learning_rate was 0.1, now 0.2; max_steps was 15, now 12.*--resume_changes"):
        train(tmp_path, record, resume=True, lr=0.2, epochs=4)
    with pytest.raises(InputError, match="settings: max_steps was 15, now 12"):  # allowed is what was named
        train(tmp_path, record, resume=True, lr=0.2, epochs=4, resume_changes=["learning_rate"])
    assert same(load_checkpoint_file(tmp_path / "last.pt"), before)


def test_the_advice_keeps_what_was_allowed_before(tmp_path, record):
    train(tmp_path, record, killed_in_step=5)
    with pytest.raises(InputError) as error:
        train(tmp_path, record, resume=True, lr=0.2, epochs=4, resume_changes=["learning_rate"])
    advice = str(error.value).split("--resume_changes ")[1].strip('".')
    assert advice == "['learning_rate', 'max_steps']"
    train(tmp_path, record, resume=True, lr=0.2, epochs=4, resume_changes=ast.literal_eval(advice))


def test_resuming_without_a_last_checkpoint_keeps_the_earlier_result(tmp_path, record):
    train(tmp_path, record)
    earlier = (tmp_path / "model.pt").read_bytes()
    (tmp_path / "last.pt").unlink()
    train(tmp_path, record, resume=True, lr=0.2)
    assert (tmp_path / "previous_model.pt").read_bytes() == earlier != (tmp_path / "model.pt").read_bytes()


def test_a_change_that_is_no_setting_is_refused_with_the_settings(tmp_path, record):
    with pytest.raises(
        InputError,
        match="--resume_changes names lr; the settings of this run are learning_rate, max_steps, processes, roi_size",
    ):
        train(tmp_path, record, resume_changes=["lr"])


def test_another_number_of_processes_is_another_run(tmp_path, record, monkeypatch):
    train(tmp_path, record, killed_in_step=5)
    monkeypatch.setattr("bundles.common.training.checkpoint.world_size", lambda: 2)
    with pytest.raises(InputError, match="processes was 1, now 2"):
        train(tmp_path, record, resume=True)


def test_other_parameter_groups_are_refused_with_their_sizes(tmp_path, record):
    """As without the file of the start weights, which decides the groups."""
    train(tmp_path, record, killed_in_step=5)
    state = load_checkpoint_file(tmp_path / "last.pt")
    (group,) = state["optimizer"]["param_groups"]
    halves = [{**group, "params": group["params"][:2]}, {**group, "params": group["params"][2:]}]
    state["optimizer"]["param_groups"] = halves
    save_atomically(state, tmp_path / "last.pt")
    with pytest.raises(InputError, match=r"tensors in each: 2, 4; now 6\).*--pretrained_encoder or --pretrained_model"):
        train(tmp_path, record, resume=True)


def test_a_file_of_another_kind_is_no_checkpoint_to_resume_from(tmp_path, record):
    for content in ({"network": {}}, [1, 2]):
        save_atomically(content, tmp_path / "last.pt")
        with pytest.raises(InputError, match="last.pt is not a last.pt that this version wrote"):
            train(tmp_path, record, resume=True)


@pytest.mark.parametrize("stopped_behind_step", [1, 2, 6, 7, 14, 15])
def test_a_run_stopped_in_the_middle_of_an_epoch_resumes_to_the_unbroken_one(tmp_path, record, stopped_behind_step):
    unbroken = train(tmp_path / "unbroken", record)
    stopped = train(tmp_path / "stopped", record, stopped_behind_step=stopped_behind_step)
    assert not (tmp_path / "stopped" / "model.pt").exists()
    assert load_checkpoint_file(tmp_path / "stopped" / "last.pt")["validated"] is False
    resumed = train(tmp_path / "stopped", record, resume=True)
    assert stopped.steps + resumed.steps == unbroken.steps
    for name in ("last.pt", "best.pt", "model.pt"):
        one, other = (load_checkpoint_file(tmp_path / run / name) for run in ("stopped", "unbroken"))
        assert same(one, other), name


@pytest.mark.parametrize("stopped_in_validation", [1, 2, EPOCHS])
def test_a_validation_that_a_stop_cut_short_is_made_up_for(tmp_path, record, stopped_in_validation):
    train(tmp_path / "unbroken", record)
    stopped = train(tmp_path / "stopped", record, stopped_in_validation=stopped_in_validation)
    assert stopped.steps[-1] == stopped_in_validation * EPOCH_LENGTH
    resumed = train(tmp_path / "stopped", record, resume=True)
    assert len(stopped.steps + resumed.steps) == EPOCHS * EPOCH_LENGTH
    for name in ("last.pt", "best.pt", "model.pt"):
        one, other = (load_checkpoint_file(tmp_path / run / name) for run in ("stopped", "unbroken"))
        assert same(one, other), name


def test_a_longer_run_follows_its_own_schedule_from_where_the_shorter_one_ended(tmp_path, record):
    train(tmp_path, record, epochs=3)
    longer = train(tmp_path, record, epochs=5, lr=0.2, resume=True, resume_changes=["max_steps", "learning_rate"])
    assert longer.steps == list(range(10, 16))
    assert (tmp_path / "previous_model.pt").exists()  # not to be taken for the longer run's while that is under way
    network = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.2)
    schedule = WarmupCosineSchedule(optimizer, warmup_steps=2, t_total=15)
    expected = [0.2 * schedule.lr_lambda(step) for step in range(9, 15)]
    assert longer.rates == pytest.approx(expected)


@pytest.mark.parametrize("killed_in_step", [4, 7, 8, 14])
def test_a_run_resumed_while_or_after_new_parts_learn_first_is_the_same_run(tmp_path, record, killed_in_step):
    unbroken = train(tmp_path / "unbroken", record, new_parts_steps=7)
    assert unbroken.rates[:8] == [0.0] * 8 and unbroken.new_rates[3] == 0.1
    train(tmp_path / "killed", record, new_parts_steps=7, killed_in_step=killed_in_step)
    resumed = train(tmp_path / "killed", record, new_parts_steps=7, resume=True)
    left = len(resumed.steps)
    assert (resumed.rates, resumed.new_rates) == (unbroken.rates[-left:], unbroken.new_rates[-left:])
    for name in ("last.pt", "model.pt"):
        one, other = (load_checkpoint_file(tmp_path / run / name) for run in ("killed", "unbroken"))
        assert same(one, other), name


def test_another_length_of_the_first_phase_holds_from_the_resumed_step_on(tmp_path, record):
    train(tmp_path, record, new_parts_steps=4, killed_in_step=8, settings={"new_parts_steps": 4})
    changed = {"settings": {"new_parts_steps": 10}, "new_parts_steps": 10}
    with pytest.raises(InputError, match="new_parts_steps was 4, now 10"):
        train(tmp_path, record, resume=True, **changed)
    resumed = train(tmp_path, record, resume=True, resume_changes=["new_parts_steps"], **changed)
    assert resumed.steps == list(range(7, 16))
    # steps 7 to 10: the end of the first phase, half a cosine over its second half; then 2 up, and down over 3
    assert resumed.rates == pytest.approx([0.0] * 4 + [0.0, 0.05, 0.1, 0.075, 0.025])
    down = [0.1 * (1 + np.cos(np.pi * step / 5)) / 2 for step in (1, 2, 3, 4)]
    assert resumed.new_rates == pytest.approx(down + [0.0, 0.05, 0.1, 0.075, 0.025])


def test_counts_of_the_engine_are_kept(tmp_path, record):
    counted = {}

    class Count:
        def attach(self, engine):
            engine.state.skipped_steps = 0
            engine.state_dict_user_keys.append("skipped_steps")
            engine.add_event_handler(Events.EPOCH_STARTED, self)

        def __call__(self, engine):
            counted["before"] = engine.state.skipped_steps
            engine.state.skipped_steps += 1

    train(tmp_path, record, more=[Count()], killed_in_step=8)
    train(tmp_path, record, more=[Count()], resume=True)
    assert counted["before"] == 4
    assert load_checkpoint_file(tmp_path / "last.pt")["counts"] == {"skipped_steps": 5}


def test_only_rank_0_writes(tmp_path, record, monkeypatch):
    monkeypatch.setattr("bundles.common.training.checkpoint.rank", lambda: 1)
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


@pytest.mark.parametrize(("saved", "available"), [(True, True), (True, False), (False, True), (False, False)])
def test_the_state_of_a_gpu_is_restored_where_both_runs_have_one(monkeypatch, saved, available):
    state = torch.arange(3, dtype=torch.uint8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: saved)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: state)
    states, restored = random_states(), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "set_rng_state", restored.append)
    restore_random_states(states)
    assert [tensor is state for tensor in restored] == [True] * (saved and available)


def test_a_fresh_run_sets_an_earlier_one_aside_and_never_continues_it(tmp_path, record):
    train(tmp_path, record, killed_in_step=EPOCH_LENGTH + 1)
    earlier = (tmp_path / "last.pt").read_bytes()
    train(tmp_path, record, killed_in_step=1)  # stopped before its first checkpoint
    assert (tmp_path / "previous_last.pt").read_bytes() == earlier
    resumed = train(tmp_path, record, resume=True)
    assert resumed.steps[0] == 1  # from the start, not from where the earlier run was


def skipping(from_step):
    """Stands for a gradient guard that leaves out every step from one on."""

    class Skip:
        def attach(self, engine):
            engine.state.skipped_in_a_row = 0
            engine.add_event_handler(Events.ITERATION_COMPLETED, self)

        def __call__(self, engine):
            engine.state.skipped_in_a_row = max(0, engine.state.iteration - from_step + 1)

    return Skip()


def test_a_state_with_left_out_steps_at_its_end_does_not_replace_a_sound_one(tmp_path, record):
    train(tmp_path, record, more=[skipping(from_step=8)], killed_in_step=13)
    assert load_checkpoint_file(tmp_path / "last.pt")["step"] == 6
    stopped = train(tmp_path / "stopped", record, more=[skipping(from_step=8)], stopped_behind_step=10)
    assert stopped.steps[-1] == 10 and load_checkpoint_file(tmp_path / "stopped" / "last.pt")["step"] == 6


def test_nor_does_one_whose_validation_is_not_a_number(tmp_path, record):
    train(tmp_path, record, scores=(0.1, float("nan"), 0.2, 0.3, 0.4), killed_in_step=7)
    assert load_checkpoint_file(tmp_path / "last.pt")["step"] == 3


@pytest.mark.parametrize(("changed", "kept"), [("learning_rate", True), ("task_weights", False)])
def test_the_best_score_is_forgotten_where_another_thing_is_measured(tmp_path, record, changed, kept):
    settings = {"learning_rate": 0.1, "task_weights": 1}
    scores = (0.9, 0.1, 0.2, 0.3, 0.4)
    train(tmp_path, record, scores=scores, settings=settings, killed_in_step=5)
    settings[changed] = 0.5
    train(tmp_path, record, scores=scores, settings=settings, resume=True, resume_changes=[changed])
    best = load_checkpoint_file(tmp_path / "model.pt")["trained"]
    assert best["steps"] == (EPOCH_LENGTH if kept else 5 * EPOCH_LENGTH)


def test_a_setting_that_an_older_version_did_not_record_is_not_compared(tmp_path, record):
    settings = {"learning_rate": 0.1}
    train(tmp_path, record, settings=settings, killed_in_step=5)
    assert train(tmp_path, record, settings={**settings, "task": "BTCV"}, resume=True).steps[0] == 4


def test_the_scores_of_all_validations_are_kept_over_a_resume(tmp_path, record):
    scores = (0.1, 0.5, 0.3, 0.4, 0.2)
    train(tmp_path, record, scores=scores, killed_in_step=8)
    trainer = train(tmp_path, record, scores=scores, resume=True).trainer
    assert trainer.state.validations == [[3 * epoch, pytest.approx(score)] for epoch, score in enumerate(scores, 1)]


def test_scores_that_cannot_be_compared_are_not_kept(tmp_path, record):
    settings = {"learning_rate": 0.1, "max_steps": EPOCHS * EPOCH_LENGTH, "roi_size": (96, 96, 96)}
    train(tmp_path, record, settings=settings, killed_in_step=8)
    changed = {**settings, "roi_size": (64, 64, 64)}
    trainer = train(tmp_path, record, settings=changed, resume=True, resume_changes=["roi_size"]).trainer
    assert [step for step, _ in trainer.state.validations] == [9, 12, 15]


def test_the_last_line_names_the_step_and_the_score_of_the_weights(tmp_path, record, caplog):
    with caplog.at_level("INFO", logger="bundles.common.training.checkpoint"):
        train(tmp_path, record)
        train(tmp_path / "unvalidated", record, scores=None)
    assert [message for message in caplog.messages if message.startswith("wrote")] == [
        f"wrote {tmp_path}/model.pt: the weights of step 6, dice 0.5000",
        f"wrote {tmp_path}/unvalidated/model.pt: the weights of step 15",
    ]


@pytest.mark.parametrize("name", ["tasks", "heads", "labels", "task"])
def test_another_network_cannot_be_allowed(tmp_path, record, name):
    train(tmp_path, record, settings={name: ["a"]}, killed_in_step=5)
    with pytest.raises(InputError, match=f"another network: {name} was a, now b. .*--pretrained_model"):
        train(tmp_path, record, settings={name: ["b"]}, resume=True, resume_changes=[name])


def test_processes_that_see_different_files_are_refused(tmp_path, record, monkeypatch):
    train(tmp_path, record, killed_in_step=5)
    monkeypatch.setattr("bundles.common.training.checkpoint.gather_lists", lambda part: [*part, None])
    with pytest.raises(
        InputError, match=r"do not see the same .*last.pt: its step is 3, no file. .*share --output_dir"
    ):
        train(tmp_path, record, resume=True)


@pytest.mark.parametrize(
    ("scores", "epochs_run", "best_epoch"),
    [((0.1, 0.5, 0.3, 0.5, 0.9), 4, 2), ((0.1, 0.5, 0.3, 0.6, 0.2), 5, 4), ((0.1, 0.5, 0.3, float("nan"), 0.9), 4, 2)],
)
@pytest.mark.parametrize("killed_in_step", [None, 8, 11, 12])
def test_early_stopping_ends_the_run_as_complete_resumed_or_not(
    tmp_path, record, scores, epochs_run, best_epoch, killed_in_step
):
    options = {"scores": scores, "early_stopping": 2}
    if killed_in_step is not None:
        train(tmp_path, record, **options, killed_in_step=killed_in_step)
    run = train(tmp_path, record, **options, resume=killed_in_step is not None)
    assert run.steps[-1] == epochs_run * EPOCH_LENGTH
    assert load_checkpoint_file(tmp_path / "model.pt")["trained"]["steps"] == best_epoch * EPOCH_LENGTH


def test_resuming_a_run_that_stopped_early_makes_no_step(tmp_path, record):
    options = {"scores": (0.5, 0.1, 0.2, 0.9, 0.9), "early_stopping": 2}
    assert train(tmp_path, record, **options).steps == list(range(1, 3 * EPOCH_LENGTH + 1))
    before = load_checkpoint_file(tmp_path / "model.pt")
    assert train(tmp_path, record, **options, resume=True).steps == []
    assert same(load_checkpoint_file(tmp_path / "model.pt"), before)


@pytest.mark.parametrize("patience", [0, -1, 2.5, True, "3"])
def test_a_patience_that_is_no_number_of_validations_is_refused(tmp_path, record, patience):
    with pytest.raises(InputError, match=r"--early_stopping .* whole number, 1 or more, or null for no early stopping"):
        train(tmp_path, record, early_stopping=patience)


def test_without_a_validation_nothing_stops_early(tmp_path, record):
    assert train(tmp_path, record, scores=None, early_stopping=1).steps == list(range(1, 16))


def test_what_a_last_pt_lacks_is_named(tmp_path, record):
    train(tmp_path, record, killed_in_step=EPOCH_LENGTH + 1)
    state = load_checkpoint_file(tmp_path / "last.pt")
    for name in ("optimizer", "counts", "random"):
        save_atomically({key: value for key, value in state.items() if key != name}, tmp_path / "last.pt")
        with pytest.raises(InputError, match=rf"wrote \(it has no {name}\)"):
            train(tmp_path, record, resume=True)


@pytest.mark.parametrize("fault", ["gone", "cut"])
def test_best_weights_that_cannot_be_read_are_told_at_the_start_and_written_anew(tmp_path, record, caplog, fault):
    scores = (0.9, 0.1, 0.2, 0.4, 0.3)
    train(tmp_path, record, scores=scores, killed_in_step=2 * EPOCH_LENGTH + 1)
    best = tmp_path / "best.pt"
    best.unlink() if fault == "gone" else best.write_bytes(best.read_bytes()[:100])
    train(tmp_path, record, scores=scores, resume=True)
    assert "The best validation so far (dice 0.9) is forgotten" in caplog.text
    assert load_checkpoint_file(tmp_path / "model.pt")["trained"]["steps"] == 4 * EPOCH_LENGTH


def test_best_weights_that_are_gone_at_the_end_are_told(tmp_path, record):
    train(tmp_path, record)
    (tmp_path / "best.pt").unlink()
    with pytest.raises(InputError, match="best.pt cannot be read, and no validation of this run was left"):
        train(tmp_path, record, resume=True)


def test_results_of_all_earlier_runs_stay(tmp_path, record, caplog):
    train(tmp_path, record, killed_in_step=3 * EPOCH_LENGTH + 1, epochs=4)  # longer than the others
    results = []
    for lr in (0.1, 0.2, 0.3):
        train(tmp_path, record, lr=lr, epochs=2)
        results.append((tmp_path / "model.pt").read_bytes())
    caplog.set_level("INFO")
    train(tmp_path, record, killed_in_step=1)
    assert not (tmp_path / "model.pt").exists()
    kept = [tmp_path / f"previous_model{number}.pt" for number in ("", "_2", "_3")]
    assert [path.read_bytes() for path in kept] == results
    assert f"the earlier {tmp_path / 'model.pt'} is now previous_model_3.pt" in caplog.text
    train(tmp_path, record, epochs=1)
    train(tmp_path, record, epochs=2, resume=True, resume_changes=["max_steps"])
    assert [path.read_bytes() for path in kept] == results
    assert (tmp_path / "previous_model_4.pt").exists()  # of the same run, with fewer steps
    train(tmp_path, record, keep_results=False)
    assert not (tmp_path / "previous_model_5.pt").exists()


def test_two_starts_without_resume_keep_the_longer_run(tmp_path, record):
    train(tmp_path, record, killed_in_step=3 * EPOCH_LENGTH + 1)
    longer = (tmp_path / "last.pt").read_bytes()
    train(tmp_path, record, killed_in_step=EPOCH_LENGTH + 1)
    assert (tmp_path / "previous_last.pt").read_bytes() == longer
    train(tmp_path, record, killed_in_step=EPOCH_LENGTH + 1)
    assert (tmp_path / "previous_last.pt").read_bytes() == longer
    train(tmp_path, record)
    assert (tmp_path / "previous_last.pt").read_bytes() == longer
