# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""What a training costs, in numbers that anyone can compute again."""
