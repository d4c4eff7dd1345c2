# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""From folders of raw scans to candidates: every NIfTI file, MetaImage and DICOM series below them, each with a name of its own."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from .btcv_folder import find_layout
from .data_list import MASK_FOLDERS, SECTIONS, is_nifti, is_scan, parse_data_list
from .dicom_series import Series, find_series, is_dicom
from .input_error import InputError
from .meta_image import SUFFIXES as METAIMAGE
from .meta_image import data_file
from .refused_scan import RefusedScan

PREPARED = ".prepared"  # the folder that marks the output of an earlier `prepare`
FOREIGN = (".nrrd", ".nhdr", ".mgz", ".mgh", ".img")  # scans in formats that are not read here
UID = r"\d+(\.\d+){5,}"
LONGEST_NAME = 120  # bytes; a file system takes 255, and suffixes and temporary prefixes are added

StrPath = str | os.PathLike


@dataclass(frozen=True)
class Candidate:
    """One scan as it was found, not yet looked into.

    Attributes:
        name: what its files are called: the path below the source as one word, unique.
        source: the file, or the folder of the series.
        kind: ``nifti``, ``metaimage`` or ``dicom``.
        files: all files that hold it.
        series: of DICOM.
        label: its label file, where a data list names one, else "".
        patient: where a data list names one, else "".
        section: ``training``, ``validation`` or ``test`` of the data list that holds it, else "".
    """

    name: str
    source: str
    kind: str
    files: tuple[str, ...] = field(repr=False)
    series: Series | None = field(default=None, repr=False)
    label: str = ""
    patient: str = ""
    section: str = ""

    @property
    def series_uid(self) -> str:
        """SeriesInstanceUID of DICOM, or the name of the file where that is one, as LUNA16's are; else ""."""
        if self.series is not None:
            return self.series.series_uid
        stem = _stem(os.path.basename(self.source))
        return stem if re.fullmatch(UID, stem) else ""


@dataclass
class Found:
    """What lies below the sources.

    Attributes:
        name: those of the sources.
        candidates: sorted by name.
        refused: file or folder to the reason why it was not looked into.
        labels: label names of the data lists, if all that have some agree.
    """

    name: str
    candidates: list[Candidate]
    refused: dict[str, str]
    labels: dict[str, str]


def find_candidates(sources: StrPath | Sequence[StrPath], *, skip: StrPath | None = None) -> Found:
    """Find every scan below the sources.

    Links are followed, each real folder and file is taken once. Hidden files, folders of masks (`MASK_FOLDERS`, which DICOM may lie in), results of these
    bundles and the outputs of earlier runs are left out. A ``dataset.json`` (or a folder in BTCV's layout) adds what it knows of its scans:
    label, patient, section; its label files are no scans, scans that it does not name are taken too.

    Args:
        sources: a folder, a NIfTI file, or several.
        skip: a folder that is not looked into: the output.

    Raises:
        InputError: a source does not exist, or there is no scan at all.
    """
    sources = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    roots = [Path(os.path.abspath(Path(source).expanduser())) for source in sources]
    search = _Search(skip)
    for root in roots:
        if not root.exists():
            raise InputError(f"The source {root} does not exist: check --source.")
        if (root / PREPARED).is_dir():
            raise InputError(f"The source {root} is what an earlier run has written: name the raw scans by --source.")
        if root.is_file() and not is_nifti(root.name):
            raise InputError(
                f"The source {root} is neither a folder nor a NIfTI file (.nii, .nii.gz): name its folder."
            )
        search.look_into(root)
    candidates = search.candidates()
    if not candidates and not search.refused:
        raise InputError(
            f"No scans in {', '.join(map(str, roots)) or '--source, which is empty'}: looked for NIfTI files (.nii, .nii.gz), MetaImage (.mhd, "
            ".mha) and DICOM at any depth, leaving out hidden files and, but for DICOM, folders of masks (label..., seg..., mask...)."
        )
    return Found(
        ", ".join(root.name for root in roots), candidates, dict(sorted(search.refused.items())), search.common_labels()
    )


class _Search:
    def __init__(self, skip: StrPath | None) -> None:
        self.seen = {os.path.realpath(skip)} if skip else set()
        self.refused: dict[str, str] = {}
        self.volumes: dict[
            str, tuple[str, bool]
        ] = {}  # path to its place below the source, and whether it lies among masks
        self.dicom: dict[str, str] = {}
        self.listed: dict[str, dict] = {}  # real path to its entry of a data list
        self.label_files: set[str] = set()
        self.label_names: list[dict] = []

    def look_into(self, root: Path) -> None:
        base = root.parent  # so that a name tells which source it came from, and does not change when another is added
        for path in _walk(root, self.seen, self.refused, self.read_list) if root.is_dir() else [str(root)]:
            real = os.path.realpath(path)
            if real in self.seen or os.path.basename(path).upper() == "DICOMDIR":
                continue
            self.seen.add(real)
            place = os.path.relpath(path, base)
            readable = path.encode(errors="surrogateescape").decode(errors="replace")
            if readable != path:
                self.refused[readable] = "has a name that is not UTF-8: rename it"
            elif not os.path.exists(path):
                self.refused[path] = "is a link that leads nowhere"
            elif not os.path.isfile(path):
                continue  # a pipe, a socket
            elif is_scan(os.path.basename(path)) or path.lower().endswith(METAIMAGE):
                folders = Path(os.path.relpath(path, root)).parts[:-1]
                self.volumes[path] = (place, any(part.lower().startswith(MASK_FOLDERS) for part in folders))
            elif is_nifti(os.path.basename(path)):
                continue  # a result
            elif path.lower().endswith(FOREIGN):
                self.refused[path] = f"is no NIfTI and no DICOM but {Path(path).suffix}: convert it to .nii.gz"
            elif is_dicom(path):
                self.dicom[path] = place
            else:
                self._check_readable(path)

    def _check_readable(self, path: str) -> None:
        """Of a file that is neither: it may have been a scan if it cannot be opened."""
        try:
            open(path, "rb").close()
        except OSError as error:
            self.refused[path] = f"cannot be read: {error.strerror or error}"

    def read_list(self, folder: str) -> None:
        """Note what the data list of a folder says of its scans."""
        path = Path(folder, "dataset.json")
        try:
            content = parse_data_list(path)
        except InputError as error:
            self.refused[str(path)] = str(error)
            return
        if content.get("labels"):
            self.label_names.append(content["labels"])
        for section in SECTIONS:
            for entry in content.get(section, []):
                if isinstance(entry.get("label"), str):
                    self.label_files.add(os.path.realpath(entry["label"]))
                for image in [entry["image"]] if isinstance(entry["image"], str) else entry["image"]:
                    known = section if section in ("validation", "test") else "training"
                    self.listed[os.path.realpath(image)] = entry | {"section": known}
                    if not os.path.lexists(image):
                        self.refused[image] = f"is named by {path}, but does not exist"

    def candidates(self) -> list[Candidate]:
        found: dict[str, Candidate] = {}  # by first file, with the place for a name
        for path, (place, among_masks) in self.volumes.items():
            real = os.path.realpath(path)
            entry = self.listed.get(real, {})
            if real in self.label_files or (among_masks and not entry):
                continue
            kind = "metaimage" if path.lower().endswith(METAIMAGE) else "nifti"
            try:
                files = (path,) if kind == "nifti" else tuple(sorted({path, data_file(path)}))
            except (RefusedScan, OSError) as error:
                self.refused[path] = str(error)
                continue
            label = entry.get("label", "")
            found[path] = Candidate(
                name=_stem(place),
                source=path,
                kind=kind,
                files=files,
                label=label if isinstance(label, str) else "",
                patient=str(entry.get("patient", "")),
                section=entry.get("section", ""),
            )
        for series, place in self._series():
            folder = os.path.dirname(series.files[0]) if len(series.files) == 1 else os.path.commonpath(series.files)
            found[series.files[0]] = Candidate(place, folder, "dicom", series.files, series)
        return _named(found)

    def _series(self) -> Iterator[tuple[Series, str]]:
        """Every series with its place: its folder, and its UID shortened where several lie in one folder."""
        all_series, refused = find_series(sorted(self.dicom))
        self.refused.update(refused)
        folders = [_common_folder([self.dicom[file] for file in series.files]) for series in all_series]
        many = Counter(folders)
        for series, folder in zip(all_series, folders, strict=True):
            yield series, folder if many[folder] == 1 else f"{folder}-{_short(series.series_uid)}"

    def common_labels(self) -> dict[str, str]:
        first = self.label_names[0] if self.label_names else {}
        return first if all(names == first for names in self.label_names) else {}


def _walk(root: Path, seen: set[str], refused: dict[str, str], read_list) -> Iterator[str]:
    """Yield the visible files below a folder in a fixed order."""

    def unreadable(error: OSError) -> None:
        refused[error.filename] = f"cannot be read: {error.strerror}"

    for parent, folders, files in os.walk(root, followlinks=True, onerror=unreadable):
        real = os.path.realpath(parent)
        if real in seen or PREPARED in folders:
            folders.clear()
            continue
        seen.add(real)  # a link that leads back up is not followed for ever
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if "dataset.json" in files or find_layout(Path(parent)):
            read_list(parent)
        yield from (os.path.join(parent, name) for name in sorted(files) if not name.startswith("."))


def _stem(name: str) -> str:
    return re.sub(r"\.(nii|nii\.gz|mhd|mha)$", "", name, flags=re.IGNORECASE)


def _common_folder(places: Collection[str]) -> str:
    return os.path.commonpath([os.path.dirname(place) or "." for place in places])


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _named(found: dict[str, Candidate]) -> list[Candidate]:
    """Make the places to file names; where two would be the same, a checksum of the path tells them apart."""
    names = {path: _file_name(candidate.name) for path, candidate in found.items()}
    by_name = defaultdict(list)
    for path, name in names.items():
        by_name[name.casefold()].append(path)  # some file systems do not tell upper from lower case
    for paths in by_name.values():
        if len(paths) > 1:
            names.update({path: f"{names[path]}-{_short(path)}" for path in paths})
    return sorted((replace(found[path], name=names[path]) for path in found), key=lambda candidate: candidate.name)


def _file_name(place: str) -> str:
    """``site 1/scan`` becomes ``site_1__scan``; letters of any language stay."""
    name = re.sub(r"[^\w.+-]", "_", "__".join(Path(place).parts)).lstrip(".") or "scan"
    if len(name.encode()) > LONGEST_NAME:
        name = name.encode()[: LONGEST_NAME - 9].decode(errors="ignore") + "-" + _short(place)
    return name
