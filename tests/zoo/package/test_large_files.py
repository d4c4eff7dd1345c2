# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Weights that are too large for the zoo are hosted outside of the package, with URL and hash."""

from __future__ import annotations

import hashlib
import zipfile

import pytest
import yaml
from monai.apps.utils import HashCheckError
from monai.bundle import download_large_files

from bundles.common.errors import InputError
from zoo.pack import main, pack
from zoo.package import large_files
from zoo.package.archive import extract_archive
from zoo.package.large_files import list_large_files, read_large_files
from zoo.verify import verify


@pytest.fixture
def bundle(tmp_path):
    (tmp_path / "bundle/models").mkdir(parents=True)
    (tmp_path / "bundle/models/model.pt").write_bytes(b"x" * 2_000)
    (tmp_path / "bundle/models/encoder.pt").write_bytes(b"y" * 500)
    return tmp_path / "bundle"


@pytest.fixture
def small_limit(monkeypatch):
    monkeypatch.setattr(large_files, "LARGE", 1_000)


def test_large_files_are_listed_with_address_and_hash(bundle, small_limit):
    assert list_large_files(bundle, "https://example.org/files/") == ["models/model.pt"]
    assert yaml.safe_load((bundle / "large_files.yml").read_text())["large_files"] == [
        {
            "path": "models/model.pt",
            "url": "https://example.org/files/models/model.pt",
            "hash_val": hashlib.sha256(b"x" * 2_000).hexdigest(),
            "hash_type": "sha256",
        }
    ]


def test_without_an_address_everything_stays_in(bundle, small_limit):
    assert list_large_files(bundle, None) == []
    assert read_large_files(bundle) == []


def test_the_limit_is_the_zoos(bundle):
    assert list_large_files(bundle, "https://example.org") == []
    assert large_files.LARGE == 25_000_000


def test_monai_fetches_what_the_list_names_and_checks_its_hash(bundle, small_limit, tmp_path):
    (tmp_path / "server/models").mkdir(parents=True)
    list_large_files(bundle, (tmp_path / "server").as_uri())
    (bundle / "models/model.pt").rename(tmp_path / "server/models/model.pt")
    download_large_files(str(bundle))
    assert (bundle / "models/model.pt").read_bytes() == b"x" * 2_000
    (bundle / "models/model.pt").unlink()
    (tmp_path / "server/models/model.pt").write_bytes(b"z" * 2_000)
    with pytest.raises(HashCheckError, match="sha256"):
        download_large_files(str(bundle))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("large_files: [{path: a, url: b, hash_val: c}]", "lacks hash_type"),
        ("large_files: [{path: a, url: b, hash_val: '', hash_type: md5}]", "lacks hash_val"),
        ("large_files: [{path: a, url: b, hash_val: c, hash_type: crc}]", "'crc'.*sha256"),
        ("files: []", "must contain a list"),
    ],
)
def test_a_list_that_clients_could_not_use_is_refused(bundle, text, message):
    (bundle / "large_files.yml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_large_files(bundle)


def test_a_package_leaves_them_out_of_the_zip_and_in_the_repository(tmp_path, btcv_models, unbuilt, monkeypatch):
    for module in ("package.large_files", "checks.file_checks"):
        monkeypatch.setattr(f"zoo.{module}.LARGE", 1_000_000)
    package = pack("swin_unetr_btcv_seg", out=tmp_path, models=btcv_models, large_files_url="https://example.org/files")
    assert package.left_out == ("models/model.pt",)
    with zipfile.ZipFile(package.archive) as archive:
        assert not any(name.endswith(".pt") for name in archive.namelist())
    assert (package.hugging_face / "models/model.pt").read_bytes() == (btcv_models / "model.pt").read_bytes()
    failed = {verdict.check for verdict in verify(package.hugging_face, build=False) if verdict.outcome == "FAILED"}
    assert failed == set()
    folder = extract_archive(package.archive, tmp_path / "unpacked")
    reasons = {verdict.check: verdict.reason for verdict in verify(folder, build=False) if verdict.outcome == "FAILED"}
    assert "models/model.pt is missing" in reasons["large files"] and "download_large_files" in reasons["large files"]
    (folder / "models").mkdir()
    (folder / "models/model.pt").write_bytes((btcv_models / "model.pt").read_bytes()[:-1] + b"?")
    reasons = {verdict.check: verdict.reason for verdict in verify(folder, build=False) if verdict.outcome == "FAILED"}
    assert "large_files.yml lists" in reasons["large files"]


def test_without_the_option_they_are_inside_and_the_zoos_limit_is_named(tmp_path, btcv_models, unbuilt, monkeypatch):
    for module in ("package.large_files", "checks.file_checks"):
        monkeypatch.setattr(f"zoo.{module}.LARGE", 1_000_000)
    package = pack("swin_unetr_btcv_seg", out=tmp_path, models=btcv_models)
    assert package.left_out == ()
    folder = extract_archive(package.archive, tmp_path / "unpacked")
    reasons = {verdict.check: verdict.reason for verdict in verify(folder, build=False) if verdict.outcome == "FAILED"}
    assert (
        reasons.keys() == {"sizes"}
        and "models/model.pt" in reasons["sizes"]
        and "--large_files_url" in reasons["sizes"]
    )


def test_packing_names_what_passes_and_what_does_not(tmp_path, btcv_models, unbuilt, monkeypatch, capsys):
    words = ["swin_unetr_btcv_seg", "--models", str(btcv_models), "--out"]
    archive, repository = "swin_unetr_btcv_seg_v0.1.0.zip", "huggingface/swin_unetr_btcv_seg"
    assert main([*words, str(tmp_path / "small")]) == 0
    output = capsys.readouterr().out
    assert f"zoo.verify {tmp_path / 'small' / archive}\n" in output and "sizes" not in output
    monkeypatch.setattr(large_files, "LARGE", 1_000_000)
    assert main([*words, str(tmp_path / "inside")]) == 0
    output = capsys.readouterr().out
    assert f"zoo.verify {tmp_path / 'inside' / archive}\n" in output
    assert (
        "models/model.pt is over 25 MB" in output
        and "'sizes' of zoo.verify fails" in output
        and "--large_files_url URL" in output
    )
    assert main([*words, str(tmp_path / "beside"), "--large_files_url", "https://example.org"]) == 0
    output = capsys.readouterr().out
    assert f"zoo.verify {tmp_path / 'beside' / repository}\n" in output and "sizes" not in output
