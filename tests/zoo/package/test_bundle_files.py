# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A bundle is copied without links and without files that runs left behind."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from bundles.common.errors import InputError
from zoo.package.bundle_files import BUNDLES, copy_bundle, files_of, find_bundle

PARTS = {
    "swin_unetr_btcv_seg": ["common", "segmentation"],
    "swin_unetr_msd": ["common", "segmentation", "decathlon"],
    "swin_unetr_pretrain": ["common", "pretraining"],
}
NAMES = ["swin_unetr_btcv_seg", "swin_unetr_msd", "swin_unetr_pretrain"]


@pytest.mark.parametrize("name", NAMES)
def test_the_copy_has_the_bytes_that_git_tracks_and_no_links(tmp_path, name):
    copy_bundle(BUNDLES / name, tmp_path / name)
    copied = list(files_of(tmp_path / name))
    assert not any((tmp_path / name / path).is_symlink() for path in copied)
    assert all((tmp_path / name / path).read_bytes() == (BUNDLES / name / path).read_bytes() for path in copied)
    links = {path.relative_to(BUNDLES / name): path.resolve() for path in (BUNDLES / name / "scripts").iterdir()}
    links = {path: target for path, target in links.items() if (BUNDLES / name / path).is_symlink()}
    assert set(links) == {Path("scripts", part) for part in PARTS[name]}
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", name, *PARTS[name]],
        cwd=BUNDLES,
        capture_output=True,
        text=True,
    )
    if tracked.returncode:
        pytest.skip("not a git checkout")
    expected = set()
    for path in map(Path, tracked.stdout.split()):
        if not (BUNDLES / path).exists():  # moved or removed, not yet committed
            continue
        part = path.parts[0]
        inside = path.relative_to(name) if part == name else Path("scripts", path)
        if inside not in links:
            expected.add(inside)
    assert set(copied) == expected


def test_what_runs_and_editors_leave_stays_behind(tmp_path, tree):
    bundle = tree / "swin_unetr_btcv_seg"
    left = [
        "configs/.hidden.yaml",
        "scripts/__pycache__/a.pyc",
        "configs/last.pt",
        "configs/cache.ckpt",
        "docs/README.md~",
    ]
    left += ["configs/train.yaml.orig", "configs/train.yaml.bak"]
    left += ["configs/mlruns.db", "output/models/model.pt", "models/model.pt", "data/scan.nii.gz", "notes.txt"]
    for name in left:
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        (bundle / name).touch()
    copy_bundle(bundle, tmp_path / "copy")
    copied = {path.as_posix() for path in files_of(tmp_path / "copy")}
    assert "configs/train.yaml" in copied and "scripts/common/weights/loading.py" in copied
    assert copied.isdisjoint(left)


@pytest.mark.parametrize("form", ["dangling", "text", "missing"])
def test_a_dead_link_to_what_the_bundles_share_is_refused(tmp_path, tree, form):
    common = tree / "swin_unetr_btcv_seg/scripts/common"
    common.unlink()
    if form == "dangling":
        common.symlink_to("../../nowhere")
    elif form == "text":  # as from git without symlink support, or a zip
        common.write_text("../../common")
    with pytest.raises(InputError, match=r"scripts/common is missing or a broken link.*cp -rL"):
        copy_bundle(tree / "swin_unetr_btcv_seg", tmp_path / "copy")


def test_any_other_dead_link_is_named(tmp_path, tree):
    (tree / "swin_unetr_msd/configs/extra.yaml").symlink_to("/nowhere/extra.yaml")
    with pytest.raises(InputError, match=r"configs/extra\.yaml is a broken link"):
        copy_bundle(tree / "swin_unetr_msd", tmp_path / "copy")


def test_a_bundle_without_its_licence_is_refused(tmp_path, tree):
    (tree / "swin_unetr_msd/LICENSE").unlink()
    with pytest.raises(InputError, match="LICENSE is missing"):
        copy_bundle(tree / "swin_unetr_msd", tmp_path / "copy")


def test_a_bundle_is_found_by_its_name_or_its_folder(tree):
    assert find_bundle("swin_unetr_msd") == BUNDLES / "swin_unetr_msd"
    assert find_bundle(tree / "swin_unetr_msd") == tree / "swin_unetr_msd"
    with pytest.raises(InputError, match="swin_unetr_btvc is not a bundle.*Did you mean swin_unetr_btcv_seg"):
        find_bundle("swin_unetr_btvc")


def test_files_come_in_the_order_of_their_names(tmp_path):
    for name in ("b/1", "a.x", "a/2", "a/10"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    os.symlink("a", tmp_path / "link")
    assert [path.as_posix() for path in files_of(tmp_path)] == ["a.x", "a/10", "a/2", "b/1", "link"]
