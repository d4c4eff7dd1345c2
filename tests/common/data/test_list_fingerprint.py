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
    assert len({fingerprint(scans)["names_and_sizes"] for scans in [SCANS, *others]}) == 4


def test_a_flat_folder_may_move_too_and_other_files_of_the_same_names_differ(tmp_path):
    def scans(folder: str, sizes: list[int]) -> list[dict]:
        for number, size in enumerate(sizes):
            path = tmp_path / folder / f"case_{number}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes(size))
        return [{"image": str(path)} for path in sorted((tmp_path / folder).iterdir())]

    first = scans("data", [5, 7])
    assert fingerprint(first) == fingerprint(scans("elsewhere/renamed", [5, 7]))
    assert fingerprint(first) != fingerprint(scans("of another site", [5, 8]))
    assert fingerprint(first[:1]) == fingerprint(scans("one", [5]))
    assert fingerprint([])["number"] == 0
