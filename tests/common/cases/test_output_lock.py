# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Two runs never write into one folder, and what a killed run left unfinished is removed."""

from __future__ import annotations

import pytest

from bundles.common.cases.output_lock import alone_in
from bundles.common.errors import InputError
from bundles.common.files import atomic_path


def lock_of(out):
    return {"lock": out / ".records" / "lock", "doing": "preparing", "option": "--dataset_dir"}


def test_a_second_run_is_refused_until_the_first_ends(tmp_path):
    options = lock_of(tmp_path) | {"folders": []}
    with alone_in(tmp_path, **options):
        with pytest.raises(InputError, match="Another run is already preparing .*or choose another --dataset_dir"):
            with alone_in(tmp_path, **options):
                pass
    with alone_in(tmp_path, **options):
        pass


def test_unfinished_files_are_removed_and_no_others(tmp_path):
    labels = tmp_path / "labels"
    labels.mkdir()
    kept = [labels / name for name in ("a.nii.gz", ".hidden", ".0123456x.a.nii.gz", ".01234567")]
    for path in (*kept, labels / ".0a1b2c3d.a.nii.gz"):
        path.write_bytes(b"")
    with alone_in(tmp_path, **lock_of(tmp_path), folders=[labels, tmp_path / "absent"]):
        assert sorted(labels.iterdir()) == sorted(kept)
    with pytest.raises(KeyboardInterrupt):
        with alone_in(tmp_path, **lock_of(tmp_path), folders=[labels]):
            with atomic_path(labels / "b.nii.gz") as temporary:
                temporary.with_name(".ffffffff.c.nii.gz").write_bytes(b"")
                raise KeyboardInterrupt
    assert sorted(labels.iterdir()) == sorted(kept)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / ".records").write_bytes(b"")  # a file where the folder of the lock is to be
    with pytest.raises(InputError, match="--dataset_dir .* cannot be written: .*Choose another folder"):
        with alone_in(tmp_path, **lock_of(tmp_path), folders=[]):
            pass
