# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A plan is carried out run by run: each once, in order, continued after a stop, and never with other settings."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from bundles.common.errors import InputError
from bundles.common.files import write_text
from bundles.common.weights.checkpoint_file import save_atomically
from evidence import run as runner
from evidence.run import main, plan_of, run_plan
from evidence.runs import execution
from evidence.runs import run_claim as claims
from evidence.runs.execution import RunFailed
from evidence.runs.plan import words_of as plan_words_of
from evidence.runs.plan import write_lists
from evidence.runs.progress import minutes_of, overview, state_of
from evidence.search import main as search_main
from evidence.study.study_data import prepare_folder
from tools.child_process import STOP_SIGNALS, Stopped

from .made_up_study import encoder_file, finished, made_up_scores, planner, whole_plan, write_study

# Takes the place of a bundle: writes what the command would write, and counts its calls.
BUNDLE = """
import sys
import time
from pathlib import Path
result, scores = Path(sys.argv[1]), Path(sys.argv[2])
result.parent.mkdir(parents=True, exist_ok=True)
result.write_text(scores.read_text() if result.name == "scores.csv" else "weights")
with open(result.parent / "calls", "a") as calls:
    calls.write("x")
"""


@pytest.fixture
def plan():
    return whole_plan()


@pytest.fixture
def bundles(monkeypatch, tmp_path):
    """Commands that take no time and write made-up scores; nothing is logged to MLflow."""
    program = tmp_path / "bundle.py"
    program.write_text(BUNDLE)

    def words_of(command, out, folder):
        result = out / next(value for key, value in command.options.items() if key == "output_dir").parent
        return [str(program), str(result / command.result), str(result / ".made_up.csv")]

    def log_run(name, done, **_):
        pass

    monkeypatch.setattr(execution, "words_of", words_of)
    monkeypatch.setattr(runner, "log_run", log_run)


@pytest.fixture
def out(tmp_path, plan):
    folder = tmp_path / "out"
    write_text(folder / "outline.json", json.dumps(plan.outline))
    for run in plan.runs:
        if run.kind == "finetuning":
            lines = ["case,label,dice,nsd,hd95"]
            for row in made_up_scores(run, gain=0.05):
                lines.append(",".join("" if value is None else str(value) for value in row.values()))
            write_text(folder / "runs" / run.name / ".made_up.csv", "\n".join(lines) + "\n")
    return folder


def go(plan, out, **options):
    lines = []
    options = {"threads": 1, "tracking_uri": "", **options}
    return run_plan(plan, out=out, say=lines.append, **options), lines


def small(plan, count=3):
    return type(plan)(study=plan.study, runs=plan.runs[:count], outline=plan.outline)


def test_every_run_is_done_once_and_keeps_its_scores_and_settings(plan, out, bundles):
    plan = small(plan, 5)
    assert go(plan, out)[0] and go(plan, out)[0]
    for run in plan.runs:
        folder = out / "runs" / run.name
        done = json.loads((folder / "done.json").read_text())
        assert done["settings"] == run.settings
        assert (folder / "train/models/calls").read_text() == "x"
        if run.kind == "finetuning":
            assert done["scores"] == made_up_scores(run, gain=0.05)


def test_commands_that_ended_well_are_not_repeated(plan, out, bundles):
    run = plan.runs[0]
    (out / "runs" / run.name / "train/models").mkdir(parents=True)
    write_text(out / "runs" / run.name / "train/models/model.pt", "weights")
    write_text(out / "runs" / run.name / ".train.done", "")
    go(small(plan, 1), out)
    assert not (out / "runs" / run.name / "train/models/calls").exists()
    assert (out / "runs" / run.name / "evaluation/calls").read_text() == "x"


def elsewhere(run):
    """Return the run on a machine that has the data in another folder."""
    lists = json.loads(json.dumps(run.lists).replace("/data/", "/mnt/data/"))
    return dataclasses.replace(run, lists=lists)


def test_each_command_reads_lists_of_the_machine_that_it_runs_on(plan, out, bundles, monkeypatch):
    """Another machine does a run just before the evaluation of this one reads its list."""
    names = ("finetune_scratch_n2_seed0", "finetune_scratch_n2_seed1")
    here, there = (run for run in plan.runs if run.name in names)
    seen, call = [], execution._run_command

    def look(command, folder, **options):
        if (folder.name, command.name) == (here.name, "evaluate"):
            go(type(plan)(study=plan.study, runs=(elsewhere(there),), outline=plan.outline), out)
        words = plan_words_of(command, out, folder)
        read = json.loads(Path(words[words.index("--dataset_dir") + 1]).read_text())
        seen.append((folder.name, command.name, (read.get("training") or read["test"])[0]["image"]))
        call(command, folder, **options)

    monkeypatch.setattr(execution, "_run_command", look)
    go(type(plan)(study=plan.study, runs=(here,), outline=plan.outline), out)
    roots = {(name, command): image.rpartition("/")[0] for name, command, image in seen}
    assert roots == {
        (here.name, "train"): "/data",
        (here.name, "evaluate"): "/data",
        (there.name, "train"): "/mnt/data",
        (there.name, "evaluate"): "/mnt/data",
    }


def test_a_run_that_is_taken_over_elsewhere_reads_the_lists_of_there(plan, out, bundles):
    run = plan.runs[0]
    (out / "runs" / run.name / "lists").mkdir(parents=True)
    write_lists(run, out)
    go(type(plan)(study=plan.study, runs=(elsewhere(run),), outline=plan.outline), out)
    assert "/mnt/data/val_00.nii.gz" in (out / "runs" / run.name / "lists/validation.json").read_text()


def test_other_settings_are_refused_by_name_with_both_values(plan, out, bundles):
    go(small(plan, 3), out)
    changed = whole_plan(finetuning={"learning_rate": 0.5})
    with pytest.raises(InputError) as caught:
        go(small(changed, 3), out)
    assert "learning_rate was 0.02, now 0.5" in str(caught.value) and "finetune_" in str(caught.value)


@pytest.mark.parametrize("part", ["curve", "ablation"])
def test_no_report_mixes_parts_of_other_settings(tmp_path, capsys, monkeypatch, part):
    """After an edit of the study, only the runs of one part are removed and repeated."""
    prepare_folder(tmp_path / "out", "made_up")
    write_study(tmp_path / "out", whole_plan(), gain=0.05)
    made = planner(finetuning={"learning_rate": 0.5})
    for run in plan_of(made, [part]).runs:
        shutil.rmtree(tmp_path / "out/runs" / run.name)
    monkeypatch.setattr(runner, "planner_of", lambda *_, **__: made)
    monkeypatch.setattr(runner, "read_study", lambda _: made.study)
    begun = []
    monkeypatch.setattr(runner, "carry_out", lambda run, **_: begun.append(run.name))
    store = f"sqlite:///{tmp_path / 'mlruns.db'}"
    words = ["made_up", "--out", str(tmp_path / "out"), "--part", part, "--tracking_uri", store]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "was made with other settings" in error and "learning_rate was 0.02, now 0.5" in error
    assert not begun and not (tmp_path / "out/curve.md").exists()


def test_a_part_without_runs_is_no_hindrance(plan, out, bundles):
    made = planner()
    plan = plan_of(made, ["ablation"], beside=["curve", "ablation"])
    assert {run.name for run in plan.runs}.isdisjoint(run.name for run in plan.beside)
    assert len(plan.runs) == 23 and len(plan.beside) == 15 - 4
    small = type(plan)(study=plan.study, runs=plan.runs[:2], outline=plan.outline, beside=plan.beside)
    assert go(small, out)[0]
    assert not any((out / "runs" / run.name / "done.json").exists() for run in plan.beside)


def test_more_seeds_reuse_what_is_there(plan, out, bundles):
    go(small(plan, 3), out)
    more = whole_plan(curve={"n": [2, 4], "seeds": [0, 1, 2, 3], "encoder_per_seed": True})
    assert [state_of(run, out) for run in more.runs[:3]] == ["done"] * 3
    go(small(more, 3), out)


def test_a_run_of_another_process_is_left_alone(plan, out, bundles):
    other = claims.take(out / "runs" / plan.runs[0].name)
    finished_all, _ = go(small(plan, 1), out)
    assert not finished_all and not (out / "runs" / plan.runs[0].name / "done.json").exists()
    assert "1 running" in overview(small(plan, 1), out, names=False)
    other.release()
    assert go(small(plan, 1), out)[0]


def test_what_needs_a_run_of_another_process_waits_or_leaves(plan, out, bundles):
    pair = [
        run for run in plan.runs if run.name.endswith("pretrained_seed0") or run.name.endswith("pretrained_n2_seed0")
    ]
    plan = type(plan)(study=plan.study, runs=tuple(pair), outline=plan.outline)
    held = claims.take(out / "runs" / pair[0].name)
    assert go(plan, out, wait=False)[0] is False
    assert not (out / "runs" / pair[1].name / "done.json").exists()
    held.release()


def test_a_command_that_fails_is_shown_with_the_end_of_its_log(plan, out, bundles, monkeypatch):
    monkeypatch.setattr(execution, "words_of", lambda *_: ["-c", "import sys; sys.exit('no such organ')"])
    with pytest.raises(RunFailed, match="no such organ(?s:.*)failed with status 1(?s:.*)log.txt"):
        go(small(plan, 1), out)
    assert not claims.is_held(out / "runs" / plan.runs[0].name)


def test_time_left_is_the_median_of_finished_runs_of_the_kind(plan, out):
    runs = [run for run in plan.runs if run.kind == "finetuning" and run.facts["n"] == 2][:4]
    plan = type(plan)(study=plan.study, runs=tuple(runs), outline=plan.outline)
    for run, minutes in zip(runs, (2, 4, 30), strict=False):
        write_text(out / "runs" / run.name / "done.json", json.dumps(finished(run) | {"seconds": 60 * minutes}))
    assert overview(plan, out, names=False) == "3 of 4 runs done, 0 running, 1 left; about 4 min with 1 process"
    assert "left     " + runs[3].name in overview(plan, out, names=True)


def test_threads_reach_the_commands(plan, out, bundles, monkeypatch):
    program = "import os, sys; sys.exit('threads ' + os.environ['OMP_NUM_THREADS'])"
    monkeypatch.setattr(execution, "words_of", lambda *_: ["-c", program])
    with pytest.raises(RunFailed, match="threads 3"):
        go(small(plan, 1), out, threads=3)


def test_a_signal_ends_the_command_in_order_and_frees_the_run(plan, out, bundles, monkeypatch):
    started = out / "started"
    program = f"""
import os, pathlib, signal, sys, time
def stop(*_):
    pathlib.Path({str(out / "saved")!r}).touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
pathlib.Path({str(started)!r}).write_text(str(os.getpid()))
time.sleep(60)
"""
    monkeypatch.setattr(execution, "words_of", lambda *_: ["-c", program])

    def stop_when_started(*_):
        if started.exists() and started.read_text():
            raise Stopped(signal.SIGTERM)

    signal.signal(signal.SIGALRM, stop_when_started)
    signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)
    try:
        with pytest.raises(Stopped):
            go(small(plan, 1), out)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert (out / "saved").exists()
    assert not claims.is_held(out / "runs" / plan.runs[0].name)
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["openkbp"], "openkbp needs data. Pass --data DIR"),
        (["openkbp", "--data", "nowhere"], "nowhere"),
        (["nonsense"], "no study nonsense"),
    ],
)
def test_mistakes_end_with_one_message(tmp_path, capsys, words, message):
    assert main([*words, "--out", str(tmp_path / "new")]) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith("Stopped: ") and "Traceback" not in error


def test_a_folder_of_other_files_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").touch()
    assert main(["demo", "--out", str(tmp_path), "--list"]) == 1
    assert "contains files that no study made" in capsys.readouterr().err


def test_a_folder_of_another_study_is_refused(tmp_path):
    prepare_folder(tmp_path / "out", "one")
    prepare_folder(tmp_path / "out", "one")
    with pytest.raises(InputError, match="contains the study one, not two"):
        prepare_folder(tmp_path / "out", "two")


def test_command_line_is_a_module(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "python -m evidence.run" in capsys.readouterr().out and sys.argv


def test_settings_are_compared_again_when_a_run_is_claimed(plan, out, bundles, monkeypatch):
    """Another process, with another edit of the study, does the run between the check and the claim."""
    other = small(whole_plan(finetuning={"learning_rate": 0.5}), 1)
    take = claims.take

    def late(folder):
        write_text(folder / "settings.json", json.dumps(other.runs[0].settings))
        return take(folder)

    monkeypatch.setattr(runner.claims, "take", late)
    with pytest.raises(InputError, match="learning_rate was 0.5, now 0.02"):
        go(small(plan, 1), out)
    folder = out / "runs" / plan.runs[0].name
    assert not (folder / "train").exists() and not claims.is_held(folder)
    assert json.loads((folder / "settings.json").read_text()) == other.runs[0].settings


def test_a_run_that_another_edit_of_the_study_began_meanwhile_stops_this_one(plan, out, bundles, monkeypatch):
    other = whole_plan(finetuning={"learning_rate": 0.5})
    carry_out = execution.carry_out

    def meanwhile(run, **options):
        for each, begun in zip(plan.runs[:4], other.runs[:4], strict=True):
            if each.name != run.name:
                write_text(out / "runs" / each.name / "settings.json", json.dumps(begun.settings))
                write_text(out / "runs" / each.name / "done.json", json.dumps(finished(begun)))
        return carry_out(run, **options)

    monkeypatch.setattr(runner, "carry_out", meanwhile)
    with pytest.raises(InputError, match="was made with other settings"):
        go(small(plan, 4), out)


@pytest.fixture
def handlers():
    """Restore the signal handlers after the test."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_signals_that_are_ignored_stay_ignored(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    seen = []

    def look():
        seen.extend(signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM))
        raise InputError("seen")

    runner.call(look)
    assert seen[0] is signal.SIG_IGN and seen[1] not in (signal.SIG_IGN, signal.SIG_DFL)


@pytest.mark.parametrize("program", [main, search_main])
def test_a_wrong_store_ends_before_the_first_run(plan, tmp_path, capsys, monkeypatch, program):
    made = planner()
    module = sys.modules[program.__module__]
    monkeypatch.setattr(module, "planner_of", lambda *_, **__: made)
    monkeypatch.setattr(module, "read_study", lambda _: made.study)
    uri = f"sqlite:///{tmp_path / 'no/folder/mlruns.db'}"
    assert program(["made_up", "--out", str(tmp_path / "out"), "--tracking_uri", uri]) == 1
    assert f"Stopped: MLflow store {uri}" in capsys.readouterr().err
    assert not (tmp_path / "out/runs").exists()


def test_a_finished_pretraining_keeps_the_figures_of_its_last_validation(plan, out, bundles, record):
    run = next(run for run in plan.runs if run.kind == "pretraining")
    validation = {"views": 64, "loss_rotation": 1.4, "rotation_accuracy": 0.125}
    folder = out / "runs" / run.name
    write_text(folder / "train/validation.json", json.dumps(validation))
    save_atomically(encoder_file(record, steps=50), folder / "train/models/encoder.pt")
    write_text(folder / ".train.done", "")  # the training has ended, but done.json is not written
    go(type(plan)(study=plan.study, runs=(run,), outline=plan.outline), out)
    done = json.loads((out / "runs" / run.name / "done.json").read_text())
    assert done["figures"] == {"steps": 100, "steps_kept": 50, **validation}


@pytest.mark.parametrize("name", ["settings.json", "done.json"])
def test_a_torn_file_of_a_run_is_named_and_made_again(plan, out, bundles, name):
    plan = small(plan, 1)
    go(plan, out)
    path = out / "runs" / plan.runs[0].name / name
    before = path.read_text()
    path.write_text("")
    with pytest.raises(InputError, match=f"{name} is not valid JSON .*Remove it"):
        go(plan, out)
        overview(plan, out, names=False)
    path.unlink()
    (path.parent / "done.json").unlink(missing_ok=True)
    assert go(plan, out)[0] and path.read_text() == before
    assert (path.parent / "train/models/calls").read_text() == "x"  # not trained again


GROWING = {"n": [2], "seeds": [0], "floor": False, "ceiling": False, "convergence": {"seeds": [10], "most": 400}}


@pytest.fixture
def growing(monkeypatch, tmp_path, bundles):
    """A study with a chain whose Dice is 0.5, 0.55 and 0.552 after 50, 100 and 200 steps, and its folder."""
    made = planner(headroom=GROWING)
    made.out = tmp_path / "out"
    dice = {50: 0.5, 100: 0.55, 200: 0.552}

    def carry_out(run, **options):
        scores = made_up_scores(run, gain=0.0)
        for row in scores if run.name.startswith("converge_") else ():
            row["dice"] = dice[run.facts["steps"]]
        lines = ["case,label,dice,nsd,hd95"]
        lines += [",".join("" if value is None else str(value) for value in row.values()) for row in scores]
        write_text(made.out / "runs" / run.name / ".made_up.csv", "\n".join(lines) + "\n")
        return execution.carry_out(run, **options)

    monkeypatch.setattr(runner, "carry_out", carry_out)
    return made, made.out


def finished_runs(out):
    return sorted(path.parent.name for path in out.glob("runs/*/done.json"))


CHAIN = [f"converge_scratch_n2_seed10_steps{steps}" for steps in (100, 200, 50)]
AFTER = ["finetune_converged_n2_seed0_steps100", "finetune_scratch_n2_seed0"]


def test_a_chain_is_carried_out_until_more_steps_gain_nothing(growing):
    made, out = growing
    done, lines = go(plan_of(made, ["headroom"]), out)
    assert done and finished_runs(out) == [*CHAIN, *AFTER]
    order = [line.split()[0] for line in lines if line.endswith("...")]
    assert [name for name in order if "converge_" in name] == [CHAIN[2], CHAIN[0], CHAIN[1]]
    assert order.index(AFTER[0]) > order.index(CHAIN[1])
    assert "not counted: what the chains of doubled steps add after scratch with n = 2, 100 steps" in lines[1]
    # Repeated, it finds everything done.
    assert go(plan_of(made, ["headroom"]), out) == (True, [])


def test_a_broken_chain_goes_on_where_it_stopped(growing, monkeypatch):
    made, out = growing
    plan = plan_of(made, ["headroom"])
    carry_out = runner.carry_out

    def stop(run, **options):
        if run.name == CHAIN[1]:
            raise Stopped(signal.SIGTERM)
        return carry_out(run, **options)

    monkeypatch.setattr(runner, "carry_out", stop)
    with pytest.raises(Stopped):
        go(plan, out)
    assert CHAIN[1] not in finished_runs(out) and CHAIN[0] in finished_runs(out)
    monkeypatch.setattr(runner, "carry_out", carry_out)
    assert go(plan_of(made, ["headroom"]), out)[0] and finished_runs(out) == [*CHAIN, *AFTER]
    assert (out / "runs" / CHAIN[0] / "train/models/calls").read_text() == "x"  # not trained again


def test_who_has_nothing_to_do_waits_for_the_next_link_or_leaves(growing, monkeypatch):
    made, out = growing
    held = claims.take(out / "runs" / CHAIN[2])
    done, _ = go(plan_of(made, ["headroom"]), out, wait=False)
    assert not done and finished_runs(out) == [AFTER[1]]
    first = next(run for run in plan_of(made, ["headroom"]).runs if run.name == CHAIN[2])
    waits, sleep = [], time.sleep

    def wait(seconds):
        if seconds != runner.WAIT:
            return sleep(seconds)
        waits.append(seconds)
        assert len(waits) == 1
        write_text(out / "runs" / first.name / "settings.json", json.dumps(first.settings))
        write_text(out / "runs" / first.name / "done.json", json.dumps(finished(first)))  # the other process is done
        return held.release()

    monkeypatch.setattr(runner.time, "sleep", wait)
    assert go(plan_of(made, ["headroom"]), out)[0]
    assert waits and CHAIN[2] in finished_runs(out) and CHAIN[0] in finished_runs(out)


def test_time_grows_with_the_steps_and_falls_with_the_processes(out):
    made = planner(headroom=GROWING, minutes={"pretraining": 30, "finetuning": 12}, ablation=None)
    plan = plan_of(made, ["curve"])
    minutes = minutes_of(plan, out)
    by_name = {run.name: minutes(run) for run in plan.runs}
    assert by_name["pretrain_pretrained_seed0"] == 30
    assert by_name["finetune_scratch_n4_seed0"] == 12 and by_name["finetune_scratch_n2_seed0"] == 10  # 60 and 50 steps
    total = 3 * 30 + 6 * 12 + 6 * 10
    assert overview(plan, out, names=False, processes=2) == (
        f"0 of 15 runs done, 0 running, 15 left; about {total // 60} h {total % 60:02d} min with 1 process, "
        f"{total // 120} h {total // 2 % 60:02d} min with 2"
    )
    run = next(run for run in plan.runs if run.name == "finetune_scratch_n2_seed0")
    write_text(out / "runs" / run.name / "done.json", json.dumps(finished(run) | {"seconds": 60 * 5}))
    assert minutes_of(plan, out)(next(run for run in plan.runs if run.name == "finetune_scratch_n4_seed0")) == 6


def test_the_random_encoder_of_the_floor_takes_a_minute(out):
    plan = plan_of(planner(headroom={"n": [2], "seeds": [0]}, steps=50), ["headroom"])
    run = next(run for run in plan.runs if run.name == "pretrain_floor_seed0")
    assert minutes_of(plan, out)(run) == 1


def test_processes_share_the_cores(monkeypatch):
    monkeypatch.setattr(runner, "available_cores", lambda: 4)
    assert [runner.processes_of(threads) for threads in (1, 2, 3, 4, 9)] == [4, 2, 1, 1, 1]
