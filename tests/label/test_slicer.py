# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A session of 3D Slicer's extension MONAILabel, request by request: a scan, its mask and names, a label, a training.

Like the work of an annotator, the tests depend on the previous ones. Slicer itself is not run.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from tools.synthetic_patient import ORGANS
from zoo.package.archive import file_hash

from .server import BTCV, SPLEEN, TRAINS_WITHIN, needs_monai_label
from .slicer_client import PANELS, Refused, SlicerClient, segment_names

pytestmark = needs_monai_label
FROM_DICOM = "4: Abdomen 1.5 B30f"  # Slicer's name for a volume of a DICOM series: number, description


@pytest.fixture(scope="module")
def client(tmp_path_factory, server) -> SlicerClient:
    client = SlicerClient(server.url + "/", tmp_path_factory.mktemp("slicer"))
    client.fetch_info()
    return client


@pytest.fixture(scope="module")
def mask(server, tmp_path_factory) -> np.ndarray:
    """The mask of ``case_2`` as another client gets it (Z, Y, X); test_monai_label.py compares it with the bundle's."""
    path = tmp_path_factory.mktemp("mask") / "mask.nii.gz"
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(server.infer(BTCV, "case_2", path)))


@pytest.fixture(scope="module")
def saved_volume(client, data) -> Path:
    """A volume as Slicer saves it before it sends it: by ITK, in a file with a random name."""
    path = client.folder / "tmp1x2y3z.nii.gz"
    SimpleITK.WriteImage(SimpleITK.ReadImage(data / "btcv/image/case_2.nii.gz"), path)
    return path


@pytest.fixture(scope="module")
def submitted(client, data) -> dict[str, dict]:
    """Two labels are submitted."""
    names = client.info["labels"]
    return {
        case: client.save_label(case, data / f"btcv/label/{case}.nii.gz", names, BTCV) for case in ("case_0", "case_1")
    }


def goes_on(client: SlicerClient) -> bool:
    """Whether a training waits for its process or has one; `train_runs` knows of the process alone."""
    return client.train_status()["status"] in ("SUBMITTED", "RUNNING")


def ends(client: SlicerClient) -> dict:
    until = time.monotonic() + TRAINS_WITHIN
    while goes_on(client):
        assert time.monotonic() < until, client.train_status()
        time.sleep(1)
    assert not client.train_runs()
    return client.train_status()


def test_the_panels_offer_both_models_for_segmentation_only(client):
    assert "config" not in client.info, "the extension would ask for a newer server"
    assert client.models("Auto Segmentation") == [BTCV, SPLEEN]
    assert {panel: client.models(panel) for panel in PANELS if panel != "Auto Segmentation"} == {
        "SmartEdit": [],
        "Scribbles": [],
    }
    assert all(model["description"] for model in client.info["models"].values())  # shown as a tooltip
    assert list(client.info["trainers"]) == [BTCV, SPLEEN]
    assert set(client.info["strategies"]) == {"first", "random"}


def test_the_segment_editor_starts_with_the_organs_in_the_order_of_their_values(client):
    """Slicer saves a label with the place of its segment in this list."""
    assert client.info["labels"] == list(ORGANS.values())


@pytest.mark.parametrize("model", [BTCV, SPLEEN])
def test_the_names_of_a_model_count_its_values_from_one(client, model):
    labels = client.info["models"][model]["labels"]
    assert [labels[name] for name in segment_names(labels)] == list(range(1, len(labels) + 1))


def test_next_sample_is_a_scan_of_the_studies(client, server, data):
    sample = client.next_sample("first")
    assert sample["id"] == "case_0" and Path(sample["path"]) == server.studies / "case_0.nii.gz"
    assert client.download_image("case_0") == (data / "btcv/image/case_0.nii.gz").read_bytes()
    assert client.datastore()["objects"]["case_0"]["labels"] == {}  # no "original" label to show


def test_run_gives_the_mask_on_the_grid_of_the_scan_and_its_names(client, mask, data):
    path, params = client.infer(BTCV, "case_2")
    assert path.suffix == ".nrrd"
    image, scan = SimpleITK.ReadImage(path), SimpleITK.ReadImage(data / "btcv/image/case_2.nii.gz")
    assert image.GetPixelID() == SimpleITK.sitkUInt8 and image.GetSize() == scan.GetSize()
    for geometry in ("GetOrigin", "GetSpacing", "GetDirection"):
        np.testing.assert_allclose(getattr(image, geometry)(), getattr(scan, geometry)(), atol=1e-3)
    assert np.array_equal(SimpleITK.GetArrayFromImage(image), mask) and len(np.unique(mask)) > 1
    assert params["label_names"] == {name: value for value, name in ORGANS.items()}
    assert segment_names(params["label_names"]) == list(ORGANS.values())


def test_the_other_model_has_its_own_names(client):
    path, params = client.infer(SPLEEN, "case_2")
    assert params["label_names"] == {"spleen": 1}
    assert set(np.unique(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(path)))) <= {0, 1}


def test_run_with_a_scan_that_the_server_does_not_have_yet(client, server, saved_volume, mask):
    assert client.upload_image(saved_volume, FROM_DICOM) == FROM_DICOM
    assert (server.studies / f"{FROM_DICOM}.nii.gz").read_bytes() == saved_volume.read_bytes()
    path, _ = client.infer(BTCV, FROM_DICOM)
    assert np.array_equal(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(path)), mask)
    assert client.fetch_info()["datastore"]["total"] == 4


def test_a_scan_in_another_format_is_refused(client, server, saved_volume):
    """So the how-to says to leave "File Extension" as it is."""
    volume = saved_volume.with_name("tmp9.nrrd")
    SimpleITK.WriteImage(SimpleITK.ReadImage(saved_volume), volume)
    client.upload_image(volume, "other format")
    with pytest.raises(Refused, match="500"):
        client.infer(BTCV, "other format")
    (server.studies / "other format.nrrd").unlink()


def test_a_volume_replaces_the_scan_of_its_name(client, server, saved_volume, data):
    kept = server.studies / "twice.nii.gz"
    for volume in (data / "btcv/image/case_0.nii.gz", saved_volume):
        client.upload_image(volume, "twice")
        assert kept.read_bytes() == volume.read_bytes()
    kept.unlink()


def test_run_in_a_session_leaves_nothing_in_the_studies(client, server, saved_volume, mask):
    session = client.create_session(saved_volume)
    assert Path(client.get_session(session)["image"]).name == saved_volume.name
    path, params = client.infer(BTCV, "not in the studies", session)
    assert np.array_equal(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(path)), mask)
    assert params["label_names"]["left_adrenal_gland"] == 13
    assert client.fetch_info()["datastore"]["total"] == 4
    with pytest.raises(Refused, match="404"):
        client.get_session("another")


def test_submitted_labels_are_stored_voxel_for_voxel(client, server, submitted, data):
    assert submitted["case_1"] == {"image": "case_1", "label": "case_1"}
    stored = server.studies / "labels/final/case_1.nii.gz"
    assert stored.read_bytes() == (data / "btcv/label/case_1.nii.gz").read_bytes()
    label = client.datastore()["objects"]["case_1"]["labels"]["final"]
    assert label["info"]["label_info"][12] == {"name": "left_adrenal_gland", "idx": 13}
    assert label["info"]["model"] == BTCV
    assert client.download_label("case_1", "final") == stored.read_bytes()
    datastore = client.fetch_info()["datastore"]
    assert (datastore["completed"], datastore["total"]) == (2, 4)  # the bar of Active Learning
    assert client.next_sample("first")["id"] not in submitted  # a scan without a label is next


def test_stop_ends_a_training_and_leaves_the_model(client, server, submitted):
    model = server.models / BTCV / "models/model.pt"
    before = file_hash(model, "sha256")
    client.train_start(BTCV, max_epochs=1000)
    until = time.monotonic() + TRAINS_WITHIN
    while not any(" mean_dice " in line or " loss " in line for line in client.train_status().get("details", [])):
        assert goes_on(client), client.train_status()
        assert time.monotonic() < until, client.train_status()
        time.sleep(0.5)
    assert client.train_runs()
    stopped = client.train_stop()
    assert stopped["status"] == "STOPPED" and stopped["details"][-1]  # the extension logs the last line
    assert not client.train_runs()
    assert client.train_status()["id"] == stopped["id"]
    assert file_hash(model, "sha256") == before
    assert [path.name for path in model.parent.iterdir() if "shipped" in path.name] == []
    running = [path.read_text() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert [line for line in running if "utils.app" in line and str(server.models) in line] == []


def test_train_after_a_stop_with_the_options_as_the_panel_has_them(client, server, submitted, mask):
    started = client.train_start(BTCV, max_epochs=1)
    assert started["status"] in ("SUBMITTED", "RUNNING") and started["id"] and started["start_ts"]
    task = ends(client)
    assert task["id"] == started["id"] and task["status"] == "DONE", task["details"]
    assert client.fetch_info()["train_stats"] == {BTCV: {}, SPLEEN: {}}  # so two bars of the extension say nothing
    path, _ = client.infer(BTCV, "case_2")
    changed = np.count_nonzero(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(path)) != mask)
    assert changed > 100
    assert (server.models / BTCV / "models/shipped_model.pt").exists()
