# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
from __future__ import annotations

import json
import os

import pytest

from bundles.common.errors import InputError
from bundles.segmentation.inference.resume import compare_settings, write_or_compare_settings
from bundles.segmentation.results.organ_volumes import COLUMNS


def test_a_run_that_goes_on_must_be_the_same(tmp_path):
    model = tmp_path / "model.pt"
    model.write_bytes(b"weights")
    asked = {"output_dir": str(tmp_path / "out"), "models": [str(model)]}
    write_or_compare_settings(**asked, settings={"spacing": (1.5, 1.5, 2.0)}, resume=False)
    write_or_compare_settings(**asked, settings={"spacing": [1.5, 1.5, 2.0]}, resume=True)
    with pytest.raises(InputError, match=r"spacing was 1.5, 1.5, 2.0, now 1.0, 1.0, 1.0"):
        write_or_compare_settings(**asked, settings={"spacing": [1.0, 1.0, 1.0]}, resume=True)
    os.utime(model, (1, 1))
    with pytest.raises(InputError, match="models was .*now"):
        write_or_compare_settings(**asked, settings={"spacing": [1.5, 1.5, 2.0]}, resume=True)
    write_or_compare_settings(**asked, settings={"spacing": [1.0, 1.0, 1.0]}, resume=False)  # starts anew
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["spacing"] == [1.0, 1.0, 1.0]


def test_a_new_start_takes_the_table_of_the_last_run_away(tmp_path):
    # stopped before its first scan and then resumed, a run would count the masks of the last one as its own
    table, asked = tmp_path / "volumes.csv", {"output_dir": str(tmp_path), "models": []}
    write_or_compare_settings(**asked, settings={"spacing": 1}, resume=False)
    table.write_text("rows")
    write_or_compare_settings(**asked, settings={"spacing": 1}, resume=True)
    assert table.exists()
    write_or_compare_settings(**asked, settings={"spacing": 2}, resume=False)
    assert not table.exists() and (tmp_path / "previous_volumes.csv").read_text() == "rows"


def test_no_table_of_an_earlier_run_replaces_one_of_other_scans(tmp_path):
    def table_of(*scans: str) -> str:
        return "".join([",".join(COLUMNS) + "\n", *(f"{scan},liver,1,1.0,/data/{scan}.nii\n" for scan in scans)])

    asked = {"output_dir": str(tmp_path), "models": [], "settings": {}, "resume": False}
    written = [
        table_of("a", "b"),
        table_of("c"),
        "another table",
        table_of("a", "b", "d"),
        table_of("c", "a", "b", "d"),
    ]
    for table in written:
        (tmp_path / "volumes.csv").write_text(table)
        write_or_compare_settings(**asked)
    write_or_compare_settings(**asked)  # without a table
    left = {path.name: path.read_text() for path in tmp_path.glob("previous*")}
    assert left == {
        "previous_volumes.csv": written[4],  # it tells of a, b and d, too
        "previous_volumes_2.csv": written[1],
        "previous_volumes_3.csv": written[2],
    }


def test_a_run_that_may_still_be_refused_leaves_the_table_of_the_last_one(tmp_path):
    table, asked = tmp_path / "volumes.csv", {"output_dir": str(tmp_path), "models": []}
    write_or_compare_settings(**asked, settings={"spacing": 1}, resume=False)
    table.write_text("rows")
    compare_settings(**asked, settings={"spacing": 2}, resume=False)
    assert table.read_text() == "rows" and json.loads((tmp_path / "settings.json").read_text())["spacing"] == 1
    with pytest.raises(InputError, match="spacing was 1, now 2"):
        compare_settings(**asked, settings={"spacing": 2}, resume=True)


@pytest.mark.parametrize("content", ["", "[1]", "{"])
def test_settings_that_are_damaged_are_named(tmp_path, content):
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(InputError, match="settings.json is damaged"):
        compare_settings(output_dir=str(tmp_path), models=[], settings={}, resume=True)


def test_a_model_that_is_missing_is_named_and_leaves_no_trace(tmp_path):
    asked = {"output_dir": str(tmp_path / "out"), "settings": {}, "resume": True}
    for _ in range(2):
        with pytest.raises(InputError, match="--pretrained_model absent.pt does not exist"):
            write_or_compare_settings(**asked, models=["absent.pt"])
    assert not (tmp_path / "out").exists()


def test_masks_without_settings_are_not_continued(tmp_path):
    (tmp_path / "volumes.csv").write_text("rows")
    with pytest.raises(InputError, match="settings.json is missing, so nobody knows the settings of the masks"):
        write_or_compare_settings(output_dir=str(tmp_path), models=[], settings={}, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["volumes.csv"]


def test_resuming_what_never_began_begins_it(tmp_path):
    write_or_compare_settings(output_dir=str(tmp_path), models=[], settings={"a": 1}, resume=True)
    assert json.loads((tmp_path / "settings.json").read_text()) == {"a": 1, "models": {}}
