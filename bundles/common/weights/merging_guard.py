# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Let a network accept only weights whose patch-merging order it has.

The order cannot be seen in the weights, and a network with the other order takes them without an error. MONAI's own
entry points (``ckpt_export``, ``onnx_export``, ``monai.bundle.load``, MONAI Label) build the network of a config first
and load a file of weights later. So the network compares what it is given with the file that it was built for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from .dialects import ANCHOR, ENCODER, find_weights
from .merging_order import merging_of

# Tensors that distinguish two trainings: the first one, and one after the first patch merging.
COMPARED = (ENCODER + ANCHOR, ENCODER + "layers2.0.blocks.0.attn.qkv.weight")

_trusted = 0  # depth of `trusted_weights`


@contextmanager
def trusted_weights() -> Iterator[None]:
    """Load weights whose order is known: after its check, or those of the network itself."""
    global _trusted
    _trusted += 1
    try:
        yield
    finally:
        _trusted -= 1


class MergingGuard:
    """Watch the weights that a network is given.

    Args:
        files: files of weights that the network may be given; those that do not exist (yet) are ignored.
        folder: the bundle's ``models``. MONAI Label can be told to load another of its files.
        merging: the order that the network is built with.
        asked: the option ``--merging``. If it is set, the user answers for the order, and nothing is watched.
    """

    def __init__(
        self, *, files: Sequence[str | None], merging: str, folder: str | None = None, asked: str | None = None
    ) -> None:
        self.files = [str(file) for file in files if file is not None]
        self.folder = folder
        self.merging = merging
        self.asked = asked

    def __call__(self, network: torch.nn.Module) -> None:
        """Watch a network: `load_state_dict` raises `InputError` for weights of another file."""
        if self.asked is None:
            network.register_load_state_dict_pre_hook(self.check)

    def check(self, module: torch.nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
        """Check a state dict before it is loaded; called by PyTorch.

        Raises:
            InputError: these are not the weights of a file that needs this network's order.
        """
        given = [state.get(prefix + name) for name in COMPARED]
        if _trusted or any(tensor is None for tensor in given):
            return
        beside = [] if self.folder is None else sorted(map(str, Path(self.folder).glob("*.pt")))
        orders = [order for file in dict.fromkeys([*self.files, *beside]) if (order := _order_if_same(file, given))]
        if self.merging in orders:
            return
        if orders:
            raise InputError(
                f"These weights need patch merging {orders[0]}, but the network was built with {self.merging}: it would "
                f"compute something else. Build it for their file: --pretrained_model {self.files[0]}."
            )
        known = ", ".join(self.files) or "no file"
        raise InputError(
            f"The network was built for {known}, with patch merging {self.merging}, but is given other weights. The order "
            "that they need cannot be seen in them, and with the other order a network computes something else. Name their "
            "file when the network is built: --pretrained_model FILE, which tells the order, or set --merging."
        )


def _order_if_same(file: str, given: Sequence[torch.Tensor]) -> str | None:
    """Return the order that a file needs if it holds the given tensors, else None."""
    if not os.path.exists(file):
        return None
    try:
        found = find_weights(file)
    except InputError:  # another file of the folder, such as an encoder that is a teacher and a student
        return None
    for name, tensor in zip(COMPARED, given, strict=True):
        own = found.encoder.get(name)
        if own is None or own.shape != tensor.shape or not torch.equal(own.to(tensor.dtype), tensor.detach().cpu()):
            return None
    return merging_of(found, None)[0]
