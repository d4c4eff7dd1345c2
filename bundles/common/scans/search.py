# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Find the scans below folders: every NIfTI file, MetaImage and DICOM series, each with a unique name."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..data.carried_labels import NOTES
from ..data.list_forms.labelled_folder import has_flat_pairs, has_layout
from ..data.list_forms.list_file import SECTIONS, image_files, parse_data_list
from ..data.nifti_files import holds_masks, is_nifti, is_scan, masks_beside_images
from ..errors import InputError, RefusedScan
from ..files import absolute_path
from ..words import counted
from .dicom_headers import is_dicom
from .dicom_series import Series, find_series
from .headers.nifti_bytes import compression
from .meta_image import SUFFIXES as METAIMAGE
from .meta_image import data_file

logger = logging.getLogger(__name__)

IS_PACKED = "is packed"  # begins the reason why an archive is left out
PREPARED = ".prepared"  # the folder that marks the output of an earlier `prepare`
FOREIGN = (".nrrd", ".nhdr", ".mgz", ".mgh", ".img")  # scans in formats that are not supported
PACKED = (
    *(
        ".zip",
        ".tar",
        ".tgz",
        ".tar.gz",
        ".tbz2",
        ".tar.bz2",
        ".tar.xz",
        ".7z",
        ".rar",
        ".nii.bz2",
        ".nii.zst",
        ".nii.xz",
    ),
    *(".nii.zip", ".dcm.gz", ".img.gz", ".nrrd.gz"),
)
UID = r"\d+(\.\d+){5,}"
SLICE_SUFFIXES = (".dcm", ".dicom", ".ima")
RANK = ("", "training", "validation", "test")  # sections, from the least to the most held out
LONGEST_NAME = 120  # bytes; file systems allow 255, and suffixes and temporary prefixes are added

StrPath = str | os.PathLike


@dataclass(frozen=True)
class Candidate:
    """One scan that was found, but not read yet.

    Attributes:
        name: unique name of its output files: its path below the source as one word.
        source: the file, or the folder of the series.
        kind: ``nifti``, ``metaimage`` or ``dicom``.
        files: all files that belong to it.
        series: the DICOM series, else None.
        label: its label file, if a data list names one, else "".
        patient: its patient, if a data list names one, else "".
        section: ``training``, ``validation`` or ``test``, if a data list names the scan, else "".
        fault: why it must not be used, whatever its content, else "".
        remark: what the user should know about it although it is used, else "".
        notes: what a data list says about its label (`NOTES`).
    """

    name: str
    source: str
    kind: str
    files: tuple[str, ...] = field(repr=False)
    series: Series | None = field(default=None, repr=False)
    label: str = ""
    patient: str = ""
    section: str = ""
    fault: str = ""
    remark: str = ""
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def series_uid(self) -> str:
        """SeriesInstanceUID of a DICOM series, or the file name if it is such a UID, as in LUNA16; else ""."""
        if self.series is not None:
            return self.series.series_uid
        stem = _stem(os.path.basename(self.source))
        return stem if re.fullmatch(UID, stem) else ""


@dataclass
class Found:
    """What was found below the sources.

    Attributes:
        name: names of the sources.
        candidates: scans, sorted by name.
        refused: files and folders that could not be examined, with the reasons.
        labels: label names of the data lists, if all lists with label names agree.
        ignore_label: value of unknown voxels that these lists declare, or None.
        notes: what the user should know.
        left_out: files and folders that are not scans by their names, although their content may be, with the reasons.
    """

    name: str
    candidates: list[Candidate]
    refused: dict[str, str]
    labels: dict[str, str]
    notes: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    ignore_label: int | None = None


def find_candidates(sources: StrPath | Sequence[StrPath], *, skip: StrPath | None = None) -> Found:
    """Find every scan below the sources.

    Links are followed; each real folder and file is visited once. Hidden files, results of these bundles, outputs of
    earlier runs, folders of masks (`holds_masks`) and files that are named like masks beside images
    (`masks_beside_images`) are left out; DICOM files in folders of masks are not. What is left out though it looks like
    a scan is in ``left_out``, except for hidden files.

    A ``dataset.json`` (or a folder whose files are pairs by their names, see `labelled_folder`) adds the label, patient
    and section of its scans. Its patients belong only to this list, unless a DICOM file has the same PatientID. If
    several lists or sections name a scan, the section that is held out most counts. The label files of a list are not
    scans. Scans that it does not name are found as well.

    A file that may be a slice but cannot be read is refused, and so is every series with files in its folder: it may
    lack its first or last slices, which leaves no gap.

    Args:
        sources: a folder, a NIfTI file, or several.
        skip: folder that is not searched: the output.

    Raises:
        InputError: a source does not exist or is not a path, or no scan was found.
    """
    given, sources = sources, [sources] if isinstance(sources, (str, os.PathLike)) else sources
    if not isinstance(sources, (list, tuple)) or not all(isinstance(one, (str, os.PathLike)) for one in sources):
        raise InputError(
            f"--source {given!r} must be a folder or a list of folders; quote a name that is a number: \"'2023'\"."
        )
    roots = [absolute_path(source) for source in sources]
    search = _Search(skip)
    for root in roots:
        if not root.exists():
            raise InputError(f"The source {root} does not exist: check --source.")
        if (root / PREPARED).is_dir():
            raise InputError(f"The source {root} is the output of an earlier run: pass the raw scans as --source.")
        if root.is_file() and not is_nifti(root.name):
            raise InputError(
                f"The source {root} is neither a folder nor a NIfTI file (.nii, .nii.gz): pass its folder."
            )
        search.look_into(root)
    candidates = search.candidates()
    if not candidates and not search.refused:
        raise InputError(
            f"No scans in {', '.join(map(str, roots)) or '--source, which is empty'}: searched at any depth for NIfTI "
            "(.nii, .nii.gz), MetaImage (.mhd, .mha) and DICOM files, skipping hidden files and, except for DICOM, "
            f"folders of masks (labels, segmentations, masks).{_first_of(search.left_out)}"
        )
    labels, ignore_label = search.common_labels()
    refused = dict(sorted(search.refused.items()))
    left_out = dict(sorted(search.left_out.items()))
    if left_out:
        number = counted(len(left_out), "file or folder is", "files and folders are")
        logger.warning("%s left out.%s", number, _first_of(left_out))
    name = ", ".join(root.name for root in roots)
    return Found(name, candidates, refused, labels, search.notes, left_out, ignore_label)


def _first_of(left_out: Mapping[str, str]) -> str:
    return f" {min(left_out)} {left_out[min(left_out)]}." if left_out else ""


def scan_in(folder: Path, *, apart_from: Sequence[StrPath] = ()) -> str | None:
    """Return a scan below a folder that is not below those in ``apart_from``; None if there is none."""
    seen = {os.path.realpath(Path(one).expanduser()) for one in apart_from} - {os.path.realpath(folder)}
    for path in _walk(folder, seen, {}, lambda _: None):
        name = os.path.basename(path)
        if os.path.realpath(path) in seen or not os.path.isfile(path) or name.upper() == "DICOMDIR":
            continue
        if is_scan(name) or name.lower().endswith(METAIMAGE) or is_dicom(path):
            return path
    return None


class _Search:
    def __init__(self, skip: StrPath | None) -> None:
        self.seen = {os.path.realpath(skip)} if skip else set()
        self.refused: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        # path -> its place below the source, and the folder of masks that it is in, or ""
        self.volumes: dict[str, tuple[str, str]] = {}
        self.results: list[str] = []  # NIfTI files that are named like a result
        self.dicom: dict[str, str] = {}  # path -> its place below the source
        self.listed: dict[str, dict] = {}  # real path -> its entry in a data list
        self.label_files: set[str] = set()
        self.label_names: list[tuple[dict, int | None]] = []  # with the value of unknown voxels
        self.roots: list[Path] = []
        self.mask_folders: dict[Path, bool] = {}  # whether a folder holds masks by its name
        self.unknown: list[str] = []  # files that are not scans by name or content
        self.contradictions: list[str] = []
        self.notes: list[str] = []

    def look_into(self, root: Path) -> None:
        self.roots.append(root)
        base = root.parent  # a name then shows its source, and does not change when another source is added
        walk = _walk(root, self.seen, self.refused, self.read_list, self.left_out)
        for path in walk if root.is_dir() else [str(root)]:
            real = os.path.realpath(path)
            if real in self.seen or os.path.basename(path).upper() == "DICOMDIR":
                continue
            self.seen.add(real)
            place = os.path.relpath(path, base)
            readable = path.encode(errors="surrogateescape").decode(errors="replace")
            if readable != path:
                self.refused[readable] = "has a name that is not UTF-8: rename it"
            elif not os.path.exists(path):
                self.refused[path] = "is a broken link"
            elif not os.path.isfile(path):
                if is_nifti(path) or path.lower().endswith((*METAIMAGE, *SLICE_SUFFIXES)):
                    self.refused[path] = "is no regular file, but a pipe, a socket or a device: replace it by the scan"
            elif is_scan(os.path.basename(path)) or path.lower().endswith(METAIMAGE):
                self.volumes[path] = (place, self._mask_folder(root, path))
            elif is_nifti(os.path.basename(path)):
                self.results.append(path)
            elif path.lower().endswith(FOREIGN):
                self.refused[path] = f"is in an unsupported format ({Path(path).suffix}): convert it to .nii.gz"
            elif path.lower().endswith(PACKED):
                self.left_out[path] = f"{IS_PACKED}: if it holds scans, unpack it"
            elif is_dicom(path):
                self.dicom[path] = place
            else:
                self.unknown.append(path)

    def _mask_folder(self, root: Path, path: str) -> str:
        """Return the uppermost folder of masks between a source and a file, or ""."""
        folder = root
        for part in Path(os.path.relpath(path, root)).parts[:-1]:
            folder = folder / part
            if folder not in self.mask_folders:
                self.mask_folders[folder] = holds_masks(folder)
            if self.mask_folders[folder]:
                return str(folder)
        return ""

    def _refuse_lost_slices(self) -> None:
        """Refuse files that may have been slices, but are unreadable, empty or truncated."""
        slices = {(os.path.dirname(path), _kind(path)) for path in self.dicom}
        for path in self.unknown:
            try:
                with open(path, "rb") as file:
                    start = file.read(1024)
            except OSError as error:
                self.refused[path] = f"cannot be read: {error.strerror or error}"
                continue
            named_like_slice = path.lower().endswith(SLICE_SUFFIXES)
            beside = (os.path.dirname(path), _kind(path)) in slices
            if not start and (named_like_slice or beside or not _kind(path)):
                self.refused[path] = "is empty (0 bytes): copy it again, or remove it"
            elif (named_like_slice or beside) and (kind := compression(start)):
                self.refused[path] = f"is compressed with {kind}: unpack it"
            elif named_like_slice or (beside and b"\0" in start):
                self.refused[path] = (
                    "is named like a DICOM file, but is not one: cut short or damaged; copy it again, or remove it"
                )

    def read_list(self, folder: str) -> None:
        """Record what the data list of a folder contains about its scans."""
        path = Path(folder, "dataset.json")
        written = os.path.lexists(path)
        if not written and not has_layout(path.parent) and self._mask_folder(self.roots[-1], str(path)):
            return  # masks of structures, one of which is named like a mask of the other
        try:
            content = parse_data_list(path)
        except InputError as error:
            if written:
                self.refused[str(path)] = str(error)
            else:  # the scans need no pairs
                self.notes.append(f"no labels are taken over from {folder}, as its files cannot be paired: {error}")
            return
        except Exception as error:  # an error of the operating system, or of a list that no check foresees
            self.refused[str(path)] = f"cannot be read: {getattr(error, 'strerror', None) or error}"
            return
        if content.get("labels"):
            self.label_names.append((content["labels"], content.get("ignore_label")))
        for section in SECTIONS:
            for entry in content.get(section, []):
                if isinstance(entry.get("label"), str):
                    self.label_files.add(os.path.realpath(entry["label"]))
                images = image_files(entry)
                fields = {key: value for key, value in entry.items() if key != "patient"}
                if entry.get("patient") not in (None, ""):
                    fields["patient"] = (folder, str(entry["patient"]).strip())
                fields["section"] = section if section in ("validation", "test") else "training"
                for image in images:
                    self._list(image, fields | {"list": str(path), "channels": len(images)})
                    if not os.path.lexists(image):
                        self.refused[image] = f"is listed in {path}, but does not exist"

    def _list(self, image: str, entry: dict) -> None:
        """Record an entry. If an image has several, they are merged, and the section that is held out most counts."""
        real = os.path.realpath(image)
        known = self.listed.get(real, entry)
        if known["section"] != entry["section"]:
            where = " and ".join(f"{one['section']} of {one['list']}" for one in (known, entry))
            self.contradictions.append(f"{image} ({where})")
        # Sorting is stable: among equal sections, the entry that was read first wins.
        first, second = sorted((known, entry), key=lambda one: -RANK.index(one["section"]))
        channels = max(first["channels"], second["channels"])
        self.listed[real] = second | first | {"channels": channels}

    def candidates(self) -> list[Candidate]:
        self._refuse_lost_slices()
        all_series = list(self._series())
        patient_ids = {series.patient_id for series, _ in all_series}
        found: dict[str, Candidate] = {}  # by first file; the name is its place until `_named`
        masks, lost_labels = defaultdict(list), []
        beside = masks_beside_images([path for path, (_, mask_folder) in self.volumes.items() if not mask_folder])
        for path, (place, mask_folder) in self.volumes.items():
            real = os.path.realpath(path)
            entry = self.listed.get(real, {})
            if real in self.label_files:
                continue
            if mask_folder and not entry:
                masks[mask_folder].append(path)
                continue
            if path in beside and not entry:
                self.left_out[path] = "is named like a mask, beside images: rename it if it is a scan"
                continue
            kind = "metaimage" if path.lower().endswith(METAIMAGE) else "nifti"
            try:
                files = (path,) if kind == "nifti" else tuple(sorted({path, data_file(path)}))
            except (RefusedScan, OSError) as error:
                self.refused[path] = str(error)
                continue
            label = entry.get("label", "")
            missing = label != "" and not (isinstance(label, str) and os.path.isfile(label))
            if missing:
                lost_labels.append(str(label))
            several = entry.get("channels", 1) > 1
            found[path] = Candidate(
                name=_stem(place),
                source=path,
                kind=kind,
                files=files,
                label="" if missing else label,
                patient=self._patient(entry, patient_ids),
                section=entry.get("section", ""),
                fault=f"is one of {entry['channels']} channels of an image: CT must have one ({entry['list']})"
                if several
                else "",
                remark=f"its label {label} does not exist" if missing else "",
                notes={key: entry[key] for key in NOTES if key in entry and label and not missing},
            )
        broken = _broken_folders(self.refused)
        for series, place in all_series:
            folder = os.path.dirname(series.files[0]) if len(series.files) == 1 else os.path.commonpath(series.files)
            here = {os.path.dirname(file) for file in series.files} & broken
            fault = (
                f"is in a folder with files that cannot be read, perhaps slices of it: fix or remove them ({min(here)})"
                if here
                else ""
            )
            found[series.files[0]] = Candidate(place, folder, "dicom", series.files, series, fault=fault)
        for folder, files in masks.items():
            self.left_out[folder] = (
                f"is a folder of masks by its name ({len(files)} files, such as {files[0]}): rename it if these are scans"
            )
        self._note(lost_labels)
        self._refuse_listed_elsewhere()
        for path in self.results:
            if path not in self.refused and os.path.realpath(path) not in self.label_files:
                self.left_out[path] = (
                    "is named like a mask or another result of these bundles: rename it if it is a scan"
                )
        return _named(found)

    def _note(self, lost_labels: list[str]) -> None:
        if self.contradictions:
            self.notes.append(
                f"{counted(len(self.contradictions), 'scan is', 'scans are')} in several sections of the source lists, such as "
                f"{self.contradictions[0]}: the first of test, validation, training counts"
            )
        if lost_labels:
            lost = counted(len(lost_labels), "label of the source lists does", "labels of the source lists do")
            self.notes.append(f"{lost} not exist, such as {lost_labels[0]}")
        if self.label_names and not self.common_labels()[0]:
            self.notes.append(
                "the dataset.json files of the sources name the labels differently: no names are written. Prepare "
                "these sources one by one if you need their labels"
            )

    def _patient(self, entry: dict, patient_ids: set[str]) -> str:
        """Return the patient of an entry: "1" of one list is not "1" of another, but a PatientID is global."""
        folder, patient = entry.get("patient", ("", ""))
        if patient in patient_ids or not patient:
            return patient
        root = next((root for root in self.roots if Path(folder).is_relative_to(root)), Path(folder))
        same_name = [other for other in self.roots if other.name == root.name and other != root]
        return f"{os.path.relpath(folder, root.parent)}{'-' + _short(str(root)) if same_name else ''}/{patient}"

    def _refuse_listed_elsewhere(self) -> None:
        """Refuse files that a list names but the search did not find."""
        met = {os.path.realpath(path) for path in (*self.volumes, *self.dicom, *self.refused)}
        for real, entry in self.listed.items():
            if real in met or not os.path.isfile(real):
                continue
            images = image_files(entry)
            path = next((image for image in images if os.path.realpath(image) == real), real)
            inside = any(Path(path).is_relative_to(root) for root in self.roots)
            reason = "is hidden, a result, or not a supported scan" if inside else "is outside the sources"
            self.refused[path] = f"{reason} (it is listed in {entry['list']})"

    def _series(self) -> Iterator[tuple[Series, str]]:
        """Yield every series with its place: its folder, and a hash of its UID if the folder has several series."""
        all_series, refused = find_series(sorted(self.dicom))
        self.refused.update(refused)
        folders = [_common_folder([self.dicom[file] for file in series.files]) for series in all_series]
        series_in = Counter(folders)
        for series, folder in zip(all_series, folders, strict=True):
            yield series, folder if series_in[folder] == 1 else f"{folder}-{_short(series.series_uid)}"

    def common_labels(self) -> tuple[dict[str, str], int | None]:
        first = self.label_names[0] if self.label_names else ({}, None)
        return first if all(names == first for names in self.label_names) else ({}, None)


def _broken_folders(refused: Collection[str]) -> set[str]:
    """Return the folders with files that cannot be read and may be slices."""
    no_slices = (*FOREIGN, *METAIMAGE, ".json")
    return {os.path.dirname(path) for path in refused if not path.lower().endswith(no_slices) and not is_nifti(path)}


def _kind(path: str) -> str:
    """Return the suffix of a file; "" if it has none, or only the end of a UID or a number."""
    suffix = Path(path).suffix.lower()
    return suffix if re.search("[a-z]", suffix) else ""


def _walk(
    root: Path,
    seen: set[str],
    refused: dict[str, str],
    read_list: Callable[[str], None],
    left_out: dict[str, str] | None = None,
) -> Iterator[str]:
    """Yield the visible files below a folder in a fixed order."""

    def unreadable(error: OSError) -> None:
        # If a folder fails while it is being read, the error does not name it.
        refused[error.filename or str(root)] = f"cannot be read: {error.strerror or error}"

    for parent, folders, files in os.walk(root, followlinks=True, onerror=unreadable):
        real = os.path.realpath(parent)
        if real in seen or PREPARED in folders:
            if real not in seen:
                logger.warning("%s is the output of an earlier run: it is skipped", parent)
                if left_out is not None:
                    left_out[parent] = "is the output of an earlier run"
            folders.clear()
            continue
        seen.add(real)  # a link that leads back up is followed only once
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if "dataset.json" in files or has_layout(Path(parent)) or has_flat_pairs(Path(parent)):
            read_list(parent)
        yield from (os.path.join(parent, name) for name in sorted(files) if not name.startswith("."))


def _stem(name: str) -> str:
    return re.sub(r"\.(nii|nii\.gz|mhd|mha)$", "", name, flags=re.IGNORECASE)


def _common_folder(places: Collection[str]) -> str:
    return os.path.commonpath([os.path.dirname(place) or "." for place in places])


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _named(found: dict[str, Candidate]) -> list[Candidate]:
    """Turn the places into file names; equal names get a checksum of the path appended."""
    names = {path: _file_name(candidate.name) for path, candidate in found.items()}
    by_name = defaultdict(list)
    for path, name in names.items():
        by_name[name.casefold()].append(path)  # some file systems ignore case
    for paths in by_name.values():
        if len(paths) > 1:
            names.update({path: f"{names[path]}-{_short(path)}" for path in paths})
    return sorted((replace(found[path], name=names[path]) for path in found), key=lambda candidate: candidate.name)


def _file_name(place: str) -> str:
    """Turn ``site 1/scan`` into ``site_1__scan``; letters of any language are kept."""
    name = re.sub(r"[^\w.+-]", "_", "__".join(Path(place).parts)).lstrip(".") or "scan"
    if len(name.encode()) > LONGEST_NAME:
        name = name.encode()[: LONGEST_NAME - 9].decode(errors="ignore") + "-" + _short(place)
    return name
