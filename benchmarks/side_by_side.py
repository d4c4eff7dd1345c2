# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Time two or more implementations of the same task in turns, each in its own process, against the machine's limit.

A *side* is a function that prepares (network, data) and returns the function to time::

    def stock(size: int) -> Callable[[], object]:
        layer, x = torch.nn.Linear(size, size), torch.rand(size, size)
        return lambda: layer(x)

    comparison = compare({"stock": partial(stock, 512), "ours": partial(ours, 512)}, reference="stock", runs=5)
    comparison.ratio("ours")         # speed relative to the reference: median over the rounds
    comparison.memory_ratio("ours")  # memory above the start, relative to the reference

Sides are pickled, so they must be functions of a module, or a `functools.partial` of one. Each side has its own process
(spawned) for the whole comparison. In each round each side runs once while the others wait. The order is reversed in
odd rounds, so that other load and changes of the clock frequency affect all sides equally. Ratios are computed within a
round; the result is their median over the rounds.

*peak* is the peak memory of the timed runs: on a GPU the memory allocated by PyTorch, on a CPU the resident memory of
the process (VmHWM of Linux, reset before the first timed run). *above* is its excess over the memory before the side
was prepared: it includes weights and data, but not Python and PyTorch. For that, import at the top of the side's
module, not inside the side.

`work` counts arithmetic and memory traffic of a function, `floor` measures the best rates of the machine, and
`limit_seconds` computes how long the former takes at the latter.
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
from bundles.common.run.worker_pool import available_cores

MIB, GIB = 2**20, 2**30
PACKAGES = ("torch", "monai", "numpy")
START = "spawn"  # a forked process would start with the memory of its parent, and could not use CUDA

Timed = Callable[[], Any]


# ---- sides in turns ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Side:
    """Measurements of one side.

    Attributes:
        seconds: time of each timed run.
        peak: peak memory of the timed runs in bytes; see the module.
        above: excess of ``peak`` over the memory before the side was prepared, in bytes.
        result: return value of the last run, if ``results`` were requested.
    """

    seconds: tuple[float, ...]
    peak: int
    above: int
    result: Any = None

    @property
    def median(self) -> float:
        """Return the median time in seconds."""
        return statistics.median(self.seconds)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Result of `compare`.

    Attributes:
        sides: measurements by name of the side; None for a side that ran out of memory.
        reference: name of the side that ratios are relative to.
        device: ``cpu`` or ``cuda``.
        threads: PyTorch threads.
    """

    sides: Mapping[str, Side | None]
    reference: str
    device: str
    threads: int

    def ratio(self, name: str) -> float | None:
        """Return the speed relative to the reference, median over the rounds; None if one of the two did not run."""
        side, other = self.sides[name], self.sides[self.reference]
        if side is None or other is None:
            return None
        return statistics.median(b / a for a, b in zip(side.seconds, other.seconds, strict=True))

    def memory_ratio(self, name: str) -> float | None:
        """Return ``above`` relative to the reference; None if one of the two did not run or the reference's is zero."""
        side, other = self.sides[name], self.sides[self.reference]
        return side.above / other.above if side and other and other.above > 0 else None

    def as_dict(self) -> dict[str, Any]:
        """Return everything except the results, for `write_json`."""
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
        """Return the table cells of each side by column heading, for `print_table`.

        Args:
            limits: lower limit of the time in seconds by side (`limit_seconds`).
        """
        rows = []
        for name, side in self.sides.items():
            if side is None:
                rows.append({"side": name, "seconds": "out of memory"})
                continue
            row = {"side": name, "seconds": f"{side.median:.4g}"}
            row["min – max"] = f"{min(side.seconds):.4g} – {max(side.seconds):.4g}"
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
        sides: maps each name to the function that prepares the side and returns the function to time; see the module.
        reference: side that ratios are relative to. None: the last.
        runs: timed rounds.
        warmup: untimed rounds before them.
        device: ``cpu`` or ``cuda``. With ``cuda``, synchronise before and after each run and measure GPU memory.
        threads: PyTorch threads in each process. None: PyTorch's default.
        results: return the value of each side's last run (pickled, so tensors must be on the CPU).

    Raises:
        ValueError: if ``reference`` is not one of the sides, or ``runs`` is below 1.
        Exception: any exception of a side, except running out of memory.
    """
    reference = list(sides)[-1] if reference is None else reference
    if reference not in sides or runs < 1:
        raise ValueError(
            f"reference {reference!r} must be one of {', '.join(sides)}, and runs must be >= 1, not {runs}."
        )
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    dead: set[str] = set()
    processes: dict[str, ProcessPoolExecutor] = {}
    with ExitStack() as stack:

        def call(name: str, *arguments: Any) -> Any:
            try:
                return processes[name].submit(_call, *arguments).result()
            except (BrokenProcessPool, torch.OutOfMemoryError):
                dead.add(name)
                processes[name].shutdown()  # free its memory for the other sides
                return None

        for name, prepare in sides.items():
            processes[name] = stack.enter_context(ProcessPoolExecutor(1, mp_context=get_context(START)))
            call(name, "prepare", prepare, device, threads)
        rounds = range(warmup + runs)
        for number in track(rounds, description="Rounds", console=Console(stderr=True), transient=True):
            for name in list(sides) if number % 2 == 0 else reversed(sides):
                if name not in dead and number == warmup:
                    call(name, "forget_peak")
                if name not in dead and (duration := call(name, "run")) is not None and number >= warmup:
                    seconds[name].append(duration)
        measured: dict[str, Side | None] = {}
        for name in sides:
            memory = None if name in dead else call(name, "memory")
            result = None if name in dead or not results else call(name, "result")
            measured[name] = None if name in dead else Side(seconds=tuple(seconds[name]), result=result, **memory)
        used = next((call(name, "threads") for name in sides if name not in dead), threads or 0)
    return Comparison(sides=measured, reference=reference, device=device, threads=used)


class _Process:
    """A side in its measured process."""

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
        self.last = None  # free the last result before the next is computed
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
    """Call a picklable function in a new process and return its result, so that its memory is freed afterwards."""
    with ProcessPoolExecutor(1, mp_context=get_context(START)) as pool:
        return pool.submit(function, *arguments, **options).result()


# ---- work and limit ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Work:
    """Work of a function.

    Attributes:
        flops: FLOPs of convolutions, matrix products and attention; a multiply-add counts as two.
        bytes: bytes that its operations read and write, counted per operation; fusion and caches reduce them.
    """

    flops: int
    bytes: int


class _Traffic(TorchDispatchMode):
    """Sums the bytes of the tensors that operations read and write; views count as nothing."""

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
    """Return the bytes that a tensor occupies; an expanded tensor counts like the tensor it was expanded from."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _attention(*shapes: Any, **_: Any) -> int:
    return sdpa_flop_count(*shapes[:3])


def _attention_backward(*shapes: Any, **_: Any) -> int:
    return sdpa_backward_flop_count(*shapes[:4])


def work(function: Timed) -> Work:
    """Count the work of a function by running it twice. Triton kernels are not counted."""
    aten = torch.ops.aten
    cpu_attention = {  # PyTorch's counter only knows the attention operations of a GPU
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
    """Best measured rates of a machine.

    Attributes:
        matmul: FLOP/s of a large matrix product.
        conv: FLOP/s of a 3x3x3 convolution, 48 to 48 channels.
        copy: bytes/s of a copy, counting reads and writes.
    """

    matmul: float
    conv: float
    copy: float


def floor(
    dtype: torch.dtype = torch.float32, device: str = "cpu", *, threads: int | None = None, seconds: float = 1.0
) -> Floor:
    """Measure the best rates of a matrix product, a convolution and a copy.

    With ``threads`` the number of threads of this process is changed; to avoid that, call it through `in_a_process`.

    Args:
        dtype: data type of the matrix product and the convolution.
        device: ``cpu`` or ``cuda``.
        threads: PyTorch threads. None: unchanged.
        seconds: time to spend on each of the three.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    gpu = torch.device(device).type == "cuda"
    side, extent = (8192, 96) if gpu else (1536, 32)
    a, b = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
    convolution = torch.nn.Conv3d(48, 48, 3, padding=1, bias=False, device=device, dtype=dtype)
    x = torch.rand(1, 48, *[extent] * 3, device=device).to(dtype)
    source = torch.empty(256 * MIB, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    with torch.no_grad():
        return Floor(
            matmul=2 * side**3 / _fastest(lambda: a @ b, gpu, seconds),
            conv=2 * 27 * 48**2 * extent**3 / _fastest(lambda: convolution(x), gpu, seconds),
            copy=2 * source.numel() / _fastest(lambda: target.copy_(source), gpu, seconds),
        )


def _fastest(function: Timed, gpu: bool, seconds: float) -> float:
    """Return the seconds of the fastest of at least three runs; on a GPU a run is the mean of ten calls in a row."""
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
    """Return the seconds that the arithmetic takes at the faster rate of matrix product and convolution.

    Memory traffic is ignored, because fused kernels can avoid it. Without fusion it takes `Work.bytes` / `Floor.copy`.
    """
    return work.flops / max(floor.matmul, floor.conv)


# ---- the machine ---------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Describe the machine: CPU, usable cores, memory in bytes, load of the last minute, GPU (or None) and versions."""
    models = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if "model name" in line]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": available_cores(),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "load": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def machine_line(here: Mapping[str, Any]) -> str:
    """Format the result of `machine` as one line."""
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    gpu = f"{here['gpu']}; " if here["gpu"] else ""
    cpu = f"{here['cpu']}, {here['cores']} cores, {here['memory'] / GIB:.0f} GiB, load {here['load']:.1f}"
    return f"{gpu}{cpu}; {versions}"


def resident_bytes(name: str) -> int:
    """VmRSS (current) or VmHWM (peak) of this process in bytes; outside Linux the peak for both."""
    for line in _lines("/proc/self/status"):
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _forget_resident_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM to the current resident memory
    except OSError:  # not Linux, or not permitted: the peak then includes preparation and warm-up
        pass


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:  # not Linux
        return []


# ---- output --------------------------------------------------------------------------------------------------------


def print_table(rows: Sequence[Mapping[str, str]], *, left: Iterable[str] = ("side",), title: str = "") -> None:
    """Print rows of cells by column heading; columns named in ``left`` are left-aligned."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    headings = list(max(rows, key=len))
    for heading in headings:
        table.add_column(heading, justify="left" if heading in left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(row.get(heading, "") for heading in headings))
    console = Console()
    console = Console(width=max(console.width, 120))  # do not truncate numbers in a narrow terminal
    if title:
        console.print(title, style="bold", highlight=False)
    console.print(table)


def write_json(path: str | os.PathLike, results: Mapping[str, Any]) -> None:
    """Write results atomically as JSON; missing folders are created."""
    write_text(str(path), json.dumps(results, indent=4) + "\n")
