# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
from __future__ import annotations

import pytest
import torch
from ignite.engine import Events
from monai.engines import SupervisedTrainer
from torch.utils._python_dispatch import TorchDispatchMode

from bundles.common.errors import InputError
from bundles.common.training.weight_average import UpdateAverage, WeightAverage


def weights_and_means(steps: int, *, iterations: int, accumulation_steps: int = 1) -> tuple[list, list, WeightAverage]:
    """The weights after each iteration of a run by SGD, and the mean beside them."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    average = WeightAverage(network=network, steps=steps)
    batches = [{"image": torch.randn(2, 3), "label": torch.randn(2, 1)} for _ in range(iterations)]
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=batches,
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.3),
        loss_function=torch.nn.MSELoss(),
        train_handlers=[UpdateAverage(average=average)],
        decollate=False,
        accumulation_steps=accumulation_steps,
    )
    weights, means = [], []

    @trainer.on(Events.ITERATION_COMPLETED)
    def keep(engine):
        weights.append(torch.nn.utils.parameters_to_vector(network.parameters()).detach().clone())
        means.append(torch.nn.utils.parameters_to_vector(average.network.parameters()).detach().clone())

    trainer.run()
    return weights, means, average


def test_the_mean_of_all_steps_and_then_an_exponential_one():
    weights, means, _ = weights_and_means(4, iterations=9)
    torch.testing.assert_close(means[2], (weights[0] + weights[1] + weights[2]) / 3)
    expected = sum(weights[:4]) / 4
    torch.testing.assert_close(means[3], expected)
    for t in range(4, 9):
        expected = 0.75 * expected + 0.25 * weights[t]
        torch.testing.assert_close(means[t], expected)
    assert not torch.allclose(means[8], weights[8], atol=1e-3)


def test_accumulated_iterations_count_as_one_step():
    weights, means, average = weights_and_means(10, iterations=6, accumulation_steps=3)
    assert torch.equal(weights[2], weights[4]) and not torch.equal(weights[2], weights[5])
    torch.testing.assert_close(means[5], (weights[2] + weights[5]) / 2)
    assert int(average.model.n_averaged) == 2


def test_one_step_is_the_network_itself():
    weights, means, average = weights_and_means(1, iterations=3)
    assert average.model is None and average.network is average.trained
    assert torch.equal(means[2], weights[2])


class Copies(TorchDispatchMode):
    """What is copied, and what may be sent to a device."""

    def __init__(self):
        super().__init__()
        self.copied, self.sent = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.copy_:
            self.copied.append(args[0].numel())
        if func.overloadpacket is torch.ops.aten._to_copy:
            self.sent.append(args[0])
        return func(*args, **(kwargs or {}))


def test_index_tables_are_copied_once_and_nothing_is_sent():
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    network.register_buffer("index", torch.arange(7))
    average = WeightAverage(network=network, steps=3)
    network.index += 1
    seen = []
    for _ in range(3):
        network(torch.randn(5, 3))
        with Copies() as copies:
            average.update()
        seen.append(sorted(copies.copied))
        assert copies.sent == []
        for theirs, ours in zip(network.buffers(), average.network.buffers(), strict=True):
            assert torch.equal(theirs, ours)
    assert seen == [[1, 4, 4, 7], [1, 4, 4], [1, 4, 4]]  # mean, variance and number of batches; the index once


def test_a_mean_that_starts_anew_forgets_what_was():
    _, _, average = weights_and_means(4, iterations=5)
    average.start_anew()
    for mean, weight in zip(average.network.parameters(), average.trained.parameters(), strict=True):
        assert torch.equal(mean, weight)
    assert int(average.model.n_averaged) == 0


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, "10"])
def test_what_is_no_number_of_steps_is_refused(steps):
    with pytest.raises(InputError, match=r"--average_steps .* whole number, 1 or more"):
        WeightAverage(network=torch.nn.Linear(1, 1), steps=steps)


@pytest.mark.parametrize(
    ("run_steps", "shorten", "steps", "warned"),
    [(401, False, 200, False), (399, False, 200, True), (20, True, 5, False)],
)
def test_a_mean_of_most_of_the_run_is_warned_of_or_shortened(caplog, run_steps, shorten, steps, warned):
    average = WeightAverage(network=torch.nn.Linear(1, 1), steps=200, run_steps=run_steps, shorten=shorten)
    assert average.steps == steps
    assert (f"--average_steps 200 of a run of {run_steps} steps" in caplog.text) == warned


def test_a_run_of_few_steps_in_monai_label_has_no_mean():
    assert WeightAverage(network=torch.nn.Linear(1, 1), steps=200, run_steps=3, shorten=True).model is None


def test_two_steps_are_the_shortest_mean_and_half_a_run_the_longest_without_a_warning(caplog):
    _, means, average = weights_and_means(2, iterations=2)
    assert average.model is not None and not torch.equal(*means)
    WeightAverage(network=torch.nn.Linear(1, 1), steps=200, run_steps=400)
    assert caplog.text == ""
