# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""How far each part of a network has moved from its start weights: what a training changes, and what it leaves."""

from __future__ import annotations

import hashlib
import logging
import math
import statistics
from collections.abc import Iterator, Mapping

import torch
from ignite.engine import Engine, Events
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..run.distributed import rank, unwrap
from ..weights.dialects import ENCODER
from ..weights.module_table import part_of

logger = logging.getLogger(__name__)

TRANSFORMER, REST = ENCODER.removesuffix("."), "rest"


def weight_matrices(network: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and tensor of the trained weight matrices and convolution kernels of a network.

    Left out are frozen tensors (they do not move), biases, weights of norms and tables of relative position biases:
    these begin at constants or near 0, so that a direction means little, and make up less than a hundredth of the
    parameters.
    """
    for name, module in network.named_modules():
        if isinstance(module, (nn.Linear, _ConvNd)) and module.weight.requires_grad:
            yield f"{name}.weight", module.weight


def moved(start: Mapping[str, torch.Tensor], network: torch.nn.Module) -> dict[str, dict[str, float]]:
    """Compare the weights of a network with those at its start.

    Args:
        start: name to tensor, as from `weight_matrices`. Tensors of zeros have no direction, and are left out.
        network: the network now.

    Returns:
        ``cosine`` and ``distance``, by part of the network (`part_of`), and ``median_cosine``, by ``swinViT`` and
        ``rest``. The cosine is that of the angle between all weights of the part at the start and now; the distance is
        ``|w - w0| / |w0|``. The median is over the single matrices and kernels, so that large ones do not outweigh the
        others. Rounded to six digits.
    """
    sums: dict[str, list[float]] = {}
    cosines: dict[str, list[float]] = {}
    for name, weight in weight_matrices(network):
        # in double precision on the CPU: the same on every device, and exact where hardly anything has moved
        w0, w = start[name].double().flatten(), weight.detach().cpu().double().flatten()
        row = [float(w0 @ w0), float(w @ w), float(w0 @ w), float((w - w0).square().sum())]
        if row[0] == 0:
            continue
        part = sums.setdefault(part_of(name), [0.0] * 4)
        part[:] = [total + value for total, value in zip(part, row, strict=True)]
        cosines.setdefault(TRANSFORMER if name.startswith(ENCODER) else REST, []).append(_cosine(row))
    return {
        "cosine": {part: round(_cosine(row), 6) for part, row in sums.items()},
        "distance": {part: round(math.sqrt(row[3] / row[0]), 6) for part, row in sums.items()},
        "median_cosine": {group: round(statistics.median(values), 6) for group, values in cosines.items()},
    }


def _cosine(row: list[float]) -> float:
    """Return the cosine from the squared norms and the product; 0 if all weights have become 0."""
    return row[2] / math.sqrt(row[0] * row[1]) if row[1] else 0.0


class Movement:
    """Handler for `SupervisedTrainer` that records after every epoch how far each part has moved from the start.

    Add it before `TrainingCheckpoint`: a resumed run then captures its start weights, which are built from the same
    seed and the same file, before the saved ones are loaded. Add it before `Tracking`, which draws the curves.

    ``engine.state.moved`` holds the result of `moved`; it is saved in ``last.pt`` and under ``trained`` in
    ``model.pt``, where it belongs to the weights of that file. ``engine.state.start_fingerprint`` is a checksum of the
    start weights. If that of a resumed run differs (another seed, or without the file of the start weights), nothing is
    recorded from then on, with a warning. Only rank 0 computes. The start weights stay in the CPU's memory.

    Args:
        network: what is measured, with or without ``DistributedDataParallel``: the network that is saved, so the
            average of the weights if there is one.
    """

    def __init__(self, *, network: torch.nn.Module) -> None:
        self.network = unwrap(network)
        self.start: dict[str, torch.Tensor] = {}
        self.fingerprint = ""
        self.warned = False

    def attach(self, engine: Engine) -> None:
        """Register the handlers."""
        if rank() == 0:
            engine.state.moved, engine.state.start_fingerprint = {}, ""
            engine.state_dict_user_keys.extend(["moved", "start_fingerprint"])
            engine.add_event_handler(Events.STARTED, self.started)
            engine.add_event_handler(Events.EPOCH_COMPLETED, self.epoch_completed)

    def started(self, engine: Engine) -> None:
        """Keep a copy of the start weights."""
        self.start = {name: weight.detach().cpu().clone() for name, weight in weight_matrices(self.network)}
        checksum = hashlib.sha256()
        for weight in self.start.values():
            checksum.update(weight.contiguous().numpy())
        self.fingerprint = engine.state.start_fingerprint = checksum.hexdigest()[:16]

    def epoch_completed(self, engine: Engine) -> None:
        """Measure, record and log."""
        if engine.should_terminate:  # a stop interrupted the validation
            return
        if engine.state.start_fingerprint != self.fingerprint:  # loaded from last.pt
            if not self.warned:
                logger.warning(
                    "the resumed run had other start weights (another --seed, --pretrained_encoder or --pretrained_model): "
                    "how far the network has moved from them is not recorded any more"
                )
            self.warned, engine.state.moved = True, {}
            return
        engine.state.moved = moved(self.start, self.network)
        medians = ", ".join(f"{group} {value:.4f}" for group, value in engine.state.moved["median_cosine"].items())
        logger.info("cosine between the weights at the start and now (median): %s", medians)
