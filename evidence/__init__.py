# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Measure what pre-training gains, through the bundles' command line: studies, their runs, and the report."""
