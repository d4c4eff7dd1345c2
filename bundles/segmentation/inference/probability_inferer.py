# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Class probabilities of a whole scan: the mean over networks and mirror images, within the available memory."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import combinations
from typing import Any, NamedTuple

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer

from ...common.errors import InputError
from ...common.run.options import check_option
from .sliding_window import blend_windows

logger = logging.getLogger(__name__)

# In plain RuntimeErrors of PyTorch: its allocator on the CPU, and the libraries on a GPU, which allocate on their own.
OUT_OF_MEMORY_ON_CPU = "DefaultCPUAllocator"
OUT_OF_MEMORY_ON_GPU = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
SLICES = 8  # slices converted from logits to probabilities at a time


class _Plan(NamedTuple):
    """Windows per forward pass, and what is kept off the GPU."""

    windows: int
    volumes_on_cpu: bool = False
    networks_on_cpu: bool = False


class ProbabilityInferer(Inferer):
    """Sliding-window inference (Gaussian weights, see `blend_windows`), softmax over the classes, then the mean.

    The mean is over all networks and all 2**n mirror images of the scan along the n ``mirror_axes``. Predictions are
    mirrored back first. One network without mirroring gives the softmax of the blended logits. Mirror only along axes
    that were flipped in training: a network that never saw a liver on the left does not recognise it there.

    At most two class volumes (K, X, Y, Z) in float32 exist at a time, for any number of networks and mirror images: the
    sum and the logits that are being blended.

    If the GPU's memory is too small, the scan is tried again with half as many windows per forward pass, down to one;
    then with the class volumes in the computer's memory; then entirely on the CPU. Each step is logged as a warning.
    The next scan starts with the settings that worked.

    Args:
        roi_size: window size in voxels.
        sw_batch_size: windows per forward pass.
        overlap: overlap of neighbouring windows as a share of the window, one number or one per axis; in [0, 1).
        skip_air: skip windows in which all voxels are exactly 0. Voxels covered only by such windows are background.
        mirror_axes: spatial axes (0, 1, 2) along which the scan is mirrored.
        others: additional networks of the ensemble, moved to the device of the scan. Their sizes may differ, their
            classes must not.
        backend: maps a network, its place in the ensemble and the scans to the network that computes in its place
            (`choose_backend`); None: PyTorch computes all of them.
        amp: mixed precision on a GPU, for a caller that does not set it, such as MONAI Label.
        amp_kwargs: arguments of ``torch.autocast`` with ``amp``.

    Raises:
        InputError: here for invalid arguments; when called, if the scan or what the network makes of it contains NaN or
            infinite values, or if it does not fit into memory even on the CPU.
    """

    def __init__(
        self,
        *,
        roi_size: Sequence[int],
        sw_batch_size: int,
        overlap: float | Sequence[float],
        skip_air: bool = True,
        mirror_axes: Sequence[int] = (),
        others: Sequence[torch.nn.Module] = (),
        backend: Callable[[torch.nn.Module, int, torch.Tensor], torch.nn.Module] | None = None,
        amp: bool = False,
        amp_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.amp, self.amp_kwargs = amp, dict(amp_kwargs or {})
        _check_arguments(sw_batch_size, overlap, mirror_axes)
        self.roi_size = roi_size
        self.overlap = overlap
        self.skip_air = skip_air
        self.mirrors = [axes for n in range(len(mirror_axes) + 1) for axes in combinations(mirror_axes, n)]
        self.others = [network.eval() for network in others]
        self.backend = backend
        self._computing: Sequence[torch.nn.Module] = ()
        halvings = [_Plan(sw_batch_size // 2**n) for n in range(int(math.log2(sw_batch_size)) + 1)]
        self._plans = [*halvings, _Plan(1, volumes_on_cpu=True), _Plan(1, volumes_on_cpu=True, networks_on_cpu=True)]

    @torch.no_grad()
    def __call__(self, inputs: torch.Tensor, network: torch.nn.Module) -> torch.Tensor:
        """Return the probabilities (B, K, X, Y, Z) of scans (B, C, X, Y, Z), float32, with the metadata of the input.

        They are on the device of the input, or on the CPU if the GPU's memory is too small.
        """
        images = (inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs).float()
        _check_finite(inputs)
        probabilities = None
        while probabilities is None:
            try:
                with torch.autocast("cuda", **self.amp_kwargs) if self.amp else nullcontext():
                    probabilities = self._mean(images, network, self._plans[0])
            except torch.OutOfMemoryError as error:
                reason, of_gpu = ". ".join(str(error).split(". ")[:2]), True
            except RuntimeError as error:
                of_gpu = any(text in str(error) for text in OUT_OF_MEMORY_ON_GPU)
                if not of_gpu and OUT_OF_MEMORY_ON_CPU not in str(error):
                    raise
                reason = str(error).splitlines()[0]
            if probabilities is None:  # not in the except block: its traceback keeps the volumes of the failed attempt
                torch.cuda.empty_cache()
                self._fall_back(reason, images, of_gpu=of_gpu)
        _check_probabilities(probabilities, inputs)
        if isinstance(inputs, MetaTensor):
            return MetaTensor(probabilities).copy_meta_from(inputs)
        return probabilities

    def computed_by(self) -> list[str]:
        """What computed the networks for the last scan, such as ``PyTorch 2.13.0``; empty before the first one."""
        return sorted({getattr(network, "computed_by", f"PyTorch {torch.__version__}") for network in self._computing})

    def _mean(self, images: torch.Tensor, network: torch.nn.Module, plan: _Plan) -> torch.Tensor:
        cpu, home = torch.device("cpu"), images.device
        networks = [network, *self.others]
        if self.backend is not None:
            networks = [self.backend(member, number, images) for number, member in enumerate(networks)]
        self._computing = networks
        total = None
        try:
            for member in networks:
                member.to(cpu if plan.networks_on_cpu else home)
                for axes in self.mirrors:
                    dims = [axis + 2 for axis in axes]
                    logits = blend_windows(
                        images.flip(dims) if dims else images,
                        member,
                        roi_size=self.roi_size,
                        sw_batch_size=getattr(member, "windows_at_once", plan.windows),
                        overlap=self.overlap,
                        skip_air=self.skip_air,
                        network_device=cpu if plan.networks_on_cpu else home,
                        volume_device=cpu if plan.volumes_on_cpu else home,
                    )
                    total = _add_softmax(total, logits, dims)
                    del logits  # free the memory before the next pass
                if hasattr(member, "release_memory"):
                    member.release_memory()
        finally:
            if plan.networks_on_cpu:  # the evaluator and the next scan expect them on their original device
                for member in networks:
                    member.to(home)
        passes = len(networks) * len(self.mirrors)
        return total.div_(passes) if passes > 1 else total

    def _fall_back(self, reason: str, images: torch.Tensor, *, of_gpu: bool) -> None:
        tried = (
            f"{_windows(self._plans[0])} of {list(self.roi_size)} voxels at a time, a scan of {list(images.shape[2:])}"
        )
        on_cpu = not of_gpu and images.device.type == "cpu"
        if len(self._plans) == 1 or (on_cpu and self._plans[1].volumes_on_cpu):  # the other plans are this one
            one = "does not fit into the computer's memory"
            both = "fits neither into the GPU's memory nor into the computer's"
            raise InputError(
                f"The scan {one if on_cpu else both} ({tried}): {reason}. Set a smaller "
                "--roi_size or a coarser --spacing, if the model was trained with them, or use a machine with more memory."
            )
        self._plans.pop(0)
        plan = self._plans[0]
        if plan.networks_on_cpu:
            now = "On the CPU from now on, which is slow; --device cpu avoids the failed attempts"
        elif plan.volumes_on_cpu:
            now = (
                "From now on the probabilities are combined in the computer's memory, which is slower; "
                "--sw_batch_size 1 avoids all but one of the failed attempts"
            )
        else:
            now = f"From now on {_windows(plan)} at a time; --sw_batch_size {plan.windows} avoids the failed attempt"
        memory = "GPU's" if of_gpu else "computer's"
        logger.warning("The %s memory is too small (%s): %s. %s.", memory, tried, reason, now)


def _check_probabilities(probabilities: torch.Tensor, inputs: torch.Tensor) -> None:
    """Refuse probabilities that are not numbers: the largest of them would be background.

    The softmax makes all classes of a voxel NaN if one of its logits is NaN or infinite, so one class is enough to
    check.
    """
    bad = sum(int(part[:, :1].isnan().sum()) for part in probabilities.split(SLICES, dim=2))
    if bad:
        raise InputError(
            f"{_name_of(inputs)}: what the network computes is not a number (NaN) in {bad} voxels. In mixed precision large "
            "values overflow: repeat with --amp_type bf16, or with --amp false. If that does not help, the weights are "
            "damaged, or the scan is of another kind than those of the training."
        )


def _check_finite(inputs: torch.Tensor) -> None:
    if not torch.isfinite(inputs).all():
        raise InputError(
            f"{_name_of(inputs)} has voxels that are not numbers (NaN or infinite), which would corrupt the mask in a wide area. "
            "Repair or remove the file; --check_data full finds all such files before the run."
        )


def _name_of(inputs: torch.Tensor) -> str:
    return inputs.meta.get("filename_or_obj", "the scan") if isinstance(inputs, MetaTensor) else "the scan"


def _windows(plan: _Plan) -> str:
    return f"{plan.windows} window{'s' * (plan.windows > 1)}"


def _add_softmax(total: torch.Tensor | None, logits: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """Mirror ``logits`` back along ``dims`` and add their softmax to ``total``.

    If ``total`` is None, the softmax is computed in place and returned as the new total.
    """
    first = total is None
    total = logits if first else total
    length = logits.shape[2]
    for start in range(0, length, SLICES):
        stop = min(start + SLICES, length)
        part = logits[:, :, length - stop : length - start] if 2 in dims else logits[:, :, start:stop]
        part = (part.flip(dims) if dims else part).softmax(1)
        if first:
            total[:, :, start:stop] = part  # in place: the first image is never mirrored
        else:
            total[:, :, start:stop] += part
    return total


def _check_arguments(sw_batch_size: int, overlap: float | Sequence[float], mirror_axes: Sequence[int]) -> None:
    check_option("sw_batch_size", sw_batch_size)
    check_option("overlap", overlap)
    axes = mirror_axes if isinstance(mirror_axes, (list, tuple)) else [mirror_axes]
    if axes is not mirror_axes or any(axis not in (0, 1, 2) or axes.count(axis) > 1 for axis in axes):
        raise InputError(
            f"--mirror_axes {mirror_axes!r} must be a list of distinct spatial axes (0, 1, 2), such as [0,1]; [] for no "
            "mirroring."
        )
