# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Compile regions of a Swin UNETR with ``torch.compile``: the decoder, or all of it, also as CUDA graphs.

`torch.nn.Module.compile` changes neither modules nor names: state dicts, checkpoints and exports are those of the same
network without it. Regions are compiled, not the network as a whole: they get plain tensors, whoever calls the network,
and the pre-training calls stages of the encoder by themselves. The attention runs between compiled pieces
(``fast/attention.py``), since its kernels are not part of PyTorch's public interface.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from monai.networks.blocks import UnetOutBlock, UnetrBasicBlock, UnetrUpBlock
from monai.networks.nets.swin_unetr import BasicLayer, PatchEmbed
from torch import nn

from ..errors import InputError

logger = logging.getLogger(__name__)

DECODER = (UnetrBasicBlock, UnetrUpBlock, UnetOutBlock)
ENCODER = (BasicLayer, PatchEmbed)
#: Value of ``--compile`` to the types of the regions, and the arguments of ``torch.compile``.
REGIONS: dict[str, tuple[tuple[type, ...], dict[str, Any]]] = {
    "decoder": (DECODER, {}),
    "network": ((*DECODER, *ENCODER), {}),
    "graphs": ((*DECODER, *ENCODER), {"mode": "reduce-overhead"}),
}
#: Versions that torch.compile keeps of one function. All regions of a kind share their functions, each with shapes of
#: its own, in training and in validation; beyond PyTorch's limit of 8, the others would silently run uncompiled.
VERSIONS = 128
TRITON_FROM = (7, 0)  # compute capability of the oldest cards that Triton compiles for


def replays_graphs(method: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a network's method called outside ``forward``: with ``--compile graphs``, it begins a generation.

    Otherwise each call would be recorded as another graph after the earlier ones, in ever more memory. The result of
    the previous call may be overwritten.
    """

    @functools.wraps(method)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, "graphs_are_replayed", False):
            torch.compiler.cudagraph_mark_step_begin()
        return method(self, *args, **kwargs)

    return call


def check_compile(*, compile: str | None, device: torch.device | str, accumulation_steps: int = 1) -> None:
    """Check that this machine can compile for the device, before anything is read.

    Args:
        compile: the option.
        device: the run's device.
        accumulation_steps: batches whose gradients are summed. Sums that one graph begins are overwritten by the next.

    Raises:
        InputError: it cannot; the message says what is missing.
    """
    if compile is None:
        return
    if compile not in REGIONS:
        raise InputError(f"--compile {compile!r} is not one of {', '.join(REGIONS)}; leave it out to compile nothing.")
    kind = torch.device(device).type
    if compile == "graphs" and kind != "cuda":
        raise InputError(
            f"--compile graphs needs a GPU, and this run is on {device}: CUDA graphs replay the work of a GPU. "
            "Use --compile network, or leave the option out."
        )
    if compile == "graphs" and accumulation_steps > 1:
        raise InputError(
            f"--compile graphs cannot sum the gradients of {accumulation_steps} batches (--accumulation_steps or "
            "--global_batch_size): CUDA graphs overwrite them. Use --compile network."
        )
    if (reason := why_no_compiler(kind)) is not None:
        raise InputError(f"--compile {compile} cannot work here: {reason}, or leave the option out.")


def why_no_compiler(kind: str) -> str | None:
    """Return what ``torch.compile`` lacks on this machine for a kind of device, and what to do; None if nothing."""
    if kind == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "Triton is missing; install it with the PyTorch for CUDA that it belongs to"
        if torch.cuda.get_device_capability() < TRITON_FROM:
            return "this GPU is older than what Triton compiles for (compute capability 7.0); use a newer one"
        names = [os.environ.get("CC"), "gcc", "clang"]
    else:
        names = [os.environ.get("CXX"), "g++", "clang++"]
    if any(name and shutil.which(name) for name in names):
        return None
    kind_of = "C" if kind == "cuda" else "C++"
    wanted = " or ".join(name for name in names[1:] if name)
    variable = "CC" if kind == "cuda" else "CXX"
    return f"it has no {kind_of} compiler ({wanted}); install one, name one in {variable}"


def compiled(network: nn.Module, *, compile: str | None, device: torch.device | str, **arguments: Any) -> nn.Module:
    """Compile regions of a network, in place; they are built when they are first called, which takes a minute or more.

    Args:
        network: Swin UNETR, or a pre-training network with its encoder.
        compile: ``decoder`` (the convolutional blocks), ``network`` (these, patch embedding and the stages of the
            encoder), ``graphs`` (the same, replayed as CUDA graphs), or None.
        device: device of the run.
        arguments: further arguments of ``torch.compile``.

    Returns:
        The same network.

    Raises:
        InputError: see `check_compile`.
    """
    check_compile(compile=compile, device=device)
    if compile is None:
        return network
    types, options = REGIONS[compile]
    regions = _regions(network, types)
    torch._dynamo.config.recompile_limit = max(VERSIONS, torch._dynamo.config.recompile_limit)
    for region in regions:
        # dynamic: PyTorch would mistake the shapes of the next region for changing shapes of this one
        region.compile(**{"dynamic": False, **options, **arguments})
    if compile == "graphs":  # a graph may overwrite the results of the previous step
        network.graphs_are_replayed = True
        network.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())
    logger.info(
        "%d regions are compiled when they are first called, which takes a while (--compile %s)", len(regions), compile
    )
    return network


def _regions(network: nn.Module, types: tuple[type, ...]) -> list[nn.Module]:
    """Return the outermost modules of these types, and those that the network itself counts as its decoder."""
    found: list[nn.Module] = []
    own = getattr(network, "decoder_regions", ())
    for child in network.children():
        if isinstance(child, types) or any(child is region for region in own):
            found.append(child)
        else:
            found += _regions(child, types)
    return found
