# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Sides of a benchmark timed in turns, their work counted, the machine's limit beside them: measured, shown and written the same way."""

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
    """The options that the benchmarks of a training share, with their defaults."""
    gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("--feature_size", type=int, default=48, metavar="N", help="48 base, 24 small, 12 tiny (default: 48)")
    add("--roi", type=int, nargs=3, default=list(roi), metavar=("X", "Y", "Z"), help=f"voxels (default here: {roi})")
    if batch is not None:
        add("--batch", type=int, default=batch, help=f"crops per step (default here: {batch})")
    add("--runs", type=int, default=runs, help=f"timed rounds (default here: {runs})")
    add("--warmup", type=int, default=1, help="rounds before them (default: 1)")
    device = "cuda" if gpu else "cpu"
    add("--device", choices=("cpu", "cuda"), default=device, help="(default: cuda where there is one)")
    precision = "bf16" if gpu else "fp32"
    add("--precision", choices=tuple(PRECISIONS), default=precision, help=f"(default here: {precision})")
    add("--threads", type=int, help="of PyTorch on the CPU")
    add("--json", metavar="FILE", help="write the numbers, in bytes and seconds")


def check_options(given: argparse.Namespace) -> None:
    """Refuse what cannot run.

    Raises:
        InputError: with the option and its value.
    """
    for name, least in (("batch", 1), ("runs", 1), ("warmup", 0), ("threads", 1)):
        if (value := getattr(given, name, None)) is not None and value < least:
            raise InputError(f"--{name} {value}: give {least} or more.")
    if given.feature_size < 12 or given.feature_size % 12:
        raise InputError(f"--feature_size {given.feature_size}: give a multiple of 12.")
    if any(size < 32 or size % 32 for size in given.roi):
        raise InputError(f"--roi {given.roi}: give multiples of 32.")
    if given.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no GPU here.")
    if given.device == "cpu" and given.precision != "fp32":
        raise InputError(f"--precision {given.precision} wants a GPU; a CPU trains in fp32.")


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
    """Time the sides in turns and count what each does.

    Args:
        sides: see `side_by_side.compare`.
        reference: side that ratios are to.
        given: options (`add_options`).
        best: of this machine (`machine_floor`).
        same_work: sides whose work is that of another one, by name, and need not be counted.

    Returns:
        `Comparison.as_dict`, with ``flops``, ``bytes``, ``limit`` (seconds) and ``result`` of each side.
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
    """What this machine does at best in the precision asked for."""
    return in_a_process(floor, PRECISIONS[given.precision], given.device, threads=given.threads)


def head(given: argparse.Namespace, best: Floor) -> dict[str, Any]:
    """What every result begins with: options, machine and floor; printed too."""
    here = machine()
    print(machine_line(here))
    rates = f"matrix product {best.matmul / 1e9:.4g} GFLOP/s, convolution {best.conv / 1e9:.4g} GFLOP/s"
    print(f"{given.device}, {given.precision}; at best {rates}, copy {best.copy / 1e9:.4g} GB/s")
    options = {name: value for name, value in vars(given).items() if name != "json"}
    return {"options": options, "machine": here, "floor": asdict(best)}


def show(results: dict[str, Any], *, title: str) -> None:
    """Print the table of `measure`; its rows are taken out of the results."""
    print_table(results.pop("rows"), title=f"{title}; ratios to {results['reference']}")
