# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Types of command-line arguments that argparse lacks."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """Return a whole number of at least 1; argparse shows the message of another one."""
    return _at_least(1, text)


def not_negative(text: str) -> int:
    """Return a whole number of at least 0; argparse shows the message of another one."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    number = int(text)
    if number < least:
        raise argparse.ArgumentTypeError(f"{text} must be at least {least}")
    return number
