# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Ensembles consist of compatible models; scores that may be too high are warned about."""

from __future__ import annotations

import logging

import pytest
import torch

from bundles.common.data.list_fingerprint import fingerprint
from bundles.common.errors import InputError
from bundles.common.networks.swin_unetr import build_swin_unetr
from bundles.common.weights.checkpoint_file import save_atomically
from bundles.segmentation.models.ensemble import load_ensemble, model_files, warn_of_seen_cases, warn_of_unseen_mirrors

LABELS = {"0": "background", "1": "liver", "2": "spleen"}
PRESET = {"feature_size": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8], "window_size": 4}


@pytest.fixture
def save(tmp_path, record):
    """Write a model; its folder is its name."""

    def write(name: str, *, labels=LABELS, trained=None, seed=0, **change) -> str:
        torch.manual_seed(seed)
        made = record | change
        network = build_swin_unetr(made, out_channels=3)
        path = tmp_path / name / "models/model.pt"
        content = {"model": network.state_dict(), "encoder": made, "labels": labels, "trained": trained or {}}
        save_atomically({key: value for key, value in content.items() if value is not None}, path)
        return str(path)

    return write


def others(paths, **change):
    return load_ensemble(paths, **({"labels": LABELS, "asked": {}, "preset": PRESET, "expected": {}} | change))


@pytest.mark.parametrize(
    ("name", "value"), [("spacing", [3.0, 3.0, 3.0]), ("hu_window", [-100.0, 240.0]), ("foreground", -1000.0)]
)
def test_models_of_other_preprocessing_are_refused(save, name, value):
    shown = {"spacing": [1.5, 1.5, 2.0], "hu_window": [-175.0, 250.0], "foreground": 0.0}
    paths = [save("a", trained=shown), save("b", trained=shown | {name: value}), save("c")]
    with pytest.raises(InputError, match=rf"b/models/model\.pt was trained with {name} .*a/models/model\.pt with"):
        others(paths)
    assert len(others([paths[0], paths[0], paths[2]])) == 2  # other published files do not record it


def touch(folder, *names) -> list[str]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return [str(folder / name) for name in names]


def test_files_and_patterns_name_each_model_once_in_order(tmp_path, caplog):
    a, b, c = touch(tmp_path, "fold0/model.pt", "fold1/model.pt", "other [1].pt")
    assert model_files(a) == [a]
    assert not caplog.records
    with caplog.at_level(logging.INFO):
        assert model_files(str(tmp_path / "fold*/model.pt")) == [a, b]
    assert f"ensemble of 2 models: {a}, {b}" in caplog.text
    assert model_files([b, str(tmp_path / "fold*/model.pt"), c]) == [b, a, c]
    assert model_files(c) == [c]  # brackets are part of a name that exists


def test_a_file_that_is_not_there_is_named(tmp_path):
    (a,) = touch(tmp_path, "a.pt")
    with pytest.raises(InputError, match="--pretrained_model .*missing.pt does not exist"):
        model_files([a, str(tmp_path / "missing.pt")])
    with pytest.raises(InputError, match=r"fold\*/model.pt' fits no file"):
        model_files(str(tmp_path / "fold*/model.pt"), optional=True)
    with pytest.raises(InputError, match=r"\[\] names no file"):
        model_files([])
    # A bundle without weights can still be inspected.
    assert model_files(str(tmp_path / "model.pt"), optional=True) == [str(tmp_path / "model.pt")]
    with pytest.raises(InputError, match="missing.pt does not exist"):
        model_files([a, str(tmp_path / "missing.pt")], optional=True)


def test_all_but_the_first_are_built_each_as_its_file_says(save):
    paths = [save("a", seed=1), save("b", seed=2), save("c", seed=3, depths=[2, 1, 1, 1], merging="legacy")]
    networks = others(paths)
    assert len(networks) == 2 and not any(network.training for network in networks)
    for network, path in zip(networks, paths[1:], strict=True):
        stored = torch.load(path, weights_only=True)["model"]
        assert network.state_dict().keys() == stored.keys()
        assert all(torch.equal(tensor, stored[name]) for name, tensor in network.state_dict().items())
    assert len(networks[1].swinViT.layers1[0].blocks) == 2
    assert type(networks[0].swinViT.layers1[0].downsample) is not type(networks[1].swinViT.layers1[0].downsample)
    assert others(paths[:1]) == []


def test_other_labels_are_refused_with_both(save):
    paths = [save("a"), save("b", labels={"0": "background", "1": "spleen", "2": "liver"})]
    with pytest.raises(
        InputError, match=r"b/models/model.pt has the labels .*1: 'spleen'.*a/models/model.pt .*1: 'liver'"
    ):
        others(paths)
    # Values as numbers or text, and in any order, are the same labels; a file without labels is accepted.
    same = [save("a"), save("c", labels={2: "spleen", 1: "liver", 0: "background"}), save("d", labels=None)]
    assert len(others(same)) == 2


def test_another_number_of_channels_is_refused(save):
    paths = [save("a"), save("b", in_channels=4)]
    with pytest.raises(InputError, match="b/models/model.pt .*in_channels is 4 in the file, 1 requested"):
        others(paths, asked={"in_channels": 1, "feature_size": None})


def test_a_training_with_other_settings_is_warned_of(save, caplog):
    expected = {"spacing": [1.5, 1.5, 2.0], "hu_window": [-175.0, 250.0]}
    paths = [save("a"), save("b", trained={"spacing": [1.0, 1.0, 1.0], "hu_window": [-175.0, 250.0]})]
    with caplog.at_level(logging.WARNING):
        others(paths, expected=expected)
    assert [record.getMessage() for record in caplog.records] == [
        f"{paths[1]} was trained with spacing 1.0, 1.0, 1.0; this run uses 1.5, 1.5, 2.0"
    ]


SCORED = [{"image": "/data/imagesTr/a.nii.gz"}, {"image": "/data/imagesTr/b.nii.gz"}]
HELD_OUT = {"validation_scans": fingerprint(SCORED)}
OTHERS = {"validation_scans": fingerprint(SCORED[:1])}


@pytest.mark.parametrize(
    ("trainings", "section", "warned"),
    [
        ([HELD_OUT], "validation", 0),
        ([HELD_OUT, HELD_OUT], "validation", 0),
        ([OTHERS], "validation", 1),  # another list or split than the training's
        ([HELD_OUT, OTHERS], "validation", 1),  # folds
        ([OTHERS, OTHERS], "all", 2),
        ([HELD_OUT, OTHERS], "test", 0),
        ([{}], "validation", 0),  # model_split warns of it
        ([HELD_OUT, None], "validation", 1),
    ],
)
def test_scores_on_cases_that_a_model_did_not_hold_out_are_warned_of(tmp_path, caplog, trainings, section, warned):
    paths = [str(tmp_path / f"fold{number}.pt") for number in range(len(trainings))]
    for path, trained in zip(paths, trainings, strict=True):
        save_atomically({"model": {}} | ({} if trained is None else {"trained": trained}), path)
    warn_of_seen_cases(paths, section=section, scans=SCORED)
    assert len(caplog.records) == warned
    for path, trained in zip(paths, trainings, strict=True):
        assert (f"{path} held out other cases" in caplog.text) == (warned > 0 and trained != HELD_OUT)


@pytest.mark.parametrize(
    ("augmentation", "axes", "warned"),
    [
        ({"flip": 0.0}, [0], True),
        ({}, [0], True),
        ({"flip": 0.2}, [0], False),
        ({"flip": 0.0}, [], False),
        ({"flip": [0.5, 0.0, 0.0]}, [0], False),
        ({"flip": [0.5, 0.0, 0.0]}, [0, 2], True),
        (None, [0], False),
    ],
)
def test_mirrors_that_the_training_never_saw_are_warned_of(tmp_path, caplog, augmentation, axes, warned):
    path = tmp_path / "model.pt"
    save_atomically({"model": {}, "trained": {} if augmentation is None else {"augmentation": augmentation}}, path)
    warn_of_unseen_mirrors([str(path)], mirror_axes=axes)
    assert ("was trained without flips" in caplog.text) == warned


def test_a_pattern_that_fits_several_files_of_one_run_is_refused(tmp_path):
    touch(tmp_path, "a/models/model.pt", "a/models/best.pt", "a/models/last.pt", "b/models/model.pt")
    with pytest.raises(InputError, match=r"fits best.pt, last.pt and model.pt of one run \(.*/a/models\)"):
        model_files(str(tmp_path / "*/models/*.pt"))
    assert len(model_files(str(tmp_path / "*/models/model.pt"))) == 2
