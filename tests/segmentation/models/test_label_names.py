# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
from __future__ import annotations

import json

import pytest

from bundles.common.errors import InputError
from bundles.common.weights.checkpoint_file import save_atomically
from bundles.segmentation.models.label_names import check_labels, read_labels
from bundles.segmentation.models.model_record import model_labels

LABELS = {"0": "background", "1": "spleen", "2": "right_kidney", "3": "liver"}


def test_labels_of_the_metadata_and_of_a_model(tmp_path):
    content = {"network_data_format": {"outputs": {"pred": {"channel_def": LABELS}}}}
    (tmp_path / "metadata.json").write_text(json.dumps(content))
    assert read_labels(str(tmp_path / "metadata.json")) == LABELS
    model = str(tmp_path / "model.pt")
    assert model_labels(model, otherwise=LABELS) == LABELS
    save_atomically({"labels": {"0": "background", "1": "tumour"}}, model)
    assert model_labels(model, otherwise=LABELS) == {"0": "background", "1": "tumour"}


def test_values_without_a_gap_pass_and_others_do_not():
    assert check_labels({0: "background", 1: "spleen"}) == {"0": "background", "1": "spleen"}
    with pytest.raises(InputError, match=r"values found: \[0, 2\]"):
        check_labels({"0": "background", "2": "spleen"})


@pytest.mark.parametrize("labels", [["background", "liver"], {"liver": 1}, 3])
def test_labels_of_a_foreign_file_that_are_not_names_by_value_are_not_used(tmp_path, caplog, labels):
    model = str(tmp_path / "model.pt")
    save_atomically({"labels": labels}, model)
    assert model_labels(model, otherwise=LABELS) == LABELS
    assert f"{model} records labels that are not names by value" in caplog.text


def test_two_values_with_one_name_are_refused():
    """Tables and scores are by name: one of the two would replace the other."""
    with pytest.raises(InputError, match="give the name 'lesion' to the values 1 and 2"):
        check_labels({"0": "background", "1": "lesion", 2: "lesion"})
