# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The study files of the project can be read, and mistakes in a study file are named."""

from __future__ import annotations

import pytest

from bundles.common.errors import InputError
from bundles.pretraining.network import SwinPretrainer
from evidence.study.reading import STUDIES, check_study, read_study
from evidence.study.study import trains_whole_network

from ..made_up_study import CONTENT


def check(**changes):
    return check_study({**CONTENT, **changes}, source="own.yaml")


def arms(**changes):
    return {name: {**arm, **changes.get(name, {})} for name, arm in CONTENT["arms"].items()}


@pytest.mark.parametrize("name", sorted(path.stem for path in STUDIES.glob("*.yaml")))
def test_studies_of_the_project_are_sound_and_named_as_their_files(name):
    assert read_study(name).name == name


def test_there_are_four_studies():
    assert sorted(path.stem for path in STUDIES.glob("*.yaml")) == ["demo", "hippocampus", "openkbp", "openkbp_560"]


def test_the_study_of_openkbp_compares_pretrainings_of_the_encoder_and_of_the_whole_network():
    study = read_study("openkbp")
    assert {name: arm.start for name, arm in study.arms.items()} == {
        **{"scratch": None, "three_tasks": None},
        **dict.fromkeys(("reconstruction", "position", "union", "carried_start"), "network"),
        **{"carried": None, "carried_masks": None},
    }
    carried = [name for name, arm in study.arms.items() if arm.propagation is not None]
    assert carried == ["carried", "carried_start", "carried_masks"] and study.curve.n == [1, 2, 8]
    assert {study.arms[name].starts_from for name in ("carried", "carried_masks")} == {"nothing"}
    for name, arm in study.arms.items():
        if name != "scratch":  # a quarter of the steps, or the contrast collapses
            options = study.pretraining_of(name)
            assert options["warmup_steps"] == options["max_steps"] / 4
            whole = trains_whole_network(options["tasks"], options.get("reconstruction_head"))
            assert whole == (arm.start == "network" or name in carried)
    assert not {"larynx", "esophagus"} & set(study.first_figure) and len(study.first_figure) == 5


@pytest.mark.parametrize(
    ("tasks", "head", "whole"),
    [
        (["position"], "vae", True),
        (["inpainting"], "unet", True),
        (["inpainting"], "vae", False),
        (["contrast", "rotation"], "unet", False),
    ],
)
def test_the_decoder_is_trained_by_position_or_by_inpainting_through_it(record, tasks, head, whole):
    assert trains_whole_network(tasks, head) == whole
    network = SwinPretrainer(encoder=record, tasks=tasks, heads={"reconstruction_head": head, "pooling": "mean"})
    decoder = [each for name, each in network.named_parameters() if name.startswith("decoder1.")]
    assert (bool(decoder) and all(each.requires_grad for each in decoder)) == whole


def test_steps_are_one_number_or_one_for_each_n():
    assert check(steps=70).steps_of(5) == 70
    assert check().steps_of(4) == 60
    with pytest.raises(InputError, match="no entry for n = 5"):
        check().steps_of(5)


def test_unknown_study_lists_the_known():
    with pytest.raises(InputError, match="no study nonsense.*demo, hippocampus, openkbp, openkbp_560"):
        read_study("nonsense")


def test_an_arm_may_have_the_name_of_a_task_that_is_no_row_of_the_ablation():
    named = {**CONTENT["arms"], "position": {"start": "network", "pretraining": {"tasks": ["position"]}}}
    assert list(check(arms=named, search=None).arms) == ["scratch", "pretrained", "position"]
    with pytest.raises(InputError, match="arm 'position' has the name of an ablation row"):
        check(arms=named, search=None, ablation={**CONTENT["ablation"], "subsets": [["position"]]})
    assert check(
        arms=named, search=None, ablation={**CONTENT["ablation"], "arm": "position", "subsets": [["position"]]}
    )


def test_the_tasks_and_the_head_are_those_of_the_preset():
    whole = {"scratch": {"pretraining": None}, "whole": {"start": "network", "pretraining": {}}}
    study = check(preset="whole_network", arms=whole, search=None, ablation=None)
    assert study.pretraining_of("whole")["tasks"] == ["inpainting", "contrast", "rotation", "position"]
    assert check().pretraining_of("pretrained")["tasks"] == ["inpainting", "contrast", "rotation"]
    assert check(pretraining={"tasks": ["contrast"]}).pretraining_of("pretrained")["tasks"] == ["contrast"]


HEADROOM = {"n": [2], "seeds": [0], "convergence": {"seeds": [9], "most": 200}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arms": arms(pretrained={"encoder": {}})}, "arms.pretrained.encoder is not a key.*now called pretraining"),
        (
            {"arms": arms(scratch={"start": "network"})},
            "arms.scratch.start is 'network', but scratch has no pre-training",
        ),
        (
            {"arms": arms(pretrained={"start": "decoder"})},
            "arms.pretrained.start 'decoder' must be 'encoder', 'network' or 'nothing'",
        ),
        (
            {"arms": arms(pretrained={"start": "nothing"})},
            "arms.pretrained carries no labels: start 'nothing' and masks_only need the entry 'propagation'",
        ),
        (
            {"arms": arms(pretrained={"masks_only": True})},
            "arms.pretrained carries no labels",
        ),
        (
            {"arms": arms(scratch={"propagation": {}})},
            "arms.scratch.propagation is set, but scratch has no pre-training",
        ),
        (
            {"arms": arms(pretrained={"propagation": {}})},
            "arms.pretrained.propagation needs a network that was pre-trained with the task position",
        ),
        (
            {"arms": arms(pretrained={"pretraining": {"tasks": ["position"]}, "propagation": {}, "masks_only": True})},
            "arms.pretrained has masks_only.*remove its start and finetuning",
        ),
        (
            {
                "arms": arms(
                    pretrained={
                        "pretraining": {"tasks": ["position"]},
                        "propagation": {"max_scans": 9},
                        "masks_only": True,
                    }
                )
            },
            "arms.pretrained has masks_only: every scored patient gets a mask. Remove propagation.max_scans",
        ),
        (
            {"arms": arms(pretrained={"pretraining": {"tasks": ["position"]}, "propagation": {"unlabelled": "x"}})},
            "arms.pretrained.propagation.unlabelled is set by the plan",
        ),
        (
            {"arms": arms(pretrained={"start": "network"})},
            "arms.pretrained.start is 'network', but its pre-training trains the encoder alone: tasks .*'vae'.*position",
        ),
        (
            {
                "arms": arms(
                    pretrained={
                        "start": "network",
                        "pretraining": {"tasks": ["contrast"], "reconstruction_head": "unet"},
                    }
                )
            },
            r"tasks \['contrast'\], reconstruction_head 'unet'",
        ),
        (
            {"arms": arms(pretrained={"start": "network", "pretraining": {"reconstruction_head": "unet"}})},
            r"ablation.arm is pretrained, whose start is 'network', but .* tasks \['contrast'\]",
        ),
        (
            {"arms": {**CONTENT["arms"], "floor": {"pretraining": {}}}},
            "arm 'floor' has the name of an arm of 'headroom'",
        ),
        (
            {"first_figure": ["liver", "kidney"]},
            "first_figure 'kidney' is not a label of the row. Did you mean left kidney",
        ),
        ({"first_figure": []}, r"first_figure \[\] must be a list of at least one value"),
        ({"first_figure": ["liver", "liver"]}, r"first_figure \['liver', 'liver'\] contains a value twice"),
        ({"headroom": {"n": [2], "seeds": [0], "floor": False, "ceiling": False}}, "headroom measures nothing"),
        (
            {"headroom": HEADROOM, "tuning": 0, "search": None},
            "headroom.convergence scores the tuning patients, but tuning is 0",
        ),
        (
            {"headroom": {**HEADROOM, "convergence": {"seeds": [9], "most": 99}}},
            "headroom.convergence.most 99 allows no doubling of the 50 steps with n = 2. Set at least 100",
        ),
        (
            {"headroom": {**HEADROOM, "convergence": {"seeds": [2], "most": 200}}},
            r"headroom.convergence.seeds \[2\] and curve.seeds \[0, 1, 2\] share 2: steps would be chosen on",
        ),
        (
            {"headroom": {"n": [2], "seeds": [9]}},
            r"search.seeds \[9\] and headroom.seeds \[9\] share 9",
        ),
        (
            {"headroom": {**HEADROOM, "convergence": {"seeds": [9], "most": 200, "gain": 0}}},
            "headroom.convergence.gain 0 must be greater than 0",
        ),
        ({"source": "ours"}, "source is not a key of a study"),
        ({"ablatoin": {}}, "ablatoin.*Did you mean ablation"),
        ({"curve": {"n": [2], "seed": [0]}}, "curve.seed is not a key.*Did you mean seeds"),
        ({"curve": {"n": [0], "seeds": [0]}}, r"curve.n\[0\] 0 must be greater than or equal to 1"),
        ({"curve": {"n": [2, 2], "seeds": [0]}}, r"curve.n \[2, 2\] contains a value twice"),
        ({"arms": {"scratch": {"pretraining": None}}}, "at least one arm with a pre-training"),
        ({"arms": {"scratch": {"pretraining": {}}, "pretrained": {"pretraining": {}}}}, "arms.scratch.pretraining"),
        (
            {"arms": {**CONTENT["arms"], "rotation": {"pretraining": {"tasks": ["rotation"]}}}},
            "arm 'rotation' has the name of an ablation row.*such as rotation_only",
        ),
        (
            {"arms": {**CONTENT["arms"], "contrast-rotation": {"pretraining": {}}}},
            "arm 'contrast-rotation' must be text of",
        ),
        ({"evaluation": {"amp": "no"}}, "evaluation.amp 'no' must be true or false"),
        ({"pretraining": {"amp_type": "fp8"}}, "pretraining.amp_type 'fp8' must be auto, bf16 or fp16"),
        (
            {"arms": arms(pretrained={"finetuning": {"amp": False}})},
            "arms.pretrained.finetuning has amp False.*same precision: set finetuning.amp",
        ),
        (
            {"search": {"n": 2, "seeds": [9], "grid": {"amp_type": ["bf16", "fp16"]}}},
            "search.grid has amp_type 'bf16'",
        ),
        ({"finetuning": {"max_steps": 9}}, "finetuning has max_steps 9.*set 'steps'"),
        (
            {"arms": arms(scratch={"finetuning": {"max_steps": 900}})},
            "arms.scratch.finetuning has max_steps 900.*same number of steps: set 'steps'",
        ),
        (
            {"search": {"n": 2, "seeds": [9], "grid": {"max_steps": [10, 20]}}},
            "search.grid has max_steps 10.*search.options.max_steps",
        ),
        (
            {
                "search": {
                    "n": 2,
                    "seeds": [9],
                    "recipes_of": {"scratch": [{"drop_path": 0.1}], "pretrained": [{"max_steps": 70}]},
                }
            },
            "search.recipes_of.pretrained has max_steps 70",
        ),
        (
            {"search": {"n": 2, "seeds": [9, 2], "grid": {"drop_path": [0, 0.1]}}},
            r"search.seeds \[9, 2\] and curve.seeds \[0, 1, 2\] share 2:.*other seeds",
        ),
        (
            {
                "search": {"n": 2, "seeds": [9], "grid": {"drop_path": [0, 0.1]}},
                "ablation": {**CONTENT["ablation"], "seeds": [8, 9]},
            },
            r"search.seeds \[9\] and ablation.seeds \[8, 9\] share 9",
        ),
        ({"finetuning": {"seed": 3}}, "finetuning.seed is set by the plan"),
        ({"task": "Task09_Spleen"}, "Task09_Spleen and row exclude each other"),
        ({"steps": 0}, "steps"),
        ({"preset": None}, "preset is missing"),
        ({"ablation": {"n": 2, "seeds": [0], "arm": "scratch"}}, "ablation.arm 'scratch'"),
        (
            {"ablation": {"n": 2, "seeds": [0], "arm": "pretrained", "subsets": [["colour"]]}},
            r"ablation.subsets\[0\]\[0\] 'colour' must be 'inpainting', 'contrast', 'rotation' or 'position'",
        ),
        (
            {"search": {"n": 2, "seeds": [0], "grid": {"learning_rate": 0.1}}},
            "search.grid.learning_rate 0.1 must be a list",
        ),
        (
            {"search": {"n": 2, "seeds": [0], "grid_of": {"scratch": {"warmup_steps": [1, 2, 3]}}}},
            "'scratch': 3, 'pretrained': 0",
        ),
        (
            {
                "search": {
                    "n": 2,
                    "seeds": [0],
                    "grid": {"drop_path": [0, 0.1]},
                    "recipes_of": {"scratch": [{"drop_path": 0.2}]},
                }
            },
            "'scratch': 3, 'pretrained': 2",
        ),
        (
            {"search": {"n": 2, "seeds": [0], "recipes_of": {"scratch": [{"seed": 1}]}}},
            r"search.recipes_of.scratch\[0\].seed is set by the plan",
        ),
        (
            {"search": {"n": 2, "seeds": [0], "recipes_of": {"scratch": {"drop_path": 1}}}},
            "search.recipes_of.scratch {'drop_path': 1} must be a list",
        ),
        ({"tuning": "4"}, "tuning '4' must be a valid integer"),
        ({"arms": arms(pretrained={"pretraining": False})}, "arms.pretrained.pretraining False must be entries"),
        ({"arms": arms(pretrained={"pretraining": []})}, r"arms.pretrained.pretraining \[\] must be entries"),
        ({"finetuning": {"roi_size": [64, 64]}}, r"finetuning.roi_size \[64, 64\] must be three whole numbers"),
        ({"pretraining": {"roi_size": 64}}, "pretraining.roi_size 64 must be three"),
        ({"row": {**CONTENT["row"], "roi_size": "64x64x32"}}, "row.roi_size '64x64x32' must be three"),
        ({"row": {**CONTENT["row"], "cpu": {"roi_size": [64, 64, 0]}}}, r"row.cpu.roi_size \[64, 64, 0\] must be"),
        (
            {"search": {"n": 2, "seeds": [9], "grid": {"roi_size": [[64, 64], [64, 64, 32]]}}},
            r"search.grid.roi_size \[64, 64\] must be three",
        ),
        ({"curve": {"n": [2], "seeds": [2**32]}}, r"curve.seeds\[0\] 4294967296 must be less than 4294967296"),
        ({"pretraining": {"tasks": None}}, "pretraining.tasks None must be a list of inpainting"),
        (
            {"arms": arms(pretrained={"pretraining": {"tasks": []}})},
            r"arms.pretrained.pretraining.tasks \[\] must be a list",
        ),
        ({"row": {**CONTENT["row"], "cases": 3}}, "row.cases 3 must be entries"),
        ({"finetuning": {"labels": {"0": "background"}}}, "finetuning.labels is set by the plan"),
        ({"tuning": -1}, "tuning -1 must be greater than or equal to 0"),
        ({"row": "abc"}, "row 'abc' must be entries"),
        ({"row": None, "task": 9}, "task 9 must be the name of a row of tasks.yaml"),
        ({"name": 5}, "name 5 must be"),
        (
            {"preset": "few_label"},
            "preset 'few_label' must be one that both bundles have: official, whole_network, cpu",
        ),
        ({"preset": "gpu"}, "preset 'gpu'.*official, whole_network, cpu"),
        ({"minutes": {"finetuning": "four"}}, "minutes.finetuning 'four' must be a valid number"),
        ({"synthetic": {"training": "many"}}, "synthetic.training 'many' must be a valid integer"),
        (
            {"curve": {"n": [2], "seeds": [0], "encoder_per_seed": "no"}},
            "curve.encoder_per_seed 'no' must be true or false",
        ),
        (
            {"ablation": {**CONTENT["ablation"], "encoder_per_seed": "no"}},
            "ablation.encoder_per_seed 'no' must be true or false",
        ),
        ({"ablation": {**CONTENT["ablation"], "paper": 5}}, "ablation.paper 5 must be a list"),
        ({"ablation": {**CONTENT["ablation"], "paper": [5]}}, r"ablation.paper\[0\] 5 must be entries"),
        ({"ablation": {**CONTENT["ablation"], "paper": [{"dice": 1}]}}, r"ablation.paper\[0\].tasks is missing"),
        (
            {"ablation": {**CONTENT["ablation"], "paper": [{"tasks": ["contrast"], "dice": "high"}]}},
            r"ablation.paper\[0\].dice 'high' must be a valid number",
        ),
        ({"ablation": {**CONTENT["ablation"], "subsets": 5}}, "ablation.subsets 5 must be a list"),
        (
            {"ablation": {**CONTENT["ablation"], "subsets": [[["contrast"]]]}},
            r"ablation.subsets\[0\]\[0\] \['contrast'\] must be 'inpainting'",
        ),
        ({"search": {"n": 2, "seeds": [0], "grid": {}}}, "the search tries nothing"),
        ({"search": {"n": 2, "seeds": [0], "grid": {"drop_path": []}}}, r"search.grid.drop_path \[\] must be a list"),
        (
            {"search": {"n": 2, "seeds": [0], "grid_of": {"scrach": {"drop_path": [1]}}}},
            "search.grid_of.scrach is not an arm. Did you mean scratch",
        ),
        ({"curve": {"n": [], "seeds": [0]}}, r"curve.n \[\] must be a list of at least one value"),
        ({"curve": 5}, "curve 5 must be entries"),
        ({"arms": {**CONTENT["arms"], 3: {"pretraining": {}}}}, "arms has the key 3: keys must be text"),
        ({"steps": {2: 50, 4: 0}}, "steps {2: 50, 4: 0} must be a whole number, 1 or more, or one for each n"),
        ({"steps": {}}, "steps {} must be a whole number"),
        ({"tuning": True}, "tuning True must be a valid integer"),
        ({"minutes": {"pretraining": 0}}, "minutes.pretraining 0 must be greater than 0"),
        ({"synthetic": {"seed": -1}}, "synthetic.seed -1 must be greater than or equal to 0"),
        (
            {
                "search": {
                    "n": 2,
                    "seeds": [0],
                    "grid": {"drop_path": [0.1, 0.2]},
                    "recipes_of": {"pretrained": [{"drop_path": 0.2}], "scratch": [{"drop_path": 0}]},
                }
            },
            "the search tries {'drop_path': 0.2} and {'drop_path': 0.2} for pretrained",
        ),
        (
            {"search": {"n": 2, "seeds": [0], "grid": {"drop_path": [0.1, 0.2, 0.1]}}},
            r"search.grid.drop_path \[0.1, 0.2, 0.1\] contains a value twice",
        ),
        (
            {"search": {"n": 2, "seeds": [0], "recipes_of": {arm: [{"drop_path": 1}] * 2 for arm in CONTENT["arms"]}}},
            "the search tries {'drop_path': 1} and {'drop_path': 1} for scratch",
        ),
        (
            {
                "search": {
                    "n": 2,
                    "seeds": [9],
                    "recipes_of": {
                        "scratch": [{"drop_path": 0.1}, {"drop_path": 0.2}],
                        "pretrained": [{"drop_path": 0.1}, {"drop_path": 0.1, "learning_rate": 0.02}],
                    },
                }
            },
            "the search tries {'drop_path': 0.1} and {'drop_path': 0.1, 'learning_rate': 0.02} for pretrained.*equal",
        ),
        (
            {"finetuning": {"feature_size": 24}},
            "finetuning has feature_size 24, pretraining 'none'.*pretraining.feature_size",
        ),
        (
            {"pretraining": {"window_size": 7}, "arms": arms(scratch={"finetuning": {"window_size": 4}})},
            "arms.scratch.finetuning has window_size 4, pretraining 7",
        ),
        (
            {"arms": arms(pretrained={"pretraining": {"depths": [1, 1, 1, 1]}})},
            r"arms.pretrained.pretraining has depths \[1, 1",
        ),
        (
            {"search": {"n": 2, "seeds": [0], "grid": {"feature_size": [12, 24]}}},
            "search.grid has feature_size 12.*pretraining.feature_size",
        ),
    ],
)
def test_mistakes_are_named(changes, words):
    with pytest.raises(InputError, match=words) as caught:
        check(**changes)
    assert "own.yaml" in str(caught.value)


def test_all_mistakes_of_types_are_named_at_once():
    with pytest.raises(InputError) as caught:
        check(tuning=-3, curve={"n": "8", "seeds": [0]}, ablatoin={})
    assert str(caught.value).startswith("own.yaml: ablatoin is not a key")
    with pytest.raises(InputError) as caught:
        check(tuning=-3, curve={"n": "8", "seeds": [0]})
    assert str(caught.value).splitlines() == [
        "own.yaml: curve.n '8' must be a list.",
        "own.yaml: tuning -3 must be greater than or equal to 0.",
    ]


def test_null_stands_for_the_default():
    study = check(tuning=None, evaluation=None, search=None, minutes={"pretraining": None, "finetuning": 2})
    assert (study.tuning, study.evaluation, study.search) == (0, {}, None)
    assert (study.minutes.pretraining, study.minutes.finetuning) == (10, 2)
    assert check(arms=arms(scratch={"finetuning": None})).arms["scratch"].finetuning == {}


def test_an_arm_may_repeat_the_network_of_the_pretraining():
    study = check(pretraining={"depths": [1, 1, 1, 1]}, arms=arms(scratch={"finetuning": {"depths": [1, 1, 1, 1]}}))
    assert study.network == {"depths": [1, 1, 1, 1]}
    assert check().network == {}


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "own.yaml").write_bytes("name: Schädel".encode("latin-1"))
    with pytest.raises(InputError, match="own.yaml is not UTF-8 text"):
        read_study(str(tmp_path / "own.yaml"))
