# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
from __future__ import annotations

from bundles.common.data.list_fingerprint import fingerprint
from bundles.pretraining.results.seen_scans import warn_of_seen_scans


def scans(folder, *names: str) -> list[dict]:
    for name in names:
        (folder / name).write_text(name)
    return [{"image": str(folder / name)} for name in names]


def test_scans_that_the_training_did_not_hold_out_are_told(tmp_path, caplog):
    trained = {"validation_scans": fingerprint(scans(tmp_path, "a.nii", "b.nii"))}
    warn_of_seen_scans("model.pt", trained=trained, section="validation", scans=scans(tmp_path, "a.nii", "b.nii"))
    warn_of_seen_scans("model.pt", trained=trained, section="training", scans=scans(tmp_path, "c.nii"))
    warn_of_seen_scans("model.pt", trained={}, section="validation", scans=scans(tmp_path, "c.nii"))
    assert not caplog.messages
    warn_of_seen_scans("model.pt", trained=trained, section="validation", scans=scans(tmp_path, "c.nii"))
    assert "model.pt held out other scans (2) than the 1 scored here" in caplog.text
