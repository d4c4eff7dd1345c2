# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Consistency of all configs: properties required by MONAI, one preprocessing per bundle, one meaning per name."""

from __future__ import annotations

import pytest
import yaml
from monai.bundle import ConfigParser, ConfigWorkflow

from bundles.common.run.options import option_names
from bundles.pretraining.network import ASSUMED_IF_NOT_RECORDED

from .command_line import BUNDLES

NAMES = ["swin_unetr_btcv_seg", "swin_unetr_msd", "swin_unetr_pretrain"]
WORKFLOWS = ["evaluate", "inference", "train"]
CONFIGS = sorted(path for bundle in NAMES for path in (BUNDLES / bundle / "configs").glob("*.yaml"))
SHARED = [
    *WORKFLOWS,
    "multi_gpu_train",
    "multi_gpu_evaluate",
    "export_onnx",
    "export_pt2",
    "inference_trt",
    "propagate",
]


def config(bundle: str, name: str) -> dict:
    return yaml.safe_load((BUNDLES / bundle / "configs" / f"{name}.yaml").read_text())


def test_every_config_is_known_to_these_tests():
    found = {str(path.relative_to(BUNDLES)) for path in CONFIGS}
    expected = {
        f"{bundle}/configs/{name}.yaml"
        for bundle in NAMES
        for name in [*WORKFLOWS, "multi_gpu_train", "multi_gpu_evaluate", "presets"]
    }
    pretrain = {f"swin_unetr_pretrain/configs/{name}.yaml" for name in ("convert", "prepare", "collections")}
    msd = {f"swin_unetr_msd/configs/{name}.yaml" for name in ("results", "submit")}
    tasks = {f"{bundle}/configs/tasks.yaml" for bundle in NAMES[:2]}
    exports = {
        f"{bundle}/configs/{name}.yaml"
        for bundle in NAMES[:2]
        for name in ("export_onnx", "export_pt2", "inference_trt", "propagate")
    }
    assert found == expected | pretrain | msd | tasks | exports
    assert len(found) == 33


@pytest.mark.parametrize("bundle", NAMES)
@pytest.mark.parametrize("name", WORKFLOWS)
def test_properties_that_monai_demands_are_there(bundle, name, monkeypatch, btcv, pretrained, segmenter):
    folder = BUNDLES / bundle
    monkeypatch.syspath_prepend(str(folder))
    forget_scripts(monkeypatch)
    model = (pretrained if bundle == "swin_unetr_pretrain" else segmenter) / "models" / "model.pt"
    options = {"bundle_root": str(folder), "preset": "cpu", "dataset_dir": str(btcv), "roi_size": [64, 64, 32]}
    if name == "train":
        options |= {"task": "Task09_Spleen"} if bundle == "swin_unetr_msd" else {}
        workflow = ConfigWorkflow(str(folder / "configs" / "train.yaml"), workflow_type="train", **options)
    else:
        if name == "inference":
            options["dataset_dir"] = str(btcv / "imagesTr")
        options["pretrained_model"] = str(model)
        workflow = ConfigWorkflow(str(folder / "configs" / f"{name}.yaml"), workflow_type="infer", **options)
    workflow.initialize()
    assert workflow.check_properties() == []
    forget_scripts(monkeypatch)


def forget_scripts(monkeypatch) -> None:
    """Unload the package ``scripts``, as MONAI Label does, because each bundle has its own."""
    import sys

    for module in [module for module in sys.modules if module.split(".")[0] == "scripts"]:
        monkeypatch.delitem(sys.modules, module)


@pytest.mark.parametrize(
    ("preset", "plane", "fills", "head", "pooling", "encoder_parameters"),
    [
        ("official", "official", ["noise", "sample"], "_EarlyProjection", "token", 8_062_002),
        ("paper", "axial", ["zero"], "ConvTranspose3d", "normalised_mean", 8_062_002),
        ("cpu", "axial", ["noise"], "_EarlyProjection", "normalised_mean", None),
    ],
)
def test_presets_of_the_pre_training_build_what_they_stand_for(
    preset, plane, fills, head, pooling, encoder_parameters, monkeypatch
):
    folder = BUNDLES / "swin_unetr_pretrain"
    monkeypatch.syspath_prepend(str(folder))
    forget_scripts(monkeypatch)
    parser = ConfigParser(ConfigParser.load_config_file(str(folder / "configs" / "train.yaml")))
    parser.update({"bundle_root": str(folder), "preset": preset})
    network, views = parser.get_parsed_content("network_def"), parser.get_parsed_content("views")
    assert (views.plane, views.mask_fill) == (plane, fills)
    assert (type(network.conv).__name__, network.pooling) == (head, pooling)
    if encoder_parameters is not None:
        assert sum(p.numel() for p in network.swinViT.parameters()) == encoder_parameters
    plan = parser.get_parsed_content("plan")
    assert plan["steps"] >= parser.get_parsed_content("max_steps")
    forget_scripts(monkeypatch)


def test_what_an_evaluation_takes_for_untold_is_what_train_yaml_has():
    train = config("swin_unetr_pretrain", "train")
    for name, value in ASSUMED_IF_NOT_RECORDED.items():
        if name == "task_weights":
            assert value == {} and set(train[name].values()) == {1.0}  # tasks that are not named have weight 1
        else:
            assert train[name] in (value, f"$@values['{name}']")


@pytest.mark.parametrize("bundle", NAMES)
def test_preprocessing_is_equal_in_train_evaluate_and_inference(bundle):
    train, evaluate, inference = (config(bundle, name) for name in ("train", "evaluate", "inference"))
    loading = evaluate["preprocessing"]["transforms"][0]
    assert loading["_target_"] == "scripts.common.scans.decode_once.LoadScand"  # the grid of the checks
    loading.pop("used_again", None)
    assert train["preprocessing"] == evaluate["preprocessing"]
    inference["preprocessing"]["transforms"][0].pop("used_again", None)
    assert on_image_alone(inference["preprocessing"]) == on_image_alone(train["preprocessing"])
    # the evaluation of a pre-training takes the HU window recorded in the model file, which is that of its training
    inferred = inference["hu_window"]
    if bundle == "swin_unetr_pretrain":
        assert evaluate["hu_window"] == inferred == "$@values['hu_window']"
        evaluated = inferred = ASSUMED_IF_NOT_RECORDED["hu_window"]
    else:
        evaluated = evaluate["hu_window"]
    assert train["hu_window"] == evaluated == inferred


def on_image_alone(preprocessing: dict) -> list[dict]:
    """Steps without their handling of labels, and with class names instead of full paths."""
    steps = []
    for step in preprocessing["transforms"]:
        of_labels = ("allow_missing_keys", *(["labels"] if step["_target_"].endswith("LoadScand") else []))
        step = {key: value for key, value in step.items() if key not in of_labels}
        if step.get("keys") == ["image", "label"]:
            step["keys"] = "image"
            step |= {"mode": step["mode"][0]} if "mode" in step else {}
        steps.append(step | {"_target_": step["_target_"].split(".")[-1]})
    return steps


@pytest.mark.parametrize("bundle", NAMES[:2])
def test_segmentation_bundles_have_the_same_workflows(bundle):
    for name in SHARED:
        assert (
            BUNDLES / bundle / "configs" / f"{name}.yaml"
        ).resolve() == BUNDLES / f"segmentation/configs/{name}.yaml"


def test_a_new_option_costs_its_line_and_its_use_and_is_a_setting(monkeypatch):
    """As zoom: below ``components`` it is used, and nothing else in the configs names it."""
    folder = BUNDLES / "swin_unetr_btcv_seg"
    lines = [line for line in (folder / "configs/train.yaml").read_text().splitlines() if "zoom" in line.split("#")[0]]
    assert [line.split("  #")[0] for line in lines] == ["zoom: 0.15", "  zoom: '@zoom'"]
    monkeypatch.syspath_prepend(str(folder))
    forget_scripts(monkeypatch)
    parser = ConfigParser(ConfigParser.load_config_file(str(folder / "configs/train.yaml")))
    parser.update({"bundle_root": str(folder), "preset": "cpu", "zoom": 0.3})
    assert parser.get_parsed_content("augment").ranges.zoom == 0.3
    options = __import__("scripts.common.run.options", fromlist=["option_names"])
    assert "zoom" in set(options.option_names(parser.config)) - options.NOT_SETTINGS
    forget_scripts(monkeypatch)


#: Options that say all by their name, or that the comment of the line above covers.
SELF_EXPLANATORY = {
    "bundle_root",
    "output_dir",
    "weight_decay",
    "in_channels",
    "folds",
    "seed",
    "depths",
    "num_heads",
    "window_size",
}


def test_every_option_has_a_comment():
    for path in CONFIGS:
        if path.stem not in WORKFLOWS:
            continue
        names = set(option_names(yaml.safe_load(path.read_text())))
        lines = [line for line in path.read_text().splitlines() if line.partition(":")[0] in names]
        without = {line.partition(":")[0] for line in lines if "  # " not in line}
        if path.parts[-3] == "swin_unetr_pretrain":
            without -= set(option_names(config("swin_unetr_pretrain", "train")))  # explained in train.yaml
        assert without <= SELF_EXPLANATORY, f"{path}: {without}"


@pytest.mark.parametrize("bundle", NAMES)
def test_presets_say_where_their_numbers_come_from(bundle):
    path = BUNDLES / bundle / "configs" / "presets.yaml"
    presets = ConfigParser.load_config_file(str(path))
    assert next(iter(presets)) == "official"
    assert "cpu" in presets
    official = path.read_text().split("\nofficial:")[1].split("\ncpu:")[0].split("\npaper:")[0]
    unsourced = [line for line in official.splitlines() if line.startswith("  ") and "#" not in line]
    assert {line.split(":")[0].strip() for line in unsourced} <= {
        "cache_num",
        "num_workers",
        "log_every",
        "gradient_checkpointing",
    }
