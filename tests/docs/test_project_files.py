# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Files about the project say one version, and name commands that exist."""

from __future__ import annotations

import re
from configparser import ConfigParser

import yaml

from tools.site_pages import ROOT


def test_one_version():
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert config["metadata"]["version"] == citation["version"] == newest
    assert config["metadata"]["license"] == citation["license"]


def test_commands_of_make_exist():
    rules = re.findall(r"^([\w-]+(?: [\w-]+)*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = {target for rule in rules for target in rule.split()}
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/explanation/architecture.md"):
        used = set(re.findall(r"(?:`|^)make ([\w-]+)", (ROOT / name).read_text(), re.MULTILINE))
        assert used and used <= targets, (name, used - targets)
