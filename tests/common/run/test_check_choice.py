# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
from __future__ import annotations

import pytest

from bundles.common.errors import InputError
from bundles.common.run.option_checks import check_choice


def test_only_the_choices_pass():
    check_choice(name="check_data", value="full", choices=["full", "none"])
    with pytest.raises(InputError, match="--check_data 'ful' is not one of full, none"):
        check_choice(name="check_data", value="ful", choices=["full", "none"])
