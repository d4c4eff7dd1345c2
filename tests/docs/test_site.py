# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The built site is whole, and loads nothing from other hosts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tools.site_pages import ROOT, pages

pytest.importorskip("material", reason="needs the extra docs: make docs installs it")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True)
    assert built.returncode == 0, built.stderr.decode()
    return folder


class Loaded(HTMLParser):
    """Addresses that a page loads by itself, unlike those that a reader may follow."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag != "a" and given.get("rel") not in ("canonical", "next", "prev"):
            self.addresses += [given[name] for name in ("src", "href", "srcset", "poster", "data") if given.get(name)]


def test_every_page_is_built(site):
    assert {
        path for path in pages() if not (site / path.replace("README.md", "index.md")).with_suffix(".html").is_file()
    } == set()


def test_pages_load_nothing_from_other_hosts(site):
    files = [*site.rglob("*.html")]
    loaded = {address for file in files for address in Loaded(file.read_text(encoding="utf-8")).addresses}
    assert any(".js" in address for address in loaded) and any(".css" in address for address in loaded)
    assert {address for address in loaded if re.match(r"([a-z]+:)?//", address)} == set()
    sheets = "".join(file.read_text(encoding="utf-8") for file in site.rglob("*.css"))
    assert re.findall(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//[^)]*", sheets) == []


def test_files_that_pages_load_exist(site):
    for file in site.rglob("*.html"):
        for address in Loaded(file.read_text(encoding="utf-8")).addresses:
            if not address.startswith(("data:", "/")) and file.name != "404.html":
                assert (file.parent / address.split("#")[0].split("?")[0]).exists(), (file, address)


def test_no_page_wants_what_only_a_network_gives(site):
    """Diagrams of Mermaid are drawn by a script from a CDN."""
    assert [file for file in site.rglob("*.html") if 'class="mermaid"' in file.read_text(encoding="utf-8")] == []


def test_a_word_of_the_glossary_is_found(site):
    index = (site / "search" / "search_index.json").read_text(encoding="utf-8")
    assert "reference/glossary.html#pre-training" in index and "source/demo/run.py" not in index
