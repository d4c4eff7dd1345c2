# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Count how often the decoder of Swin UNETR changes the memory layout of its tensors on a GPU. No GPU is needed.

    python -m benchmarks.layout_copies            with a PyTorch for CUDA

One forward of the decoder at 96^3 on tensors without memory (`FakeTensorMode`): PyTorch's own rules decide the layout of
each result. Counted are copies between channels-first and channels-last, and the numbers that they copy per voxel of the
crop.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bundles.common.networks.swin_unetr import build_swin_unetr

RECORD = {"in_channels": 1, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8], "window_size": 4}
RECORD |= {"patch_size": 2, "merging": "monai", "use_v2": False}
SIDE, BATCH, CLASSES = 96, 4, 14
# name: whether the outputs of the encoder are channels-last, whether the weights are
CASES = {
    "as it is": (True, False),
    "encoder's outputs channels-first": (False, False),
    "all channels-last": (True, True),
}


def layout(tensor: torch.Tensor) -> str:
    """Return ``first``, ``last``, ``both`` (a layout cannot be told), or nothing for any other order of the axes."""
    last = tensor.is_contiguous(memory_format=torch.channels_last_3d)
    return {(True, True): "both", (True, False): "last", (False, True): "first"}.get((last, tensor.is_contiguous()), "")


class LayoutCopies(TorchDispatchMode):
    """Collects, in ``copied``, the size of each tensor (B, C, X, Y, Z) that is copied into another layout."""

    def __init__(self) -> None:
        super().__init__()
        self.copied: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket is torch.ops.aten.clone and out.ndim == 5:
            if {layout(args[0]), layout(out)} == {"first", "last"}:
                self.copied.append(out.numel())
        return out


def on_gpu(shape: Sequence[int], *, last: bool) -> torch.Tensor:
    """Return a tensor (B, C, X, Y, Z) on the GPU, channels-last or not."""
    if not last:
        return torch.empty(*shape, device="cuda")
    batch, channels, *space = shape
    return torch.empty(batch, *space, channels, device="cuda").permute(0, 4, 1, 2, 3)


def copies(*, encoder_last: bool, weights_last: bool, feature_size: int) -> list[int]:
    """Return the sizes of the copies of one forward of the decoder.

    Args:
        encoder_last: whether the outputs of the encoder are channels-last.
        weights_last: whether the weights of the decoder's convolutions are.
        feature_size: feature size of the network.
    """
    network = build_swin_unetr(RECORD | {"feature_size": feature_size}, out_channels=CLASSES)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        for module in network.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    there = on_gpu(weight.shape, last=weights_last and weight.ndim == 5)
                    module._parameters[name] = torch.nn.Parameter(there, requires_grad=False)
        x = on_gpu((BATCH, 1, *[SIDE] * 3), last=False)
        hidden = [
            on_gpu((BATCH, feature_size * 2**i, *[SIDE // 2 ** (i + 1)] * 3), last=encoder_last) for i in range(5)
        ]
        with LayoutCopies() as counted:
            up = network.decoder5(network.encoder10(hidden[4]), hidden[3])
            up = network.decoder4(up, network.encoder4(hidden[2]))
            up = network.decoder3(up, network.encoder3(hidden[1]))
            up = network.decoder2(up, network.encoder2(hidden[0]))
            network.out(network.decoder1(up, network.encoder1(x)))
    return counted.copied


def main(arguments: Sequence[str] | None = None) -> int:
    """Count from the command line and print a line for each case; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layout_copies", description=__doc__.partition("\n")[0])
    parser.add_argument("--feature_size", type=int, default=48, help="feature size (default: %(default)s)")
    given = parser.parse_args(arguments)
    if torch.version.cuda is None:
        print(
            f"Stopped: PyTorch {torch.__version__} is built without CUDA and knows no layouts of a GPU.",
            file=sys.stderr,
        )
        return 1
    for name, (encoder_last, weights_last) in CASES.items():
        found = copies(encoder_last=encoder_last, weights_last=weights_last, feature_size=given.feature_size)
        per_voxel = sum(found) / (BATCH * SIDE**3)
        print(f"{name}: {len(found)} copies, {per_voxel:.1f} numbers per voxel of the crop")
    return 0


if __name__ == "__main__":
    sys.exit(main())
