# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The page of options is what the configs say today, and names every config with options."""

from __future__ import annotations

from tools.options_page import CONFIGS, PAGE, ROOT, page


def test_the_page_is_that_of_the_configs():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tools.options_page"


def test_every_config_with_options_is_on_it():
    files = {path.resolve() for path in ROOT.glob("bundles/swin_unetr_*/configs/*.yaml")}
    with_options = {path for path in files if "\ncomponents:" in path.read_text(encoding="utf-8")}
    named = {
        (ROOT / f"bundles/{bundle}/configs/{name}.yaml").resolve() for bundle in CONFIGS for name in CONFIGS[bundle]
    }
    assert named == with_options
