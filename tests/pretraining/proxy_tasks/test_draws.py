# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Each scan has a generator of its own, fixed by the seed and the number of its draw."""

from __future__ import annotations

import numpy as np
import torch

from bundles.pretraining.proxy_tasks.draws import draw, generator


def numbers(seed, number):
    return torch.rand(4, generator=generator(seed, number, "cpu"))


def test_a_generator_is_fixed_by_seed_and_number_which_are_not_added_up():
    assert torch.equal(numbers(1, 2), numbers(1, 2))
    for other in ((2, 1), (1, 3), (2, 2), (0, 3)):
        assert not torch.equal(numbers(1, 2), numbers(*other))


def test_draws_are_joined_in_the_order_of_the_generators():
    joined = draw([generator(0, 1, "cpu"), generator(0, 2, "cpu")], lambda g: torch.rand(4, generator=g))
    assert torch.equal(joined, torch.cat([numbers(0, 1), numbers(0, 2)]))


def test_seeds_are_all_but_the_lowest_of_64_bits():
    """What a seed draws must not change from one version to the next: runs are resumed and repeated."""
    state = np.random.SeedSequence([3, 5]).generate_state(1, dtype=np.uint64)[0]
    assert generator(3, 5, "cpu").initial_seed() == int(state) // 2
