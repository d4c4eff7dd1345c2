# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
from __future__ import annotations

import json
import os

import pytest

from bundles.common.errors import InputError
from bundles.segmentation.inference.resume_settings import keep_or_compare


def test_a_run_that_goes_on_must_be_the_same(tmp_path):
    model = tmp_path / "model.pt"
    model.write_bytes(b"weights")
    asked = {"output_dir": str(tmp_path / "out"), "models": [str(model)]}
    keep_or_compare(**asked, settings={"spacing": (1.5, 1.5, 2.0)}, resume=False)
    keep_or_compare(**asked, settings={"spacing": [1.5, 1.5, 2.0]}, resume=True)
    with pytest.raises(InputError, match=r"spacing was \[1.5, 1.5, 2.0\], now \[1.0, 1.0, 1.0\]"):
        keep_or_compare(**asked, settings={"spacing": [1.0, 1.0, 1.0]}, resume=True)
    os.utime(model, (1, 1))
    with pytest.raises(InputError, match="models was .*now"):
        keep_or_compare(**asked, settings={"spacing": [1.5, 1.5, 2.0]}, resume=True)
    keep_or_compare(**asked, settings={"spacing": [1.0, 1.0, 1.0]}, resume=False)  # starts anew
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["spacing"] == [1.0, 1.0, 1.0]


def test_a_model_that_is_missing_is_named_and_leaves_no_trace(tmp_path):
    asked = {"output_dir": str(tmp_path / "out"), "settings": {}, "resume": True}
    for _ in range(2):
        with pytest.raises(InputError, match="--pretrained_model absent.pt does not exist"):
            keep_or_compare(**asked, models=["absent.pt"])
    assert not (tmp_path / "out").exists()


def test_resuming_what_never_began_begins_it(tmp_path):
    keep_or_compare(output_dir=str(tmp_path), models=[], settings={"a": 1}, resume=True)
    assert json.loads((tmp_path / "settings.json").read_text()) == {"a": 1, "models": {}}
