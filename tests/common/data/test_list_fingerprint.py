# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Equal data have equal fingerprints wherever they lie; another scan, order or name changes it."""

from __future__ import annotations

from bundles.common.data.list_fingerprint import fingerprint

SCANS = [{"image": "/data/ct/site_a/1.nii.gz"}, {"image": ["/data/ct/site_b/2.nii.gz", "/data/ct/site_b/3.nii.gz"]}]


def test_the_folder_may_move_and_labels_do_not_matter():
    moved = [{"image": "/mnt/x/site_a/1.nii.gz", "label": "y"}, {"image": ["/mnt/x/site_b/2.nii.gz", "/z"]}]
    assert fingerprint(SCANS) == fingerprint(moved)
    assert fingerprint(SCANS)["number"] == 2


def test_other_scans_differ():
    others = [SCANS[:1], SCANS[::-1], [SCANS[0], {"image": "/data/ct/site_c/2.nii.gz"}]]
    assert len({fingerprint(scans)["sha256"] for scans in [SCANS, *others]}) == 4
