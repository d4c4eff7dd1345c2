# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Run the parts one after another, each in its own process, and keep what they report. Standard library only."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .page import write_page
from .parts import MARK, PARTS, Settings, run_part

ROOT = Path(__file__).resolve().parents[2]
RESULTS = "gpu_check.json"
LIMIT = 560  # seconds of all parts; the curve takes what the others leave
DRY_LIMIT = 1500  # a dry run takes less than five minutes on two idle cores; tests run on busy ones
LOG_TAIL = 30  # lines of a part's other output that are kept if it fails


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check from the command line; return 0, or 1 if any result is not as it should be."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("gpu_check_results"), help=f"folder of {RESULTS} (default: %(default)s)")
    add("--scans", type=Path, help="folder of synthetic scans (default: made with tools.synthetic_ct)")
    add("--curve_data", type=Path, help="folder of packed scans for the curve (default: synthetic patients)")
    add("--only", choices=tuple(PARTS), nargs="+", default=list(PARTS), help="run these parts; keep others' results")
    add("--limit", type=float, help=f"seconds for all parts (default: {LIMIT}; {DRY_LIMIT} in a dry run)")
    add("--dry_run", action="store_true", help="all parts at tiny size on the CPU")
    add("--report", type=Path, metavar="FILE", help=f"only write a page from {RESULTS} of --out")
    add("--run_part", choices=tuple(PARTS), help=argparse.SUPPRESS)
    add("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.run_part:
        settings = Settings(
            *(given.scans.resolve(), given.work.resolve(), given.dry_run, given.limit),
            curve_data=given.curve_data and given.curve_data.resolve(),
        )
        return run_part(given.run_part, settings)
    if given.report:
        if not (given.out / RESULTS).exists():
            print(
                f"Stopped: {given.out / RESULTS} does not exist: run the check first, or correct --out.",
                file=sys.stderr,
            )
            return 1
        write_page(given.out / RESULTS, given.report)
        print(f"wrote {given.report}")
        return 0
    return run(given)


def run(given: argparse.Namespace) -> int:
    """Run the parts and write the results after each line that a part reports."""
    ends = time.monotonic() + (given.limit or (DRY_LIMIT if given.dry_run else LIMIT))
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / RESULTS
    results = earlier_results(file, dry_run=given.dry_run)
    results |= {"dry_run": given.dry_run, "date": time.strftime("%Y-%m-%d"), "command": sys.argv[1:]}
    work = Path(tempfile.mkdtemp(prefix="gpu_check_"))
    try:
        scans = given.scans or work / "scans"
        if given.scans is None and "workflows" in given.only:
            make_scans(scans)
        for name in given.only:
            result: dict[str, Any] = {"title": PARTS[name].title, "checks": []}
            results["parts"][name] = result
            print(f"\n{name}: {result['title']}", flush=True)
            left = ends - time.monotonic()
            # a dry run is for slow machines: only the limit of the whole run counts
            seconds = left if given.dry_run else min(left, PARTS[name].seconds)
            if seconds < 5:
                result |= {"status": "left out", "why": "the time was over (--limit)"}
                print(f"  left out: {result['why']}", flush=True)
            else:
                run_child(name, given, scans, work, seconds, result, lambda: write(file, results))
            write(file, results)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    faults = [check["text"] for part in results["parts"].values() for check in part["checks"] if check["ok"] is False]
    faults += [f"{name}: {part['why']}" for name, part in results["parts"].items() if part["status"] != "done"]
    print(f"\n{len(faults)} fault(s); results in {file}" + "".join(f"\n  {fault}" for fault in faults))
    return 1 if faults else 0


def run_child(
    name: str, given: argparse.Namespace, scans: Path, work: Path, seconds: float, result: dict, keep: Any
) -> None:
    """Run a part in a process of its own until it ends or its time is over; ``keep`` is called after each result."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--run_part", name, "--scans", str(scans)]
    command += ["--work", str(work), "--limit", str(seconds), *(["--dry_run"] if given.dry_run else [])]
    command += ["--curve_data", str(given.curve_data.resolve())] if given.curve_data else []
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    if given.dry_run:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    begin, other = time.monotonic(), []
    process = subprocess.Popen(
        command,
        cwd=work,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    late = threading.Event()

    def end() -> None:
        late.set()
        kill(process)

    timer = threading.Timer(seconds, end)
    timer.start()
    try:
        for line in process.stdout:
            if line.startswith(MARK):
                check = json.loads(line[1:])
                result["checks"].append(check)
                sign = {True: "ok  ", False: "FAIL", None: "    "}[check["ok"]]
                print(f"  {sign}  {check['text']}", flush=True)
                keep()
            elif line.strip():
                other = [*other[1 - LOG_TAIL :], line.rstrip()]
        status = process.wait()
    finally:
        timer.cancel()
        kill(process)
    result["seconds"] = round(time.monotonic() - begin, 1)
    if late.is_set():
        result |= {"status": "out of time", "why": f"not finished within {seconds:.0f} s", "output": other}
    elif status:
        last = other[-1] if other else "no output"
        result |= {"status": "failed", "why": f"exit status {status}: {last}", "output": other}
    else:
        result["status"] = "done"
    if result["status"] != "done":
        print(f"  FAIL  {result['why']}", flush=True)


def kill(process: subprocess.Popen) -> None:
    """Kill a part and all processes that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def make_scans(folder: Path) -> None:
    """Make a handful of synthetic scans."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    code = f"from tools.synthetic_ct import write_dataset; write_dataset({str(folder)!r}, **{SCANS!r})"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, check=False)


SCANS = {"unlabelled": 8, "training": 3, "validation": 1, "test": 1, "shuffled": False, "progress": False}


def earlier_results(file: Path, *, dry_run: bool) -> dict[str, Any]:
    """Return the results of an earlier call into the same folder, so that ``--only`` completes them."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"parts": {}}
    same = isinstance(content, dict) and content.get("dry_run") == dry_run and isinstance(content.get("parts"), dict)
    return content if same else {"parts": {}}


def write(file: Path, results: dict[str, Any]) -> None:
    """Write the results atomically."""
    temporary = file.with_name(f".{file.name}")
    temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    temporary.replace(file)


if __name__ == "__main__":
    sys.exit(main())
