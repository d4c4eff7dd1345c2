# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Reading ``scores.csv`` returns what was written."""

from __future__ import annotations

import math

import pytest

from bundles.segmentation.results.scores_table import read_scores

HEADER = "case,label,dice,nsd,hd95\n"


@pytest.fixture
def table(tmp_path):
    def write(text):
        (tmp_path / "scores.csv").write_text(text, encoding="utf-8")
        return tmp_path / "scores.csv"

    return write


def test_rows_have_case_label_and_scores(table):
    rows = read_scores(
        table(HEADER + "img0001,Schädel,0.912345,0.500000,3.250000\nimg0002,liver,0.000000,1.000000,0\n")
    )
    assert rows == [
        {"case": "img0001", "label": "Schädel", "dice": 0.912345, "nsd": 0.5, "hd95": 3.25},
        {"case": "img0002", "label": "liver", "dice": 0.0, "nsd": 1.0, "hd95": 0.0},
    ]
    assert all(isinstance(row[metric], float) for row in rows for metric in ("dice", "nsd", "hd95"))


def test_empty_fields_are_nan(table):
    (one, other) = read_scores(table(HEADER + "a,liver,,,\nb,liver,0.000000,0.000000,\n"))
    assert all(math.isnan(one[metric]) for metric in ("dice", "nsd", "hd95"))
    assert other["dice"] == 0 and math.isnan(other["hd95"])


def test_names_are_not_changed(table):
    (row,) = read_scores(table(HEADER + '"0017, left",1,1.0,1.0,0.0\n'))
    assert (row["case"], row["label"]) == ("0017, left", "1")


def test_a_table_without_cases_is_empty(table):
    assert read_scores(table(HEADER)) == []


@pytest.mark.parametrize("column", ["case", "label", "nsd"])
def test_a_missing_column_is_an_error(table, column):
    with pytest.raises(KeyError, match=column):
        read_scores(table(HEADER.replace(column, "other") + "a,liver,1.0,1.0,0.0\n"))


def test_a_row_that_is_cut_short_is_an_error(table):
    with pytest.raises(ValueError, match="line 3 is cut short"):
        read_scores(table("case,label,dice,nsd,hd95\na,liver,0.5,0.5,1\nb,liver,0.7\n"))


def test_a_score_that_is_no_number_is_an_error(table):
    with pytest.raises(ValueError, match="high"):
        read_scores(table(HEADER + "a,liver,high,1.0,0.0\n"))
