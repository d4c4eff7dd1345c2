# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Options, measurement and report that the benchmarks of a training step share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.side_by_side import (
    Floor,
    Work,
    compare,
    floor,
    in_a_process,
    limit_seconds,
    machine,
    machine_line,
    print_table,
    work,
)
from bundles.common.errors import InputError
from bundles.common.run.mixed_precision import TYPES

PRECISIONS = {"fp32": torch.float32, **TYPES}


def add_options(parser: argparse.ArgumentParser, *, roi: Sequence[int], runs: int, batch: int | None = None) -> None:
    """Add the options that these benchmarks share, with the given defaults."""
    gpu = torch.cuda.is_available()
    add = parser.add_argument
    size_help = "feature size: 48 base, 24 small, 12 tiny (default: 48)"
    add("--feature_size", type=int, default=48, metavar="N", help=size_help)
    roi_help = f"crop size in voxels (default here: {roi})"
    add("--roi", type=int, nargs=3, default=list(roi), metavar=("X", "Y", "Z"), help=roi_help)
    if batch is not None:
        add("--batch", type=int, default=batch, help=f"crops per step (default here: {batch})")
    add("--runs", type=int, default=runs, help=f"timed rounds (default here: {runs})")
    add("--warmup", type=int, default=1, help="untimed rounds before them (default: 1)")
    device = "cuda" if gpu else "cpu"
    add("--device", choices=("cpu", "cuda"), default=device, help="device to run on (default: cuda if available)")
    precision = "bf16" if gpu else "fp32"
    precision_help = f"precision of the autocast (default here: {precision})"
    add("--precision", choices=tuple(PRECISIONS), default=precision, help=precision_help)
    add("--threads", type=int, help="PyTorch threads on the CPU (default: PyTorch's)")
    add("--json", metavar="FILE", help="write the results to FILE, in bytes and seconds")


def check_options(given: argparse.Namespace) -> None:
    """Check the values of the shared options.

    Raises:
        InputError: names the first invalid option and its value.
    """
    for name, least in (("batch", 1), ("runs", 1), ("warmup", 0), ("threads", 1)):
        if (value := getattr(given, name, None)) is not None and value < least:
            raise InputError(f"--{name} {value}: must be {least} or more.")
    if given.feature_size < 12 or given.feature_size % 12:
        raise InputError(f"--feature_size {given.feature_size}: must be a multiple of 12.")
    if any(size < 32 or size % 32 for size in given.roi):
        raise InputError(f"--roi {given.roi}: must be multiples of 32.")
    if given.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no GPU. Use --device cpu.")
    if given.device == "cpu" and given.precision != "fp32":
        raise InputError(f"--precision {given.precision} needs a GPU. On a CPU use fp32.")


def _work_of(prepare: Callable[[], Callable[[], Any]], threads: int | None) -> Work:
    if threads is not None:
        torch.set_num_threads(threads)
    return work(prepare())


def measure(
    sides: Mapping[str, Callable[[], Callable[[], Any]]],
    *,
    reference: str,
    given: argparse.Namespace,
    best: Floor,
    same_work: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Time the sides in turns and count the work of each.

    Args:
        sides: see `side_by_side.compare`.
        reference: side that ratios are relative to.
        given: options (`add_options`).
        best: best rates of this machine (`machine_floor`).
        same_work: maps sides that do the same work as another side to that side; their work is not counted again.

    Returns:
        `Comparison.as_dict`, plus ``flops``, ``bytes``, ``limit`` (seconds) and ``result`` of each side, and ``rows``
        for `show`.
    """
    options = {"runs": given.runs, "warmup": given.warmup, "device": given.device, "threads": given.threads}
    comparison = compare(sides, reference=reference, results=True, **options)
    results = comparison.as_dict()
    same_work = same_work or {}
    works: dict[str, Work] = {}
    for name, prepare in sides.items():
        if name not in same_work and comparison.sides[name] is not None:
            works[name] = in_a_process(_work_of, prepare, given.threads)
    works |= {name: works[other] for name, other in same_work.items() if other in works and name in sides}
    for name, side in results["sides"].items():
        if side is not None and name in works:
            side |= asdict(works[name]) | {"limit": limit_seconds(works[name], best)}
            side["result"] = comparison.sides[name].result
    limits = {name: limit_seconds(each, best) for name, each in works.items()}
    results["rows"] = comparison.rows(limits)
    for row in results["rows"]:
        if row["side"] in works:
            row |= {
                "GFLOP": f"{works[row['side']].flops / 1e9:.4g}",
                "GB\nmoved": f"{works[row['side']].bytes / 1e9:.3g}",
            }
    return results


def machine_floor(given: argparse.Namespace) -> Floor:
    """Measure the best rates of this machine in the requested precision."""
    return in_a_process(floor, PRECISIONS[given.precision], given.device, threads=given.threads)


def head(given: argparse.Namespace, best: Floor) -> dict[str, Any]:
    """Print and return the head of the results: options, machine and its best rates (``floor``)."""
    hardware = machine()
    print(machine_line(hardware))
    rates = f"matrix product {best.matmul / 1e9:.4g} GFLOP/s, convolution {best.conv / 1e9:.4g} GFLOP/s"
    print(f"{given.device}, {given.precision}; best rates: {rates}, copy {best.copy / 1e9:.4g} GB/s")
    options = {name: value for name, value in vars(given).items() if name != "json"}
    return {"options": options, "machine": hardware, "floor": asdict(best)}


def show(results: dict[str, Any], *, title: str) -> None:
    """Print the table of `measure` and remove its ``rows`` from the results."""
    print_table(results.pop("rows"), title=f"{title}; ratios to {results['reference']}")
