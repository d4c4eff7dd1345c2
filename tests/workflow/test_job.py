# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A job carries out one command: once, alone in its folder, with its threads and a clean end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bundles.common.errors import InputError
from bundles.common.files import folder_lock
from tools.bundle_runs import Command, Run, read_plan, write_plan
from tools.child_process import Stopped
from workflow.__main__ import overview
from workflow.job import JobFailed, carry_out

ROOT = Path(__file__).parents[2]
WRITE = "import pathlib, os; p = pathlib.Path('{}'); p.parent.mkdir(parents=True, exist_ok=True); p.write_text('x'); "


@pytest.fixture
def out(tmp_path):
    """A plan with one run of two commands, train and evaluate."""
    commands = [
        Command(
            name=name, bundle="swin_unetr_msd", configs=(f"configs/{name}.yaml",), options={"amp": False},
            result=result, statuses=(0, 3),
        )
        for name, result in (("train", "train/models/model.pt"), ("evaluate", "evaluation/scores.csv"))
    ]  # fmt: skip
    run = Run(name="a", kind="finetuning", facts={}, commands=tuple(commands), lists={}, cases={}, row={})
    write_plan(tmp_path, workflow="study", name="made_up", source="", runs=[(run, 1.0)])
    return tmp_path


def go(out, program, command="train", **options):
    lines = []
    carry_out(out, "a", command, ["-c", program], **{"threads": 1, "gpu": False, "say": lines.append, **options})
    return lines


def writes(out, result="train/models/model.pt"):
    return WRITE.format(out / "runs/a" / result)


def test_a_command_that_has_succeeded_does_not_run_again(out):
    assert go(out, writes(out)) == ["a: train ..."]
    settings = json.loads((out / "runs/a/settings.json").read_text())
    assert settings["precision"] == {"train": "fp32", "evaluate": "fp32"} and settings["kind"] == "finetuning"
    assert go(out, "raise SystemExit('again')") == []
    (out / "runs/a/train/models/model.pt").unlink()  # as an engine does with what it thinks is incomplete
    assert go(out, writes(out)) == ["a: train ..."]


def test_the_last_command_removes_what_only_an_unfinished_run_needs(out):
    for name in ("train/models/last.pt", "evaluation/cases/one.json"):
        (out / "runs/a" / name).parent.mkdir(parents=True, exist_ok=True)
        (out / "runs/a" / name).touch()
    go(out, writes(out))
    assert (out / "runs/a/train/models/last.pt").exists()
    go(out, writes(out, "evaluation/scores.csv"), "evaluate")
    assert not (out / "runs/a/train/models/last.pt").exists() and not (out / "runs/a/evaluation/cases").exists()
    assert (out / "runs/a/train/models/model.pt").exists()


def test_a_command_that_fails_is_shown_with_the_end_of_its_log(out):
    with pytest.raises(JobFailed, match="no such organ(?s:.*)a: train failed with status 1(?s:.*)log.txt"):
        go(out, "raise SystemExit('no such organ')")
    assert not (out / "runs/a/.train.done").exists()


def test_some_statuses_are_no_error_but_the_result_must_be_there(out):
    go(out, writes(out) + "raise SystemExit(3)")
    with pytest.raises(JobFailed, match="evaluate succeeded but did not write .*scores.csv"):
        go(out, "", "evaluate")


def test_what_could_not_be_done_is_told_and_how_it_is_tried_again(out):
    go(out, writes(out))
    (out / "runs/a/evaluation/cases").mkdir(parents=True)
    (out / "runs/a/evaluation/cases/one.json").touch()
    table = "scan,missing,reason\\na.nii.gz,score,no memory\\nb.nii.gz,score,no memory\\nb.nii.gz,picture,no memory\\n"
    program = (
        writes(out, "evaluation/scores.csv") + f"(p.parent / 'failed.csv').write_text('{table}'); raise SystemExit(3)"
    )
    said = go(out, program, "evaluate")[-1]
    mark = out / "runs/a/.evaluate.done"
    assert said == (
        f"a: evaluate could not do all of 2 scans, see {out / 'runs/a/evaluation/failed.csv'}. To try these again, remove "
        f"{mark} and {out / 'runs/a/evaluation/scores.csv'}, and start the workflow again."
    )
    assert overview(read_plan(out), out, "few_label_curve").splitlines()[1] == said
    assert (out / "runs/a/evaluation/cases/one.json").exists()  # the others are not scored again
    mark.unlink()
    repaired = f"import os; os.remove('{out / 'runs/a/evaluation/failed.csv'}')"
    assert go(out, repaired, "evaluate") == ["a: evaluate ..."]
    assert not (out / "runs/a/evaluation/cases").exists()


def test_threads_reach_the_command_and_time_is_kept(out):
    program = "import os, time; time.sleep(0.3); raise SystemExit('threads ' + os.environ['OMP_NUM_THREADS'])"
    with pytest.raises(JobFailed, match="threads 3"):
        go(out, program, threads=3)
    first = float((out / "runs/a/.spent.json").read_text())
    assert 0.3 <= first < 10
    go(out, "import time; time.sleep(0.3); " + writes(out))
    assert float((out / "runs/a/.spent.json").read_text()) >= first + 0.3


def test_progress_is_told_with_step_loss_and_time_left(out, monkeypatch):
    monkeypatch.setattr("workflow.job.SAY_SECONDS", 0.0)
    line = "print('10:00:00 step 7/20  loss 0.1234 dice 0.1  lr 1e-3  left 1:02', flush=True); import time; time.sleep(1); "
    assert "a: train, step 7/20, loss 0.1234, 1:02 left" in go(out, line + writes(out))


def test_a_second_job_of_a_run_waits_for_the_first(out):
    lines = []
    with folder_lock(out / "runs/a/.job.lock"):
        second = threading.Thread(target=lambda: lines.extend(go(out, writes(out))))
        second.start()
        time.sleep(0.5)
        assert second.is_alive() and not (out / "runs/a/train").exists()
    second.join(timeout=30)
    assert lines == ["a: another job works on it; waiting for its end", "a: train ..."]


def test_a_signal_ends_the_command_in_order(out):
    started, saved = out / "started", out / "saved"
    program = f"""
import os, pathlib, signal, sys, time
def stop(*_):
    pathlib.Path({str(saved)!r}).touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
pathlib.Path({str(started)!r}).write_text(str(os.getpid()))
time.sleep(60)
"""

    def stop_when_started(*_):
        if started.exists() and started.read_text():
            raise Stopped(signal.SIGTERM)

    signal.signal(signal.SIGALRM, stop_when_started)
    signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)
    try:
        with pytest.raises(Stopped):
            go(out, program)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert saved.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


def test_a_job_ends_with_its_engine(out):
    """However the engine ends, so that the same run is not carried out twice."""
    started = out / "started"
    program = f"import os, pathlib, time; pathlib.Path({str(started)!r}).write_text(str(os.getpid())); time.sleep(60)"
    job = [sys.executable, "-m", "workflow.job", "--out", str(out), "a", "train", "--", "-c", program]
    engine = subprocess.Popen([sys.executable, "-c", f"import subprocess; subprocess.run({job!r})"], cwd=ROOT)
    while not (started.exists() and started.read_text()):
        assert engine.poll() is None
        time.sleep(0.05)
    engine.kill()
    engine.wait()
    for _ in range(200):
        if not Path("/proc", started.read_text()).exists():
            break
        time.sleep(0.05)
    assert not Path("/proc", started.read_text()).exists()


def test_other_settings_of_the_same_run_stop_it(out):
    (out / "runs/a").mkdir(parents=True, exist_ok=True)
    saved = {"kind": "finetuning", "precision": {"train": "bf16", "evaluate": "bf16"}}
    (out / "runs/a/settings.json").write_text(json.dumps(saved))
    with pytest.raises(InputError, match=r"a was computed in .*bf16 \(train\), but .*compute a in .*fp32 \(train\)"):
        go(out, writes(out))
    assert not (out / "runs/a/train").exists() and json.loads((out / "runs/a/settings.json").read_text()) == saved
