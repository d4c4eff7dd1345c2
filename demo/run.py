# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The demo: synthetic patients, pre-training, fine-tuning with its controls, scores, a mask, a report; by one command.

    python -m demo.run

Each stage is one command that can be typed alone (``python -m monai.bundle run ...``); the report lists them. Stages
that are done are not done again; an interrupted demo goes on where it was.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from bundles.common.errors import InputError

from .stage import RECORDS, Attempt, Records, Stage
from .summary import clock, print_summary

ROOT = Path(__file__).resolve().parents[1]
PRETRAIN = "bundles/swin_unetr_pretrain"
SEGMENT = "bundles/swin_unetr_btcv_seg"
MADE_HERE = (
    *("data", "swin_unetr_pretrain", "swin_unetr_btcv_seg", "from_scratch", "shuffled_labels", "segmentation"),
    *("logs", "mlruns", "mlruns.db", "report.html"),
)
NSD_TOLERANCE = 4  # mm, about one voxel of the cpu preset's grid (4 x 4 x 5 mm)
# step 120/300  loss 1.23 inpainting 0.40 ...  lr 1.00e-03  3.20 crops/s  left 2:31
STEP_LINE = re.compile(r"step (\d+)/(\d+)  loss (\S+).*left (\d+(?::\d\d)+)")


def stages(out: Path, *, pretrain_steps: int | None = None, finetune_steps: int | None = None) -> list[Stage]:
    """Return the stages of the demo in their order.

    Args:
        out: the demo's folder.
        pretrain_steps: steps of the pre-training; None: those of the ``cpu`` preset.
        finetune_steps: steps of each fine-tuning; None: those of the ``cpu`` preset.
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

    def evaluation(of: str, title: str, folder: str) -> Stage:
        return Stage(
            name=f"evaluate_{of}",
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
            needs=["data", of],
            code=code[SEGMENT],
            folder=f"{folder}/evaluation",
            seconds=8,
        )

    everything = [
        Stage(
            name="data",
            title="Synthetic patients",
            command=["-m", "tools.synthetic_ct", "--out", path("data")],
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
            title="Mask of an unseen scan",
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
            seconds=8,
        ),
    ]
    report = Stage(
        name="report",
        title="Report",
        command=["-m", "demo.report", "--out", path()],
        outputs=["report.html"],
        needs=[stage.name for stage in everything],
        code=[ROOT / "demo" / name for name in ("report.py", "report.html.jinja", "summary.py")],
        seconds=7,
    )
    return [*everything, report]


def _as_typed(path: Path) -> str:
    """Return a path as one would type it in the repository's root."""
    return (path.relative_to(ROOT) if path.is_relative_to(ROOT) else path).as_posix()


def _steps(bundle: str, asked: int | None) -> int:
    """Return the steps of a training: those asked for, or the ``cpu`` preset's."""
    presets = yaml.safe_load((ROOT / bundle / "configs" / "presets.yaml").read_text())
    return asked or presets["cpu"]["max_steps"]


ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """Ctrl-C, or a signal to end."""

    def __init__(self, signal_number: int) -> None:
        self.status = 128 + signal_number


class StageFailed(Exception):
    """A stage's command ended with an error."""

    def __init__(self, stage: Stage, log: Path, status: int) -> None:
        self.stage, self.log, self.status = stage, log, status


class Screen:
    """One progress bar over all stages, or a plain line every few seconds where the output is no terminal.

    Args:
        todo: the stages that are to run.
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

    def begin(self, stage: Stage, goes_on: bool) -> None:
        """A stage begins."""
        self.stage, self.stage_began, self.step = stage, time.monotonic(), None
        if not self.console.is_terminal:
            self.console.print(f"{stage.title} ..." + " (going on with the interrupted run)" * goes_on)
        self.update("")

    def update(self, text: str) -> None:
        """Read what the stage has printed since the last call, and draw."""
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
        """Return what the running stage says of its time left, with two seconds for its last validation and files."""
        return None if self.step is None else max(0.0, self.step[3] - (now - self.step[4])) + 2

    def end(self) -> None:
        """The stage is done."""
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
    """Estimate how far the demo is, from how the stages so far compare with what was expected of them.

    Args:
        expected: seconds expected of each stage that runs.
        taken: seconds of the finished ones.
        running: name of the running stage.
        elapsed: seconds that it has taken.
        stage_left: seconds that it will take yet; None when it does not say.

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
    """Keep other runners out of ``out``, and end a stage that a killed runner has left behind.

    Yields:
        A file descriptor for the stages' processes to inherit; its lock is held as long as one of them lives.

    Raises:
        InputError: if another runner is at work there.
    """
    folder = out / RECORDS
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".runner.lock", "a") as runner, open(folder / ".stage.lock", "a+") as stage:
        try:
            fcntl.flock(runner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"A demo is running in {out} already: wait for it, or stop it.") from None
        for _ in range(50):
            try:
                fcntl.flock(stage, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:  # the lock is held, so the process whose number stands in the file lives
                stage.seek(0)
                with suppress(ValueError, ProcessLookupError):
                    os.killpg(int(stage.read()), signal.SIGKILL)
                time.sleep(0.1)
        else:
            raise InputError(f"A stage of an earlier run is still at work in {out}: try again when it has ended.")
        yield stage.fileno()


def run_stage(attempt: Attempt, records: Records, screen: Screen, *, threads: int, lock: int) -> None:
    """Run the command of a stage, its output into its log, and record its success.

    Raises:
        StageFailed: if the command fails.
    """
    stage, began = attempt.stage, time.monotonic()
    log = records.out / "logs" / f"{stage.name}.log"
    log.parent.mkdir(exist_ok=True)
    if not attempt.goes_on:
        log.unlink(missing_ok=True)
    screen.begin(stage, attempt.goes_on)
    os.ftruncate(lock, 0)
    with open(log, "ab") as written, open(log, errors="replace") as read:
        written.write(f"$ python {shlex.join(attempt.words)}\n".encode())
        written.flush()
        read.seek(0, os.SEEK_END)
        # A session of its own: Ctrl-C comes to this process alone, which then ends the stage in order.
        process = subprocess.Popen(
            [sys.executable, *attempt.words],
            cwd=ROOT,
            env=_environment(threads),
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[lock],
        )
        try:
            os.write(lock, str(process.pid).encode())
            noted = began
            while (status := _wait(process, 0.3)) is None:
                screen.update(read.read())
                if time.monotonic() - noted > 5:
                    noted = time.monotonic()
                    records.note(attempt, noted - began)
        finally:
            if process.poll() is None:
                records.note(attempt, time.monotonic() - began)
                _end(process)
    if status:
        raise StageFailed(stage, log, status)
    records.finish(attempt, time.monotonic() - began)
    screen.end()


def _wait(process: subprocess.Popen, seconds: float) -> int | None:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def _end(process: subprocess.Popen) -> None:
    """End a stage with all its processes, at once if it does not go by itself."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        if _wait(process, 5) is not None:
            return


def _environment(threads: int) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    return environment | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        # the demo asks nothing of the network
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
    }


def start_over(out: Path) -> None:
    """Remove what the demo made in its folder, and nothing else."""
    for path in [*(out / name for name in MADE_HERE), *(out / RECORDS).glob("*.json")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def check_folder(out: Path) -> None:
    """Refuse a folder that holds something else: the demo empties folders of common names such as ``data``.

    Raises:
        InputError: if it does.
    """
    if out.is_dir() and any(out.iterdir()) and not (out / RECORDS).is_dir():
        raise InputError(f"{out} holds files that this demo did not make: choose an empty or a new folder by --out.")


def run(out: Path, plan: Sequence[Stage], *, threads: int, lock: int, console: Console) -> None:
    """Run the stages that are not done.

    Raises:
        StageFailed: if a stage fails.
        Stopped: on Ctrl-C or a signal to end.
    """
    records = Records(out)
    stale: set[str] = set()
    for stage in plan:
        if not records.is_done(stage) or stale.intersection(stage.needs):
            stale.add(stage.name)
    todo = [stage for stage in plan if stage.name in stale]
    if reused := [stage.title for stage in plan if stage.name not in stale]:
        console.print(f"Done before and not done again: {', '.join(reused)}.", soft_wrap=True)
    if not todo:
        return
    console.print(f"{len(todo)} of {len(plan)} stages to run with {threads} threads in {out}", soft_wrap=True)
    screen = Screen(todo, console)
    with screen.bar:
        for stage in todo:
            run_stage(records.begin(stage), records, screen, threads=threads, lock=lock)


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def raise_on_signals() -> None:
    """Let Ctrl-C and signals to end raise `Stopped`; those that are ignored (nohup) stay ignored."""
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _raise_stopped)


def _raise_stopped(signal_number: int, _frame: object) -> None:
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C would leave the stage's process behind
    raise Stopped(signal_number)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo from the command line, and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m demo.run", description="Run the demo on synthetic patients.")
    parser.add_argument("--out", type=Path, default=ROOT / "demo/out", help="folder for all it makes (demo/out)")
    parser.add_argument("--fresh", action="store_true", help="remove what an earlier demo made there, and start over")
    parser.add_argument("--pretrain_steps", type=_positive, help="steps of the pre-training (the cpu preset's)")
    parser.add_argument("--finetune_steps", type=_positive, help="steps of each fine-tuning (the cpu preset's)")
    parser.add_argument("--threads", type=_positive, default=available_cores(), help="threads to compute with (all)")
    given = parser.parse_args(arguments)

    console = Console()
    out = given.out.resolve()
    raise_on_signals()
    try:
        check_folder(out)
        with alone_in(out) as lock:
            if given.fresh:
                start_over(out)
            plan = stages(out, pretrain_steps=given.pretrain_steps, finetune_steps=given.finetune_steps)
            run(out, plan, threads=given.threads, lock=lock, console=console)
            print_summary(out, console)
    except InputError as error:
        console.print(f"Stopped: {error}", markup=False, highlight=False, soft_wrap=True)
        return 1
    except StageFailed as failure:
        lines = failure.log.read_text(errors="replace").splitlines()[-15:]
        console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
        message = f"\n{failure.stage.title} failed with status {failure.status}. The whole log: {failure.log}"
        console.print(message, markup=False, highlight=False, soft_wrap=True)
        # a process that a signal ended has a negative status here, and 128 + signal in a shell
        return failure.status if failure.status > 0 else 128 - failure.status
    except Stopped as stop:
        console.print("Stopped. `make demo` goes on from here.")
        return stop.status
    return 0


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
