# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Numbers have their plural, and values are written without Python's brackets and quotes."""

from __future__ import annotations

import pytest

from bundles.common.words import counted, listed, plain_name, sentence, shown


@pytest.mark.parametrize(
    ("number", "words", "said"),
    [
        (0, ("scan",), "0 scans"),
        (1, ("scan",), "1 scan"),
        (2, ("scan",), "2 scans"),
        (1, ("mask has", "masks have"), "1 mask has"),
        (3, ("mask has", "masks have"), "3 masks have"),
    ],
)
def test_a_number_has_its_plural(number, words, said):
    assert counted(number, *words) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([1.5, 1.5, 2.0], "1.5, 1.5, 2.0"),
        ((64, 64, 32), "64, 64, 32"),
        ({"0": "background", "1": "liver"}, "0: background, 1: liver"),
        ({3, 1, 2}, "1, 2, 3"),
        ({"flip": [0, 0.5], "noise": 0.1}, "flip: (0, 0.5), noise: 0.1"),
        ([[2, 1], [3]], "(2, 1), (3)"),
        (["a", None, True, False], "a, null, true, false"),
        ([], "nothing"),
        ({}, "nothing"),
        (None, "null"),
        (0, "0"),
        (1, "1"),
        ("runs/a b", "runs/a b"),
    ],
)
def test_a_value_is_written_as_a_person_does(value, said):
    assert shown(value) == said


def test_words_are_listed_as_in_a_sentence():
    assert listed(["liver"]) == "liver"
    assert listed(["liver", "spleen"]) == "liver and spleen"
    assert listed(("rotation", "contrast", "inpainting")) == "rotation, contrast and inpainting"


def test_names_are_compared_in_one_spelling_in_any_script():
    assert plain_name(" Left-Kidney (total)") == plain_name("left_kidney total") == "left_kidney_total"
    assert plain_name("Селезёнка (вся)") == "селезёнка_вся" != plain_name("печень")


def test_a_sentence_ends_once():
    assert [sentence(text) for text in ("no", "no.", "another region?")] == ["no.", "no.", "another region?"]
