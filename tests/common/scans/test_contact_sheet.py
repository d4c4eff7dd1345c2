# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Contact sheets hold every scan, forty a page, and have the same bytes every time."""

from __future__ import annotations

import warnings

import numpy as np
from matplotlib.image import imread

from bundles.common.scans.contact_sheet import CAPTION, COLUMNS, PER_PAGE, SIDE, write_sheets


def scans(number: int) -> list[tuple[str, str, np.ndarray]]:
    return [(f"scan {i}", "too coarse: $5 mm", np.full((SIDE, 3 * SIDE), 100 + i, np.uint8)) for i in range(number)]


def test_pages_are_full_but_for_the_last(tmp_path):
    paths = write_sheets(tmp_path, scans(PER_PAGE + 3), stem="contact_sheet")
    assert [path.name for path in paths] == ["contact_sheet_001.png", "contact_sheet_002.png"]
    assert sorted(tmp_path.iterdir()) == paths  # nothing else is left


def test_every_scan_is_at_its_place_pixel_by_pixel(tmp_path):
    (path,) = write_sheets(tmp_path, scans(7), stem="contact_sheet")
    page = np.rint(imread(path)[:, :, 0] * 255).astype(int)
    for place in range(7):
        top = 24 + place // COLUMNS * (SIDE + CAPTION) + CAPTION
        left = place % COLUMNS * (3 * SIDE + 8)
        assert np.unique(page[top : top + SIDE, left : left + 3 * SIDE]).tolist() == [100 + place]


def test_names_and_remarks_are_written_above(tmp_path):
    (path,) = write_sheets(tmp_path, scans(1), stem="contact_sheet", colour="red")
    caption = imread(path)[24 : 24 + CAPTION, : 3 * SIDE, :3]
    assert (caption.min(axis=2) < 0.5).sum() > 50
    assert ((caption[:, :, 0] > 0.9) & (caption[:, :, 1] < 0.5)).sum() > 20


def test_the_same_scans_give_the_same_bytes(tmp_path):
    first, second = (write_sheets(tmp_path / folder, scans(3), stem="sheet")[0].read_bytes() for folder in "ab")
    assert first == second


def test_no_scans_give_no_page(tmp_path):
    assert write_sheets(tmp_path, [], stem="contact_sheet") == []


def test_names_in_any_script_and_of_any_length(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_sheets(tmp_path, [("肺 Müller " * 20, "", np.zeros((SIDE, 3 * SIDE), np.uint8))], stem="sheet")


def test_pages_of_an_earlier_run_are_removed_and_no_other_file(tmp_path):
    others = [tmp_path / name for name in ("sheet_old.png", "sheet_12.png", "sheet_001_mine.png", "my_sheet_003.png")]
    for path in (*others, tmp_path / "sheet_1000.png"):
        path.write_bytes(b"")
    assert len(write_sheets(tmp_path, scans(2 * PER_PAGE + 1), stem="sheet")) == 3
    first = write_sheets(tmp_path, scans(1), stem="sheet")
    assert sorted(tmp_path.iterdir()) == sorted([*first, *others])
