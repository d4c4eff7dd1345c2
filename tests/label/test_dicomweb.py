# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A packed bundle between a DICOM server and OHIF: a study in Orthanc, its mask, and the DICOM SEG in the study again.

MONAI Label reads the study over DICOMweb, as it does for the viewer OHIF that it serves. The requests are those of
OHIF's extension (plugins/ohifv3 in https://github.com/Project-MONAI/MONAILabel, 0.8.5) and of MONAI Label's own
interface for DICOM SEG. OHIF itself, a web page, is not run.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import requests
import torch

from tools.synthetic_patient import ORGANS, draw_patient, render

from ..common.scans.dicom_files import write_series
from ..orthanc import ask, orthanc
from ..workflows.command_line import succeed
from .server import BTCV, PYTHON, Server, needs_monai_label, serve

pytestmark = needs_monai_label
SEG_WRITER = "itkimage2segimage"  # of dcmqi; MONAI Label calls it


@pytest.fixture(scope="module")
def patient() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image, label and affine. Of the thirteen organs the label lacks the gallbladder, 4."""
    image, label, affine = render(draw_patient(2))
    label[label == 4] = 0
    assert present(label) == [value for value in ORGANS if value != 4]
    return image, label, affine


@pytest.fixture(scope="module")
def series(tmp_path_factory, patient) -> list[Path]:
    """A CT series of the patient: its files in the order of the slices."""
    image, _, affine = patient
    lps = np.diag([-1.0, -1.0, 1.0]) @ affine[:3]
    spacing = np.linalg.norm(lps[:, :3], axis=0)
    direction = lps[:, :3] / spacing
    orientation = [*direction[:, 0], *direction[:, 1]]
    folder = tmp_path_factory.mktemp("study") / "ct"
    return write_series(folder, image + 1024, orientation=orientation, position=lps[:, 3], spacing=spacing)


@pytest.fixture(scope="module")
def pacs(tmp_path_factory, series) -> str:
    """Orthanc with the series."""
    with orthanc(tmp_path_factory.mktemp("orthanc"), dicomweb=True) as address:
        for file in series:
            assert json.loads(ask(f"{address}/instances", file.read_bytes()))["Status"] == "Success"
        yield address


@pytest.fixture(scope="module")
def server(tmp_path_factory, pacs, packages) -> Server:
    if shutil.which(SEG_WRITER, path=Path(PYTHON).parent) is None:
        pytest.skip(f"{SEG_WRITER} is not in the environment of the server: pip install dcmqi")
    folder = tmp_path_factory.mktemp("server")
    with serve(PYTHON, folder, packages=packages[:1], dicomweb=f"{pacs}/dicom-web") as running:
        yield running


@pytest.fixture(scope="module")
def uids(series) -> pydicom.Dataset:
    """Header of the first slice."""
    return pydicom.dcmread(series[0], stop_before_pixels=True)


@pytest.fixture(scope="module")
def mask(tmp_path_factory, server, series, uids) -> np.ndarray:
    """The bundle's own mask of the series (columns, rows, slices), in the order of the slices."""
    folder = tmp_path_factory.mktemp("own")
    command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "--config_file", "configs/inference.yaml"]
    command += ["--dataset_dir", str(series[0].parent), "--output_dir", str(folder)]
    succeed(subprocess.run(command, cwd=server.models / BTCV, capture_output=True, text=True, timeout=600))
    (path,) = folder.glob("*_seg.nii.gz")
    image = nib.load(path)
    directions = np.reshape(uids.ImageOrientationPatient, (2, 3)).astype(float)
    affine = np.eye(4)
    affine[:3, :3] = np.diag([-1, -1, 1]) @ np.column_stack([*directions, np.cross(*directions)])
    turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.io_orientation(affine))
    voxels = nib.orientations.apply_orientation(np.asarray(image.dataobj), turn)
    assert voxels.any()
    return voxels


def present(mask: np.ndarray) -> list[int]:
    return [int(value) for value in np.unique(mask) if value]


def label_info(values: list[int]) -> list[dict[str, Any]]:
    """What MONAI Label wants to know of the segments, one entry for each value that the mask has, in their order."""
    return [{"name": ORGANS[value], "model_name": BTCV, "color": [10 * value, 0, 0]} for value in values]


def infer(server: Server, uids: pydicom.Dataset, output: str, **params: Any) -> bytes:
    address = f"{server.url}/infer/{BTCV}?image={uids.SeriesInstanceUID}&output={output}"
    answer = requests.post(address, files={"params": (None, json.dumps(params))}, timeout=300)
    assert answer.ok, answer.text[:2000]
    return answer.content


def read_segments(segmentation: pydicom.Dataset, series: list[Path]) -> dict[str, np.ndarray]:
    """The voxels of each segment by its name (columns, rows, slices): its frames by the images that they refer to."""
    images = [pydicom.dcmread(file, stop_before_pixels=True) for file in series]
    places = {image.SOPInstanceUID: z for z, image in enumerate(images)}
    names = {segment.SegmentNumber: segment.SegmentLabel for segment in segmentation.SegmentSequence}
    shape = (segmentation.Columns, segmentation.Rows, len(series))
    found = {name: np.zeros(shape, bool) for name in names.values()}
    frames = segmentation.pixel_array.reshape(-1, segmentation.Rows, segmentation.Columns)
    for frame, groups in zip(frames, segmentation.PerFrameFunctionalGroupsSequence, strict=True):
        (source,) = groups.DerivationImageSequence[0].SourceImageSequence
        z = places[source.ReferencedSOPInstanceUID]
        position = groups.PlanePositionSequence[0].ImagePositionPatient
        np.testing.assert_allclose(position, images[z].ImagePositionPatient, atol=1e-3)
        found[names[groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber]][:, :, z] = frame.T
    return found


def assert_belongs_to(segmentation: pydicom.Dataset, uids: pydicom.Dataset) -> None:
    assert segmentation.Modality == "SEG"
    for keyword in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID"):
        assert segmentation[keyword].value == uids[keyword].value
    assert segmentation.ReferencedSeriesSequence[0].SeriesInstanceUID == uids.SeriesInstanceUID


def assert_holds(segments: dict[str, np.ndarray], mask: np.ndarray) -> None:
    assert set(segments) == {ORGANS[value] for value in present(mask)}
    for value in present(mask):
        assert np.array_equal(segments[ORGANS[value]], mask == value), ORGANS[value]


def test_the_series_is_the_next_sample(server, uids):
    assert server.info()["datastore"]["total"] == 1
    sample = requests.post(f"{server.url}/activelearning/first", json={}, timeout=60).json()
    assert sample["id"] == sample["SeriesInstanceUID"] == uids.SeriesInstanceUID
    assert sample["StudyInstanceUID"] == uids.StudyInstanceUID and sample["PatientID"] == uids.PatientID


def test_ohif_is_served_and_reads_the_study_through_the_server(server, uids, series):
    page = requests.get(f"{server.url}/ohif/", timeout=60)
    assert page.ok and "OHIF" in page.text
    proxy = f"{server.url}/proxy/dicom"
    (study,) = requests.get(f"{proxy}/qido/studies", timeout=60).json()
    assert study["0020000D"]["Value"] == [uids.StudyInstanceUID]
    address = f"{proxy}/wado/studies/{uids.StudyInstanceUID}/series/{uids.SeriesInstanceUID}"
    assert len(requests.get(f"{address}/metadata", timeout=60).json()) == len(series)
    frame = requests.get(f"{address}/instances/{uids.SOPInstanceUID}/frames/1", timeout=60).content
    assert pydicom.dcmread(series[0]).PixelData in frame


def test_run_in_ohif_gives_the_bundles_mask_in_every_voxel(server, uids, mask):
    """OHIF takes the uncompressed bytes as they are, slice after slice."""
    options = {"result_extension": ".nrrd", "result_dtype": "uint8", "result_compress": False}
    head, _, content = infer(server, uids, "image", restore_label_idx=False, **options).partition(b"\n\n")
    header = dict(line.split(": ", 1) for line in head.decode().splitlines() if ": " in line)
    assert header["encoding"] == "raw" and header["type"] in ("unsigned char", "uint8", "uchar")
    assert header["sizes"] == " ".join(map(str, mask.shape))
    assert np.array_equal(np.frombuffer(content, np.uint8).reshape(mask.shape, order="F"), mask)


def test_the_segmentation_has_the_names_the_frame_of_reference_and_every_voxel(server, uids, series, mask, tmp_path):
    path = tmp_path / "seg.dcm"
    path.write_bytes(infer(server, uids, "dicom_seg", label_info=label_info(present(mask))))
    segmentation = pydicom.dcmread(path)
    assert_belongs_to(segmentation, uids)
    assert_holds(read_segments(segmentation, series), mask)
    assert segmentation.SeriesDescription == BTCV


def segmentations(pacs: str) -> dict[str, pydicom.Dataset]:
    """The DICOM SEG in Orthanc by its names for them."""
    names = [
        name
        for name in json.loads(ask(f"{pacs}/instances"))
        if json.loads(ask(f"{pacs}/instances/{name}/simplified-tags"))["Modality"] == "SEG"
    ]
    return {name: pydicom.dcmread(BytesIO(ask(f"{pacs}/instances/{name}/file"))) for name in names}


def submit(server: Server, pacs: str, uids: pydicom.Dataset, label: Path, names: list[int]) -> pydicom.Dataset:
    """Submit a label, and return the segmentation that Orthanc has then."""
    before = segmentations(pacs)
    address = f"{server.url}/datastore/label?image={uids.SeriesInstanceUID}"
    params = {"params": json.dumps({"label_info": label_info(names)})}
    with open(label, "rb") as file:
        answer = requests.put(address, data=params, files={"label": (label.name, file)}, timeout=120)
    assert answer.ok, answer.text[:2000]
    ((_, new),) = [item for item in segmentations(pacs).items() if item[0] not in before]
    return new


@pytest.fixture(scope="module")
def label(tmp_path_factory, patient) -> Path:
    path = tmp_path_factory.mktemp("label") / "label.nii.gz"
    nib.save(nib.Nifti1Image(patient[1], patient[2]), path)
    return path


@pytest.fixture(scope="module")
def stored(server, pacs, uids, label, patient) -> pydicom.Dataset:
    """The label as a segmentation, submitted with the names of the organs that it has."""
    return submit(server, pacs, uids, label, present(patient[1]))


def test_a_submitted_label_is_a_segmentation_in_the_study(stored, pacs, uids, series, patient):
    assert_belongs_to(stored, uids)
    assert_holds(read_segments(stored, series), patient[1])
    address = f"{pacs}/dicom-web/studies/{uids.StudyInstanceUID}/series?Modality=SEG"
    (found,) = json.loads(ask(address))
    assert found["0020000E"]["Value"] == [stored.SeriesInstanceUID]


def test_a_training_reads_the_scan_and_the_label(server, stored):
    task = server.train(BTCV, max_epochs=1, val_split=0)
    assert task["status"] == "DONE", task["details"]
    content = torch.load(server.models / BTCV / "models/model.pt", weights_only=True)
    assert content["trained"]["data"] == "MONAI Label" and content["trained"]["scans"]["number"] == 1


def test_the_name_of_an_absent_organ_moves_all_later_ones(server, pacs, uids, series, label, patient, stored):
    """MONAI Label 0.8.5 gives the n-th name to the n-th value that occurs: docs/how-to/monai-label.md warns."""
    segments = read_segments(submit(server, pacs, uids, label, list(ORGANS)), series)
    assert np.array_equal(segments["left_kidney"], patient[1] == 3)
    assert np.array_equal(segments["gallbladder"], patient[1] == 5)
    assert "left_adrenal_gland" not in segments
