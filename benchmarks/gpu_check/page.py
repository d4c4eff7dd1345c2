# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Write the results as a page of the documentation. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HEAD = """# On a GPU

`benchmarks/gpu_check` runs what needs a GPU in one command of under ten minutes: the attention and its Triton kernel
against float64, parity of the fast path, the bundles with mixed precision, time and memory of a step, its slowest
kernels, and, in the time that is left, [Dice over the number of labelled patients](#the-curve).

```bash
make gpu-kit                                        # once, where packages can be downloaded: writes gpu-kit/
python3 gpu-kit/check.py --out results              # on the machine with the GPU; no network
.venv/bin/python -m benchmarks.gpu_check --out results --report docs/explanation/gpu.md   # here again: writes this page
```

The machine needs x86-64 Linux with Python 3.12, PyTorch 2.11 to 2.15, and what usually comes with it: NumPy, SciPy,
Matplotlib, PyYAML, TensorBoard, rich, Pillow. All else is in the kit. (`make install` takes PyTorch up to 2.14.)
`--dry_run` does everything at tiny size on a CPU. A part that fails, or runs out of time or memory, does not stop the next
one. All results are in `results/gpu_check.json` as soon as they are known.

## The curve

The check pre-trains an encoder on unlabelled scans. It then trains Swin UNETR (feature size 24) from scratch and from
that encoder, with 2, 8 and 32 labelled patients and three seeds. As many runs go at once as memory and cores allow. All
voxels lie on the card. The steps are doubled, and every arm trained anew, until scratch gains less than half a point of
Dice on eight patients set apart. Both arms are compared at that length, on the validation patients. If the time ends
before, the longest comparison is shown as not converged. Intervals: the bootstrap over patients and seeds, and the t
interval over seeds ([how evidence is read](evidence.md)).

**The patients are synthetic** (`tools/synthetic_ct.py`): 48 without labels, 32 for training, 8 to choose the steps, 16 for
validation, drawn where the check runs. Such a curve shows that pre-training, fine-tuning and scoring work on a GPU, and
how long a curve takes. It cannot show what pre-training gains on real scans: all patients come from one generator of
ellipsoids and tubes, without other scanners, diseases or operations, so the unlabelled scans hold nothing that the
labelled ones lack. For your own question, pack your own labelled CT:

```bash
make gpu-kit DATA=/data/Task09_Spleen     # images and labels on a grid of 4x4x5 mm; 60 MiB in all may travel
```

Pre-training then sees the images of the training patients, without their labels. Dice is measured on the packed grid.
"""
NOT_RUN = """
## Results

**Not run yet.** Nothing of the project has run on a GPU so far. What a CPU can show is tested: all parts at tiny size
(`.venv/bin/python -m benchmarks.gpu_check --dry_run`), and the Triton kernel by its interpreter, and by compiling it
(`make test-triton`). The kit of 27 MiB was run from an empty folder, with Python 3.12 and PyTorch 2.11.0 built for CUDA, on
two CPU cores: `python3 gpu-kit/check.py --out results --dry_run` ended without a fault, in 242 s of CPU time. With PyTorch
2.15.0 all parts were without a fault, too, the curve in a second call (`--only curve`), since the machine was busy.

Not measured: the goals of [What makes it fast](speed.md#goals-and-measurements); a fine-tuning step of four crops of
96^3 at base size in bf16 within 15 ms and in half of stock's memory; 3x on the pre-training step; the Triton kernel's
time; what `--compile` and CUDA graphs gain; the curve.
"""


def write_page(results: Path, page: Path) -> None:
    """Write the page from the JSON, and keep the JSON beside it; the page of a dry run says "not run yet".

    Raises:
        FileNotFoundError: there are no results.
    """
    content = json.loads(results.read_text(encoding="utf-8"))
    page.write_text(page_text(content), encoding="utf-8")
    if not content["dry_run"]:
        page.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def page_text(results: Mapping[str, Any] | None) -> str:
    """Return the Markdown of the page."""
    if results is None or results["dry_run"]:
        return HEAD + NOT_RUN
    lines = [HEAD, f"Results of {results['date']}. Each line is printed by the check itself.", ""]
    for name, part in results["parts"].items():
        lines += [f"## {part['title']}", ""]
        if part["status"] != "done":
            lines += [f"**{part['status'].capitalize()}**: {part['why']}.", ""]
        table = TABLES.get(name, _list)
        lines += [*table(part["checks"]), ""] if part["checks"] else []
    return "\n".join(lines).rstrip() + "\n"


def _list(checks: list[Mapping[str, Any]]) -> list[str]:
    return [f"- {_mark(check)}{check['text']}" for check in checks]


def _others(checks: list[Mapping[str, Any]], key: str) -> list[str]:
    """List what a table of the checks with ``key`` does not show."""
    rest = [check for check in checks if key not in check]
    return ["", *_list(rest)] if rest else []


def _mark(check: Mapping[str, Any]) -> str:
    return "**failed**: " if check["ok"] is False else ""


def _parity(checks: list[Mapping[str, Any]]) -> list[str]:
    rows = ["| | output | input gradient | weight gradient |", "|---|---|---|---|"]
    for check in (check for check in checks if "ours" in check):
        cells = [
            f"{check['ours'][part]:.1e} ({check['stock'][part]:.1e})"
            for part in ("output", "input gradient", "weight gradient")
        ]
        rows.append(f"| {_mark(check)}{check['check']} | {' | '.join(cells)} |")
    text = [
        "Relative error against stock MONAI in float64, in parentheses that of stock MONAI at the same precision.",
        "",
    ]
    return [*text, *rows, *_others(checks, "ours")]


def _steps(checks: list[Mapping[str, Any]]) -> list[str]:
    rows = ["| | s a step, ours | stock | ratio | peak GiB, ours | stock | ratio |", "|---|---|---|---|---|---|---|"]
    for check in (check for check in checks if "seconds" in check):
        ours, stock = (sorted(check["seconds"][side]) for side in ("ours", "stock"))
        ours, stock = ours[len(ours) // 2], stock[len(stock) // 2]
        memory = [check["peak"][side] / 2**30 for side in ("ours", "stock")]
        rows.append(
            f"| {check['check']}: {check['crops']} | {ours:.3f} | {stock:.3f} | {stock / ours:.2f} | {memory[0]:.1f} | "
            f"{memory[1]:.1f} | {memory[0] / memory[1]:.2f} |"
        )
    compiled = [check for check in checks if "compile" in check]
    if compiled:
        rows += ["", "| | s a step | gain | peak GiB | s until the first timed step |", "|---|---|---|---|---|"]
    for check in compiled:
        figures = (
            f"{check['step']:.4f} | {check['gain']:.2f} | {check['compiled_peak'] / 2**30:.1f} | {check['start']:.0f}"
        )
        rows.append(f"| {check['check'].replace('--compile None', 'not compiled')} | {figures} |")
    return [*rows, *_others([check for check in checks if "compile" not in check], "seconds")]


def _kernels(checks: list[Mapping[str, Any]]) -> list[str]:
    lines = []
    for check in checks:
        lines += ["", f"### {check['check']}", ""] if "rows" in check else ["", *_list([check])]
        if "rows" in check:
            lines += ["| kernel | calls | ms | share |", "|---|---|---|---|"]
            lines += [
                f"| `{row['kernel'][:90]}` | {row['calls']} | {row['ms']:.2f} | {row['ms'] / check['total_ms']:.0%} |"
                for row in check["rows"]
            ]
    return lines[1:]


def _curve(checks: list[Mapping[str, Any]]) -> list[str]:
    head = ("labelled patients", "steps", "scratch", "pre-trained", "difference", "patients and seeds", "seeds alone")
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for check in (check for check in checks if "curve" in check):
        found = check["curve"]
        steps = f"{found['steps']}{'' if check['converged'] else ', not converged'}"
        cells = [f"{found['scratch']:.3f}", f"{found['pre-trained']:.3f}", f"{found['difference']:+.3f}"]
        cells += [_interval(found["interval"]), _interval(found["seeds_interval"])]
        rows.append(f"| {found['n']} | {steps} | {' | '.join(cells)} |")
    return [*rows, *_others([check for check in checks if "dice" not in check], "curve")]


def _interval(ends: list[float] | None) -> str:
    return "none" if ends is None else f"{ends[0]:+.3f} to {ends[1]:+.3f}"


TABLES = {"parity": _parity, "steps": _steps, "kernels": _kernels, "curve": _curve}
