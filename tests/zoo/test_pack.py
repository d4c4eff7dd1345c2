# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Packing is reproducible, and refuses bundles that would fail for clients before it writes anything."""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from bundles.common.errors import InputError
from bundles.common.weights.checkpoint_file import save_atomically
from zoo.pack import main, pack
from zoo.package.archive import extract_archive
from zoo.package.bundle_files import files_of

from .conftest import ORGANS, save_btcv, save_pretrained, save_task


def contents(folder: Path) -> dict[str, bytes]:
    return {path.as_posix(): (folder / path).read_bytes() for path in files_of(folder)} if folder.exists() else {}


def refused(message: str, bundle: str | Path, *, out: Path, **options) -> None:
    """Assert that packing is refused with this message and leaves the output folder unchanged."""
    before = contents(out)
    with pytest.raises(InputError, match=message):
        pack(bundle, out=out, **options)
    assert contents(out) == before
    assert out.exists() == bool(before)


def test_the_command_writes_zip_list_and_repository(tmp_path, btcv_models, capsys):
    assert main(["swin_unetr_btcv_seg", "--models", str(btcv_models), "--out", str(tmp_path)]) == 0
    archive = tmp_path / "swin_unetr_btcv_seg_v0.1.0.zip"
    checksum = hashlib.sha1(archive.read_bytes()).hexdigest()
    assert json.loads((tmp_path / "model_info.json").read_text()) == {
        "swin_unetr_btcv_seg_v0.1.0": {"checksum": checksum, "source": archive.name}
    }
    output = capsys.readouterr().out
    assert str(archive) in output and checksum in output and "added" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["huggingface", "model_info.json", archive.name]
    assert (tmp_path / "huggingface/swin_unetr_btcv_seg/models/model.pt").is_file()
    folder = extract_archive(archive, tmp_path / "unpacked")
    files = contents(folder)
    assert files["models/model.pt"] == (btcv_models / "model.pt").read_bytes()
    assert {
        "LICENSE",
        "configs/inference.json",
        "configs/train.json",
        "docs/README.md",
        "scripts/common/weights/loading.py",
    } <= files.keys()
    with zipfile.ZipFile(archive) as entries:
        names = entries.namelist()
    assert names == sorted(names)
    assert not any(re.search(r"__pycache__|\.pyc|^\w+/(output|data)/|/\.", name) for name in names)


@pytest.mark.usefixtures("unbuilt")
def test_a_copy_of_the_tree_with_other_times_gives_the_same_bytes(tmp_path, tree, btcv_models):
    first = pack("swin_unetr_btcv_seg", out=tmp_path / "a", models=btcv_models)
    for path in (tree / "swin_unetr_btcv_seg").rglob("*"):
        os.utime(path, (1_500_000_000, 1_500_000_000))
    save_btcv(tree / "swin_unetr_btcv_seg/models")
    (tree / "common/__pycache__").mkdir(exist_ok=True)
    second = pack(tree / "swin_unetr_btcv_seg", out=tmp_path / "b")  # the bundle's own weights
    assert first.checksum == second.checksum
    assert first.archive.read_bytes() == second.archive.read_bytes()
    assert contents(first.hugging_face) == contents(second.hugging_face)


@pytest.mark.usefixtures("unbuilt")
@pytest.mark.parametrize("name", ["swin_unetr_msd", "swin_unetr_pretrain"])
def test_packing_twice_gives_the_same_bytes_and_says_so(tmp_path, name, spleen_models, pretrained_models, capsys):
    words = {"swin_unetr_msd": ["--task", "Task09_Spleen", "--models"], "swin_unetr_pretrain": ["--models"]}[name]
    words = [name, *words, str(spleen_models if "msd" in name else pretrained_models), "--out", str(tmp_path)]
    assert main(words) == 0
    before = contents(tmp_path)
    assert main(words) == 0
    assert "same bytes as before" in capsys.readouterr().out
    assert contents(tmp_path) == before


@pytest.mark.usefixtures("unbuilt")
def test_the_pre_training_gives_away_its_encoder_and_a_segmenter_does_not(tmp_path, pretrained_models, btcv_models):
    package = pack("swin_unetr_pretrain", out=tmp_path, models=pretrained_models)
    assert (package.hugging_face / "models/encoder.pt").is_file()
    save_btcv(tmp_path / "m")
    for name in ("encoder.pt", "last.pt", "best.pt", "previous_model.pt"):
        (tmp_path / "m" / name).touch()
    package = pack("swin_unetr_btcv_seg", out=tmp_path, models=tmp_path / "m")
    assert [path.name for path in (package.hugging_face / "models").iterdir()] == ["model.pt"]


@pytest.mark.usefixtures("unbuilt")
def test_the_address_of_the_zip_stands_in_the_list(tmp_path, btcv_models):
    prefix = "https://example.org/releases/download/zoo"
    package = pack("swin_unetr_btcv_seg", out=tmp_path, models=btcv_models, url_prefix=prefix)
    (entry,) = json.loads((tmp_path / "model_info.json").read_text()).values()
    assert entry == {"checksum": package.checksum, "source": f"{prefix}/swin_unetr_btcv_seg_v0.1.0.zip"}


@pytest.mark.parametrize("below", ["", "new/out"])
def test_an_output_folder_that_is_a_file_is_refused(tmp_path, btcv_models, capsys, below):
    (tmp_path / "out").write_text("text")
    out = tmp_path / "out" / below
    assert main(["swin_unetr_btcv_seg", "--models", str(btcv_models), "--out", str(out)]) == 1
    assert f"Stopped: --out {out}: {tmp_path / 'out'} is a file" in capsys.readouterr().out


def test_an_entry_over_several_lines_is_told(tmp_path, tree, btcv_models):
    path = tree / "swin_unetr_btcv_seg/configs/train.yaml"
    text = re.sub(r"^preset: (\w+)", r"preset:\n  \1", path.read_text(), flags=re.MULTILINE)
    path.write_text(text)
    refused(
        r"configs/train\.yaml: preset cannot be set.*same line",
        tree / "swin_unetr_btcv_seg",
        out=tmp_path / "out",
        models=btcv_models,
    )


def test_missing_weights_are_refused_on_the_command_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for name in ("swin_unetr_btcv_seg", "swin_unetr_pretrain"):
        assert main([name, "--models", str(tmp_path / "empty"), "--out", str(tmp_path / "out")]) == 1
        output = capsys.readouterr().out
        assert f"Stopped: {tmp_path / 'empty' / 'model.pt'} does not exist" in output and "--models" in output
    assert not (tmp_path / "out").exists()


def test_a_bundle_without_weights_of_its_own_is_refused(tmp_path, tree):
    refused(
        r"swin_unetr_msd/models/model\.pt does not exist",
        tree / "swin_unetr_msd",
        out=tmp_path / "out",
        task="Task03_Liver",
    )


def test_a_dead_link_is_refused(tmp_path, tree, btcv_models):
    (tree / "swin_unetr_btcv_seg/scripts/common").unlink()
    (tree / "swin_unetr_btcv_seg/scripts/common").symlink_to("../../gone")
    refused(
        "scripts/common is missing or a broken link",
        tree / "swin_unetr_btcv_seg",
        out=tmp_path / "out",
        models=btcv_models,
    )


@pytest.mark.usefixtures("unbuilt")
def test_a_released_version_with_other_bytes_is_refused(tmp_path, tree, btcv_models):
    out = tmp_path / "out"
    pack("swin_unetr_btcv_seg", out=out, models=btcv_models)
    with open(tree / "swin_unetr_btcv_seg/docs/README.md", "a") as readme:
        readme.write("One more word.\n")
    refused(
        r"swin_unetr_btcv_seg_v0\.1\.0 was released with other bytes.*Raise version.*changelog",
        tree / "swin_unetr_btcv_seg",
        out=out,
        models=btcv_models,
    )
    change_metadata(
        tree / "swin_unetr_btcv_seg", version="0.1.1", changelog={"0.1.0": "first", "0.1.1": "one more word"}
    )
    package = pack(tree / "swin_unetr_btcv_seg", out=out, models=btcv_models)
    assert package.archive.name == "swin_unetr_btcv_seg_v0.1.1.zip" and not package.released_before
    assert len(json.loads((out / "model_info.json").read_text())) == 2


def change_metadata(bundle: Path, **change) -> None:
    path = bundle / "configs/metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change, indent=4))


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("train.yaml", "extra_dir: /home/ann/data  # mine\n"),
        ("evaluate.yaml", "extra_dir: $'C:/scans' + '/a'\n"),
        ("logging.conf", "[handler_file]\nclass=FileHandler\nargs=('/var/log/x.log',)\n"),
    ],
)
def test_a_config_that_names_a_path_of_one_machine_is_refused(tmp_path, tree, btcv_models, file, text):
    with open(tree / "swin_unetr_btcv_seg/configs" / file, "a") as config:
        config.write(text)
    message = f"paths of one machine: .*{re.escape(file)}, "
    refused(message, tree / "swin_unetr_btcv_seg", out=tmp_path / "out", models=btcv_models)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "0.2.0"}, r"version 0\.2\.0 is missing from the changelog"),
        ({"changelog": {"0.1.0": ""}}, r"version 0\.1\.0 is missing from the changelog"),
        ({"version": "next"}, "version 'next' .*must be numbers"),
        (
            {"version": "0.10.0", "changelog": {"0.9.0": "a", "0.10.0": "b"}},
            r"version 0\.10\.0: clients sort versions as text.*0\.9\.0",
        ),
    ],
)
def test_a_version_that_is_not_told_or_not_the_latest_is_refused(tmp_path, tree, btcv_models, change, message):
    change_metadata(tree / "swin_unetr_btcv_seg", **change)
    refused(message, tree / "swin_unetr_btcv_seg", out=tmp_path / "out", models=btcv_models)


class Harm:
    """Not a tensor, number, text or container."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {}, "more": Harm()}, "was refused: it contains .*Harm.*weights_only=True"),
        ({"model": {}, "best": np.float64(0.5)}, "NumPy numbers, which torch.load.weights_only=True. refuses"),
        (b"not a checkpoint", "cannot be read as a checkpoint"),
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-LFS pointer"),
    ],
)
def test_weights_that_clients_cannot_open_are_refused(tmp_path, content, message):
    path = tmp_path / "m/model.pt"
    path.parent.mkdir()
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    refused(rf"model\.pt.*{message}", "swin_unetr_btcv_seg", out=tmp_path / "out", models=path.parent)


def test_weights_of_other_labels_are_refused(tmp_path):
    models = save_btcv(tmp_path / "m", labels={**ORGANS, "1": "kidneys"})
    refused(
        "trained for the labels .*kidneys.*BTCV has .*spleen",
        "swin_unetr_btcv_seg",
        out=tmp_path / "out",
        models=models,
    )


def test_an_encoder_of_another_training_is_refused(tmp_path):
    models = save_pretrained(tmp_path / "m")
    content = torch.load(models / "encoder.pt", weights_only=True)
    content["state_dict"]["swinViT.patch_embed.proj.weight"] += 1
    save_atomically(content, models / "encoder.pt")
    refused(
        r"encoder\.pt and .*model\.pt contain different encoders",
        "swin_unetr_pretrain",
        out=tmp_path / "out",
        models=models,
    )


def test_weights_that_do_not_fit_the_network_are_refused(tmp_path):
    models = save_task(tmp_path / "m", "Task09_Spleen")
    content = torch.load(models / "model.pt", weights_only=True)
    del content["model"]["out.conv.conv.bias"]
    save_atomically(content, models / "model.pt")
    refused(
        rf"The check 'weights fit network_def' failed: {re.escape(str(models))}/model\.pt does not fit the network: 1 tensor missing .out\.conv\.conv\.bias",
        "swin_unetr_msd",
        out=tmp_path / "out",
        task="Task09_Spleen",
        models=models,
    )


def test_an_unknown_bundle_offers_the_nearest(capsys):
    assert main(["swin_unetr_btvc"]) == 1
    assert "Did you mean swin_unetr_btcv_seg" in capsys.readouterr().out
