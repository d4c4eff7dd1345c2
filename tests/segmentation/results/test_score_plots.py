# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Every case is a dot at its score in its organ's row, and the number of cases is shown."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bundles.segmentation.results.score_plots import score_figure

NAN = math.nan


def row(case: int, organ: str, dice: float, hd95: float) -> dict:
    return {"case": f"c{case}", "label": organ, "dice": dice, "nsd": dice / 2, "hd95": hd95}


ROWS = [
    *(row(case, "liver", 0.9 - 0.1 * case, 2.0 + case) for case in range(5)),
    row(0, "spleen", 0.8, 3.0),
    row(1, "spleen", 0.0, NAN),  # in one mask only
    row(2, "spleen", NAN, NAN),  # in neither
    row(0, "gallbladder", NAN, NAN),
    row(0, "pancreas", 0.7, 150.0),
    row(0, "not asked for", 0.1, 400.0),
]
ORGANS = ["liver", "spleen", "gallbladder", "pancreas"]


def dots_of(panel) -> list[np.ndarray]:
    """Scores and heights of the dots of each organ, from the top."""
    return [line.get_xydata() for line in panel.lines if line.get_marker() == "o"]


def test_each_case_is_a_dot_in_the_row_of_its_organ():
    panels = score_figure(ROWS, organs=ORGANS).axes
    for panel, metric in zip(panels, ("dice", "nsd", "hd95"), strict=True):
        dots = dots_of(panel)
        assert len(dots) == len(ORGANS)
        for place, (organ, drawn) in enumerate(zip(ORGANS, dots, strict=True)):
            scores = [r[metric] for r in ROWS if r["label"] == organ and not math.isnan(r[metric])]
            assert drawn[:, 0].tolist() == scores
            assert (abs(drawn[:, 1] - place) <= 0.3).all()  # within the box
            left, right = panel.get_xlim()
            assert all(left < score < right for score in scores)
    assert panels[0].get_ylim() == (3.5, -0.5)  # the first organ at the top


def test_numbers_of_cases_stand_below_the_organs_and_missed_ones_beside():
    panels = score_figure(ROWS, organs=ORGANS).axes
    names = [label.get_text() for label in panels[0].get_yticklabels()]
    assert names == ["liver\nn = 5", "spleen\nn = 2", "gallbladder\nn = 0", "pancreas\nn = 1"]
    assert [(text.get_text(), text.get_position()[1]) for text in panels[2].texts] == [("1\nmissed", 1)]
    assert not panels[0].texts and not panels[1].texts


def test_boxes_have_median_and_mean_and_one_case_has_none():
    panel = score_figure(ROWS, organs=ORGANS).axes[0]
    assert len(panel.patches) == 2  # liver and spleen
    means = [line.get_xydata()[0] for line in panel.lines if line.get_marker() == "D"]
    np.testing.assert_allclose(means, [[0.7, 0], [0.4, 1]])
    medians = [line.get_xydata() for line in panel.lines if line.get_color() == "black"]
    np.testing.assert_allclose([line[:, 0] for line in medians], [[0.7, 0.7], [0.4, 0.4]])
    box = panel.patches[0].get_path().get_extents()
    assert (box.x0, box.x1) == pytest.approx(tuple(np.quantile([0.9, 0.8, 0.7, 0.6, 0.5], [0.25, 0.75])))


def test_dots_of_equal_scores_do_not_hide_each_other():
    figure = score_figure([row(case, "liver", 0.8, 2.0) for case in range(100)], organs=["liver"])
    heights = dots_of(figure.axes[0])[0][:, 1]
    assert np.diff(np.sort(heights)).min() > 0.002 and np.ptp(heights) > 0.4


@pytest.mark.parametrize(("organs", "cases"), [(1, 1), (1, 100), (13, 12), (15, 100)])
def test_rows_keep_their_height_and_no_text_leaves_the_picture(organs, cases):
    names = [f"an organ with a long name {i}" for i in range(organs)]
    rows = [row(case, name, 0.5, NAN if case else 1.0) for case in range(cases) for name in names]
    figure = score_figure(rows, organs=names)
    figure.draw_without_rendering()
    for panel in figure.axes:
        assert panel.get_position().height * figure.get_figheight() / organs > 0.3  # inches, for two lines of text
        assert panel.get_position().width > 0.2
        for text in [*panel.texts, *panel.get_xticklabels(), *panel.get_yticklabels()]:
            place = text.get_window_extent()
            assert place.x0 >= 0 and place.x1 <= figure.bbox.width, text


def test_the_axis_of_hd95_keeps_small_distances_apart_beside_a_large_one():
    panel = score_figure(ROWS, organs=ORGANS).axes[2]
    two, four, large = panel.transAxes.inverted().transform(panel.transData.transform([(2, 0), (4, 0), (150, 0)]))[:, 0]
    assert four - two > 0.08 and large < 1
    assert [label.get_text() for label in panel.get_xticklabels()][-2:] == ["50", "100"]


def test_only_cases_without_a_score_give_an_empty_picture():
    panels = score_figure([row(0, "liver", NAN, NAN)], organs=["liver"]).axes
    assert [len(dots_of(panel)[0]) for panel in panels] == [0, 0, 0]
