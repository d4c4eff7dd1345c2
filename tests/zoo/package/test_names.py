# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Names that clients would misinterpret are refused."""

from __future__ import annotations

import pytest

from bundles.common.errors import InputError
from zoo.package.names import check_name


@pytest.mark.parametrize("name", ["swin_unetr_msd_spleen", "swin_unetr_btcv_seg", "vista3d", "MedNIST-gan"])
def test_good_names_pass(name):
    check_name(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hepatic_vessel", "'_v'"),
        ("organs_v2", "'_v'"),
        ("tumour_detection", "'detection'"),
        ("lung_classification", "'classification'"),
        ("spleen_deepedit", "'deepedit'"),
        ("my bundle", "letters, digits"),
        ("", "letters, digits"),
        ("../x", "letters, digits"),
    ],
)
def test_others_are_refused_with_the_reason(name, message):
    with pytest.raises(InputError, match=message):
        check_name(name)
