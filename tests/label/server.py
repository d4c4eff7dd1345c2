# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A MONAI Label server on the loopback address, and a client of its REST interface."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from zoo.package.archive import extract_archive

from ..orthanc import free_port

PYTHON = os.environ.get("LABEL_PYTHON")
needs_monai_label = [
    pytest.mark.label,
    pytest.mark.skipif(not PYTHON, reason="needs a Python with MONAI Label: make test-label"),
]
BTCV, SPLEEN = "swin_unetr_btcv_seg", "swin_unetr_msd_spleen"
SERVER_PYTHON = Path(__file__).with_name("server_python")
STARTS_WITHIN, TRAINS_WITHIN = 240, 480  # seconds
HOST = "127.0.0.1"


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: URL of the server.
        models: folder of the served bundles.
        studies: folder of the scans; empty if a DICOMweb server has them.
        log: file of what it prints.
    """

    url: str
    models: Path
    studies: Path
    log: Path

    def info(self) -> dict[str, Any]:
        """Return the server's description of its app."""
        return _answer(requests.get(f"{self.url}/info/", timeout=30)).json()

    def infer(self, model: str, case: str, path: Path, **params: Any) -> Path:
        """Segment a scan of the studies and write the mask to ``path``."""
        form = {"params": json.dumps({"device": "cpu", **params})}
        address = f"{self.url}/infer/{model}?image={case}&output=image"
        path.write_bytes(_answer(requests.post(address, data=form, timeout=300)).content)
        return path

    def store_label(self, case: str, label: Path) -> None:
        """Store a label with the tag ``final``, as a client does when the annotator submits it."""
        with open(label, "rb") as file:
            address = f"{self.url}/datastore/label?image={case}&tag=final"
            _answer(requests.put(address, data={"params": "{}"}, files={"label": (label.name, file)}, timeout=60))

    def train(self, model: str, **request: Any) -> dict[str, Any]:
        """Train and wait for the end; return the task: ``status`` and ``details`` (the last lines of the log)."""
        address = f"{self.url}/train/"
        _answer(requests.post(f"{address}{model}", json={"device": "cpu", "multi_gpu": False, **request}, timeout=60))
        until = time.monotonic() + TRAINS_WITHIN
        while time.monotonic() < until:
            task = _answer(requests.get(address, timeout=30)).json()
            if task["status"] not in ("SUBMITTED", "RUNNING"):
                return task
            time.sleep(1)
        raise TimeoutError(f"the training did not end within {TRAINS_WITHIN} s: {task}")


def _answer(response: requests.Response) -> requests.Response:
    assert response.ok, f"{response.request.method} {response.url}: {response.status_code} {response.text[:2000]}"
    return response


@contextmanager
def serve(
    python: str,
    folder: Path,
    *,
    packages: Sequence[Path],
    scans: Sequence[Path] = (),
    dicomweb: str | None = None,
    backend: str = "torch",
) -> Iterator[Server]:
    """Set up the app, the bundles and the studies, and start the server; leaving the context stops it.

    Args:
        python: Python executable of the environment with MONAI Label.
        folder: folder for all files; the log is ``server.log``.
        packages: zips of the bundles.
        scans: NIfTI files.
        dicomweb: address of a DICOMweb server that has the scans instead.
        backend: what computes the masks, written into ``configs/inference.json`` as docs/how-to/monai-label.md says.
    """
    apps, studies = folder / "apps", folder / "studies"
    environment = {**os.environ, "PYTHONPATH": str(SERVER_PYTHON), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    environment["MLFLOW_ALLOW_FILE_STORE"] = "true"  # MONAI 1.5 tracks in files, which MLflow 3 otherwise refuses
    environment["PATH"] = f"{Path(python).parent}{os.pathsep}{environment['PATH']}"
    environment["NO_PROXY"] = HOST
    environment["MONAI_LABEL_SESSION_PATH"] = str(folder / "sessions")  # else they are in the home folder
    environment["MONAI_LABEL_DICOMWEB_CACHE_PATH"] = str(folder / "dicomweb")
    monailabel = [python, "-m", "monailabel.main"]
    download = [*monailabel, "apps", "--download", "--name", "monaibundle", "--output", str(apps)]
    subprocess.run(download, env=environment, check=True, capture_output=True, timeout=STARTS_WITHIN)
    models = apps / "monaibundle" / "model"
    models.mkdir()
    names = [extract_archive(package, models).name for package in packages]
    for name in names:
        config = models / name / "configs/inference.json"
        text = config.read_text()
        assert text.count('\n    "backend": "torch"') == 1
        config.write_text(text.replace('\n    "backend": "torch"', f'\n    "backend": "{backend}"'))
    studies.mkdir()
    for scan in scans:
        shutil.copy(scan, studies)
    port = free_port()
    command = [*monailabel, "start_server", "--app", str(apps / "monaibundle"), "--studies", dicomweb or str(studies)]
    command += ["--conf", "models", ",".join(names), "--conf", "zoo_source", "local", "--conf", "sam2", "false"]
    command += ["--host", HOST, "--port", str(port)]
    server = Server(f"http://{HOST}:{port}", models, studies, folder / "server.log")
    log = server.log
    with open(log, "w") as output:
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            _wait_for(server, process, log)
            yield server
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=60)


def _wait_for(server: Server, process: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < until and process.poll() is None:
        try:
            server.info()
            return
        except requests.ConnectionError:
            time.sleep(0.5)
    raise RuntimeError(f"the server did not start:\n{log.read_text()[-4000:]}")
