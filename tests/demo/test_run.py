# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The demo's stages run once, in order; failures are reported; a killed demo continues where it stopped."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from bundles.common.errors import InputError
from demo import run as demo
from demo.stage import Records, Stage
from demo.stages import TEST_PATIENTS
from tools.child_process import STOP_SIGNALS


def small_stage(name, program, outputs, **options):
    return Stage(name=name, title=f"Stage {name}", command=["-c", program], outputs=outputs, **options)


def go(out, plan):
    """Run a plan and return what it printed."""
    screen = io.StringIO()
    out.mkdir(exist_ok=True)
    with demo.alone_in(out) as lock:
        demo.run(out, plan, threads=1, lock=lock, console=Console(file=screen, width=200))
    return screen.getvalue()


@pytest.fixture(autouse=True)
def signal_handlers():
    """Restore the signal handlers after the test."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def plan(tmp_path):
    """Two stages that count how often they run."""
    count = "import pathlib; p = pathlib.Path(r'{0}'); p.parent.mkdir(exist_ok=True); p.open('a').write('x')"
    one, two = tmp_path / "out/one.txt", tmp_path / "out/two.txt"
    return [
        small_stage("one", count.format(one), ["one.txt"]),
        small_stage("two", count.format(two), ["two.txt"], needs=["one"]),
    ]


def test_stages_run_once(tmp_path, plan):
    out = tmp_path / "out"
    first, second = go(out, plan), go(out, plan)

    assert (out / "one.txt").read_text() == (out / "two.txt").read_text() == "x"
    assert re.search(r"Stage one +done in 0:0\d", first)
    assert second.strip() == "Already finished, skipped: Stage one, Stage two."


def test_later_stages_follow_a_stage_that_ran_again(tmp_path, plan):
    out = tmp_path / "out"
    go(out, plan)
    (out / "one.txt").unlink()
    go(out, plan)
    assert ((out / "one.txt").read_text(), (out / "two.txt").read_text()) == ("x", "xx")


def test_log_holds_the_command_and_all_output(tmp_path):
    program = "import sys; print('to stdout'); print('to stderr', file=sys.stderr); open('absent')"
    with pytest.raises(demo.StageFailed) as failed:
        go(tmp_path / "out", [small_stage("one", program, ["x"])])

    log = failed.value.log.read_text()
    assert failed.value.log == tmp_path / "out/logs/one.log"
    assert log.startswith("$ python -c ")
    assert "to stdout" in log and "to stderr" in log and "FileNotFoundError" in log
    assert failed.value.status == 1


def test_failure_shows_the_end_of_the_log_and_its_path(tmp_path, monkeypatch, capsys):
    program = "import sys; print('\\n'.join(f'line {i}' for i in range(100))); sys.exit(7)"
    monkeypatch.setattr(demo, "stages", lambda out, **options: [small_stage("one", program, ["x"])])
    status = demo.main(["--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out

    assert status == 7
    assert "line 99" in printed and "line 80" not in printed
    assert "Stage one failed with status 7" in printed
    assert str(tmp_path / "out/logs/one.log") in printed.replace("\n", "")
    assert "Traceback" not in printed


def test_stage_gets_its_threads_and_no_foreign_tracking_server(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9/")
    path = tmp_path / "out/seen.json"
    program = f"import json, os; json.dump(dict(os.environ), open(r'{path}', 'w'))"
    go(tmp_path / "out", [small_stage("one", program, ["seen.json"])])
    seen = json.loads(path.read_text())

    assert (seen["OMP_NUM_THREADS"], seen["MKL_NUM_THREADS"]) == ("1", "1")
    assert "MLFLOW_TRACKING_URI" not in seen


def test_second_runner_is_refused(tmp_path):
    with demo.alone_in(tmp_path), pytest.raises(InputError, match="already running in .*"):
        with demo.alone_in(tmp_path):
            pass


def test_stage_left_by_a_killed_runner_is_ended(tmp_path):
    code = (
        "import subprocess, sys, os; from pathlib import Path; from demo.run import alone_in\n"
        f"with alone_in(Path(r'{tmp_path}')) as lock:\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], pass_fds=[lock],"
        " start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
        "    os.write(lock, str(child.pid).encode()); print(child.pid, flush=True); os.kill(os.getpid(), 9)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=demo.ROOT)
    orphan = int(killed.stdout)
    assert killed.returncode == -signal.SIGKILL
    began = time.monotonic()
    with demo.alone_in(tmp_path):
        assert time.monotonic() - began < 5
        _wait_for(lambda: not _alive(orphan), seconds=10)  # the lock is free a moment before the process is gone


def _alive(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_ignored_signals_stay_ignored(tmp_path, monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    seen = []

    def look(*_):
        seen.extend(signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM))
        raise InputError("seen")

    monkeypatch.setattr(demo, "check_folder", look)
    demo.main(["--out", str(tmp_path)])
    assert seen[0] is signal.SIG_IGN and seen[1] not in (signal.SIG_IGN, signal.SIG_DFL)


def test_foreign_folder_is_refused_and_untouched(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/thesis.txt").write_text("years of work")
    assert demo.main(["--out", str(tmp_path), "--fresh"]) == 1
    assert "contains files that the demo did not make" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_fresh_removes_what_the_demo_made_and_nothing_else(tmp_path, plan):
    out = tmp_path / "out"
    go(out, plan)
    for name in ("data/a", "swin_unetr_pretrain/b", "mlruns.db", "report.html", "notes/c"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).touch()
    with demo.alone_in(out):
        demo.start_over(out)
        left = sorted(path.name for path in out.iterdir())
        assert not any(Records(out).read(stage.name) for stage in plan)
        with pytest.raises(InputError), demo.alone_in(out):
            pass  # this runner still holds the locks
    assert left == [".stages", "notes", "one.txt", "two.txt"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_stage_too_and_says_how_to_continue(tmp_path, number):
    code = (
        "import sys; from demo import run; from demo.stage import Stage\n"
        'program = \'import os, time; open(os.environ["MARK"], "w").write(str(os.getpid())); time.sleep(60)\'\n'
        "run.stages = lambda out, **options: [Stage(name='a', title='A', command=['-c', program], outputs=['x'])]\n"
        "sys.exit(run.main(['--out', sys.argv[1]]))\n"
    )
    mark = tmp_path / "mark"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        cwd=demo.ROOT,
        env=os.environ | {"MARK": str(mark)},
        stdout=subprocess.PIPE,
        text=True,
    )
    _wait_for(lambda: mark.exists() and mark.read_text())
    process.send_signal(number)
    printed, _ = process.communicate(timeout=20)

    assert process.returncode == 128 + number
    assert "`make demo` continues from here" in printed
    assert not _alive(int(mark.read_text()))


def _wait_for(happened, seconds=300):
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.slow
def test_demo_end_to_end_killed_and_started_again(tmp_path):
    """The real commands with a few steps: about two minutes on two cores."""
    out = tmp_path / "out"
    steps = ["--pretrain_steps", "8", "--finetune_steps", "2", "--threads", "1"]
    command = [sys.executable, "-m", "demo.run", "--out", str(out), *steps]

    killed = subprocess.Popen(command, cwd=demo.ROOT, stdout=subprocess.DEVNULL)
    log = out / "logs/pretrain.log"
    _wait_for(lambda: log.exists() and "step 5/8" in log.read_text())
    killed.kill()
    killed.wait()
    assert not (out / ".stages/pretrain.json").exists()

    finished = subprocess.run(command, cwd=demo.ROOT, capture_output=True, text=True, timeout=900)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "Already finished, skipped: Synthetic patients." in finished.stdout
    assert "continuing the interrupted run" in finished.stdout
    for name in (
        "swin_unetr_pretrain/models/encoder.pt",
        *(f"{run}/models/model.pt" for run in ("swin_unetr_btcv_seg", "from_scratch", "shuffled_labels")),
        *(f"{run}/evaluation/scores.csv" for run in ("swin_unetr_btcv_seg", "from_scratch", "shuffled_labels")),
        "mlruns.db",
        "report.html",
    ):
        assert (out / name).stat().st_size > 0, name
    assert len(list(out.glob("segmentation/*_seg.nii.gz"))) == TEST_PATIENTS
    assert "liver" in finished.stdout and "compute time" in finished.stdout
    assert (out / "report.html").stat().st_size < 4_000_000

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name[0] != "."}
    began = time.monotonic()
    again = subprocess.run(command, cwd=demo.ROOT, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and time.monotonic() - began < 60
    assert "liver" in again.stdout
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name[0] != "."}
    assert after == before
