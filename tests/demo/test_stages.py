# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The demo's commands differ where its comparison says, are scored alike, and write below its folder alone."""

from __future__ import annotations

from demo.stages import ROOT, TEST_PATIENTS, stages


def test_plan_has_every_stage_after_those_it_needs(tmp_path):
    plan = stages(tmp_path / "out")
    seen = set()
    for stage in plan:
        assert seen.issuperset(stage.needs), stage.name
        seen.add(stage.name)
    assert len(seen) == len(plan) == 10


def option(stage, name):
    return stage.command[list(stage.command).index(f"--{name}") + 1]


def test_the_three_fine_tunings_differ_only_in_start_and_labels(tmp_path):
    plan = {stage.name: stage for stage in stages(tmp_path / "out", pretrain_steps=8, finetune_steps=6)}
    own = {"--output_dir", "--run_name", "--save_execute_config"}

    def options(name):
        words = plan[name].command[3:]
        return {key: value for key, value in zip(words[::2], words[1::2], strict=True) if key not in own}

    scratch = options("from_scratch")
    assert scratch["--max_steps"] == "6" and option(plan["pretrain"], "max_steps") == "8"
    encoder = (tmp_path / "out/swin_unetr_pretrain/models/encoder.pt").as_posix()
    assert options("finetune") == scratch | {"--pretrained_encoder": encoder}
    assert options("shuffled_labels") == scratch | {"--data_list": "dataset_shuffled.json"}
    assert plan["finetune"].needs == ["data", "pretrain"] and plan["from_scratch"].needs == ["data"]


def test_all_runs_are_scored_on_the_same_true_labels(tmp_path):
    plan = {stage.name: stage for stage in stages(tmp_path / "out")}
    for run in ("finetune", "from_scratch", "shuffled_labels"):
        stage = plan[f"evaluate_{run}"]
        assert option(stage, "pretrained_model") == f"{option(plan[run], 'output_dir')}/models/model.pt"
        assert option(stage, "section") == "test" and "--data_list" not in stage.command


def test_patients_are_enough_for_an_interval_and_all_are_segmented(tmp_path):
    plan = {stage.name: stage for stage in stages(tmp_path / "out")}
    assert option(plan["data"], "test") == str(TEST_PATIENTS) and 3 <= TEST_PATIENTS <= 5
    assert option(plan["segment"], "dataset_dir") == (tmp_path / "out/data/labelled/imagesTs").as_posix()


def test_report_follows_a_change_of_each_of_its_modules(tmp_path):
    report = stages(tmp_path / "out")[-1]
    assert {path.name for path in report.code} >= {"report.py", "report.html.jinja", "findings.py", "summary.py"}


def test_everything_is_written_under_the_demo_folder(tmp_path):
    for stage in stages(tmp_path / "out"):
        for name in ("output_dir", "save_execute_config"):
            if f"--{name}" in stage.command:
                assert option(stage, name).startswith((tmp_path / "out").as_posix())
        if "--tracking" in stage.command:
            assert option(stage, "tracking_uri") == f"sqlite:///{(tmp_path / 'out/mlruns.db').as_posix()}"


def test_steps_of_the_preset_are_not_repeated_in_the_commands(tmp_path):
    assert all("--max_steps" not in stage.command for stage in stages(tmp_path / "out"))


def test_commands_in_the_repository_use_short_paths():
    plan = stages(ROOT / "demo/out")
    assert option(plan[1], "output_dir") == "demo/out/swin_unetr_pretrain"
