# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Two or more ways to do the same, timed in turns, each in a process of its own, beside the limit of the machine.

A *side* is a function that prepares (network, data) and returns the function to be timed::

    def stock(size: int) -> Callable[[], object]:
        layer, x = torch.nn.Linear(size, size), torch.rand(size, size)
        return lambda: layer(x)

    comparison = compare({"stock": partial(stock, 512), "ours": partial(ours, 512)}, reference="stock", runs=5)
    comparison.ratio("ours")         # how many times as fast as the reference: median over the rounds
    comparison.memory_ratio("ours")  # its peak of memory over that of the reference

Sides are pickled: functions of a module, or a `functools.partial` of one. Each has a process of its own, started anew
(spawn), for the whole comparison. In each round each side runs once while the others wait, in one order in even rounds
and in the reverse in odd ones, so that what else the machine does, and what it does to its clock, falls on all alike. A
ratio is taken within a round; the median over the rounds is what counts.

*peak* is the most memory that a timed run held: on a GPU what PyTorch had allocated there, on a CPU what the process
had resident (VmHWM of Linux, set back before the first timed run). *above* is what of it is more than before the side
was prepared: weights and data count, Python and PyTorch do not. Import in the module of the side, not in the side.

`work` counts the arithmetic and the traffic of a function, `floor` measures what the machine can do at best, and
`limit_seconds` says how long the former takes on the latter.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import math
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from bundles.common.files import write_text

MIB, GIB = 2**20, 2**30
PACKAGES = ("torch", "monai", "numpy")
START = "spawn"  # of the processes: with a fork their memory would begin with ours, and CUDA would not work

Timed = Callable[[], Any]


# ---- sides in turns ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Side:
    """What was measured of one side.

    Attributes:
        seconds: of each timed run.
        peak: most bytes that the timed runs held; see the module.
        above: what of ``peak`` came on top of what the process held before the side was prepared.
        result: what the last run returned, if ``results`` were asked for.
    """

    seconds: tuple[float, ...]
    peak: int
    above: int
    result: Any = None

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Sides that ran in turns; one that ran out of memory is None.

    Attributes:
        sides: by name.
        reference: name of the side that ratios are to.
        device: ``cpu`` or ``cuda``.
        threads: of PyTorch.
    """

    sides: Mapping[str, Side | None]
    reference: str
    device: str
    threads: int

    def ratio(self, name: str) -> float | None:
        """How many times as fast as the reference: the median over the rounds; None if one of the two did not run."""
        side, other = self.sides[name], self.sides[self.reference]
        if side is None or other is None:
            return None
        return statistics.median(b / a for a, b in zip(side.seconds, other.seconds, strict=True))

    def memory_ratio(self, name: str) -> float | None:
        """``above`` over that of the reference; None if one of the two did not run or the reference took nothing."""
        side, other = self.sides[name], self.sides[self.reference]
        return side.above / other.above if side and other and other.above > 0 else None

    def as_dict(self) -> dict[str, Any]:
        """Everything but the results, for `write_json`."""
        sides = {}
        for name, side in self.sides.items():
            sides[name] = side and {
                "seconds": list(side.seconds),
                "median": side.median,
                "ratio": self.ratio(name),
                "peak": side.peak,
                "above": side.above,
                "memory_ratio": self.memory_ratio(name),
            }
        return {"device": self.device, "threads": self.threads, "reference": self.reference, "sides": sides}

    def rows(self, limits: Mapping[str, float] | None = None) -> list[dict[str, str]]:
        """Cells of each side by their headings, for `print_table`.

        Args:
            limits: per side the seconds that the machine needs at best (`limit_seconds`).
        """
        rows = []
        for name, side in self.sides.items():
            if side is None:
                rows.append({"side": name, "seconds": "out of memory"})
                continue
            row = {"side": name, "seconds": f"{side.median:.4g}"}
            row["least – most"] = f"{min(side.seconds):.4g} – {max(side.seconds):.4g}"
            ratio, memory = self.ratio(name), self.memory_ratio(name)
            row["times\nas fast"] = "" if ratio is None else f"{ratio:.2f}"
            if limits:
                row["limit\nseconds"] = f"{limits[name]:.3g}" if name in limits else ""
                row["of the\nlimit"] = f"{limits[name] / side.median:.0%}" if name in limits else ""
            row |= {f"{part}\nMiB": f"{getattr(side, part) / MIB:.0f}" for part in ("peak", "above")}
            row["memory\nratio"] = "" if memory is None else f"{memory:.2f}"
            rows.append(row)
        return rows


def compare(
    sides: Mapping[str, Callable[[], Timed]],
    *,
    reference: str | None = None,
    runs: int = 5,
    warmup: int = 1,
    device: str = "cpu",
    threads: int | None = None,
    results: bool = False,
) -> Comparison:
    """Run sides in turns.

    Args:
        sides: by name, what prepares a side and returns the function to be timed; see the module.
        reference: side that ratios are to; None: the last.
        runs: timed rounds.
        warmup: rounds before them, which count for nothing.
        device: ``cuda``: wait for the GPU before and after each run, and measure its memory.
        threads: of PyTorch in each process; None: its default.
        results: have each process send what its last run returned (pickled; tensors on the CPU).

    Raises:
        ValueError: there is no such reference, or ``runs`` is below 1.
        Exception: what a side raises, but for a lack of memory.
    """
    reference = list(sides)[-1] if reference is None else reference
    if reference not in sides or runs < 1:
        raise ValueError(f"reference {reference!r} must be one of {', '.join(sides)}, and runs, {runs}, 1 or more.")
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    dead: set[str] = set()
    processes: dict[str, ProcessPoolExecutor] = {}
    with ExitStack() as stack:

        def call(name: str, *arguments: Any) -> Any:
            try:
                return processes[name].submit(_call, *arguments).result()
            except (BrokenProcessPool, torch.OutOfMemoryError):
                dead.add(name)
                processes[name].shutdown()  # or its memory would lack the others
                return None

        for name, prepare in sides.items():
            processes[name] = stack.enter_context(ProcessPoolExecutor(1, mp_context=get_context(START)))
            call(name, "prepare", prepare, device, threads)
        rounds = range(warmup + runs)
        for number in track(rounds, description="Rounds", console=Console(stderr=True), transient=True):
            for name in list(sides) if number % 2 == 0 else reversed(sides):
                if name not in dead and number == warmup:
                    call(name, "forget_peak")
                if name not in dead and (taken := call(name, "run")) is not None and number >= warmup:
                    seconds[name].append(taken)
        measured: dict[str, Side | None] = {}
        for name in sides:
            memory = None if name in dead else call(name, "memory")
            result = None if name in dead or not results else call(name, "result")
            measured[name] = None if name in dead else Side(seconds=tuple(seconds[name]), result=result, **memory)
        used = next((call(name, "threads") for name in sides if name not in dead), threads or 0)
    return Comparison(sides=measured, reference=reference, device=device, threads=used)


class _Process:
    """The side in the process that is measured."""

    def prepare(self, prepare: Callable[[], Timed], device: str, threads: int | None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.on_gpu = torch.device(device).type == "cuda"
        if self.on_gpu:
            torch.cuda.init()
        self.before = torch.cuda.memory_allocated() if self.on_gpu else resident_bytes("VmRSS")
        self.timed = prepare()
        self.last: Any = None

    def run(self) -> float:
        self.last = None  # or it would stay beside what comes
        gc.collect()
        if self.on_gpu:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        self.last = self.timed()
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    def forget_peak(self) -> None:
        self.last = None
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            _forget_resident_peak()

    def memory(self) -> dict[str, int]:
        peak = torch.cuda.max_memory_allocated() if self.on_gpu else resident_bytes("VmHWM")
        return {"peak": peak, "above": peak - self.before}

    def result(self) -> Any:
        return self.last

    def threads(self) -> int:
        return torch.get_num_threads()


_process = _Process()


def _call(method: str, *arguments: Any) -> Any:
    return getattr(_process, method)(*arguments)


def in_a_process(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What a function (picklable) returns in a new process, which leaves no memory behind."""
    with ProcessPoolExecutor(1, mp_context=get_context(START)) as pool:
        return pool.submit(function, *arguments, **options).result()


# ---- work and limit ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a function computes.

    Attributes:
        flops: of convolutions, matrix products and attention; a multiplication and its addition are two.
        bytes: that its operations read and write, each by itself: fusing and caches make it less.
    """

    flops: int
    bytes: int


class _Traffic(TorchDispatchMode):
    """Sums the bytes of the tensors that operations read and write; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        read, written = _tensors((args, kwargs)), _tensors(result)
        shared = {tensor.untyped_storage()._cdata for tensor in read}
        views = not func._schema.is_mutable and any(t.untyped_storage()._cdata in shared for t in written)
        if not views:
            self.bytes += sum(map(_extent, read)) + sum(map(_extent, written))
        return result


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _extent(tensor: torch.Tensor) -> int:
    """Bytes in memory; an expanded tensor is no larger than what it is expanded from."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _attention(*shapes: Any, **_: Any) -> int:
    return sdpa_flop_count(*shapes[:3])


def _attention_backward(*shapes: Any, **_: Any) -> int:
    return sdpa_backward_flop_count(*shapes[:4])


def work(function: Timed) -> Work:
    """Count what a function does by doing it once. The kernels of Triton are not seen."""
    aten = torch.ops.aten
    cpu_attention = {  # PyTorch counts those of a GPU alone
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=cpu_attention) as flops:
        function()
    with _Traffic() as traffic:
        function()
    return Work(flops=flops.get_total_flops(), bytes=traffic.bytes)


@dataclass(frozen=True, kw_only=True)
class Floor:
    """What a machine does at best, measured.

    Attributes:
        matmul: FLOP/s of a large matrix product.
        conv: FLOP/s of a 3x3x3 convolution, 48 to 48 channels.
        copy: bytes/s, reading and writing.
    """

    matmul: float
    conv: float
    copy: float


def floor(
    dtype: torch.dtype = torch.float32, device: str = "cpu", *, threads: int | None = None, seconds: float = 1.0
) -> Floor:
    """Measure a matrix product, a convolution and a copy: the best of what each does in some time.

    Args:
        dtype: of the numbers.
        device: ``cpu`` or ``cuda``.
        threads: of PyTorch; None: as they are. Better in a process of its own, by `in_a_process`.
        seconds: to spend on each.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    gpu = torch.device(device).type == "cuda"
    side, room = (8192, 96) if gpu else (1536, 32)
    a, b = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
    convolution = torch.nn.Conv3d(48, 48, 3, padding=1, bias=False, device=device, dtype=dtype)
    x = torch.rand(1, 48, *[room] * 3, device=device).to(dtype)
    source = torch.empty(256 * MIB, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    with torch.no_grad():
        return Floor(
            matmul=2 * side**3 / _fastest(lambda: a @ b, gpu, seconds),
            conv=2 * 27 * 48**2 * room**3 / _fastest(lambda: convolution(x), gpu, seconds),
            copy=2 * source.numel() / _fastest(lambda: target.copy_(source), gpu, seconds),
        )


def _fastest(function: Timed, gpu: bool, seconds: float) -> float:
    """Seconds of the fastest run, at least three of them; on a GPU the mean of ten in a row."""
    repeats, best, end = (10 if gpu else 1), math.inf, time.perf_counter() + seconds
    count = 0
    while count < 3 or time.perf_counter() < end:
        begin = time.perf_counter()
        for _ in range(repeats):
            function()
        if gpu:
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - begin) / repeats)
        count += 1
    return best


def limit_seconds(work: Work, floor: Floor) -> float:
    """Time in which the machine can do the arithmetic, at the faster of matrix product and convolution.

    The traffic is left out, for a fused kernel need not have it; `Work.bytes` / `Floor.copy` is its time unfused.
    """
    return work.flops / max(floor.matmul, floor.conv)


# ---- the machine ---------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """CPU, cores that this process may use, bytes of memory, load of the last minute, GPU (or None), and versions."""
    models = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if "model name" in line]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "load": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def machine_line(here: Mapping[str, Any]) -> str:
    """What `machine` says, in a line."""
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    gpu = f"{here['gpu']}; " if here["gpu"] else ""
    cpu = f"{here['cpu']}, {here['cores']} cores, {here['memory'] / GIB:.0f} GiB, load {here['load']:.1f}"
    return f"{gpu}{cpu}; {versions}"


def resident_bytes(name: str) -> int:
    """VmRSS (now) or VmHWM (the most so far) of this process; elsewhere than on Linux the most so far, for both."""
    for line in _lines("/proc/self/status"):
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _forget_resident_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets VmHWM back to what is resident now
    except OSError:  # not Linux, or not allowed: the peak is then that of preparation and warm-up too
        pass


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:  # not Linux
        return []


# ---- what is shown -------------------------------------------------------------------------------------------------


def print_table(rows: Sequence[Mapping[str, str]], *, left: Iterable[str] = ("side",), title: str = "") -> None:
    """Print cells by their headings; columns named in ``left`` are flush left."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    headings = list(max(rows, key=len))
    for heading in headings:
        table.add_column(heading, justify="left" if heading in left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(row.get(heading, "") for heading in headings))
    console = Console()
    console = Console(width=max(console.width, 120))  # no digit is cut off where the terminal is narrower
    if title:
        console.print(title, style="bold", highlight=False)
    console.print(table)


def write_json(path: str | os.PathLike, results: Mapping[str, Any]) -> None:
    """Write numbers, whole or not at all; the folder is made."""
    write_text(str(path), json.dumps(results, indent=4) + "\n")
