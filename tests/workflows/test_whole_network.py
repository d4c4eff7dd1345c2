# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Pre-training of encoder and decoder by all four tasks, and what the segmentation bundles take from it."""

from __future__ import annotations

import json

import pytest
import torch

from .command_line import SMALL, kill_when, run_bundle, succeed

ALL = {**SMALL, "roi_size": "[64,64,32]", "tasks": "['inpainting','contrast','rotation','position']"}
ALL |= {"reconstruction_head": "unet", "masked_only": True, "max_steps": 4}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, unlabelled):
    output = tmp_path_factory.mktemp("whole")
    text = succeed(run_bundle("swin_unetr_pretrain", "train.yaml", dataset_dir=unlabelled, output_dir=output, **ALL))
    return output, text


def test_the_run_ends_with_the_encoder_the_network_and_the_verdict(whole):
    output, text = whole
    encoder, network, model = (
        torch.load(output / "models" / f"{name}.pt", weights_only=True) for name in ("encoder", "network", "model")
    )
    assert set(encoder["state_dict"]) < set(network["state_dict"]) < set(model["model"])
    parts = {name.split(".")[0] for name in network["state_dict"]}
    decoder = {f"encoder{i}" for i in (1, 2, 3, 4, 10)} | {f"decoder{i}" for i in (1, 2, 3, 4, 5)}
    assert parts == {"swinViT", *decoder, "position_head"}
    assert all(torch.equal(tensor, model["model"][name]) for name, tensor in network["state_dict"].items())
    assert network["encoder"] == encoder["encoder"] == model["encoder"]
    report = json.loads((output / "validation.json").read_text())
    assert set(report["verdicts"]) == {"inpainting", "contrast", "rotation", "position"}
    assert not report["verdicts"]["inpainting"]["learnt"]  # four steps
    last = text.strip().splitlines()[-1]
    assert "This pre-training did not learn" in last and "inpainting" in last
    assert report["position_mm"] == pytest.approx(sum(report[f"position_mm_{axis}"] for axis in "xyz") / 3)
    assert report["effective_rank"] >= 1 and report["position_mm_of_a_constant"] > 10
    assert (output / "panel_position.png").stat().st_size > 5000


def test_an_evaluation_repeats_the_validation(tmp_path, whole, unlabelled):
    output, _ = whole
    options = {"dataset_dir": unlabelled, "pretrained_model": output / "models" / "model.pt", "output_dir": tmp_path}
    succeed(run_bundle("swin_unetr_pretrain", "evaluate.yaml", **options))
    evaluation, validation = (
        json.loads(file.read_text()) for file in (tmp_path / "evaluation.json", output / "validation.json")
    )
    assert evaluation.keys() == validation.keys()
    # model.pt has the weights of the best validation, which need not be the last
    best = torch.load(output / "models" / "model.pt", weights_only=True)["trained"]["score"]["loss"]
    assert evaluation["loss"] == pytest.approx(best, rel=1e-4)
    assert (tmp_path / "panel_position.png").exists()


def test_a_killed_run_resumes_to_the_weights_of_the_unbroken_one(tmp_path, whole, unlabelled):
    options = {**ALL, "dataset_dir": unlabelled, "output_dir": tmp_path}
    kill_when("swin_unetr_pretrain", "train.yaml", appears=tmp_path / "models" / "last.pt", **options)
    assert not (tmp_path / "models" / "model.pt").exists()
    assert "the run continues after step 2" in succeed(
        run_bundle("swin_unetr_pretrain", "train.yaml", resume=True, **options)
    )
    unbroken, resumed = (torch.load(run / "models" / "last.pt", weights_only=True) for run in (whole[0], tmp_path))
    assert unbroken["step"] == resumed["step"] == 4
    assert all(torch.equal(tensor, resumed["network"][name]) for name, tensor in unbroken["network"].items())


@pytest.mark.parametrize("bundle", ["swin_unetr_btcv_seg", "swin_unetr_msd"])
def test_both_segmentation_bundles_take_all_but_the_last_layer(tmp_path, whole, btcv, spleen, bundle):
    data = (
        {"dataset_dir": btcv} if bundle == "swin_unetr_btcv_seg" else {"dataset_dir": spleen, "task": "Task09_Spleen"}
    )
    options = {"preset": "cpu", "roi_size": "[64,64,32]", "max_steps": 1, "val_interval": 1, "output_dir": tmp_path}
    network = whole[0] / "models" / "network.pt"
    text = succeed(run_bundle(bundle, "train.yaml", pretrained_model=network, **data, **options))
    start = torch.load(tmp_path / "models" / "model.pt", weights_only=True)["trained"]["start"]
    assert sorted(start["missing"]) == ["out.conv.conv.bias", "out.conv.conv.weight"]
    assert sorted(start["left_over"]) == ["position_head.conv.conv.bias", "position_head.conv.conv.weight"]
    shares = {module: row["per_cent"] for module, row in start["modules"].items()}
    assert shares.pop("out") == 0 and shares["all"] >= 99
    assert all(share == 100 for module, share in shares.items() if module != "all")
    (line,) = [line.split() for line in text.splitlines() if line.startswith("all ")]
    assert float(line[-1]) == shares["all"]  # in the log, too


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"crops_per_volume": 1}, "--crops_per_volume 1: the task position compares crops of one scan"),
        ({"depths": "[1,1,1]", "num_heads": "[1,2,4]"}, "--depths [1, 1, 1] must be four whole numbers"),
        ({"mask_block": "[0.01,0.2]"}, "is too small for --mask_block [0.01, 0.2]"),
        ({"amp": True}, "--amp true needs a GPU, but this run is on cpu"),
        ({"reconstruction_head": "segnet"}, "--reconstruction_head 'segnet' is not one of vae"),
        ({"mask_rule": "some"}, "--mask_rule 'some' is not one of official, covered"),
        ({"intensity_change": 1.5}, "--intensity_change 1.5 must be a number"),
        ({"select_by": "position_mm", "tasks": "['rotation']"}, "--select_by position_mm belongs to position"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(tmp_path, unlabelled, options, words):
    run = run_bundle(
        "swin_unetr_pretrain", "train.yaml", dataset_dir=unlabelled, output_dir=tmp_path, **{**ALL, **options}
    )
    assert run.returncode == 1
    assert words in run.stderr[run.stderr.rindex("Stopped:") :] and "Traceback" not in run.stderr


def test_a_network_without_inpainting_has_nothing_to_reconstruct(tmp_path, unlabelled):
    options = {**ALL, "tasks": "['position']", "max_steps": 2, "dataset_dir": unlabelled, "output_dir": tmp_path}
    succeed(run_bundle("swin_unetr_pretrain", "train.yaml", **options))
    report = json.loads((tmp_path / "validation.json").read_text())
    assert set(report["verdicts"]) == {"position"} and "masked_psnr" not in report
    model = tmp_path / "models" / "model.pt"
    run = run_bundle(
        "swin_unetr_pretrain",
        "inference.yaml",
        dataset_dir=unlabelled,
        pretrained_model=model,
        output_dir=tmp_path / "i",
    )
    assert run.returncode == 1
    assert "was trained on position, without inpainting" in run.stderr[run.stderr.rindex("Stopped:") :]
