# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Compute arithmetic and memory of one pre-training step, without a GPU.

    python -m benchmarks.pretrain_cost --preset official --feature_size 48 24 12

The bundle's network and loss run forward and backward on fake tensors (`FakeTensorMode`), which have shapes, types and
storages but no values. The network is built from MONAI's modules (``--fast false``): the fast path keeps less, but how
much can only be determined on a device. Per step of 2 x crops views:

- *forward*, *backward*: FLOPs of convolutions and matrix products (`FlopCounterMode`; a multiply-add counts as two).
  Recomputation by gradient checkpointing counts as backward. Norms, softmax, GELU and interpolation are not counted.
- *fixed*: weights, gradients and AdamW's two moments in float32, 16 bytes per parameter.
- *kept*: tensors that autograd saves between forward and backward (`saved_tensors_hooks`), each storage once, without
  weights and buffers. The half-precision copies of weights that autocast makes are included.
- *peak*: weights and both moments, plus the maximum over time of all other storages from the start of the forward to
  the end of the backward: views, targets, activations, intermediate results, accumulating gradients, and with
  checkpointing the recomputed part of a block. Never less than *fixed*.

Not counted: memory that kernels allocate internally (cuDNN and cuBLAS workspaces), rounding and fragmentation of the
allocator, the CUDA context, the buckets of DDP (4 bytes per parameter) and temporaries of the optimizer. Leave headroom
above the peak. ``--measure`` adds the numbers of a real GPU.

Half precision means GPU autocast in bfloat16, which training uses if the GPU supports it. float16 has the same size.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from monai.utils import set_determinism
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from bundles.common.errors import InputError
from bundles.common.networks.roi_size import check_roi_size
from bundles.common.run.presets import choose
from bundles.common.weights.encoder_record import resolve_encoder
from bundles.pretraining.network import OFFICIAL_HEADS, SwinPretrainer
from bundles.pretraining.proxy_tasks.losses import ProxyTaskLoss
from bundles.pretraining.proxy_tasks.tasks import PAPER_TASKS as TASKS

PRESETS = Path(__file__).resolve().parents[1] / "bundles/swin_unetr_pretrain/configs/presets.yaml"
GIB, TERA = 2**30, 10**12
WARM_UP, TIMED = 3, 10  # steps of --measure


@dataclass(frozen=True, kw_only=True)
class Mode:
    """Precision of a step, and whether gradient checkpointing recomputes the encoder's blocks in the backward."""

    half: bool = False
    checkpointing: bool = False

    def __str__(self) -> str:
        return ("bf16" if self.half else "fp32") + " + checkpointing" * self.checkpointing


MODES = tuple(Mode(half=half, checkpointing=checkpointing) for half in (False, True) for checkpointing in (False, True))


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Cost of one step, as defined in the module's docstring; memory in bytes."""

    encoder_parameters: int
    head_parameters: int
    forward_flops: int
    backward_flops: int
    kept: int
    peak: int

    @property
    def parameters(self) -> int:
        return self.encoder_parameters + self.head_parameters

    @property
    def flops(self) -> int:
        return self.forward_flops + self.backward_flops

    @property
    def fixed(self) -> int:
        return 16 * self.parameters


def _storage(tensor: torch.Tensor) -> int:
    """Return the identifier of a tensor's storage, valid while the storage is alive."""
    return tensor.untyped_storage()._cdata


class SavedBytes(saved_tensors_hooks):
    """Counts the bytes that autograd saves for the backward while this context is active.

    Args:
        besides: tensors not to count, such as weights and buffers.
    """

    class _Saved:
        """Lives as long as the graph that holds it, unlike the tensor, which may have other owners."""

        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor.detach()  # without detach, an operation's result would keep its own graph alive

    def __init__(self, besides: Iterable[torch.Tensor] = ()) -> None:
        self._excluded = {_storage(tensor) for tensor in besides}
        self._alive = weakref.WeakSet()
        super().__init__(self._pack, lambda saved: saved.tensor)

    def _pack(self, tensor: torch.Tensor) -> _Saved:
        saved = self._Saved(tensor)
        self._alive.add(saved)
        return saved

    def now(self) -> int:
        """Return the bytes that graphs currently hold, each storage once."""
        storages = {_storage(saved.tensor): saved.tensor.untyped_storage().nbytes() for saved in self._alive}
        return sum(size for storage, size in storages.items() if storage not in self._excluded)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages created while it is active: currently in use (``now``) and at most (``peak``).

    Args:
        besides: tensors not to count, such as weights and buffers.
    """

    def __init__(self, besides: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes = {_storage(tensor): 0 for tensor in besides}

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and _storage(tensor) not in self._sizes:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        self._sizes[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, storage._cdata).atexit = False

    def _free(self, storage: int) -> None:
        self.now -= self._sizes.pop(storage)


@contextmanager
def _autocast_as_on_gpu(enabled: bool) -> Iterator[Callable[[], torch.autocast]]:
    """Provide a CPU autocast in bfloat16 that casts like GPU autocast.

    A PyTorch built without CUDA cannot differentiate fake GPU tensors. Of the operations in the network, GPU autocast
    computes layer norm, trilinear interpolation and softmax in float32; CPU autocast does so for none (PyTorch 2.13).
    Softmax receives float32 anyway, because the position bias is a float32 weight. Checkpointed blocks are recomputed
    in the backward under the autocast of their forward, so run the whole step inside this context.
    """

    def in_float32(function: Callable) -> Callable:
        def call(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return function(x.float() if torch.is_autocast_enabled("cpu") else x, *args, **kwargs)

        return call

    with patch.multiple(F, layer_norm=in_float32(F.layer_norm), interpolate=in_float32(F.interpolate)):
        yield partial(torch.autocast, "cpu", dtype=torch.bfloat16, enabled=enabled)


def _batch(encoder: Mapping[str, Any], roi_size: Sequence[int], crops: int, device: str) -> tuple[torch.Tensor, dict]:
    """Return random views and targets with the shapes and types of `augmented_views.AugmentedViews`."""
    shape = (2 * crops, encoder["in_channels"], *roi_size)
    views = torch.rand(shape, device=device)
    mask = torch.zeros((2 * crops, 1, *roi_size), dtype=torch.bool, device=device)
    turns = torch.zeros(2 * crops, dtype=torch.long, device=device)
    return views, {"crop": torch.rand_like(views), "mask": mask, "turns": turns}


def _network(encoder: Mapping[str, Any], heads: Mapping[str, str], mode: Mode) -> SwinPretrainer:
    return SwinPretrainer(encoder=encoder, tasks=TASKS, heads=heads, use_checkpoint=mode.checkpointing, fast=False)


def step_cost(
    *,
    encoder: Mapping[str, Any],
    roi_size: Sequence[int],
    crops: int,
    mode: Mode,
    heads: Mapping[str, str] = OFFICIAL_HEADS,
) -> StepCost:
    """Compute the cost of one step with the paper's three proxy tasks.

    Args:
        encoder: encoder record (`common.weights.encoder_record.resolve_encoder`).
        roi_size: crop size in voxels, each divisible by 32.
        crops: crops per step and GPU; each gives two views.
        mode: precision and gradient checkpointing.
        heads: ``reconstruction_head`` and ``pooling``. With the head ``unet`` the decoder counts as a head.
    """
    network = _network(encoder, heads, mode)
    loss_function = ProxyTaskLoss(tasks=TASKS)
    in_encoder, in_all = (sum(p.numel() for p in part.parameters()) for part in (network.swinViT, network))
    with FakeTensorMode(allow_non_fake_inputs=True):  # to_empty reads the shapes of the real weights
        network.to_empty(device="cpu")
        weights = [*network.parameters(), *network.buffers()]

        with _autocast_as_on_gpu(mode.half) as autocast, LiveBytes(weights) as live:
            views, targets = _batch(encoder, roi_size, crops, "cpu")
            saved = SavedBytes(weights)
            with saved, autocast():
                outputs = network(views)
                loss = loss_function(outputs, targets)
            kept = saved.now()
            loss.backward()

        # In a separate pass, because the counter keeps tensors alive. FLOPs do not depend on the precision.
        with FlopCounterMode(display=False) as flops:
            loss = loss_function(network(views), targets)
            forward = flops.get_total_flops()
            loss.backward()
    return StepCost(
        encoder_parameters=in_encoder,
        head_parameters=in_all - in_encoder,
        forward_flops=forward,
        backward_flops=flops.get_total_flops() - forward,
        kept=kept,
        peak=max(12 * in_all + live.peak, 16 * in_all),
    )


def measure_step(
    *,
    encoder: Mapping[str, Any],
    roi_size: Sequence[int],
    crops: int,
    mode: Mode,
    heads: Mapping[str, str] = OFFICIAL_HEADS,
) -> tuple[float, int] | None:
    """Measure real steps on the GPU; return milliseconds and peak bytes, or None if they run out of memory.

    The time is the median of `TIMED` steps after `WARM_UP` steps. Views and targets are random tensors on the GPU, so
    loading and masking are excluded. Arguments as in `step_cost`.
    """
    set_determinism(seed=0)  # as in every training; it changes which algorithms cuDNN chooses
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        network = _network(encoder, heads, mode).to("cuda")
        optimizer = torch.optim.AdamW(network.parameters())
        loss_function = ProxyTaskLoss(tasks=TASKS)
        views, targets = _batch(encoder, roi_size, crops, "cuda")

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=mode.half):
                outputs = network(views)
                loss = loss_function(outputs, targets)
            loss.backward()
            optimizer.step()

        seconds = []
        for _ in range(WARM_UP + TIMED):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            step()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
    except torch.cuda.OutOfMemoryError:
        return None
    return 1000 * statistics.median(seconds[WARM_UP:]), torch.cuda.max_memory_allocated()


def _row(feature_size: int, mode: Mode, cost: StepCost, teraflops: float | None) -> dict[str, str]:
    """Return the cells of one row by column heading, with line breaks for the terminal."""
    in_millions = [f"{n / 1e6:.1f}" for n in (cost.encoder_parameters, cost.head_parameters, cost.parameters)]
    cells = {
        "size": str(feature_size),
        "mode": str(mode).replace(" + ", "\n+ "),
        "million\nparameters": "{} + {}\n= {}".format(*in_millions),
        "forward\nTFLOP": f"{cost.forward_flops / TERA:.3g}",
        "backward\nTFLOP": f"{cost.backward_flops / TERA:.3g}",
        "step\nTFLOP": f"{cost.flops / TERA:.3g}",
        "fixed\nGiB": f"{cost.fixed / GIB:.2f}",
        "kept\nGiB": f"{cost.kept / GIB:.2f}",
        "peak\nGiB": f"{cost.peak / GIB:.2f}",
    }
    if teraflops is not None:
        cells[f"ms at {teraflops:g}\nTFLOP/s"] = f"{1000 * cost.flops / (teraflops * TERA):.0f}"
    return cells


def _measured_cells(measured: tuple[float, int] | None) -> dict[str, str]:
    """Return the cells of a measurement by column heading."""
    if measured is None:
        return {"measured\nms": "–", "measured\npeak GiB": "out of memory"}
    return {"measured\nms": f"{measured[0]:.0f}", "measured\npeak GiB": f"{measured[1] / GIB:.2f}"}


def _print_markdown(title: str, rows: Sequence[Mapping[str, str]]) -> None:
    lines = [rows[0].keys(), ["---", "---", *["---:"] * (len(rows[0]) - 2)], *(row.values() for row in rows)]
    print(title, "", *("| " + " | ".join(line).replace("\n", " ") + " |" for line in lines), sep="\n")


def _print_table(title: str, rows: Sequence[Mapping[str, str]]) -> None:
    table = Table(title=title, title_style="bold", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in rows[0]:
        table.add_column(heading, justify="left" if heading == "mode" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row.values())
    console = Console()
    Console(width=max(console.width, 140)).print(table)  # do not truncate numbers in a narrow terminal
    console.print(
        "\nparameters: encoder + heads. fixed: weights, gradients and AdamW's moments (float32). kept: saved between "
        "forward and backward. peak: maximum at one time, including weights and moments; kernel workspaces, "
        "fragmentation and the CUDA context come on top."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line and print its table; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pretrain_cost",
        description="Compute arithmetic and memory of one pre-training step, without a GPU.",
    )
    add = parser.add_argument
    add(
        "--preset",
        default="official",
        help="preset of swin_unetr_pretrain for the options that are not passed (default: official)",
    )
    add("--roi_size", type=int, nargs=3, metavar=("X", "Y", "Z"), help="crop size in voxels")
    add(
        "--crops",
        type=int,
        default=4,
        help="crops per step and GPU, batch_size x crops_per_volume; each gives two views (default: 4)",
    )
    add("--feature_size", type=int, nargs="+", metavar="N", help="one or more encoder sizes, such as 48 24 12")
    add("--depths", type=int, nargs=4, metavar="N", help="blocks per stage")
    add("--num_heads", type=int, nargs=4, metavar="N", help="attention heads per stage")
    add("--window_size", type=int, help="attention window size in tokens")
    add("--teraflops", type=float, help="TFLOP/s that your GPU sustains; adds a column with the time per step")
    add("--markdown", action="store_true", help="print a Markdown table")
    add(
        "--measure",
        action="store_true",
        help=f"also run {WARM_UP + TIMED} real steps per row on this machine's GPU",
    )
    options = parser.parse_args(arguments)
    try:
        _report(options)
    except InputError as error:
        print(f"Stopped: {error}", file=sys.stderr)
        return 1
    return 0


def _report(options: argparse.Namespace) -> None:
    if options.measure and not torch.cuda.is_available():
        raise InputError(
            "--measure runs real steps on a GPU, but PyTorch finds none. Omit --measure to only compute the costs."
        )
    for name in ("crops", "teraflops"):
        if (value := getattr(options, name)) is not None and value <= 0:
            raise InputError(f"--{name} {value} must be above 0.")
    preset = choose(preset=options.preset, file=str(PRESETS))
    roi_size = check_roi_size(options.roi_size or preset["roi_size"])
    asked = {name: getattr(options, name) for name in ("depths", "num_heads", "window_size")}
    feature_sizes = options.feature_size or [preset["feature_size"]]
    encoders = [
        resolve_encoder(asked=asked | {"feature_size": size}, preset=preset, checkpoint=None) for size in feature_sizes
    ]

    heads = {name: preset[name] for name in OFFICIAL_HEADS}
    rows = []
    for encoder, mode in track(
        list(product(encoders, MODES)), description="Computing", console=Console(stderr=True), transient=True
    ):
        step = {"encoder": encoder, "roi_size": roi_size, "crops": options.crops, "mode": mode, "heads": heads}
        row = _row(encoder["feature_size"], mode, step_cost(**step), options.teraflops)
        rows.append(row | (_measured_cells(measure_step(**step)) if options.measure else {}))

    crops = f"{options.crops} crop{'s' * (options.crops > 1)} of {' x '.join(map(str, roi_size))}"
    depths, attention = ("/".join(map(str, encoders[0][name])) for name in ("depths", "num_heads"))
    title = f"One step: {crops} in two views; window {encoders[0]['window_size']}, depths {depths}, heads {attention}"
    if heads["reconstruction_head"] != OFFICIAL_HEADS["reconstruction_head"]:
        title += f"; reconstruction head {heads['reconstruction_head']}"
    if "position" in preset["tasks"]:
        title += "; without the task position, which has views of its own"
    if options.measure:
        title += f"; measured on {torch.cuda.get_device_name()}, PyTorch {torch.__version__}"
    (_print_markdown if options.markdown else _print_table)(title, rows)


if __name__ == "__main__":
    sys.exit(main())
