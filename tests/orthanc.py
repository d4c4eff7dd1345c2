# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Orthanc, a DICOM server, on the loopback with a store of its own."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

DICOMWEB = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")


@contextmanager
def orthanc(folder: Path, *, dicomweb: bool = False) -> Iterator[str]:
    """Start an empty server and yield its address; leaving the context stops it.

    The test is skipped where Orthanc, or its DICOMweb plugin if that is wanted, is not installed.

    Args:
        folder: an empty folder, for the store, the configuration and the log.
        dicomweb: serve DICOMweb at ``/dicom-web``.
    """
    if shutil.which("Orthanc") is None:
        pytest.skip("Orthanc is not installed (Debian: orthanc)")
    if dicomweb and not DICOMWEB.exists():
        pytest.skip("Orthanc's DICOMweb is not installed (Debian: orthanc-dicomweb)")
    port = free_port()
    options = {
        "StorageDirectory": str(folder),
        "IndexDirectory": str(folder),
        "HttpPort": port,
        "DicomServerEnabled": False,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "Plugins": [str(DICOMWEB)] if dicomweb else [],
    }
    (folder / "orthanc.json").write_text(json.dumps(options))
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(["Orthanc", str(folder / "orthanc.json")], stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(100):
            try:
                ask(f"{address}/system")
                break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.1)
        yield address
    finally:
        process.kill()  # asked to end, it takes seconds
        process.wait()


def free_port() -> int:
    """Return a port of the loopback that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def ask(address: str, content: bytes | None = None) -> bytes:
    """GET an address, or POST content to it, without a proxy. Return the answer."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(urllib.request.Request(address, data=content), timeout=10) as answer:
        return answer.read()
