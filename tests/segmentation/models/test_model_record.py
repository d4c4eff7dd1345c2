# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""What a model started from, and whether it held out the scored cases, is read from its file; else None."""

from __future__ import annotations

import pytest

from bundles.common.data.list_fingerprint import fingerprint
from bundles.common.networks.swin_unetr import build_swin_unetr
from bundles.common.weights.checkpoint_file import save_atomically
from bundles.common.weights.loading import encoder_state
from bundles.common.weights.start_weights import load_start_weights
from bundles.segmentation.models.model_record import model_facts

SCANS = [{"image": f"/data/imagesTr/spleen_{number}.nii.gz"} for number in (2, 7)]


@pytest.fixture
def network(record):
    return build_swin_unetr(record, out_channels=2)


def trained_from(network, record, path, **start):
    """A model.pt as written by a training."""
    report = load_start_weights(network, **{"pretrained_encoder": None, "pretrained_model": None, **start})
    trained = {"start": report, "validation_scans": fingerprint(SCANS), "preset": "cpu", "steps": 5}
    save_atomically({"model": network.state_dict(), "encoder": record, "trained": trained}, path)
    return str(path)


def test_a_model_from_scratch_from_an_encoder_and_from_a_whole_model_are_told_apart(tmp_path, network, record):
    encoder = str(tmp_path / "encoder.pt")
    save_atomically({"state_dict": encoder_state(network), "encoder": record}, encoder)
    scratch = trained_from(network, record, tmp_path / "scratch.pt")
    finetuned = trained_from(network, record, tmp_path / "finetuned.pt", pretrained_encoder=encoder)
    continued = trained_from(network, record, tmp_path / "continued.pt", pretrained_model=scratch)
    facts = model_facts([scratch, finetuned, continued], scans=SCANS)
    assert [(fact["start"], fact["start_file"]) for fact in facts] == [
        ("scratch", None),
        ("encoder", encoder),
        ("model", scratch),
    ]
    assert facts[0] == {
        "file": scratch,
        "start": "scratch",
        "start_file": None,
        "held_out": True,
        "preset": "cpu",
        "steps": 5,
    }


def test_other_cases_than_those_held_out_are_told(tmp_path, network, record):
    model = trained_from(network, record, tmp_path / "model.pt")
    moved = [{"image": scan["image"].replace("/data", "/elsewhere")} for scan in SCANS]
    assert model_facts([model], scans=moved)[0]["held_out"] is True
    assert model_facts([model], scans=SCANS[:1])[0]["held_out"] is False


def test_what_a_file_does_not_say_is_left_open(tmp_path, network):
    save_atomically(network.state_dict(), tmp_path / "published.pt")
    (facts,) = model_facts([str(tmp_path / "published.pt")], scans=SCANS)
    assert facts["start"] is facts["held_out"] is facts["steps"] is None
