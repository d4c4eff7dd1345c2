# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Run the demo: synthetic patients, pre-training, fine-tuning with controls, scores, a segmentation and a report.

    python -m demo.run

Each stage is one command that also runs alone (``python -m monai.bundle run ...``); the report lists the commands.
Finished stages are not repeated, and an interrupted demo continues where it stopped.

It does not run on Snakemake, as workflow/ does: a newcomer sees one bar with step, loss and time left, and installs nothing
more.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from bundles.common.errors import InputError
from tools.arguments import positive
from tools.child_process import Stopped, available_cores, raise_on_signals, run_python

from .stage import RECORDS, Attempt, Records, Stage
from .summary import clock, print_summary

ROOT = Path(__file__).resolve().parents[1]
PRETRAIN = "bundles/swin_unetr_pretrain"
SEGMENT = "bundles/swin_unetr_btcv_seg"
# Files and folders that the demo makes; --fresh removes them.
OWN_OUTPUTS = (
    *("data", "swin_unetr_pretrain", "swin_unetr_btcv_seg", "from_scratch", "shuffled_labels", "segmentation"),
    *("logs", "mlruns", "mlruns.db", "report.html"),
)
NSD_TOLERANCE = 4  # mm, about one voxel of the cpu preset's grid (4 x 4 x 5 mm)
TEST_PATIENTS = 5  # fewer give no interval worth showing; each costs about two seconds in every evaluation
# Example: step 120/300  loss 1.23 inpainting 0.40 ...  lr 1.00e-03  3.20 crops/s  left 2:31
STEP_LINE = re.compile(r"step (\d+)/(\d+)  loss (\S+).*left (\d+(?::\d\d)+)")


def stages(out: Path, *, pretrain_steps: int | None = None, finetune_steps: int | None = None) -> list[Stage]:
    """Return the stages of the demo in the order in which they run.

    Args:
        out: the demo's folder.
        pretrain_steps: pre-training steps; None: as in the ``cpu`` preset.
        finetune_steps: steps of each fine-tuning; None: as in the ``cpu`` preset.
    """
    shared = {PRETRAIN: "bundles/pretraining", SEGMENT: "bundles/segmentation"}
    code = {
        bundle: [ROOT / name for name in ("bundles/common", shared[bundle], f"{bundle}/configs", f"{bundle}/scripts")]
        for bundle in (PRETRAIN, SEGMENT)
    }

    def bundle_run(bundle: str, config: str, **options: object) -> list[str]:
        words = ["-m", "monai.bundle", "run", "--config_file", f"{bundle}/configs/{config}.yaml"]
        options = {"bundle_root": bundle, "preset": "cpu"} | options
        return words + [str(word) for name, value in options.items() for word in (f"--{name}", value)]

    def path(*parts: str) -> str:
        return _as_typed(out.joinpath(*parts))

    def tracked(run: str, folder: str) -> dict[str, object]:
        return {
            "tracking": "mlflow",
            "tracking_uri": f"sqlite:///{(out / 'mlruns.db').as_posix()}",
            "experiment_name": "demo",
            "run_name": run,
            "save_execute_config": path(folder, "executed_config.json"),
        }

    def pretraining() -> Stage:
        folder = "swin_unetr_pretrain"
        steps = {} if pretrain_steps is None else {"max_steps": pretrain_steps}
        data = {"dataset_dir": path("data", "unlabelled"), "output_dir": path(folder)}
        panels = [f"{folder}/panel_{task}.png" for task in ("inpainting", "rotation", "contrast")]
        return Stage(
            name="pretrain",
            title="Pre-training without labels",
            command=bundle_run(PRETRAIN, "train", **data, **steps, **tracked("pretrain", folder)),
            outputs=[
                *(f"{folder}/models/{name}.pt" for name in ("model", "encoder")),
                *(f"{folder}/training_log.csv", f"{folder}/validation.json", *panels),
            ],
            needs=["data"],
            code=code[PRETRAIN],
            folder=folder,
            resume=["--resume", "true"],
            seconds=12 + 0.6 * _steps(PRETRAIN, pretrain_steps),
        )

    def finetuning(name: str, title: str, folder: str, **options: object) -> Stage:
        steps = {} if finetune_steps is None else {"max_steps": finetune_steps}
        data = {"dataset_dir": path("data", "labelled"), "output_dir": path(folder)}
        return Stage(
            name=name,
            title=title,
            command=bundle_run(SEGMENT, "train", **data, **options, **steps, **tracked(name, folder)),
            outputs=[f"{folder}/models/model.pt", f"{folder}/training_log.csv"],
            needs=["data", "pretrain"] if "pretrained_encoder" in options else ["data"],
            code=code[SEGMENT],
            folder=folder,
            resume=["--resume", "true"],
            seconds=12 + 0.6 * _steps(SEGMENT, finetune_steps),
        )

    def evaluation(run: str, title: str, folder: str) -> Stage:
        return Stage(
            name=f"evaluate_{run}",
            title=title,
            command=bundle_run(
                SEGMENT,
                "evaluate",
                dataset_dir=path("data", "labelled"),
                section="test",
                pretrained_model=path(folder, "models", "model.pt"),
                nsd_tolerance=NSD_TOLERANCE,
                output_dir=path(folder, "evaluation"),
            ),
            outputs=[f"{folder}/evaluation/scores.csv", f"{folder}/evaluation/summary.json"],
            needs=["data", run],
            code=code[SEGMENT],
            folder=f"{folder}/evaluation",
            seconds=14,
        )

    everything = [
        Stage(
            name="data",
            title="Synthetic patients",
            command=["-m", "tools.synthetic_ct", "--out", path("data"), "--test", str(TEST_PATIENTS)],
            outputs=["data/*labelled/dataset*.json", "data/*/*/*.nii.gz"],
            code=[ROOT / "tools/synthetic_ct.py"],
            seconds=10,
        ),
        pretraining(),
        finetuning(
            "finetune",
            "Fine-tuning from the encoder",
            "swin_unetr_btcv_seg",
            pretrained_encoder=path("swin_unetr_pretrain", "models", "encoder.pt"),
        ),
        finetuning("from_scratch", "Fine-tuning from scratch", "from_scratch"),
        finetuning(
            "shuffled_labels",
            "Control: shuffled labels",
            "shuffled_labels",
            data_list="dataset_shuffled.json",
        ),
        evaluation("finetune", "Scores: encoder", "swin_unetr_btcv_seg"),
        evaluation("from_scratch", "Scores: scratch", "from_scratch"),
        evaluation("shuffled_labels", "Scores: shuffled labels", "shuffled_labels"),
        Stage(
            name="segment",
            title="Segmentation of unseen scans",
            command=bundle_run(
                SEGMENT,
                "inference",
                dataset_dir=path("data", "labelled", "imagesTs"),
                pretrained_model=path("swin_unetr_btcv_seg", "models", "model.pt"),
                output_dir=path("segmentation"),
            ),
            outputs=["segmentation/*_seg.nii.gz", "segmentation/*_overlay.png"],
            needs=["data", "finetune"],
            code=code[SEGMENT],
            folder="segmentation",
            seconds=14,
        ),
    ]
    report = Stage(
        name="report",
        title="Report",
        command=["-m", "demo.report", "--out", path()],
        outputs=["report.html"],
        needs=[stage.name for stage in everything],
        code=[ROOT / "demo" / name for name in ("report.py", "report.html.jinja", "findings.py", "summary.py")],
        seconds=12,
    )
    return [*everything, report]


def _as_typed(path: Path) -> str:
    """Return a path as a user would type it in the repository's root: relative if it is inside."""
    return (path.relative_to(ROOT) if path.is_relative_to(ROOT) else path).as_posix()


def _steps(bundle: str, requested: int | None) -> int:
    """Return the number of training steps: the requested one, or that of the ``cpu`` preset."""
    presets = yaml.safe_load((ROOT / bundle / "configs" / "presets.yaml").read_text())
    return requested or presets["cpu"]["max_steps"]


class StageFailed(Exception):
    """A stage's command ended with an error."""

    def __init__(self, stage: Stage, log: Path, status: int) -> None:
        self.stage, self.log, self.status = stage, log, status


class Screen:
    """One progress bar over all stages. Without a terminal, a plain line every few seconds.

    Args:
        todo: stages to run.
        console: where to draw.
        every: seconds between plain lines.
    """

    def __init__(self, todo: Sequence[Stage], console: Console, every: float = 5.0) -> None:
        self.expected = {stage.name: stage.seconds for stage in todo}
        self.taken: dict[str, float] = {}
        self.console = console
        self.every = every
        self.began = self.last_line = time.monotonic()
        self.share = 0.0
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[times]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("", total=1.0, times="")

    def begin(self, stage: Stage, resumed: bool) -> None:
        """Show that a stage begins, or resumes after an interruption."""
        self.stage, self.stage_began, self.step = stage, time.monotonic(), None
        if not self.console.is_terminal:
            self.console.print(f"{stage.title} ..." + " (continuing the interrupted run)" * resumed)
        self.update("")

    def update(self, text: str) -> None:
        """Draw the progress.

        Args:
            text: what the stage has printed since the last call.
        """
        now = time.monotonic()
        for match in STEP_LINE.finditer(text):
            self.step = (match[1], match[2], match[3], _seconds(match[4]), now)
        elapsed = now - self.stage_began
        share, left = estimate(self.expected, self.taken, self.stage.name, elapsed, self._stage_left(now))
        self.share = max(self.share, share)
        at = f"step {self.step[0]}/{self.step[1]}, loss {float(self.step[2]):.3f}" if self.step else ""
        times = f"{clock(now - self.began)}, {clock(left)} left"
        self.bar.update(self.task, completed=self.share, description=f"{self.stage.title}  {at}".strip(), times=times)
        if not self.console.is_terminal and now - self.last_line >= self.every:
            self.last_line = now
            self.console.print(f"{self.share:4.0%}  {self.stage.title}  {at}  [{times}]", markup=False, soft_wrap=True)

    def _stage_left(self, now: float) -> float | None:
        """Return the seconds left by the stage's last progress line, plus two for its last validation and its files."""
        return None if self.step is None else max(0.0, self.step[3] - (now - self.step[4])) + 2

    def end(self) -> None:
        """Show that the stage has finished."""
        self.taken[self.stage.name] = time.monotonic() - self.stage_began
        self.console.print(f"{self.stage.title:<30} done in {clock(self.taken[self.stage.name])}", highlight=False)


def _seconds(text: str) -> int:
    total = 0
    for part in text.split(":"):
        total = 60 * total + int(part)
    return total


def estimate(
    expected: dict[str, float], taken: dict[str, float], running: str, elapsed: float, stage_left: float | None
) -> tuple[float, float]:
    """Estimate progress and time left by comparing the stages so far with their expected times.

    Args:
        expected: expected seconds of each stage to run, by name.
        taken: actual seconds of each finished stage.
        running: name of the running stage.
        elapsed: seconds since the running stage began.
        stage_left: seconds that the running stage still needs; None if it has not reported any.

    Returns:
        The share done, 0 to 1, and the seconds left.
    """
    before = sum(expected[name] for name in taken)
    pace = sum(taken.values()) / before if taken else 1.0
    if stage_left is None:
        stage_left = max(0.05 * expected[running], pace * expected[running] - elapsed)
    pace = (sum(taken.values()) + elapsed + stage_left) / (before + expected[running])
    after = sum(expected.values()) - before - expected[running]
    done = before + expected[running] * elapsed / max(elapsed + stage_left, 1e-9)
    return done / sum(expected.values()), stage_left + pace * after


@contextmanager
def alone_in(out: Path) -> Iterator[int]:
    """Lock the demo's folder against other runners, and end a stage that a killed runner left behind.

    Yields:
        A file descriptor that each stage's process inherits: its lock is held as long as one of them lives.

    Raises:
        InputError: if another runner uses the folder.
    """
    folder = out / RECORDS
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".runner.lock", "a") as runner, open(folder / ".stage.lock", "a+") as stage:
        try:
            fcntl.flock(runner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"A demo is already running in {out}. Wait for it, or stop it.") from None
        for _ in range(50):
            try:
                fcntl.flock(stage, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:  # still locked, so the process whose id is in the file is alive
                stage.seek(0)
                with suppress(ValueError, ProcessLookupError):
                    os.killpg(int(stage.read()), signal.SIGKILL)
                time.sleep(0.1)
        else:
            raise InputError(f"A stage of an earlier run is still running in {out}. Try again when it has ended.")
        yield stage.fileno()


def run_stage(attempt: Attempt, records: Records, screen: Screen, *, threads: int, lock: int) -> None:
    """Run the command of a stage, write its output to its log, and record its success.

    Args:
        attempt: the stage that has begun.
        records: gets the time spent, every few seconds.
        screen: shows the progress.
        threads: number of threads of the command.
        lock: file descriptor of `alone_in`; gets the process id of the command.

    Raises:
        StageFailed: if the command fails.
    """
    stage, began = attempt.stage, time.monotonic()
    log = records.out / "logs" / f"{stage.name}.log"
    log.parent.mkdir(exist_ok=True)
    if not attempt.resumed:
        log.unlink(missing_ok=True)
    screen.begin(stage, attempt.resumed)
    os.ftruncate(lock, 0)
    noted, status = began, None

    def on_poll(output: str) -> None:
        nonlocal noted
        screen.update(output)
        if time.monotonic() - noted > 5:
            noted = time.monotonic()
            records.note(attempt, noted - began)

    try:
        status = run_python(
            attempt.words,
            cwd=ROOT,
            log=log,
            threads=threads,
            on_poll=on_poll,
            on_start=lambda pid: os.write(lock, str(pid).encode()),
            pass_fds=[lock],
        )
    finally:
        if status is None:
            records.note(attempt, time.monotonic() - began)
    if status:
        raise StageFailed(stage, log, status)
    records.finish(attempt, time.monotonic() - began)
    screen.end()


def start_over(out: Path) -> None:
    """Remove what the demo made in its folder, and nothing else."""
    for path in [*(out / name for name in OWN_OUTPUTS), *(out / RECORDS).glob("*.json")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def check_folder(out: Path) -> None:
    """Refuse a folder with other content, because the demo empties folders with common names such as ``data``.

    Raises:
        InputError: if the folder is not empty and no demo ran in it.
    """
    if out.is_dir() and any(out.iterdir()) and not (out / RECORDS).is_dir():
        raise InputError(f"{out} contains files that the demo did not make. Pass an empty or new folder as --out.")


def run(out: Path, plan: Sequence[Stage], *, threads: int, lock: int, console: Console) -> None:
    """Run the stages that are not finished, and those that depend on them.

    Args:
        out: the demo's folder.
        plan: all stages, in order.
        threads: number of threads of each stage.
        lock: file descriptor of `alone_in`.
        console: where to print.

    Raises:
        StageFailed: if a stage fails.
        Stopped: on Ctrl-C or another stop signal.
    """
    records = Records(out)
    stale: set[str] = set()
    for stage in plan:
        if not records.is_done(stage) or stale.intersection(stage.needs):
            stale.add(stage.name)
    todo = [stage for stage in plan if stage.name in stale]
    if reused := [stage.title for stage in plan if stage.name not in stale]:
        console.print(f"Already finished, skipped: {', '.join(reused)}.", soft_wrap=True)
    if not todo:
        return
    console.print(f"Running {len(todo)} of {len(plan)} stages with {threads} threads in {out}", soft_wrap=True)
    screen = Screen(todo, console)
    with screen.bar:
        for stage in todo:
            run_stage(records.begin(stage), records, screen, threads=threads, lock=lock)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo from the command line, and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m demo.run", description="Run the demo on synthetic patients.")
    parser.add_argument("--out", type=Path, default=ROOT / "demo/out", help="output folder (default: demo/out)")
    parser.add_argument("--fresh", action="store_true", help="remove the results of an earlier demo and start over")
    parser.add_argument("--pretrain_steps", type=positive, help="pre-training steps (default: the cpu preset's)")
    parser.add_argument("--finetune_steps", type=positive, help="steps of each fine-tuning (default: the cpu preset's)")
    parser.add_argument("--threads", type=positive, default=available_cores(), help="threads (default: all cores)")
    options = parser.parse_args(arguments)

    console = Console()
    out = options.out.resolve()
    raise_on_signals()
    try:
        check_folder(out)
        with alone_in(out) as lock:
            if options.fresh:
                start_over(out)
            plan = stages(out, pretrain_steps=options.pretrain_steps, finetune_steps=options.finetune_steps)
            run(out, plan, threads=options.threads, lock=lock, console=console)
            print_summary(out, console)
    except InputError as error:
        console.print(f"Stopped: {error}", markup=False, highlight=False, soft_wrap=True)
        return 1
    except StageFailed as failure:
        lines = failure.log.read_text(errors="replace").splitlines()[-15:]
        console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
        message = f"\n{failure.stage.title} failed with status {failure.status}. Full log: {failure.log}"
        console.print(message, markup=False, highlight=False, soft_wrap=True)
        # Ended by a signal: the status is negative here and 128 + signal in a shell.
        return failure.status if failure.status > 0 else 128 - failure.status
    except Stopped as stop:
        console.print("Stopped. `make demo` continues from here.")
        return stop.status
    return 0


if __name__ == "__main__":
    sys.exit(main())
