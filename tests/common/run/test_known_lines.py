# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Lines that mean nothing are hidden by their own words; every other warning and line of the same source is seen."""

from __future__ import annotations

import logging
import os
import warnings

import pytest
from monai.data.image_reader import NvImgCodecPydicomReader
from torch.utils.data import DataLoader

from bundles.common.run.known_lines import LOG_LINES, HideLine, hide_known_lines


@pytest.fixture(autouse=True)
def hidden(monkeypatch):
    """Hide the lines, and leave warnings, loggers and the environment as they were."""
    monkeypatch.setenv("MLFLOW_CONFIGURE_LOGGING", os.environ.get("MLFLOW_CONFIGURE_LOGGING", "false"))
    loggers = [logging.getLogger(name) for name, _ in LOG_LINES]
    before = [list(logger.filters) for logger in loggers]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        hide_known_lines()
        yield seen
    for logger, filters in zip(loggers, before, strict=True):
        logger.filters = filters


def test_the_optional_dicom_decoder_of_monai_is_not_mentioned(hidden, caplog, monkeypatch):
    monkeypatch.setattr("monai.data.nvimgcodec_pydicom_plugin.is_nvimgcodec_available", lambda: False)
    NvImgCodecPydicomReader()
    assert [str(warning.message) for warning in hidden] == [] and caplog.messages == []


def test_more_loading_processes_than_cores_are_the_users_choice(hidden):
    DataLoader([0], num_workers=10_000)
    assert [str(warning.message) for warning in hidden] == []


def test_the_argument_that_monais_surface_distance_will_drop_is_not_mentioned(hidden):
    warnings.warn(
        "monai.metrics.utils get_mask_edges:always_return_as_numpy: Argument `always", FutureWarning, stacklevel=2
    )
    assert hidden == []


@pytest.mark.parametrize(
    ("text", "category"),
    [
        ("NvImgCodecPydicomReader: this file is cut short", UserWarning),
        ("the NvImgCodecPydicomReader: nvImageCodec decoder plugin did not register successfully", UserWarning),
        ("This DataLoader will create workers that share a seed", UserWarning),
        ("monai.metrics.utils get_mask_edges:crop: Argument `crop` has been deprecated", FutureWarning),
        ("monai.metrics.utils get_mask_edges:always_return_as_numpy: Argument", UserWarning),
        ("parsing config_file", RuntimeWarning),
        ("a voxel is not finite", RuntimeWarning),
    ],
)
def test_other_warnings_are_seen(hidden, text, category):
    warnings.warn(text, category, stacklevel=2)
    assert [(str(warning.message), warning.category) for warning in hidden] == [(text, category)]


def test_other_lines_of_the_same_logger_are_seen(caplog):
    (name, _), *_ = LOG_LINES
    logger = logging.getLogger(name)
    logger.warning("nvImageCodec is not available; skipping pydicom decoder plugin registration.")
    logger.warning("nvImageCodec failed on %s", "a.dcm")
    logging.getLogger("monai.data.other").warning("nvImageCodec is not available; skipping pydicom decoder plugin")
    assert caplog.messages == [
        "nvImageCodec failed on a.dcm",
        "nvImageCodec is not available; skipping pydicom decoder plugin",
    ]


def test_hiding_twice_adds_one_filter():
    hide_known_lines()
    for name, _ in LOG_LINES:
        assert sum(isinstance(one, HideLine) for one in logging.getLogger(name).filters) == 1
