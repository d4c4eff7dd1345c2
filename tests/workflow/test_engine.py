# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The rules carry out a plan: each run once and in order, and after any kill only the interrupted step again."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evidence.report import write_report
from tools.bundle_runs import Command, Run, write_plan

from .made_up_workflow import command, finish, own_environment, start, steps_of, write_made_up

ROOT = Path(__file__).parents[2]
pytest.importorskip("snakemake")
pytestmark = pytest.mark.slow

TABLES = ("curve.md", "curve.csv", "curve.png", "power.md")
KILLS, SEED = int(os.environ.get("KILLS", "5")), 0  # make test-kills has more
STEPS = 25 * KILLS  # of each command, so that the work outlasts the kills


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A study that was carried out without a break."""
    out = tmp_path_factory.mktemp("whole") / "out"
    names = write_made_up(out)
    text = finish(out)
    return out, names, text


def tables(out):
    return {name: (out / name).read_bytes() for name in TABLES}


def test_every_command_is_carried_out_once_and_after_what_it_needs(whole):
    out, names, _ = whole
    assert len(names) == 6 and all((out / "runs" / name / "done.json").is_file() for name in names)
    steps = steps_of(out)
    assert len(steps) == 2 + 4 + 4 and set(map(tuple, steps.values())) == {(1, 2, 3, 4, 5)}

    def times(path):
        return [float(line.split()[1]) for line in (out / "runs" / path / "steps").read_text().splitlines()]

    for seed in (0, 1):
        run = f"finetune_pretrained_n2_seed{seed}"
        assert times(f"pretrain_pretrained_seed{seed}/train/models")[-1] < times(f"{run}/train/models")[0]
        assert times(f"{run}/train/models")[-1] < times(f"{run}/evaluation")[0]


def test_the_tables_are_those_of_the_scores(whole):
    out, _, text = whole
    before = tables(out)
    write_report(out)  # drawn again from the same scores, without the engine
    assert tables(out) == before
    assert (
        "| 2 | pretrained | 2 of 2 |" in (out / "curve.md").read_text()
        and "finetune_scratch_n2_seed0: train ..." in text
    )


def test_mlflow_has_the_runs_and_the_tables(whole):
    from mlflow.tracking import MlflowClient

    out, names, _ = whole
    client = MlflowClient(f"sqlite:///{out / 'mlruns.db'}")
    found = client.search_runs([client.get_experiment_by_name("evidence_made_up").experiment_id])
    assert sorted(run.info.run_name for run in found) == sorted([*names, "report"])


def test_a_finished_workflow_does_nothing(whole):
    out, _, _ = whole
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*") if path.is_file()}
    assert "Nothing to be done" in finish(out)
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_runs_of_an_earlier_version_are_taken_over(whole, tmp_path):
    """Its folder has done.json and weights, with dates in any order after a copy, and no files of the engine."""
    old = tmp_path / "out"
    shutil.copytree(whole[0], old)
    shutil.rmtree(old / ".snakemake")
    for name in (*TABLES, ".tracked_curve"):
        (old / name).unlink()
    for place, path in enumerate(sorted(old.glob("runs/*/**/*"), reverse=True)):
        os.utime(path, (1e9 - place, 1e9 - place))
    steps = steps_of(old)
    assert "finetune ..." not in finish(old)
    assert tables(old) == tables(whole[0]) and steps_of(old) == steps


def test_runs_that_are_missing_are_made_whatever_tables_are_there(whole, tmp_path):
    """A report draws the tables of an unfinished study at any time, and the files of a run may be removed."""
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    shutil.rmtree(out / ".snakemake")
    removed = out / "runs" / "finetune_scratch_n2_seed1"
    for name in ("train", "evaluation"):
        shutil.rmtree(removed / name)
    for path in (path for path in removed.iterdir() if path.is_file()):
        path.unlink()
    write_report(out)
    assert "| 2 | scratch | 1 of 2 |" in (out / "curve.md").read_text()
    text = finish(out)
    assert "finetune_scratch_n2_seed1: train ..." in text and "finetune_scratch_n2_seed0: train ..." not in text
    assert tables(out) == tables(whole[0])


def test_kills_at_random_moments_cost_the_interrupted_step_alone(whole, tmp_path):
    """The engine is killed, then a job, then all at once, then told to stop, then by Ctrl-C, in turn."""
    out, generator = tmp_path / "out", random.Random(SEED)
    write_made_up(out, steps=STEPS)
    kills = 0
    for kill in range(KILLS):
        process = start(out)
        deadline = time.monotonic() + generator.uniform(3.0, 9.0)
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        kind = ("engine", "job", "all", "SIGTERM", "Ctrl-C")[kill % 5]
        if process.poll() is not None:
            break
        kills += 1
        if kind == "job":
            jobs = subprocess.run(
                ["pgrep", "-f", f"workflow.job --out {out} "], capture_output=True, text=True
            ).stdout.split()
            for job in jobs[:1]:
                os.kill(int(job), signal.SIGKILL)
            time.sleep(0.5)  # the engine notices, and the other job goes on
            process.terminate()
        elif kind == "all":
            os.killpg(process.pid, signal.SIGKILL)
        elif kind == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)
        else:
            os.kill(process.pid, signal.SIGKILL if kind == "engine" else signal.SIGTERM)
        process.wait(timeout=120)
    assert kills == KILLS
    finish(out)
    assert tables(out) == tables(whole[0])
    again = 0
    for folder, steps in steps_of(out).items():
        assert sorted(set(steps)) == list(range(1, STEPS + 1)), folder
        assert steps == sorted(steps), folder  # nothing begins anew
        again += len(steps) - STEPS
    assert again <= 2 * kills  # two jobs at once


def test_a_failing_run_does_not_stop_the_others_and_is_shown(tmp_path):
    out = tmp_path / "out"
    write_made_up(out)
    plan = json.loads((out / "plan.json").read_text())
    failing = plan["runs"]["finetune_scratch_n2_seed0"]["commands"][0]
    right, failing["words"] = failing["words"], ["-c", "import sys; sys.exit('no such organ')"]
    (out / "plan.json").write_text(json.dumps(plan))
    process = start(out)
    assert process.wait(timeout=300) == 1
    text = (tmp_path / "engine.log").read_text()
    assert "no such organ" in text and "finetune_scratch_n2_seed0: train failed with status 1" in text
    assert (out / "runs/finetune_pretrained_n2_seed1/evaluation/scores.csv").is_file() and not (
        out / "curve.md"
    ).exists()
    failing["words"] = right
    (out / "plan.json").write_text(json.dumps(plan))
    finish(out)
    assert (out / "curve.md").is_file() and steps_of(out)["finetune_scratch_n2_seed1/train/models"] == [1, 2, 3, 4, 5]


HEADROOM = {"n": [2], "seeds": [0], "floor": False, "ceiling": False}
CHAIN = HEADROOM | {"convergence": {"seeds": [10], "gain": 0.005, "most": 400}}


def test_a_chain_ends_when_more_steps_gain_nothing(tmp_path):
    out = tmp_path / "out"
    write_made_up(out, headroom=CHAIN)
    dice = {50: 0.5, 100: 0.55, 200: 0.552, 400: 0.9}
    for steps, value in dice.items():
        path = out / f"scores/converge_scratch_n2_seed10_steps{steps}.csv"
        rows = [line.split(",") for line in path.read_text().splitlines()]
        path.write_text(
            "\n".join(",".join(row if row[0] == "case" else [*row[:2], str(value), *row[3:]]) for row in rows) + "\n"
        )
    finish(out, "headroom")
    found = sorted(path.parent.name for path in out.glob("runs/*/done.json"))
    links = [f"converge_scratch_n2_seed10_steps{steps}" for steps in (100, 200, 50)]
    assert found == [*links, "finetune_converged_n2_seed0_steps100", "finetune_scratch_n2_seed0"]
    assert "twice 100 steps gain less than 0.005: 100 are enough" in (out / "headroom.md").read_text()
    assert "Nothing to be done" in finish(out, "headroom")


def test_a_second_engine_in_the_same_folder_is_refused(tmp_path):
    out = tmp_path / "out"
    write_made_up(out, steps=200)
    first = start(out)
    while not list(out.glob("runs/*/*/models/steps")):
        time.sleep(0.05)
    second = subprocess.run(
        command(out, "few_label_curve"), env=own_environment(), cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert second.returncode == 1 and f"Another workflow runs in {out} (process {first.pid} on " in second.stderr
    first.kill()
    first.wait()


# Stands for inference: a row of the table after each scan, and what it has it does not do again.
INFERENCE = """
import pathlib, sys
table, most = pathlib.Path(sys.argv[1]), int(sys.argv[2])
table.parent.mkdir(parents=True, exist_ok=True)
rows = table.read_text().splitlines() if table.exists() else []
for scan in ("a", "b", "c"):
    if scan not in rows:
        rows.append(scan)
        table.write_text("\\n".join(rows))
        with open(table.with_name("segmented"), "a") as segmented:
            segmented.write(scan)
        if len(rows) == most:
            sys.exit("no time left")
"""


def test_an_inference_that_was_stopped_goes_on(tmp_path):
    out = tmp_path / "out"
    options = {"amp": False, "dataset_dir": "/data"}
    infer = Command(name="infer", bundle="swin_unetr_msd", configs=("configs/inference.yaml",), options=options,
                    result="masks/volumes.csv", statuses=(0, 3))  # fmt: skip
    run = Run(name="all", kind="inference", facts={}, commands=(infer,), lists={}, cases={}, row={})
    out.mkdir()
    write_plan(
        out,
        workflow="folds",
        name="made_up",
        source="",
        runs=[(run, 1.0)],
        ends={"finetuning": [], "inference": ["all"]},
    )
    plan = json.loads((out / "plan.json").read_text())
    table = out / "runs/all/masks/volumes.csv"
    for most, status in ((2, 1), (9, 0)):
        plan["runs"]["all"]["commands"][0]["words"] = ["-c", INFERENCE, str(table), str(most)]
        (out / "plan.json").write_text(json.dumps(plan))
        engine = own_snakemake(out, "runs/all/.infer.done")
        assert engine.returncode == status, engine.stderr[-3000:]
    assert table.with_name("segmented").read_text() == "abc"  # none twice


def own_snakemake(out, target):
    snakefile, profile = ROOT / "workflow/Snakefile", ROOT / "workflow/profiles/local"
    words = [sys.executable, "-m", "snakemake", "--snakefile", str(snakefile), "--workflow-profile", str(profile)]
    words += ["--directory", str(out), "--config", "planned=True", "threads=1", "--", target]
    return subprocess.run(
        words, capture_output=True, text=True, env=own_environment(), cwd=out, timeout=300, check=False
    )
