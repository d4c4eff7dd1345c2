# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The file of collections says what the paper says, and differences from it are named with their numbers."""

from __future__ import annotations

import pytest

from bundles.common.errors import InputError
from bundles.pretraining.preparation.known_collection import differences, find_collection

from ...workflows.command_line import BUNDLES

FILE = BUNDLES / "swin_unetr_pretrain" / "configs" / "collections.yaml"
PRE_TRAINING = ["LUNA16", "TCIA_COVID19", "HNSCC", "CT_COLONOGRAPHY", "LIDC"]


def row(name: str = "a", verdict: str = "used", low: float = -1024, high: float = 2000, slices: float = 1.25) -> dict:
    return {"name": name, "verdict": verdict, "hu_min": low, "hu_max": high, "spacing": [0.7, 0.7, slices]}


def test_the_five_lists_add_up_to_the_published_ones():
    collections = [find_collection(name, FILE) for name in PRE_TRAINING]
    assert sum(collection["training"] for collection in collections) == 4759
    assert sum(collection["validation"] for collection in collections) == 260
    assert all(collection["hu_window"] == [-1000, 1000] for collection in collections)


def test_a_collection_that_is_as_expected():
    collection = find_collection("LUNA16", FILE)
    table = [row(str(i)) for i in range(888)] + [row("left", "left_out", low=0, slices=9)]
    (note,) = differences(collection, table)
    assert "888 scans used" in note and "843 + 45 (+0)" in note


def test_missing_scans_odd_values_and_coarse_slices_are_named():
    collection = find_collection("LUNA16", FILE)
    notes = differences(collection, [row("a", low=-700), row("b", high=400), row("c", slices=5), row("d")])
    assert "4 scans used" in notes[0] and "(-884)" in notes[0]
    assert "2 scans, such as a, do not span -1000 to 1000 HU" in notes[1]
    assert "1 scans, such as c, are coarser than its 2.5 mm" in notes[2]
    assert len(notes) == 3


def test_unknown_collections_and_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="'LUNA' is not one of LUNA16, "):
        find_collection("LUNA", FILE)
    with pytest.raises(InputError, match="none.yaml not found"):
        find_collection("LUNA16", tmp_path / "none.yaml")
