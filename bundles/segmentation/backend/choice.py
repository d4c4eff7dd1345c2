# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Which library computes a network's windows: PyTorch, or OpenVINO after a check against PyTorch."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from monai.transforms import ResizeWithPadOrCrop

from ...common.errors import InputError
from ...common.run.distributed import named_device
from ...common.run.options import check_option
from ...common.words import counted
from .kept_conversion import KeptConversion, made_from
from .openvino_network import OpenVinoNetwork, convert, load_openvino, processor, version

logger = logging.getLogger(__name__)

#: Largest difference of a probability from PyTorch's, on one window. Both compute in fp32: differences of 1e-4 are usual.
TOLERANCE = 1e-3


def check_backend(*, backend: str, device: torch.device | str) -> None:
    """Check that this run can use the backend.

    Raises:
        InputError: there is no such backend, OpenVINO is not installed, or the device is not the CPU.
    """
    check_option("backend", backend)
    if backend == "openvino":
        if named_device(device).type != "cpu":
            raise InputError(
                f"--backend openvino computes on the CPU, but this run is on {device}. Add --device cpu, or leave "
                "--backend out, to use the GPU."
            )
        load_openvino()


def choose_backend(
    *, backend: str, device: torch.device | str, models: Sequence[str], roi_size: Sequence[int]
) -> OpenVinoBackend | None:
    """Return what `ProbabilityInferer` asks for the networks to compute with; None: they are used as they are.

    Args:
        backend: ``torch`` or ``openvino``.
        device: of the run.
        models: files of the networks, in the order of the ensemble.
        roi_size: window size in voxels.

    Raises:
        InputError: see `check_backend`.
    """
    check_backend(backend=backend, device=device)
    return OpenVinoBackend(models=models, roi_size=roi_size) if backend == "openvino" else None


@dataclass(frozen=True)
class _Replaced:
    """What computes a network, for as long as its weights are not written to."""

    weights: tuple
    by: torch.nn.Module | None


#: By network, so that a server that builds its inferer anew for each request reads nothing twice.
_replaced: WeakKeyDictionary[torch.nn.Module, dict[tuple, _Replaced]] = WeakKeyDictionary()


class OpenVinoBackend:
    """Replaces networks by converted ones that were seen to give PyTorch's probabilities.

    A conversion is kept beside the file of the weights (`KeptConversion`). Before it is used on a processor for the
    first time, it is compared with PyTorch on one window. If a probability differs by more than `TOLERANCE`, or the
    conversion fails, a WARNING says so, and the network itself is used.

    Args:
        models: files of the networks, in the order of the ensemble.
        roi_size: window size in voxels.
    """

    def __init__(self, *, models: Sequence[str], roi_size: Sequence[int]) -> None:
        self.models = list(models)
        self.roi_size = tuple(roi_size)

    def __call__(self, network: torch.nn.Module, number: int, images: torch.Tensor) -> torch.nn.Module:
        """Return what computes a network.

        Args:
            network: on the CPU, in evaluation.
            number: its place in ``models``.
            images: scans (B, C, X, Y, Z); the window in the middle of the first one is compared.
        """
        weights = tuple((tensor.data_ptr(), tensor._version) for tensor in network.state_dict(keep_vars=True).values())
        known = _replaced.setdefault(network, {})
        if self.roi_size not in known or known[self.roi_size].weights != weights:
            known[self.roi_size] = _Replaced(weights, self._replacement(network, self.models[number], images))
        return known[self.roi_size].by or network

    def _replacement(self, network: torch.nn.Module, file: str, images: torch.Tensor) -> torch.nn.Module | None:
        window = ResizeWithPadOrCrop(self.roi_size)(images[0]).as_subclass(torch.Tensor)[None]
        begin = time.monotonic()
        try:
            kept = KeptConversion(file, made_from(network, channels=window.shape[1], roi_size=self.roi_size))
            found = kept.read()
            model, checked = found or (convert(network, channels=window.shape[1], roi_size=self.roi_size), {})
            replacement = OpenVinoNetwork(model)
            cpu = processor()
            is_new = cpu not in checked
            difference = _difference(network, replacement, window) if is_new else checked[cpu]
        except (RuntimeError, ValueError, TypeError, OSError) as error:  # what OpenVINO raises for odd networks
            reason = str(error).strip().partition("\n")[0]
            logger.warning("%s: OpenVINO %s cannot compute it (%s). PyTorch goes on.", file, version(), reason)
            return None
        if not difference <= TOLERANCE:
            logger.warning(
                "%s: OpenVINO %s was refused: on one window its probabilities differ from PyTorch's by up to %.2g (allowed: "
                "%.0e). PyTorch goes on.",
                *(file, version(), difference, TOLERANCE),
            )
            return None
        logger.info(
            "%s: OpenVINO %s computes it in fp32 with %s, within %.1g of PyTorch's probabilities; %s in %.0f s",
            *(file, version(), counted(torch.get_num_threads(), "thread"), difference),
            *("read" if found else "converted", time.monotonic() - begin),
        )
        if is_new:
            _keep(kept, None if found else model, checked | {cpu: difference})
        return replacement


def _keep(kept: KeptConversion, model: Any | None, checked: dict[str, float]) -> None:
    """Write a new conversion, or without ``model`` its differences alone."""
    try:
        if model is None:
            kept.note(checked)
        else:
            kept.write(model, checked)
            logger.info("kept for the next run: %s", kept.operations)
    except (OSError, RuntimeError) as error:
        logger.warning(
            "The converted network cannot be kept in %s (%s): each run converts it anew. Give the folder write access, or "
            "copy the weights to one that has.",
            *(kept.record.parent, str(error).strip().partition("\n")[0]),
        )


@torch.no_grad()
def _difference(network: torch.nn.Module, other: torch.nn.Module, window: torch.Tensor) -> float:
    """Return the largest difference between the probabilities of two networks; NaN if any is not a number."""
    return float((network(window).float().softmax(1) - other(window).softmax(1)).abs().max())
