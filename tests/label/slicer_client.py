# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The requests of 3D Slicer's extension MONAILabel, and what it makes of the answers.

The facts are those of the extension's code: plugins/slicer in https://github.com/Project-MONAI/MONAILabel at version
0.8.5 (a session for a scan that the server does not have) and at 058ddfc (December 2025: the scan is uploaded). Paths,
queries, field names and file names in the forms are the extension's; nothing is sent that it does not send.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import requests

PANELS = {  # of the module, and the types of the models that each one offers
    "Auto Segmentation": ("segmentation", "detection"),
    "SmartEdit": ("deepgrow", "deepedit"),
    "Scribbles": ("scribbles",),
}
CLIENT = "user-xyz"  # the extension's default for Client/User-ID


class Refused(Exception):
    """An answer other than 200: the extension shows an error box."""


class SlicerClient:
    """A user of the module MONAILabel.

    Args:
        url: address of the server, as typed into "MONAI Label server".
        folder: for the files that answers contain.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url.rstrip("/")
        self.folder = folder
        self.info: dict[str, Any] = {}

    def fetch_info(self) -> dict[str, Any]:
        """The round arrow beside the address."""
        self.info = self._request("GET", "/info/").json()
        return self.info

    def models(self, panel: str) -> list[str]:
        """The models that a panel's list offers, in its order."""
        return [name for name, model in self.info["models"].items() if model["type"] in PANELS[panel]]

    def options(self, section: str, name: str) -> dict[str, Any]:
        """The values in the panel Options, which go with each request: of a list, the first."""
        config = self.info[section][name].get("config", {})
        return {key: value[0] if isinstance(value, list) else value for key, value in config.items()}

    def next_sample(self, strategy: str) -> dict[str, Any]:
        """Next Sample: the id and the path of a scan."""
        options = self.options("strategies", strategy) | {"client_id": CLIENT}
        return self._request("POST", f"/activelearning/{quote_plus(strategy)}", json=options).json()

    def download_image(self, image: str) -> bytes:
        """Next Sample, if the server's path does not exist on the client's machine."""
        return self._request("GET", f"/datastore/image?image={quote_plus(image)}").content

    def datastore(self) -> dict[str, Any]:
        """Next Sample with "Original Labels": all scans and labels that the server has."""
        return self._request("GET", "/datastore/?output=all").json()

    def download_label(self, image: str, tag: str) -> bytes:
        """Next Sample with "Original Labels", if there is one of that tag."""
        return self._request("GET", f"/datastore/label?label={quote_plus(image)}&tag={quote_plus(tag)}").content

    def upload_image(self, file: Path, image: str) -> str:
        """The arrow beside Source Volume, and Run with a scan that the server does not have. Return the id."""
        form = {"params": (None, json.dumps({"client_id": CLIENT})), "file": (str(file), file.read_bytes())}
        return self._request("PUT", f"/datastore/?image={quote_plus(image)}", files=form).json()["image"]

    def create_session(self, file: Path) -> str:
        """Run of 0.8.5 with a scan that the server does not have: it gets the scan for a while. Return the id."""
        form = {"files": (file.name, file.read_bytes())}
        return self._request("PUT", "/session/", files=form, data={"client_id": CLIENT}).json()["session_id"]

    def get_session(self, session: str) -> dict[str, Any]:
        """Whether a session is still there; before each Run in it."""
        return self._request("GET", f"/session/{quote_plus(session)}").json()

    def infer(self, model: str, image: str, session: str | None = None) -> tuple[Path, dict[str, Any]]:
        """Run. Return the file of the mask, named by the server, and the parameters of the answer."""
        options = self.options("models", model) | {"result_extension": ".nrrd", "result_dtype": "uint8"}
        form = {"params": (None, json.dumps(options | {"client_id": CLIENT}))}
        address = f"/infer/{quote_plus(model)}?image={quote_plus(image)}"
        address += f"&session_id={quote_plus(session)}" if session else ""
        answer = self._request("POST", address, files=form)
        fields, files = parts(answer)
        ((name, content),) = files.items()
        path = self.folder / name
        path.write_bytes(content)
        return path, json.loads(fields["params"])

    def save_label(self, image: str, label: Path, names: list[str], model: str) -> dict[str, Any]:
        """Submit Label: the segments, numbered from 1 as they are listed in Slicer."""
        info = [{"name": name, "idx": place} for place, name in enumerate(names, 1)]
        params = {"label_info": info, "model": model, "client_id": CLIENT}
        form = {"params": (None, json.dumps(params)), "label": (str(label), label.read_bytes())}
        return self._request("PUT", f"/datastore/label?image={quote_plus(image)}", files=form).json()

    def train_start(self, model: str, **edited: Any) -> dict[str, Any]:
        """Train, with the values in Options after these were edited."""
        options = self.options("trainers", model)
        assert edited.keys() <= options.keys(), "the panel has no such option"
        return self._request(
            "POST", f"/train/{quote_plus(model)}", json=options | edited | {"client_id": CLIENT}
        ).json()

    def train_runs(self) -> bool:
        """Whether Train is grey and Stop is not."""
        return self._get("/train/?check_if_running=true").status_code == 200

    def train_status(self) -> dict[str, Any]:
        """The last training, asked for every five seconds."""
        return self._request("GET", "/train/").json()

    def train_stop(self) -> dict[str, Any]:
        """Stop."""
        return self._request("DELETE", "/train/").json()

    def _get(self, address: str) -> requests.Response:
        return requests.get(f"{self.url}{address}", timeout=60)

    def _request(self, method: str, address: str, **content: Any) -> requests.Response:
        sign_in = self._get("/auth/")  # before each request; 404 means that nobody has to sign in
        if sign_in.status_code == 200 and sign_in.json().get("enabled"):
            raise Refused("the server asks for a name and a password")
        answer = requests.request(method, f"{self.url}{address}", timeout=300, **content)
        if answer.status_code != 200:
            raise Refused(f"{method} {address}: {answer.status_code} {answer.text[:2000]}")
        return answer


def segment_names(label_names: Mapping[str, int]) -> list[str]:
    """The segments that Slicer makes of a mask: the n-th name, sorted by value, gets the voxels of the value n.

    vtkSlicerSegmentationsModuleLogic::ImportLabelmapToSegmentationNode counts so, whatever the value of the name is.
    """
    return [name for name, _ in sorted(label_names.items(), key=lambda item: item[1]) if name != "background"]


def parts(answer: requests.Response) -> tuple[dict[str, str], dict[str, bytes]]:
    """Return the fields by name and the files by file name of a multipart answer."""
    media, *_ = content_type = answer.headers["Content-Type"].split(";")
    assert media == "multipart/form-data", f"{media}: {answer.text[:2000]}"
    boundary = re.search(r'boundary="?([^";]+)', ";".join(content_type))[1].encode()
    fields, files = {}, {}
    for part in answer.content.split(b"--" + boundary)[1:-1]:
        head, _, content = part.partition(b"\r\n\r\n")
        content = content.removesuffix(b"\r\n")
        name = re.search(r'[; ]name="([^"]*)"', head.decode())[1]
        file = re.search(r'filename="([^"]*)"', head.decode())
        if file:
            files[file[1]] = content
        else:
            fields[name] = content.decode()
    return fields, files
