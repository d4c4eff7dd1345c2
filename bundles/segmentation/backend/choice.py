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
from ...common.run import mixed_precision
from ...common.run.distributed import named_device
from ...common.run.options import check_option
from ...common.words import counted
from .kept_conversion import KeptConversion, made_from
from .openvino_network import OpenVinoNetwork, convert, fast_types, load_openvino, processor, version

logger = logging.getLogger(__name__)

#: By backend, its precision.
PRECISION = {"openvino": "fp32", "openvino_bf16": "bf16"}
#: What is compared with PyTorch on one window: in fp32 the probabilities, for which differences of 1e-4 are usual; in
#: bf16 they differ by more, and the mask is compared.
COMPARED = {
    "fp32": "the largest difference of its probabilities from PyTorch's",
    "bf16": "the share of voxels with another label than PyTorch's",
}
TOLERANCE = 1e-3  # largest difference of both kinds


def check_backend(*, backend: str, device: torch.device | str) -> None:
    """Check that this run can use the backend.

    Raises:
        InputError: there is no such backend, OpenVINO is not installed, the device is not the CPU, or the processor has
            no bfloat16.
    """
    check_option("backend", backend)
    if backend in PRECISION:
        if named_device(device).type != "cpu":
            raise InputError(
                f"--backend {backend} computes on the CPU, but this run is on {device}. Add --device cpu, or leave "
                "--backend out, to use the GPU."
            )
        load_openvino()
        if PRECISION[backend] == "bf16" and "BF16" not in fast_types():
            raise InputError(
                f"--backend {backend}: this processor ({processor()}) does not compute in bfloat16. Use --backend openvino."
            )


def precision_of_run(*, backend: str, amp: bool, amp_type: str) -> str:
    """Return the precision that a run is asked to compute in: that of the backend, else of `mixed_precision`."""
    return PRECISION.get(backend) or mixed_precision.precision(amp=amp, amp_type=amp_type)


def choose_backend(
    *, backend: str, device: torch.device | str, models: Sequence[str], roi_size: Sequence[int]
) -> OpenVinoBackend | None:
    """Return what `ProbabilityInferer` asks for the networks to compute with; None: they are used as they are.

    Args:
        backend: ``torch``, ``openvino`` (fp32) or ``openvino_bf16``.
        device: the run's device.
        models: files of the networks, in the order of the ensemble.
        roi_size: window size in voxels.

    Raises:
        InputError: see `check_backend`.
    """
    check_backend(backend=backend, device=device)
    if backend not in PRECISION:
        return None
    return OpenVinoBackend(models=models, roi_size=roi_size, precision=PRECISION[backend])


@dataclass(frozen=True)
class _Replaced:
    """What computes a network, for as long as its weights are not written to."""

    weights: tuple
    by: torch.nn.Module | None


#: By network, so that a server that builds a new inferer for each request reads nothing twice.
_replaced: WeakKeyDictionary[torch.nn.Module, dict[tuple, _Replaced]] = WeakKeyDictionary()


class OpenVinoBackend:
    """Replaces networks by converted ones that were seen to give PyTorch's probabilities.

    A conversion is kept next to the file of the weights (`KeptConversion`). Before it is used on a processor in a
    precision for the first time, it is compared with PyTorch on one window (`COMPARED`). If it differs by more than
    `TOLERANCE`, or the conversion fails, a WARNING says so, and the network itself is used.

    Args:
        models: files of the networks, in the order of the ensemble.
        roi_size: window size in voxels.
        precision: ``fp32`` or ``bf16``.
    """

    def __init__(self, *, models: Sequence[str], roi_size: Sequence[int], precision: str = "fp32") -> None:
        self.models = list(models)
        self.roi_size = tuple(roi_size)
        self.precision = precision

    def __call__(self, network: torch.nn.Module, number: int, images: torch.Tensor) -> torch.nn.Module:
        """Return what computes a network.

        Args:
            network: the network, on the CPU, in evaluation mode.
            number: its place in ``models``.
            images: scans (B, C, X, Y, Z); the window in the middle of the first one is compared.
        """
        weights = tuple((tensor.data_ptr(), tensor._version) for tensor in network.state_dict(keep_vars=True).values())
        known = _replaced.setdefault(network, {})
        asked = (self.roi_size, self.precision)
        if asked not in known or known[asked].weights != weights:
            known[asked] = _Replaced(weights, self._replacement(network, self.models[number], images))
        return known[asked].by or network

    def _replacement(self, network: torch.nn.Module, file: str, images: torch.Tensor) -> torch.nn.Module | None:
        window = ResizeWithPadOrCrop(self.roi_size)(images[0]).as_subclass(torch.Tensor)[None]
        begin = time.monotonic()
        try:
            kept = KeptConversion(file, made_from(network, channels=window.shape[1], roi_size=self.roi_size))
            found = kept.read()
            model, checked = found or (convert(network, channels=window.shape[1], roi_size=self.roi_size), {})
            replacement = OpenVinoNetwork(model, precision=self.precision)
            place = f"{processor()}, {self.precision}"
            is_new = place not in checked
            difference = _difference(network, replacement, window, self.precision) if is_new else checked[place]
        except (RuntimeError, ValueError, TypeError, OSError) as error:  # what OpenVINO raises for odd networks
            reason = str(error).strip().partition("\n")[0]
            logger.warning("%s: OpenVINO %s cannot compute it (%s). PyTorch goes on.", file, version(), reason)
            return None
        if not difference <= TOLERANCE:
            logger.warning(
                "%s: OpenVINO %s in %s was refused: on one window %s is %.2g (allowed: %.0e). PyTorch goes on.",
                *(file, version(), self.precision, COMPARED[self.precision], difference, TOLERANCE),
            )
            return None
        logger.info(
            "%s: OpenVINO %s computes it in %s with %s; on one window %s is %.1g; %s in %.0f s",
            *(file, version(), self.precision, counted(torch.get_num_threads(), "thread")),
            *(COMPARED[self.precision], difference, "read" if found else "converted", time.monotonic() - begin),
        )
        if is_new:
            _keep(kept, None if found else model, checked | {place: difference})
        return replacement


def _keep(kept: KeptConversion, model: Any | None, checked: dict[str, float]) -> None:
    """Write a new conversion, or without ``model`` only its differences."""
    try:
        if model is None:
            kept.note(checked)
        else:
            kept.write(model, checked)
            logger.info("kept for the next run: %s", kept.operations)
    except (OSError, RuntimeError) as error:
        logger.warning(
            "The converted network cannot be kept in %s (%s): each run converts it again. Give the folder write access, or "
            "copy the weights to one that has.",
            *(kept.record.parent, str(error).strip().partition("\n")[0]),
        )


@torch.no_grad()
def _difference(network: torch.nn.Module, other: torch.nn.Module, window: torch.Tensor, precision: str) -> float:
    """Return how much two networks differ, see `COMPARED`; NaN if a probability is not a number."""
    expected, found = network(window).float().softmax(1), other(window).softmax(1)
    largest = (expected - found).abs().max()
    if precision == "fp32" or not torch.isfinite(largest):
        return float(largest)
    return float((expected.argmax(1) != found.argmax(1)).float().mean())
