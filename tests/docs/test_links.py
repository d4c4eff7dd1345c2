# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Links of README.md, docs/ and the bundles' READMEs lead somewhere, as the code host reads them, and so does the site's navigation."""

from __future__ import annotations

import re

import pytest
import yaml

from tools.site_pages import FENCE, ROOT, anchor, links, pages, site_path, text_of, turn_links

PAGES = {path: text_of(path) for path in pages().values() if path.endswith((".md", ".ipynb"))}


def anchors(path: str) -> set[str]:
    """Anchors of a page: its headings, as a code host names them; a second one of a name gets -1."""
    found: list[str] = []
    for heading in re.findall(r"^#{1,6} +(.+?) *$", FENCE.sub("", PAGES[path]), re.MULTILINE):
        text = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", heading)
        found.append(anchor(text) + (f"-{found.count(anchor(text))}" if anchor(text) in found else ""))
    return set(found)


def test_the_pages_are_all_there():
    on_disk = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md")}
    on_disk |= {path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.ipynb")}
    on_disk |= {f"bundles/{name}/docs/README.md" for name in ("swin_unetr_pretrain", "swin_unetr_btcv_seg")}
    assert PAGES.keys() >= on_disk | {"README.md", "CHANGELOG.md", "CONTRIBUTING.md"}
    assert len(on_disk) > 25


@pytest.mark.parametrize("path", PAGES)
def test_links_and_anchors_resolve(path):
    broken = []
    for match, target, name in links(PAGES[path], path):
        if not (ROOT / target).exists() or (name and name not in anchors(target)):
            broken.append(match[1])
    own = re.findall(r"\]\(#([^)]+)\)", FENCE.sub("", PAGES[path]))
    assert broken == [] and set(own) <= anchors(path)


@pytest.mark.parametrize("path", PAGES)
def test_lists_in_lists_are_indented_by_four(path):
    """The site takes them for items of the outer list otherwise; code hosts take both."""
    assert re.findall(r"^ {1,3}[-*] .*", FENCE.sub("", PAGES[path]), re.MULTILINE) == []


def test_every_page_is_in_the_navigation_once():
    def places(entry) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [place for part in (entry.values() if isinstance(entry, dict) else entry) for place in places(part)]

    navigation = places(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(navigation) == sorted(place for place in pages() if not place.startswith("source/"))


def test_anchors_are_those_of_code_hosts():
    assert anchor("Why `--merging`") == "why---merging"
    assert anchor("1. Train, score & look") == "1-train-score--look"
    assert anchor("`prepare.yaml` of swin_unetr_pretrain") == "prepareyaml-of-swin_unetr_pretrain"


def test_a_file_has_one_place_on_the_site():
    assert site_path("README.md") == "index.md"
    assert site_path("docs/how-to/weights.md") == "how-to/weights.md"
    assert site_path("docs/notebooks/demo.ipynb") == "notebooks/demo.md"
    assert site_path("docs/report.png") == "report.png"
    assert site_path("zoo/released/README.md") == "released-models.md"
    assert site_path("zoo/released/hippocampus.md") == "released/hippocampus.md"
    assert site_path("bundles/swin_unetr_msd/docs/README.md") == "bundles/swin_unetr_msd.md"
    assert (
        site_path("bundles/swin_unetr_msd/configs/train.yaml") == "source/bundles/swin_unetr_msd/configs/train.yaml.md"
    )


@pytest.mark.parametrize(
    ("path", "link", "turned"),
    [
        ("README.md", "docs/how-to/weights.md#sources", "how-to/weights.md#sources"),
        ("README.md", "docs/report.png", "report.png"),
        ("docs/how-to/fine-tune.md", "weights.md", "weights.md"),
        ("docs/how-to/fine-tune.md", "../../README.md", "../index.md"),
        ("docs/how-to/fine-tune.md", "../../demo/run.py", "../source/demo/run.py.md"),
        ("docs/notebooks/demo.ipynb", "my-own-scans.ipynb", "my-own-scans.md"),
        ("bundles/swin_unetr_msd/docs/README.md", "../configs/train.yaml", None),
        ("bundles/swin_unetr_msd/docs/README.md", "../../swin_unetr_btcv_seg/docs/README.md", "swin_unetr_btcv_seg.md"),
        ("README.md", "docs/missing.md", "docs/missing.md"),  # MkDocs refuses it
        ("README.md", "https://monai.io", "https://monai.io"),
        ("README.md", "#further", "#further"),
    ],
)
def test_links_turn_to_the_site(path, link, turned):
    turned = turned or "../source/bundles/swin_unetr_msd/configs/train.yaml.md"
    text = f"See [a]({link}), [b][c].\n\n```bash\ncp [a]({link})\n```\n\n[c]: {link}\n"
    assert turn_links(text, path) == f"See [a]({turned}), [b][c].\n\n```bash\ncp [a]({link})\n```\n\n[c]: {turned}\n"
