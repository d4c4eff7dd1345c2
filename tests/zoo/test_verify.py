# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The verifier passes packed bundles and reports each fault of a broken bundle under its own check."""

from __future__ import annotations

import json
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from bundles.common.weights.checkpoint_file import save_atomically
from zoo.checks import bundle_process
from zoo.checks.bundle_process import run_checks
from zoo.checks.workflow_checks import CHECKS
from zoo.pack import pack, stage
from zoo.verify import main, verify

from .conftest import save_task

SCHEMA = {
    "type": "object",
    "required": ["version"],
    "properties": {"version": {"type": "string"}, "authors": {"type": "string"}},
}


@pytest.fixture(scope="module")
def staged(tmp_path_factory, btcv_models) -> Path:
    return stage("swin_unetr_btcv_seg", folder=tmp_path_factory.mktemp("staged"), models=btcv_models)


@pytest.fixture
def bundle(tmp_path, staged) -> Path:
    """A valid bundle to break."""
    return Path(shutil.copytree(staged, tmp_path / staged.name))


def failures(folder: Path, **options) -> dict[str, str]:
    return {
        verdict.check: verdict.reason
        for verdict in verify(folder, build=False, **options)
        if verdict.outcome == "FAILED"
    }


def test_a_packed_bundle_passes_every_check_on_the_command_line(tmp_path, btcv_models, unbuilt, capsys):
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    package = pack("swin_unetr_btcv_seg", out=tmp_path / "out", models=btcv_models)
    assert main([str(package.archive), "--schema", str(schema), "--run_code"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    outcomes = {line[13:].split(":")[0]: line[:11].strip() for line in lines[:-1]}
    for check in ("ckpt_export", "torchrun on 2 GPUs", "flake8, black, isort"):
        assert outcomes.pop(check) == "not checked"
    assert outcomes.pop("schema of the metadata") == ("ok" if find_spec("jsonschema") else "not checked")
    assert set(outcomes.values()) == {"ok"}, lines
    assert set(CHECKS) <= outcomes.keys() and len(outcomes) == 21
    assert lines[-1].startswith("swin_unetr_btcv_seg: 2") and "FAILED" not in lines[-1]


@pytest.mark.parametrize("task", [None, "Task09_Spleen", "Task05_Prostate"])
def test_a_name_is_verified_as_it_would_be_packed(tmp_path, task, pretrained_models, capsys):
    if task is None:
        words = ["swin_unetr_pretrain", "--models", str(pretrained_models)]
    else:
        words = ["swin_unetr_msd", "--task", task, "--models", str(save_task(tmp_path, task))]
    assert main(words) == 0
    output = capsys.readouterr().out
    assert "FAILED" not in output
    assert all(f"ok           {check}" in output for check in CHECKS)


def remove(name):
    return lambda folder: (folder / name).unlink()


def write(name, text):
    def change(folder):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(text)

    return change


def metadata(**change):
    def write_changed(folder):
        path = folder / "configs/metadata.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change, indent=4))

    return write_changed


def pred(**change):
    def write_changed(folder):
        path = folder / "configs/metadata.json"
        content = json.loads(path.read_text())
        content["network_data_format"]["outputs"]["pred"] |= change
        path.write_text(json.dumps(content, indent=4))

    return write_changed


def packages(**change):
    def write_changed(folder):
        path = folder / "configs/metadata.json"
        content = json.loads(path.read_text())
        content["required_packages_version"] |= change
        path.write_text(json.dumps(content, indent=4))

    return write_changed


def without(key):
    def write_changed(folder):
        path = folder / "configs/metadata.json"
        content = json.loads(path.read_text())
        del content[key]
        path.write_text(json.dumps(content, indent=4))

    return write_changed


def as_link(folder):
    shutil.rmtree(folder / "scripts/common")
    (folder / "scripts/common").symlink_to("../../../bundles/common")


def one_indent(folder):
    path = folder / "configs/train.json"
    path.write_text(json.dumps(json.loads(path.read_text())))


def other_seed(folder):
    path = folder / "configs/train.yaml"
    path.write_text(path.read_text().replace("\nseed: 0 ", "\nseed: 1 "))


def large(folder):
    with open(folder / "docs/film.mp4", "wb") as file:
        os.truncate(file.fileno(), 25_000_001)


def harmful(folder):
    torch.save({"model": Path()}, folder / "models/model.pt")


def large_file(**entry):
    whole = {"path": "models/model.pt", "url": "https://example.org", "hash_val": "0" * 64, "hash_type": "sha256"}
    return write("large_files.yml", json.dumps({"large_files": [whole | entry]}))


@pytest.mark.parametrize(
    ("fault", "check", "message"),
    [
        (remove("LICENSE"), "licence", "LICENSE is missing"),
        (remove("docs/README.md"), "readme", "docs/README.md is missing"),
        (as_link, "only regular files", "scripts/common"),
        (write("scripts/__pycache__/a.pyc", ""), "only regular files", "scripts/__pycache__/a.pyc"),
        (write("configs/.train.yaml.swp", ""), "only regular files", ".train.yaml.swp"),
        (
            write("configs/.git/config", ""),
            "only regular files",
            "configs/.git/config",
        ),  # .git is only allowed at the top
        (write(".cache/other", ""), "only regular files", ".cache/other"),
        (metadata(network_data_format={}), "metadata", "inputs: image"),
        (pred(num_channels=13), "metadata", "num_channels 13, but channel_def names 14"),
        (pred(value_range=["0", "1"]), "metadata", "must be a list of numbers"),
        (pred(value_range=[]), "metadata", "value_range [], but it must be a list of numbers"),
        (metadata(version="0.2.0"), "version and changelog", "0.2.0 is missing from the changelog"),
        (
            metadata(changelog={"0.1.0": "a", "0.2.0": "b"}),
            "version and changelog",
            "0.2.0 of the changelog as the latest",
        ),
        (packages(einops=">=0.8"), "packages", "not pinned to one version: einops '>=0.8'"),
        (packages(einops="0.1.0"), "packages", "einops 0.1.0 (here "),
        (packages(nopackage="1.0"), "packages", "nopackage 1.0 (here none)"),
        (metadata(pytorch_version="1.9.0"), "packages", "torch 1.9.0 (here "),
        (
            without("required_packages_version"),
            "packages",
            "required_packages_version in configs/metadata.json is None",
        ),
        (remove("configs/inference.json"), "JSON", "missing: configs/inference.json."),
        (remove("configs/train.json"), "JSON", "missing: configs/train.json."),
        (one_indent, "JSON", "train.json is not indented by 4"),
        (other_seed, "JSON", "train.json differs from the YAML file of the same name"),
        (write("configs/extra.yaml", "a: /home/ann\n"), "no paths of one machine", "extra.yaml, a: /home/ann"),
        (large_file(), "large files", "large_files.yml lists 0000"),
        (large_file(path="models/other.pt"), "large files", "models/other.pt is missing"),
        (large_file(path="../other.pt"), "large files", "is outside the bundle"),
        (large_file(hash_type=""), "large files", "lacks hash_type"),
        (large, "sizes", "docs/film.mp4 (25 MB)"),
        (remove("models/model.pt"), "weights", "model.pt does not exist"),
        (harmful, "weights", "weights_only=True"),
        (pred(channel_def={"0": "background", **{str(n): f"organ {n}" for n in range(1, 14)}}), "labels", "organ 1"),
    ],
)
def test_each_fault_is_told_by_its_check(bundle, fault, check, message):
    assert failures(bundle) == {}
    fault(bundle)
    found = failures(bundle)
    assert message in found[check]
    beside = {"large files": {"sizes"}, "weights": {"labels"}, "metadata": {"labels"}}.get(check, set())
    assert found.keys() <= {check} | beside


def test_what_hugging_face_and_git_lay_beside_a_download_is_no_fault(bundle):
    for name in (".cache/huggingface/download/LICENSE.metadata", ".gitattributes", ".git/HEAD"):
        write(name, "text")(bundle)
    with open(bundle / ".git/pack", "wb") as file:
        os.truncate(file.fileno(), 25_000_001)
    assert failures(bundle) == {}


def test_the_version_of_a_folder_must_not_be_released_yet(bundle, tmp_path, monkeypatch, capsys):
    check, package = "version not released yet", f"{bundle.name}_v0.1.0"
    (verdict,) = [verdict for verdict in verify(bundle, build=False) if verdict.check == check]
    assert verdict.outcome == "not checked" and "--model_info FILE" in verdict.reason
    entry = {"checksum": "11", "source": "x.zip"}
    other = tmp_path / "other.json"
    other.write_text(json.dumps({f"{bundle.name}_v0.0.9": entry}))
    (verdict,) = [verdict for verdict in verify(bundle, model_info=other, build=False) if verdict.check == check]
    assert verdict.outcome == "ok"
    index = tmp_path / "model_info.json"
    index.write_text(json.dumps({package: entry}))
    assert f"{index} already contains {package}" in failures(bundle, model_info=index)[check]
    monkeypatch.setattr("zoo.verify.run_checks", lambda folder: iter(()))
    assert main([str(bundle), "--model_info", str(index)]) == 1
    assert f"FAILED       {check}" in capsys.readouterr().out


def test_a_broken_file_does_not_end_the_verification(bundle):
    (bundle / "configs/metadata.json").write_text("{")
    (bundle / "configs/train.json").write_text("{")
    (bundle / "large_files.yml").write_text("a: [")
    found = failures(bundle)
    assert {"metadata", "version and changelog", "packages", "JSON", "large files", "sizes", "labels"} <= found.keys()
    assert "licence" not in found and "weights" not in found


def test_names_that_clients_misread_are_told(bundle):
    assert "'_v'" in failures(bundle.rename(bundle.with_name("hepatic_vessel")))["name"]


def test_the_schema_is_held_to_where_there_is_one(bundle, tmp_path, monkeypatch):
    pytest.importorskip("jsonschema")
    schema = tmp_path / "meta.json"
    schema.write_text(json.dumps(SCHEMA))
    metadata(authors=["a", "b"])(bundle)
    assert "authors: ['a', 'b'] is not of type 'string'" in failures(bundle, schema=schema)["schema of the metadata"]
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))  # where a permanent copy may be kept
    assert failures(bundle) == {}
    name = json.loads((bundle / "configs/metadata.json").read_text())["schema"].rpartition("/")[2]
    (tmp_path / "torch/hub/schema").mkdir(parents=True)
    schema.rename(tmp_path / "torch/hub/schema" / name)
    assert failures(bundle).keys() == {"schema of the metadata"}


@pytest.mark.usefixtures("unbuilt")
def test_a_zip_is_held_to_its_name_and_its_release(tmp_path, btcv_models, staged):
    package = pack("swin_unetr_btcv_seg", out=tmp_path, models=btcv_models)
    check = "zip name and release"
    verdicts = {v.check: v for v in verify(staged, archive=package.archive, build=False)}
    assert verdicts[check].outcome == "ok"
    other = shutil.copyfile(package.archive, tmp_path / "bundle.zip")
    assert "must be named swin_unetr_btcv_seg_v0.1.0.zip" in failures(staged, archive=other)[check]
    (tmp_path / "alone").mkdir()
    alone = shutil.copy(package.archive, tmp_path / "alone")
    verdicts = {v.check: v for v in verify(staged, archive=Path(alone), build=False)}
    assert verdicts[check].outcome == "not checked"
    with open(package.archive, "ab") as file:
        file.write(b"\0")
    assert "released with other bytes" in failures(staged, archive=package.archive)[check]


def test_what_builds_wrong_is_told_by_its_check(bundle):
    content = torch.load(bundle / "models/model.pt", weights_only=True)
    content["model"]["out.conv.conv.bias"] = torch.zeros(3)
    save_atomically(content, bundle / "models/model.pt")
    pred(num_channels=9)(bundle)
    for name, old, new in [
        ("inference.json", '"spacing": "$@row[\'spacing\']"', '"spacing": [1.5, 1.5, 2.0]'),
        ("inference.json", '\n    "handlers": [', '\n    "listeners": ['),
        ("inference.json", '"@handlers"', '"@listeners"'),
        ("evaluate.yaml", "case_by_case.CaseEvaluator", "case_by_case.CaseJudge"),
        ("train.json", '"epoch_length": "$@plan[\'epoch_length\']"', '"epoch_length": "$@plan[\'epoch\']"'),
    ]:
        path = bundle / "configs" / name
        assert old in path.read_text(), (name, old)
        path.write_text(path.read_text().replace(old, new))
    found = dict(run_checks(bundle))
    assert list(found) == list(CHECKS)
    assert (
        "1 with a different shape" in found["weights fit network_def"]
        and "out.conv.conv.bias" in found["weights fit network_def"]
    )
    assert "`14` doesn't match: `9`" in found["network_def as in the metadata"]
    assert "spacing is [1.5, 1.5, 2.0], but was [4.0, 4.0, 5.0] in training" in found["inference as in training"]
    assert "epoch" in found["properties of train"] and "epoch" in found["properties of train for torchrun"]
    assert "CaseJudge" in found["properties of evaluate"]
    assert found["properties of inference"] == "ValueError: missing, or under another id: handlers"


def test_the_workflow_for_torchrun_is_built_with_its_overlay(bundle):
    overlay = bundle / "configs/multi_gpu_train.yaml"
    overlay.write_text(overlay.read_text() + "validate::evaluator::_target_: SupervisedJudge\n")
    checks = ["properties of train", "properties of train for torchrun"]
    found = dict(run_checks(bundle, checks))
    assert found[checks[0]] is None
    assert "SupervisedJudge" in found[checks[1]]


def test_a_process_that_dies_fails_all_its_checks(tmp_path, bundle, monkeypatch):
    program = tmp_path / "dies.py"
    program.write_text("import sys\nprint('out of memory')\nsys.exit(3)\n")
    monkeypatch.setattr(bundle_process, "PROGRAM", program)
    found = dict(run_checks(bundle, ["weights fit network_def", "properties of train"]))
    assert found.keys() == {"weights fit network_def", "properties of train"}
    assert set(found.values()) == {"the process ended with status 3: out of memory"}


def test_the_process_gets_no_tokens(tmp_path, bundle, monkeypatch):
    program = tmp_path / "looks.py"
    program.write_text(
        "import json, os\nprint('::check ' + json.dumps({'check': 'names', 'failure': ' '.join(os.environ)}))\n"
    )
    monkeypatch.setattr(bundle_process, "PROGRAM", program)
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "HTTPS_PROXY", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(name, "secret")
    names = dict(run_checks(bundle, ["names"]))["names"].split()
    assert {"PATH", "PYTHONPATH"} <= set(names)
    assert set(names) <= {
        *bundle_process.PASSED_ON,
        "PYTHONPATH",
        "PYTHONDONTWRITEBYTECODE",
        "PYTHONWARNINGS",
        "LC_CTYPE",
    }


def test_code_of_a_folder_or_zip_runs_only_if_it_is_allowed(bundle, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr("zoo.verify.run_checks", lambda folder: ran.append(folder) or iter(()))
    assert main([str(bundle)]) == 0 and not ran
    assert "runs the bundle's code on this machine: add --run_code if you trust its author" in capsys.readouterr().out
    assert main([str(bundle), "--run_code"]) == 0 and ran == [bundle]
    assert capsys.readouterr().out.startswith(f"{bundle.name}: its code will run on this machine\n")
    (bundle / "scripts" / "more.py").symlink_to(bundle / "LICENSE")
    assert main([str(bundle), "--run_code"]) == 1 and len(ran) == 1
    assert "networks and workflows: nothing is built after only regular files failed" in capsys.readouterr().out


def test_the_process_sees_the_bundles_scripts_and_nothing_of_this_project(tmp_path, bundle, monkeypatch):
    program = tmp_path / "looks.py"
    program.write_text(
        "import sys\nprint('::check ' + __import__('json').dumps({'check': 'path', 'failure': repr(sys.path)}))\n"
    )
    monkeypatch.setattr(bundle_process, "PROGRAM", program)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    path = eval(dict(run_checks(bundle, ["path"]))["path"])
    assert path[0] == str(bundle)
    assert str(Path(__file__).parents[2]) not in path and str(tmp_path) not in path
    assert sys.executable  # the process uses the interpreter of the tests


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["swin_unetr_msd"], "has many tasks"),
        (["none.zip"], "none.zip cannot be read as a zip"),
        (["nothing"], "nothing is not a bundle"),
        (["swin_unetr_btcv_seg", "--schema", "none.json"], "--schema none.json does not exist"),
        (["swin_unetr_btcv_seg", "--model_info", "none.json"], "--model_info none.json does not exist"),
        ([str(Path(__file__).parent), "--task", "Task09_Spleen"], "--task and --models only apply to a bundle's name"),
    ],
)
def test_what_cannot_be_verified_is_refused(words, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 1
    assert message in capsys.readouterr().out
