# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Fine-tuning from a whole network, through the command line: new parts first, rates by part, what has moved."""

from __future__ import annotations

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from .command_line import SMALL, kill_when, run_bundle, succeed


@pytest.fixture(scope="module")
def wider(tmp_path_factory, btcv):
    """The scans of BTCV with a class more than the network of the file has, so that its output layer starts anew."""
    folder = tmp_path_factory.mktemp("wider")
    for name in ("imagesTr", "labelsTr"):
        (folder / name).symlink_to(btcv / name)
    listed = json.loads((btcv / "dataset.json").read_text())
    listed["labels"] = {**listed["labels"], "14": "another"}
    (folder / "dataset.json").write_text(json.dumps(listed))
    return folder


@pytest.fixture(scope="module")
def options(segmenter, wider):
    return {
        **SMALL,
        "depths": None,
        "dataset_dir": wider,
        "fold": "all",
        "check_data": "headers",
        "labels": repr(json.loads((wider / "dataset.json").read_text())["labels"]),
        "pretrained_model": segmenter / "models" / "model.pt",
        "max_steps": 6,
        "new_parts_steps": 2,
        "warmup_steps": 1,
        "average_steps": 2,
        "encoder_lr_factor": 3.0,
    }


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, options):
    output = tmp_path_factory.mktemp("tuned")
    return output, succeed(run_bundle("swin_unetr_btcv_seg", "train.yaml", output_dir=output, **options))


def content(folder, name):
    return torch.load(folder / "models" / name, weights_only=True)


def test_only_the_new_output_layer_moves_first_and_then_all_parts(tuned):
    folder, output = tuned
    seen = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    seen.Reload()
    names = [name for name in seen.Tags()["scalars"] if name.startswith("weights_moved/distance/")]
    curves = {name.split("/")[-1]: [(e.step, e.value) for e in seen.Scalars(name)] for name in names}
    assert {len(curve) for curve in curves.values()} == {3} and len(curves) == 16
    first = {part: value for part, ((step, value), *_) in curves.items() if value}
    assert set(first) == {"out"} and first["out"] > 1e-4
    assert all(value > 1e-4 for _, (_, value), _ in curves.values())
    assert output.count("cosine between the weights at the start and now (median): swinViT ") == 3


def test_the_first_weights_saved_are_those_of_the_file_to_the_bit(tmp_path, options, segmenter):
    options = {**options, "max_steps": 3, "val_interval": 3, "average_steps": 1}  # the third step has a rate of 0
    succeed(run_bundle("swin_unetr_btcv_seg", "train.yaml", output_dir=tmp_path, **options))
    start, end = content(segmenter, "model.pt")["model"], content(tmp_path, "model.pt")["model"]
    assert {name for name in start if not torch.equal(start[name], end[name])} == {
        "out.conv.conv.weight",
        "out.conv.conv.bias",
    }


def test_rates_and_movement_are_in_the_record(tuned):
    last, trained = content(tuned[0], "last.pt"), content(tuned[0], "model.pt")["trained"]
    groups = last["optimizer"]["param_groups"]
    assert [group["initial_lr"] for group in groups] == pytest.approx([0.06] * 5 + [0.02] * 2)
    assert [group["starts_anew"] for group in groups] == [False] * 6 + [True]
    assert (trained["encoder_lr_factor"], trained["new_parts_steps"]) == (3.0, 2)
    assert trained["moved"] == last["counts"]["moved"]
    assert set(trained["moved"]["median_cosine"]) == {"swinViT", "rest"}


def test_a_killed_run_ends_as_the_unbroken_one_and_remembers_its_start(tmp_path, tuned, options):
    kill_when(
        "swin_unetr_btcv_seg", "train.yaml", appears=tmp_path / "models" / "last.pt", output_dir=tmp_path, **options
    )
    assert not (tmp_path / "models" / "model.pt").exists()
    output = succeed(run_bundle("swin_unetr_btcv_seg", "train.yaml", output_dir=tmp_path, resume=True, **options))
    assert "the run continues after step" in output
    one, other = content(tmp_path, "model.pt"), content(tuned[0], "model.pt")
    assert one["trained"]["moved"] == other["trained"]["moved"]
    assert one["trained"]["start_fingerprint"] == other["trained"]["start_fingerprint"]
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in other["model"])


def test_a_pre_training_records_its_movement(pretrained):
    moved = content(pretrained, "encoder.pt")["trained"]["moved"]
    assert {"swinViT.patch_embed", "swinViT.layers4", "rotation_head", "contrastive_head"} <= set(moved["distance"])
    assert all(value > 0 for value in moved["distance"].values())
