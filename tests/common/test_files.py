# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Files are written atomically, one process at a time works in a locked folder, and changed files are noticed."""

import errno
import fcntl
import os
import threading

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from bundles.common.files import (
    atomic_path,
    file_hash,
    file_stamp,
    first_free,
    folder_lock,
    move_file,
    save_figure,
    walk_once,
    write_text,
)


def test_a_file_system_without_locks_costs_a_warning(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("bundles.common.files.fcntl.flock", no_locks)
    with folder_lock(tmp_path / "lock"):
        assert f"{tmp_path / 'lock'} cannot be locked (Function not implemented)" in caplog.text


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "new" / "scan.nii.gz"
    with atomic_path(path) as temporary:
        assert temporary.parent == path.parent and temporary.name.startswith(".")
        assert temporary.name.endswith(".scan.nii.gz")
        temporary.write_bytes(b"voxels")
        assert not path.exists()
    assert path.read_bytes() == b"voxels" and os.listdir(path.parent) == ["scan.nii.gz"]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["report.json"]


def test_text_is_written_as_it_is(tmp_path):
    write_text(tmp_path / "a.csv", "ü\r\nß\n")
    assert (tmp_path / "a.csv").read_bytes() == "ü\r\nß\n".encode()


@pytest.mark.parametrize(("dpi", "size"), [({}, (200, 300)), ({"dpi": 50}, (100, 150))])
def test_a_figure_becomes_a_whole_picture_in_a_new_folder(tmp_path, dpi, size):
    save_figure(Figure(figsize=(3, 2)), tmp_path / "new" / "a.png", **dpi)
    assert imread(tmp_path / "new" / "a.png").shape[:2] == size and os.listdir(tmp_path / "new") == ["a.png"]


def test_a_failed_picture_leaves_nothing(tmp_path, monkeypatch):
    figure = Figure()
    monkeypatch.setattr(figure, "savefig", lambda path, **_: (path.write_bytes(b"half"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        save_figure(figure, tmp_path / "a.png")
    assert os.listdir(tmp_path) == []


def test_a_file_is_moved_into_a_new_folder_and_replaces_an_older_one(tmp_path):
    path, to = tmp_path / "scan.nii.gz", tmp_path / "aside" / "scan.nii.gz"
    for content in ("old", "new"):
        path.write_text(content)
        move_file(path, to)
        assert not path.exists() and to.read_text() == content
    move_file(path, to)  # there is none
    assert to.read_text() == "new"


def test_a_name_that_is_taken_gets_the_next_number(tmp_path):
    wanted = tmp_path / "previous_model.pt"
    assert first_free(wanted) == wanted
    for number in ("", "_2"):
        (tmp_path / f"previous_model{number}.pt").touch()
    assert first_free(wanted) == tmp_path / "previous_model_3.pt"
    assert first_free(wanted, taken=lambda path: path == wanted) == tmp_path / "previous_model_2.pt"


def test_a_walk_enters_linked_folders_and_each_folder_once(tmp_path):
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    (tmp_path / "disk" / "deep" / "a").touch()
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "linked").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "back").symlink_to(tmp_path / "scans")
    found = [os.path.join(parent, name) for parent, _, files in walk_once(tmp_path / "scans") for name in files]
    assert found == [str(tmp_path / "scans" / "linked" / "deep" / "a")]


def test_the_sha256_of_a_file_is_the_standard_one(tmp_path):
    (tmp_path / "a").write_text("abc")  # FIPS 180-4, example of one block
    assert file_hash(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("change", ["size", "time", "none"])
def test_a_stamp_changes_with_size_and_time(tmp_path, change):
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(b"12345")
    os.utime(path, ns=(0, 1_700_000_000_123_456_789))
    assert file_stamp(path) == file_stamp(str(path)) == [5, 1_700_000_000_123_456_789]
    before = file_stamp(path)
    if change == "size":
        path.write_bytes(b"123456")
        os.utime(path, ns=(0, 1_700_000_000_123_456_789))
    if change == "time":
        os.utime(path, ns=(0, 1_700_000_000_123_456_790))
    assert (file_stamp(path) == before) == (change == "none")


def test_a_missing_file_has_no_stamp(tmp_path):
    with pytest.raises(FileNotFoundError):
        file_stamp(tmp_path / "missing")


def test_a_lock_without_waiting_is_refused_while_another_holds_it(tmp_path):
    path = tmp_path / "study" / ".lock"
    with folder_lock(path, wait=False):
        with pytest.raises(BlockingIOError), folder_lock(path, wait=False):
            pytest.fail("two at once")
    with folder_lock(path, wait=False):  # free again
        pass


def test_a_lock_is_released_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), folder_lock(tmp_path / ".lock"):
        raise RuntimeError
    with folder_lock(tmp_path / ".lock", wait=False):
        pass


def test_a_lock_waits_until_the_other_is_done(tmp_path):
    path, order = tmp_path / ".lock", []

    def second():
        with folder_lock(path):
            order.append("second")

    with open(path, "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive() and order == []
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
