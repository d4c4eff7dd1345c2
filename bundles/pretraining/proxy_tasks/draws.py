# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Random draws for a batch with one generator per scan.

What is drawn for a scan does not depend on the other scans of its batch, so any number of processes draws the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch


def generator(seed: int, number: int, device: torch.device | str) -> torch.Generator:
    """Return the generator for draw ``number`` (`common.data.seeded_crops`) of a run with this seed."""
    state = np.random.SeedSequence([seed, number]).generate_state(1, dtype=np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))


def draw(generators: Sequence[torch.Generator], function: Callable[[torch.Generator], torch.Tensor]) -> torch.Tensor:
    """Return the draws of all generators, joined along the first dimension."""
    return torch.cat([function(generator) for generator in generators])
