# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""What would fail later is refused before a job starts: engine, profile, plugin, disk, folder, part, GPU."""

from __future__ import annotations

import errno
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from bundles.common.errors import InputError
from workflow.__main__ import main, threads_of
from workflow.gpu import one_gpu, visible_gpus
from workflow.planning import plan_from
from workflow.slurm import cancel_left_jobs, run_ids
from workflow.start import PROFILES, check_engine, check_shared, claim_folder, engine_words, read_profile

from .made_up_workflow import write_made_up

MOUNTS = """\
/dev/vda / ext4 rw 0 0
server:/export /shared\\040disk nfs4 rw 0 0
tmpfs /tmp tmpfs rw 0 0
lustre /scratch lustre rw 0 0
/dev/vdb /scratch/local xfs rw 0 0
"""


@pytest.fixture
def no_engine(monkeypatch):
    """`main` returns the command line of the engine instead of becoming it."""
    words = []
    monkeypatch.setattr("workflow.__main__.os.execv", lambda _, given: words.extend(given[1:]))
    return words


def test_shipped_profiles_name_an_executor():
    assert {path.name for path in PROFILES.iterdir()} == {"local", "slurm"}
    assert [read_profile(name)[1]["executor"] for name in ("local", "slurm")] == ["local", "slurm"]


@pytest.mark.parametrize("content", [None, "a: [", ""])
def test_a_profile_that_cannot_be_read_is_named(tmp_path, content):
    if content is None:
        with pytest.raises(InputError, match="no profile .*nowhere.*local, slurm"):
            read_profile(str(tmp_path / "nowhere"))
        return
    (tmp_path / "config.yaml").write_text(content)
    if content:
        with pytest.raises(InputError, match=r"config\.yaml is not valid YAML"):
            read_profile(str(tmp_path))
    else:
        assert read_profile(str(tmp_path)) == (tmp_path, {})


@pytest.mark.parametrize(
    ("missing", "executor", "message"),
    [
        ("snakemake", "local", "Snakemake is not installed.*make install EXTRAS=workflow"),
        ("snakemake_executor_plugin_slurm", "slurm", "executor slurm.*pip install snakemake-executor-plugin-slurm"),
        ("snakemake_executor_plugin_kubernetes", "kubernetes", "pip install snakemake-executor-plugin-kubernetes"),
    ],
)
def test_what_is_not_installed_is_named_with_how_to_install_it(monkeypatch, tmp_path, missing, executor, message):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find("json"))
    with pytest.raises(InputError, match=message):
        check_engine({"executor": executor}, tmp_path / "config.yaml")


def test_slurm_without_its_commands_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="no sbatch. Start on a login node"):
        check_engine({"executor": "slurm"}, tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("path", "local"),
    [
        ("/data/ct", "ext4"),
        ("/tmp/out", "tmpfs"),
        ("/scratch/local/out", "xfs"),
        ("/shared disk/out", None),
        ("/scratch/out", None),
    ],
)
def test_a_disk_that_other_machines_do_not_see_is_refused(tmp_path, path, local):
    mounts = tmp_path / "mounts"
    mounts.write_text(MOUNTS)
    if local is None:
        check_shared({"--out": Path(path), "--data": None}, str(mounts))
        return
    with pytest.raises(InputError, match=f"--out {path} is on .*, a disk of this machine .{local}.*SHARED_DISK=1"):
        check_shared({"--data": Path("/scratch/ct"), "--out": Path(path)}, str(mounts))


def test_all_such_paths_are_named_at_once(tmp_path):
    (tmp_path / "mounts").write_text(MOUNTS)
    with pytest.raises(InputError, match="--data /data .*; --out /tmp/out .*"):
        check_shared({"--data": Path("/data"), "--out": Path("/tmp/out")}, str(tmp_path / "mounts"))


def test_looking_cancels_nothing_and_says_how_much_is_left(tmp_path, capsys, no_engine, monkeypatch):
    out = tmp_path / "out"
    write_made_up(out)
    monkeypatch.setattr("workflow.__main__.check_engine", lambda *_: "slurm")
    cancelled = []
    monkeypatch.setattr("workflow.__main__.cancel_left_jobs", cancelled.append)
    words = ["few_label_curve", "--out", str(out), "--as_planned", "--profile", "slurm", "--shared_disk"]
    main([*words, "--list"])
    assert not cancelled and "--dry-run" in no_engine
    # two pre-trainings of 10 minutes, and four fine-tunings of 5 for the most steps, with 50 of 60 steps
    assert (
        "made_up: 0 of 6 runs have ended; by the planned minutes, the others take about 37 min"
        in capsys.readouterr().out
    )
    (out / "runs/pretrain_pretrained_seed0/.train.done").touch()
    main(words)
    assert (
        cancelled == [out]
        and "1 of 6 runs have ended; by the planned minutes, the others take about 27 min" in capsys.readouterr().out
    )


def test_a_folder_has_one_engine_and_what_a_killed_one_locked_is_free(tmp_path):
    (tmp_path / ".snakemake/locks").mkdir(parents=True)
    (tmp_path / ".snakemake/locks/0.input.lock").touch()
    program = "import sys, time; from pathlib import Path; from workflow.start import claim_folder\n"
    program += "claim_folder(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    words = [sys.executable, "-c", program, str(tmp_path)]
    holder = subprocess.Popen(words, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=rf"Another workflow runs in .* \(process {holder.pid} on .*Wait for it"):
        claim_folder(tmp_path)
    holder.kill()
    holder.wait()
    claim_folder(tmp_path)
    assert not (tmp_path / ".snakemake/locks").exists()


def test_a_disk_without_locks_is_used_and_told(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("workflow.start.fcntl.lockf", no_locks)
    claim_folder(tmp_path)
    assert f"{tmp_path} cannot be locked (No locks available)" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="Cannot write into .*file/out"):
        claim_folder(tmp_path / "file" / "out")


def test_the_engine_gets_target_config_and_limits(tmp_path):
    words = engine_words(
        "headroom",
        out=tmp_path,
        profile=PROFILES / "local",
        config={"study": "demo"},
        resources={"gpu": 2},
        more=["-n"],
    )
    assert words[:2] == ["-m", "snakemake"] and words[-3:] == ["-n", "--", "headroom"]
    assert words[words.index("--directory") + 1] == str(tmp_path)
    assert words[words.index("--config") + 1] == "study=demo" and words[words.index("--resources") + 1] == "gpu=2"


def test_few_threads_for_many_jobs_and_a_share_of_the_cores_for_each_gpu():
    assert [threads_of(cores, 0) for cores in (1, 2, 4, 16, 64)] == [1, 1, 1, 4, 16]
    assert [threads_of(cores, gpus) for cores, gpus in ((16, 2), (8, 1), (2, 4))] == [8, 8, 1]


def test_the_command_line_plans_and_becomes_the_engine(tmp_path, no_engine, monkeypatch):
    monkeypatch.setattr("workflow.__main__.visible_gpus", lambda: ["0", "1"])
    write_made_up(tmp_path / "out")
    main(["few_label_curve", "--out", str(tmp_path / "out"), "--as_planned", "--tracking_uri", "http://x", "--quiet"])
    config = no_engine[no_engine.index("--config") + 1 : no_engine.index("--resources")]
    assert {"planned=True", "gpus_per_job=1", "assign_gpus=True", "tracking_uri=http://x"} <= set(config)
    assert "gpu=2" in no_engine and no_engine[-3:] == ["--quiet", "--", "few_label_curve"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["few_label_curve", "--study", "openkbp"], "openkbp needs data"),
        (["few_label_curve", "--study", "nonsense"], "no study nonsense"),
        (["few_label_curve", "--profile", "nonsense"], "no profile nonsense"),
        (["decathlon"], "decathlon needs --folds FILE.yaml"),
        (["decathlon", "--folds", "nowhere.yaml"], "nowhere.yaml does not exist"),
    ],
)
def test_mistakes_end_with_one_message(tmp_path, capsys, no_engine, words, message):
    assert main([*words, "--out", str(tmp_path / "new")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Stopped: ") and message in error and not no_engine


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("headroom", "Study made_up has no headroom, only curve"),
        ("decathlon", "plan of made_up, which has no decathlon"),
    ],
)
def test_what_the_plan_does_not_have_is_named(tmp_path, capsys, no_engine, target, message):
    write_made_up(tmp_path / "out")
    assert main([target, "--out", str(tmp_path / "out"), "--as_planned"]) == 1
    assert message in capsys.readouterr().err and not no_engine


def test_a_folder_of_other_files_or_of_another_study_is_left_alone(tmp_path, capsys, no_engine):
    (tmp_path / "thesis.txt").touch()
    assert main(["few_label_curve", "--out", str(tmp_path)]) == 1
    assert "contains files that no study made" in capsys.readouterr().err
    write_made_up(tmp_path / "out")
    assert main(["few_label_curve", "--study", "demo", "--out", str(tmp_path / "out")]) == 1
    assert "contains the study made_up, not demo" in capsys.readouterr().err and not no_engine


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"studdy": "demo"}, "--config studdy is not known. Did you mean study"),
        ({}, "either --config study=NAME or"),
        ({"study": "demo", "folds": "a.yaml"}, "either --config study=NAME or"),
    ],
)
def test_a_config_that_says_too_little_or_too_much_is_refused(tmp_path, config, message):
    with pytest.raises(InputError, match=message):
        plan_from(config, tmp_path)


@pytest.mark.parametrize(("shown", "gpus"), [("-1", []), ("", []), ("0, 2", ["0", "2"]), ("1,-1,0", ["1"])])
def test_gpus_that_are_hidden_are_none(monkeypatch, shown, gpus):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert visible_gpus() == gpus


def test_each_job_gets_a_gpu_that_no_other_has(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    import os

    with one_gpu(locks=tmp_path) as first, one_gpu(["3", "5"], locks=tmp_path) as second:
        assert (first, second) == ("3", "5") and os.environ["CUDA_VISIBLE_DEVICES"] == "5"
        with (
            pytest.raises(InputError, match="All 2 GPUs of this machine are taken"),
            one_gpu(["3", "5"], locks=tmp_path),
        ):
            pass
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,5"
    with one_gpu(locks=tmp_path) as again:
        assert again == "3"


def slurm(tmp_path, monkeypatch, jobs):
    """Programs that stand for SLURM's: squeue answers ``jobs``, and both write down how they were called."""
    for name in ("squeue", "scancel"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        answer = jobs if name == "squeue" else ""
        program.write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/calls\nprintf "{answer}"\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")


def test_jobs_that_a_killed_engine_left_are_cancelled(tmp_path, monkeypatch):
    logs = tmp_path / ".snakemake/log"
    logs.mkdir(parents=True)
    (logs / "1.snakemake.log").write_text("host: x\nSLURM run ID: study_ab-1\nSLURM run ID: study_ab-1\n")
    (logs / "2.snakemake.log").write_text("SLURM run ID: cd-2\n")
    assert run_ids(tmp_path) == ["study_ab-1", "cd-2"]
    slurm(tmp_path, monkeypatch, "41\\n42\\n")
    said = []
    assert cancel_left_jobs(tmp_path, say=said.append) == ["41", "42"] and "Cancelling 2 jobs" in said[0]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == ["squeue --noheader --name=study_ab-1,cd-2 --format=%A", "scancel 41 42"]


def test_nothing_is_asked_of_slurm_without_an_earlier_engine_and_nothing_cancelled_without_jobs(tmp_path, monkeypatch):
    slurm(tmp_path, monkeypatch, "")
    assert cancel_left_jobs(tmp_path, say=pytest.fail) == [] and not (tmp_path / "calls").exists()
    (tmp_path / ".snakemake/log").mkdir(parents=True)
    (tmp_path / ".snakemake/log/1.log").write_text("SLURM run ID: ab\n")
    assert cancel_left_jobs(tmp_path, say=pytest.fail) == []
    assert (tmp_path / "calls").read_text().startswith("squeue")


def test_a_slurm_that_does_not_answer_is_named(tmp_path, monkeypatch):
    (tmp_path / ".snakemake/log").mkdir(parents=True)
    (tmp_path / ".snakemake/log/1.log").write_text("SLURM run ID: ab\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="SLURM does not answer .squeue"):
        cancel_left_jobs(tmp_path)
