# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The thumbnail of a carried label shows the organs, and not the air of a wide scan."""

from __future__ import annotations

import numpy as np

from bundles.common.scans.reading import Volume
from bundles.segmentation.propagation.fusion import IGNORE
from bundles.segmentation.propagation.one_scan import PICTURE_MARGIN, Recipe, _box_around, _write_picture
from bundles.segmentation.propagation.registration import RegistrationOptions


def test_the_box_is_that_of_the_organs_and_a_margin_within_the_scan():
    organs = np.zeros((100, 40, 50), bool)
    organs[40:60, 5:10, 44:48] = True
    spacing = (2.0, 4.0, 5.0)
    across, up, along = (int(PICTURE_MARGIN / size) for size in (2.0, 5.0, 5.0))
    assert _box_around(organs, spacing) == [[40 - across, 60 + across], [0, 10 + 8], [44 - along, 50]]
    assert _box_around(np.zeros_like(organs), spacing) == []


def test_organs_fill_the_picture_of_a_wide_scan_and_unknown_voxels_do_not_count(tmp_path):
    label = np.zeros((200, 200, 40), np.uint8)
    label[90:110, 95:105, 15:25] = 1
    label[0:3, 0:3] = IGNORE
    recipe = Recipe(registration=RegistrationOptions(), labels={1: "liver"})
    scan = Volume(np.zeros(label.shape, np.float32), np.diag([2.0, 2.0, 2.0, 1.0]))
    _write_picture(tmp_path / "a.npy", scan, label, recipe)
    picture = np.load(tmp_path / "a.npy")
    coloured = (picture.max(axis=2) - picture.min(axis=2) > 0)[:, :96]  # axial
    # 20 of 20 + 2 * 15 voxels across: more than a third of the width; of the whole scan it would be a tenth.
    columns = np.flatnonzero(coloured.any(axis=0))
    assert 0.35 * 96 < len(columns) < 0.45 * 96
