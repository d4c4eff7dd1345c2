# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Equal files give equal zips; a malformed or malicious zip is not unpacked."""

from __future__ import annotations

import hashlib
import os
import stat
import zipfile

import pytest
from monai.apps.utils import extractall

from bundles.common.errors import InputError
from zoo.package.archive import extract_archive, file_hash, write_archive


@pytest.fixture
def bundle(tmp_path):
    folder = tmp_path / "some_bundle"
    for name, text in {
        "LICENSE": "licence",
        "configs/b.yaml": "b: 1\n",
        "configs/a.json": "{}",
        "models/model.pt": "x" * 9,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_times_permissions_and_order_of_the_files_do_not_show(tmp_path, bundle):
    write_archive(bundle, tmp_path / "a.zip")
    other = tmp_path / "elsewhere" / "some_bundle"
    for name in ("models/model.pt", "configs/b.yaml", "LICENSE", "configs/a.json"):
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        (other / name).write_bytes((bundle / name).read_bytes())
        os.utime(other / name, (2_000_000_000, 2_000_000_000))
        (other / name).chmod(0o755)
    write_archive(other, tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    (other / "LICENSE").write_text("licences")
    write_archive(other, tmp_path / "c.zip")
    assert (tmp_path / "a.zip").read_bytes() != (tmp_path / "c.zip").read_bytes()


def test_entries_are_sorted_files_of_1980_under_the_bundles_name(tmp_path, bundle):
    write_archive(bundle, tmp_path / "a.zip", leave_out=frozenset({"models/model.pt"}))
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        entries = archive.infolist()
    assert [entry.filename for entry in entries] == [
        f"some_bundle/{name}" for name in ("LICENSE", "configs/a.json", "configs/b.yaml")
    ]
    assert {entry.date_time for entry in entries} == {(1980, 1, 1, 0, 0, 0)}
    assert {stat.filemode(entry.external_attr >> 16) for entry in entries} == {"-rw-r--r--"}
    assert {entry.compress_type for entry in entries} == {zipfile.ZIP_STORED}


def test_monai_unpacks_it_to_the_same_files(tmp_path, bundle):
    write_archive(bundle, tmp_path / "some_bundle.zip")
    extractall(tmp_path / "some_bundle.zip", tmp_path / "out")
    for name in ("LICENSE", "configs/a.json", "configs/b.yaml", "models/model.pt"):
        assert (tmp_path / "out/some_bundle" / name).read_bytes() == (bundle / name).read_bytes()
    assert extract_archive(tmp_path / "some_bundle.zip", tmp_path / "again") == tmp_path / "again/some_bundle"


def zipped(path, *names: str, link: str | None = None):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "text")
        if link:
            entry = zipfile.ZipInfo(link)
            entry.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(entry, "../common")
    return path


@pytest.mark.parametrize(
    ("names", "link", "message"),
    [
        (["a/LICENSE"], "a/scripts/common", "the link a/scripts/common"),
        (["a/LICENSE", "a/../../x"], None, r"'a/\.\./\.\./x'.*not unpacked"),
        (["/etc/x"], None, "is outside of the folder"),
        (["a/x", "b/y"], None, "must contain one folder.*a, b"),
        (["x"], None, "must contain one folder"),
        ([], None, "nothing"),
        (["./", "a/LICENSE"], None, r"bad\.zip contains the entry '\./', which is no file"),
    ],
)
def test_a_zip_of_another_form_is_refused_before_anything_is_written(tmp_path, names, link, message):
    with pytest.raises(InputError, match=message):
        extract_archive(zipped(tmp_path / "bad.zip", *names, link=link), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_encrypted_zip_is_refused(tmp_path):
    path = zipped(tmp_path / "bad.zip", "a/LICENSE")
    content = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):  # zipfile cannot write encrypted entries
        content[content.index(signature) + flags] |= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.zip is encrypted"):
        extract_archive(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_compression_is_told(tmp_path):
    path = zipped(tmp_path / "bad.zip", "a/LICENSE")
    content = bytearray(path.read_bytes())
    for signature, method in ((b"PK\3\4", 8), (b"PK\1\2", 10)):
        content[content.index(signature) + method] = 99
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.zip cannot be read as a zip"):
        extract_archive(path, tmp_path / "out")


def test_what_is_no_zip_is_named(tmp_path):
    (tmp_path / "page.zip").write_text("<html>not found</html>")
    with pytest.raises(InputError, match=r"page\.zip cannot be read as a zip"):
        extract_archive(tmp_path / "page.zip", tmp_path / "out")
    with pytest.raises(InputError, match=r"none\.zip cannot be read"):
        extract_archive(tmp_path / "none.zip", tmp_path / "out")


def test_hashes_are_those_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 1000)
    assert file_hash(tmp_path / "a", "sha1") == hashlib.sha1(b"abc" * 1000).hexdigest()
    assert file_hash(tmp_path / "a", "sha256") == hashlib.sha256(b"abc" * 1000).hexdigest()


def test_a_zip_that_unpacks_to_far_more_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("zoo.package.archive.SMALL", 2**20)
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("b/zeros", bytes(2 * 2**20))
    with pytest.raises(InputError, match=r"claims 1 entries of 2097152 bytes in a file of \d+: it is no package"):
        extract_archive(path, tmp_path / "out")
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(10_001):
            archive.writestr(f"b/{number}", "")
    with pytest.raises(InputError, match="claims 10001 entries"):
        extract_archive(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_zip_larger_than_the_disk_is_not_unpacked(tmp_path, bundle, monkeypatch):
    write_archive(bundle, tmp_path / "some.zip")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(InputError, match="has 10 free"):
        extract_archive(tmp_path / "some.zip", tmp_path)


def test_a_zip_of_endless_folders_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "deep.zip", "w") as archive:
        archive.writestr("a/" * 1500 + "x", "")
    with pytest.raises(InputError, match="1501 folders deep"):
        extract_archive(tmp_path / "deep.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize(("mebibytes", "unpacked"), [(64, True), (65, False)])
def test_a_small_zip_may_unpack_to_64_mebibytes(tmp_path, mebibytes, unpacked):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", compression=zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bundle/zeros", bytes(mebibytes * 2**20))
    if unpacked:
        assert (extract_archive(tmp_path / "a.zip", tmp_path / "out") / "zeros").stat().st_size == mebibytes * 2**20
    else:
        with pytest.raises(InputError, match="claims 1 entries of 68157440 bytes"):
            extract_archive(tmp_path / "a.zip", tmp_path / "out")


def test_fifty_folders_are_unpacked_and_one_more_is_not(tmp_path):
    for depth in (50, 51):
        name = "/".join(["folder", *"abcdefghij" * 4, *"abcdefghij"[: depth - 41]])
        with zipfile.ZipFile(tmp_path / f"{depth}.zip", "w") as archive:
            archive.writestr(name, "")
    assert extract_archive(tmp_path / "50.zip", tmp_path / "out") == tmp_path / "out" / "folder"
    with pytest.raises(InputError) as refused:
        extract_archive(tmp_path / "51.zip", tmp_path / "out")
    assert f"an entry 51 folders deep, {name[:60]!r}...: it is" in str(refused.value)
