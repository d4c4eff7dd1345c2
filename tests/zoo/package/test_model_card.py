# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The Hugging Face form: files at the root, a card that the hub can read, and valid links."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest
import yaml

from zoo.pack import stage
from zoo.package.bundle_files import files_of
from zoo.package.model_card import write_hugging_face


@pytest.fixture(scope="module")
def bundles(tmp_path_factory, btcv_models, spleen_models, pretrained_models):
    folder = tmp_path_factory.mktemp("staged")
    return {
        "btcv": stage("swin_unetr_btcv_seg", folder=folder, models=btcv_models),
        "spleen": stage("swin_unetr_msd", folder=folder, task="Task09_Spleen", models=spleen_models),
        "pretrain": stage("swin_unetr_pretrain", folder=folder, models=pretrained_models),
    }


def head_and_text(card: str) -> tuple[dict, str]:
    _, head, text = card.split("---\n", 2)
    return yaml.safe_load(head), text


@pytest.mark.parametrize(
    ("name", "pipeline"),
    [("btcv", "image-segmentation"), ("spleen", "image-segmentation"), ("pretrain", "image-feature-extraction")],
)
def test_the_card_has_a_head_that_the_hub_reads(tmp_path, bundles, name, pipeline):
    write_hugging_face(bundles[name], tmp_path / "card")
    head, text = head_and_text((tmp_path / "card/README.md").read_text())
    assert (head["license"], head["library_name"], head["pipeline_tag"]) == ("apache-2.0", "monai", pipeline)
    assert {"monai", "medical", "swin-unetr", "ct"} <= set(head["tags"])
    assert text.lstrip().startswith("# ")
    assert "## Weights of this package" in text and "| preset | cpu |" in text


def test_the_card_says_how_far_the_weights_have_moved_if_they_record_it(bundles):
    rows = {
        name: re.findall(r"\| cosine to the start weights, median \| (.*) \|", (folder / "docs/README.md").read_text())
        for name, folder in bundles.items()
    }
    assert rows == {"btcv": ["swinViT 0.862, rest 0.488"], "spleen": [], "pretrain": []}


@pytest.mark.parametrize("name", ["btcv", "spleen", "pretrain"])
def test_links_of_the_card_lead_to_files_of_the_repository(tmp_path, bundles, name):
    write_hugging_face(bundles[name], tmp_path / "card")
    links = re.findall(r"\]\(([^)#:]+)\)", (tmp_path / "card/README.md").read_text())
    assert "LICENSE" in links
    assert [link for link in links if not (tmp_path / "card" / link).is_file()] == []


def test_all_files_but_the_readme_are_there_once(tmp_path, bundles):
    write_hugging_face(bundles["btcv"], tmp_path / "card")
    bundle, card = ({path.as_posix() for path in files_of(folder)} for folder in (bundles["btcv"], tmp_path / "card"))
    assert card == bundle - {"docs/README.md"} | {"README.md"}  # docs/README.md would replace the card when pushed


def test_what_lay_there_is_replaced_and_nothing_is_left_beside_it(tmp_path, bundles):
    (tmp_path / "card/configs").mkdir(parents=True)
    (tmp_path / "card/configs/old.yaml").touch()
    write_hugging_face(bundles["btcv"], tmp_path / "card")
    assert not (tmp_path / "card/configs/old.yaml").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["card"]


def test_the_repository_of_the_hub_stays(tmp_path, bundles):
    for name in (".git/HEAD", ".cache/huggingface/upload"):
        (tmp_path / "card" / name).parent.mkdir(parents=True)
        (tmp_path / "card" / name).write_text(name)
    write_hugging_face(bundles["btcv"], tmp_path / "card")
    assert (tmp_path / "card/.git/HEAD").read_text() == ".git/HEAD"
    assert (tmp_path / "card/.cache/huggingface/upload").exists() and (tmp_path / "card/README.md").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["card"]


def test_the_repository_outlives_a_run_that_was_killed_before_it_was_moved(tmp_path, bundles):
    (tmp_path / ".card.old/.git").mkdir(parents=True)
    (tmp_path / ".card.old/.git/HEAD").write_text("ref")
    (tmp_path / "card").mkdir()
    write_hugging_face(bundles["btcv"], tmp_path / "card")
    assert (tmp_path / "card/.git/HEAD").read_text() == "ref"
    assert [path.name for path in tmp_path.iterdir()] == ["card"]


def test_the_last_package_outlives_a_failure(tmp_path, bundles, monkeypatch):
    write_hugging_face(bundles["btcv"], tmp_path / "card")
    before = {path.as_posix() for path in files_of(tmp_path / "card")}
    rename = Path.rename

    def full(path, to):
        if path.name.endswith(".new"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="No space left"):
        write_hugging_face(bundles["btcv"], tmp_path / "card")
    assert {path.as_posix() for path in files_of(tmp_path / "card")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["card"]
