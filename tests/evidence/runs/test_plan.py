# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The plan of a study has the runs counted by hand; arms differ only in their start and in what the study changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from monai.bundle import ConfigParser

from bundles.common.errors import InputError
from evidence.runs.run_maker import Z_SCORE, square_roi
from evidence.study.study import BUNDLES, PRETRAIN
from tools.bundle_runs import placed, words_of, write_lists

from ..made_up_study import CONTENT, ROW, parts, planner, whole_plan


def named(runs):
    return {run.name: run for run in runs}


def test_curve_counts_three_encoders_and_twelve_fine_tunings():
    runs = planner().curve()  # 3 seeds x 2 n x 2 arms, an encoder for each seed
    assert [run.kind for run in runs].count("pretraining") == 3
    assert [run.kind for run in runs].count("finetuning") == 12
    assert len(named(runs)) == 15


def test_ablation_counts_seven_encoders_and_sixteen_fine_tunings():
    runs = planner().ablation()  # one encoder for each subset; 2 seeds x (none + 7 subsets)
    assert [run.kind for run in runs].count("pretraining") == 7
    assert [run.kind for run in runs].count("finetuning") == 16
    tasks = sorted(tuple(run.facts["tasks"]) for run in runs if run.kind == "pretraining")
    assert len(set(tasks)) == 7 and ("inpainting", "contrast", "rotation") in tasks


def test_curve_and_ablation_share_what_is_equal():
    # Shared: scratch with both seeds, all three tasks with seed 0, and its encoder.
    assert len(whole_plan().runs) == 15 + 23 - 4


def test_search_tries_as_many_recipes_for_each_arm_on_tuning_patients_alone():
    runs = [run for run in planner().search() if run.kind == "finetuning"]
    arms = [run.facts["arm"] for run in runs]
    assert (arms.count("scratch"), arms.count("pretrained")) == (4, 4)
    for run in runs:
        assert list(run.cases["scored"]) == ["tune_00", "tune_01", "tune_02"]
        assert not set(run.cases["training"]) & set(run.cases["scored"])
    assert {run.facts["recipe"]["learning_rate"] for run in runs} == {0.01, 0.02}


def test_single_recipes_come_beside_the_grid():
    search = {"n": 2, "seeds": [9], "grid": {"learning_rate": [0.01]}}
    search["recipes_of"] = {"scratch": [{"warmup_steps": 7}], "pretrained": [{"freeze_encoder": True}]}
    runs = [run for run in planner(search=search).search() if run.kind == "finetuning"]
    assert [(run.facts["arm"], run.facts["recipe"]) for run in runs] == [
        ("scratch", {"learning_rate": 0.01}),
        ("scratch", {"warmup_steps": 7}),
        ("pretrained", {"learning_rate": 0.01}),
        ("pretrained", {"freeze_encoder": True}),
    ]
    assert runs[3].commands[0].options["freeze_encoder"] is True


def test_a_recipe_inherits_nothing_of_what_the_search_is_about():
    """The arm's own options contain the winner of an earlier search."""
    arms = {
        "scratch": {"pretraining": None, "finetuning": {"warmup_steps": 5}},
        "pretrained": {"pretraining": {}, "finetuning": {"encoder_lr_decay": 0.75, "drop_path": 0.1}},
    }
    search = {"n": 2, "seeds": [9], "grid": {"learning_rate": [0.01]}, "options": {"val_interval": 7}}
    search["recipes_of"] = {
        "scratch": [{"learning_rate": 0.005}],
        "pretrained": [{"learning_rate": 0.01, "encoder_lr_decay": 0.75}],
    }
    made = planner(arms=arms, search=search)
    tried = [run.commands[0].options for run in made.search() if run.kind == "finetuning"]
    assert [options["learning_rate"] for options in tried] == [0.01, 0.005, 0.01, 0.01]
    # No recipe of scratch sets warmup_steps, so it stays.
    assert [options.get("warmup_steps") for options in tried] == [5, 5, None, None]
    assert [options.get("encoder_lr_decay") for options in tried] == [None, None, None, 0.75]
    assert [options.get("drop_path") for options in tried] == [None, None, 0.1, 0.1]
    assert all(options["val_interval"] == 7 for options in tried)
    curve = named(made.curve())["finetune_pretrained_n2_seed0"].commands[0].options
    assert curve["encoder_lr_decay"] == 0.75


def test_the_steps_of_a_pretraining_are_the_studys_or_its_presets():
    def steps(pretraining):
        return {run.facts["steps"] for run in planner(pretraining=pretraining).curve() if run.kind == "pretraining"}

    presets = ConfigParser.load_config_file(str(BUNDLES / PRETRAIN / "configs/presets.yaml"))
    assert steps({"max_steps": 7}) == {7}
    assert steps({}) == {presets[CONTENT["preset"]]["max_steps"]}


def test_a_search_of_fewer_steps_needs_no_steps_of_its_n():
    search = {"n": 3, "seeds": [9], "grid": {"learning_rate": [0.01, 0.02]}}
    with pytest.raises(InputError, match="steps has no entry for n = 3"):
        planner(search=search).search()
    runs = planner(search={**search, "options": {"max_steps": 20}}).search()
    assert {run.facts["steps"] for run in runs if run.kind == "finetuning"} == {20}
    assert {run.commands[0].options["max_steps"] for run in runs if run.kind == "finetuning"} == {20}


def test_a_run_comes_after_those_that_it_needs():
    seen = set()
    for run in whole_plan().runs:
        assert set(run.needs) <= seen
        seen.add(run.name)


def test_arms_differ_by_their_encoder_and_what_the_study_says_alone():
    runs = named(planner().curve())
    scratch, pretrained = (runs[f"finetune_{arm}_n2_seed1"] for arm in ("scratch", "pretrained"))
    one, other = (dict(run.commands[0].options) for run in (scratch, pretrained))
    assert other.pop("pretrained_encoder") == Path("runs/pretrain_pretrained_seed1/train/models/encoder.pt")
    assert one.pop("warmup_steps") == 5 and other.pop("encoder_lr_decay") == 0.75
    assert one.pop("output_dir") != other.pop("output_dir")
    assert one == other and one["seed"] == 1 and one["max_steps"] == 50
    assert scratch.lists == pretrained.lists and scratch.cases == pretrained.cases


def test_labels_of_the_scored_reach_no_training():
    for run in [*whole_plan().runs, *planner().search()]:
        for content in run.lists.values():
            images = {each["image"] for section in ("training", "validation") for each in content.get(section, [])}
            assert not images & {case["image"] for case in parts().validation.values()}
        if run.kind == "pretraining":
            (content,) = run.lists.values()
            assert "label" not in json.dumps([content["training"], content["validation"]])
            assert len(content["training"]) == 12 + 1 and len(content["validation"]) == 3
        else:
            assert run.commands[0].options["fold"] == "all"  # no patient selects a checkpoint


def test_pretraining_sees_intensities_as_the_fine_tuning_does():
    options = planner().curve()[1].commands[0].options
    assert options["spacing"] == [4.0, 4.0, 5.0] and options["hu_window"] == [-175.0, 250.0]
    assert options["foreground_hu"] == -175.0 and options["roi_size"] == [64, 64, 32]


def test_scans_without_hu_are_z_scored_in_pretraining_too():
    made = planner()
    made.row = {**ROW, "hu_window": None, "roi_size": [32, 64, 32], "channels": ["T2", "ADC"], "foreground": 0.0}
    command = made.curve()[1].commands[0]
    assert command.configs == ("configs/train.yaml", str(Z_SCORE))
    assert command.options["roi_size"] == [32, 32, 64] and command.options["in_channels"] == 2


@pytest.mark.parametrize(
    ("roi", "square"),
    [
        ([64, 64, 32], [64, 64, 32]),
        ([32, 64, 32], [32, 32, 64]),
        ([64, 32, 32], [32, 32, 64]),
        ([96, 64, 32], [64, 64, 32]),
    ],
)
def test_crops_that_are_turned_are_square(roi, square):
    assert square_roi(roi) == square


def test_words_are_those_of_the_command_line():
    run = named(planner(finetuning={"max_gradient_norm": None}).curve())["finetune_pretrained_n2_seed0"]
    words = placed(words_of(run.commands[0]), out=Path("/out"), run=run.name)
    assert words[words.index("--max_gradient_norm") + 1] == "$None"
    assert words[words.index("--resume") + 1] == "true"
    assert words[words.index("--dataset_dir") + 1] == f"/out/runs/{run.name}/lists/n2_seed0.json"
    assert words[words.index("--task") + 1] == "/out/task.yaml"


def test_settings_hold_no_path_of_this_machine():
    for run in whole_plan().runs:
        assert "/data" not in json.dumps(run.settings) and str(Path.cwd()) not in json.dumps(run.settings)


def test_lists_are_in_msd_form(tmp_path):
    run = named(planner().curve())["finetune_scratch_n2_seed0"]
    write_lists(run, tmp_path)
    folder = tmp_path / "runs" / run.name / "lists"
    listed = json.loads((folder / "n2_seed0.json").read_text())
    assert len(listed["training"]) == 2 and listed["labels"]["1"] == "liver" and listed["modality"] == {"0": "CT"}
    assert len(json.loads((folder / "validation.json").read_text())["test"]) == 20


def test_a_search_without_tuning_patients_is_refused():
    made = planner()
    made.parts = parts(tuning=0)
    with pytest.raises(InputError, match="tuning is 0"):
        made.search()


def test_a_study_without_an_ablation_says_so():
    with pytest.raises(InputError, match="made_up has no ablation"):
        planner(ablation=None).ablation()


def test_the_network_of_the_pretraining_is_that_of_every_fine_tuning():
    network = {"feature_size": 24, "depths": [1, 1, 1, 1], "num_heads": [3, 6, 12, 24], "window_size": 7}
    made = planner(pretraining={"max_steps": 100, **network})
    for run in [*made.curve(), *made.ablation(), *made.search()]:
        options = run.commands[0].options
        assert {key: options[key] for key in network} == network
    for run in planner().curve():  # without one, it is the preset's
        assert not set(network) & set(run.commands[0].options)


def test_the_network_of_a_row_is_that_of_the_pretraining_too():
    made = planner()
    made.row = {**ROW, "feature_size": 24}  # the fine-tuning reads it from the row
    assert named(made.curve())["pretrain_pretrained_seed0"].commands[0].options["feature_size"] == 24


def test_another_pretraining_under_the_same_name_is_another_start():
    facts = [
        named(planner(pretraining={"max_steps": steps}).curve())["finetune_pretrained_n2_seed0"].settings["facts"]
        for steps in (100, 100, 200)
    ]
    assert facts[0] == facts[1] and facts[0]["encoder_settings"] != facts[2]["encoder_settings"]
    scratch = named(planner().curve())["finetune_scratch_n2_seed0"]
    assert "encoder_settings" not in scratch.facts


def test_the_outline_names_what_label_files_do_not_hold():
    made = planner()
    made.absent = {"val_03": ["liver"]}
    assert made.outline()["absent"] == {"val_03": ["liver"]}


NETWORK_ARM = {"start": "network", "pretraining": {"tasks": ["inpainting"], "reconstruction_head": "unet"}}


def with_arms(**more):
    return planner(arms={**CONTENT["arms"], **more}, search=None)


def test_an_arm_from_a_whole_network_takes_its_file_and_nothing_else_differs():
    runs = named(with_arms(whole=NETWORK_ARM).curve())
    one, other = (dict(runs[f"finetune_{arm}_n2_seed1"].commands[0].options) for arm in ("scratch", "whole"))
    assert other.pop("pretrained_model") == Path("runs/pretrain_whole_seed1/train/models/network.pt")
    assert one.pop("warmup_steps") == 5 and one.pop("output_dir") != other.pop("output_dir")
    assert one == other and runs["finetune_whole_n2_seed1"].needs == ("pretrain_whole_seed1",)
    # The file that must be there at the end: of the whole network where it is trained.
    assert runs["pretrain_whole_seed1"].commands[0].result == "train/models/network.pt"
    assert runs["pretrain_pretrained_seed1"].commands[0].result == "train/models/encoder.pt"


def test_an_arm_may_take_the_encoder_of_a_whole_network():
    runs = named(with_arms(encoder_alone={**NETWORK_ARM, "start": "encoder"}).curve())
    options = runs["finetune_encoder_alone_n2_seed0"].commands[0].options
    assert options["pretrained_encoder"] == Path("runs/pretrain_encoder_alone_seed0/train/models/encoder.pt")
    assert "pretrained_model" not in options


def test_arms_with_equal_pretrainings_share_the_run_of_each_seed():
    same = {**NETWORK_ARM, "start": "encoder"}
    reordered = {"pretraining": {"tasks": ["rotation", "inpainting", "contrast"]}}
    other = {"pretraining": {"temperature": 0.4}}
    made = with_arms(whole=NETWORK_ARM, encoder_alone=same, again=reordered, other=other)
    runs = named(made.curve())
    trained = sorted(name for name in runs if name.startswith("pretrain"))
    assert trained == [f"pretrain_{arm}_seed{seed}" for arm in ("other", "pretrained", "whole") for seed in (0, 1, 2)]
    starts = {arm: runs[f"finetune_{arm}_n2_seed2"].needs for arm in made.study.arms}
    assert starts["encoder_alone"] == starts["whole"] == ("pretrain_whole_seed2",)
    assert starts["again"] == starts["pretrained"] == ("pretrain_pretrained_seed2",)
    assert starts["other"] == ("pretrain_other_seed2",)
    assert made.outline()["pretrainings"]["encoder_alone"] == "whole"


def test_an_ablation_row_shares_the_pretraining_of_an_arm_too():
    made = with_arms(half={"pretraining": {"tasks": ["contrast"]}})
    runs = named(made.ablation())
    assert runs["finetune_contrast_n2_seed1_encoder0"].needs == ("pretrain_half_seed0",)
    assert made.outline()["pretrainings"]["contrast"] == "half"


def test_the_default_rows_of_the_ablation_are_the_papers_eight():
    rows = [tuple(each) for each in planner().subsets()]
    assert len(rows) == 8 and len(set(rows)) == 8 and not any("position" in row for row in rows)


def test_the_ablation_may_name_position():
    ablation = {**CONTENT["ablation"], "subsets": [["position"], ["rotation", "position"]]}
    made = planner(ablation=ablation)
    assert [row["arm"] for row in made.outline()["ablation"]["rows"]] == ["scratch", "position", "rotation-position"]
    runs = named(made.ablation())
    assert runs["pretrain_position_seed0"].commands[0].options["tasks"] == ["position"]


def test_a_first_figure_that_the_data_lack_is_refused():
    with pytest.raises(
        InputError, match="first_figure 'heart' is not a label of the data. Allowed are liver, left kidney"
    ):
        planner(first_figure=["heart"], row=None, task="Task09_Spleen")
    assert planner(first_figure=["left kidney"]).outline()["first_figure"] == ["left kidney"]
    assert planner().outline()["first_figure"] == ["liver", "left kidney"]


CARRIED_ARMS = {
    "scratch": {"pretraining": None, "finetuning": {"warmup_steps": 5}},
    "position": {"start": "network", "pretraining": {"tasks": ["position"]}},
    "carried": {
        "pretraining": {"tasks": ["position"]},
        "propagation": {"atlases": 2},
        "finetuning": {"real_repeats": 3},
    },
    "carried_too": {"start": "network", "pretraining": {"tasks": ["position"]}, "propagation": {"atlases": 2}},
    "masks": {"pretraining": {"tasks": ["position"]}, "propagation": {"atlases": 2}, "masks_only": True},
}


def carried_runs():
    return named(planner(arms=CARRIED_ARMS, ablation=None, search=None).curve())


def test_arms_that_carry_labels_in_the_same_way_share_network_and_labels():
    runs = carried_runs()
    kinds = [run.kind for run in runs.values()]
    # 3 seeds x 2 n: one propagation each, and five arms; one position network for each seed.
    assert (kinds.count("pretraining"), kinds.count("propagation"), kinds.count("finetuning")) == (3, 6, 30)
    for arm in ("carried", "carried_too"):
        run = runs[f"finetune_{arm}_n2_seed1"]
        assert "carry_carried_n2_seed1" in run.needs
        assert run.commands[0].options["dataset_dir"] == Path("runs/carry_carried_n2_seed1/carried/dataset.json")
    options = runs["finetune_carried_n2_seed1"].commands[0].options
    assert options["real_repeats"] == 3 and "pretrained_model" not in options
    started = runs["finetune_carried_too_n2_seed1"]
    assert started.commands[0].options["pretrained_model"] == Path(
        "runs/pretrain_position_seed1/train/models/network.pt"
    )
    assert set(started.needs) == {"pretrain_position_seed1", "carry_carried_n2_seed1"}


def test_labels_are_carried_from_the_subset_to_all_others_and_never_to_what_is_scored():
    run = carried_runs()["carry_carried_n2_seed1"]
    content = run.lists["carried"]
    labelled = {Path(entry["image"]).name for entry in content["training"]}
    targets = {Path(entry["image"]).name for entry in content["unlabelled"]}
    assert len(labelled) == 2 and len(targets) == 11 and not labelled & targets  # ten others, and one unlabelled scan
    assert all("label" not in entry for entry in content["unlabelled"])
    assert not {name for name in targets if name.startswith(("val", "tune"))}
    assert len(content["test"]) == 23 and "validation" not in content  # --fold all would train on a validation section
    assert run.commands[0].options["fold"] == "all" and run.commands[0].options["atlases"] == 2
    assert run.commands[0].statuses == (0, 3)
    assert [entry["image"] for entry in run.lists["truth"]["test"]] == [e["image"] for e in content["unlabelled"][:10]]
    assert len(run.cases["unlabelled"]) == 10


@pytest.mark.parametrize(("most", "number"), [(4, 4), (100, 11), (None, 11)])
def test_a_propagation_to_some_scans_takes_their_share_of_the_time(most, number):
    propagation = {"atlases": 2, "max_scans": most}
    arms = {name: dict(arm) for name, arm in CARRIED_ARMS.items() if name in ("scratch", "carried")}
    arms["carried"]["propagation"] = propagation
    run = named(planner(arms=arms, ablation=None, search=None).curve())["carry_carried_n2_seed1"]
    assert run.facts["steps"] == number and run.commands[0].options["max_scans"] == most
    assert len(run.lists["carried"]["unlabelled"]) == 11  # drawn by the bundle


def test_masks_alone_are_carried_to_the_scored_patients():
    run = carried_runs()["finetune_masks_n4_seed0"]
    (command,) = run.commands
    assert command.options["purpose"] == "masks" and command.options["output_dir"].name == "carried"
    assert len(run.lists["carried"]["unlabelled"]) == 20 == len(run.cases["scored"])
    assert "test" not in run.lists["carried"]
    assert run.needs == ("pretrain_position_seed0",)


def test_options_of_a_propagation_are_options_of_its_config():
    known = ConfigParser.load_config_file(BUNDLES / "segmentation/configs/propagate.yaml")
    for name in ("carry_carried_n2_seed1", "finetune_masks_n4_seed0"):
        (command,) = carried_runs()[name].commands
        assert command.configs == ("configs/propagate.yaml",) and set(command.options) <= set(known)
