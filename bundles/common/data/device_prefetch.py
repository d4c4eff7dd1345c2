# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Copy the next batch to the GPU while it computes the current step."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sized
from typing import Any

import torch


class DevicePrefetch:
    """Data loader that returns images and labels on the GPU; on a CPU, batches of the loader are unchanged.

    If training never waits for the GPU, it asks for a batch as soon as the previous step is queued. The copy then runs
    at the same time as that step, on a separate stream. This needs a loader with ``pin_memory``; copies from other
    memory wait for the step.

    Args:
        loader: yields dicts of tensors.
        device: device of the training.
        keys: keys to copy. Others, such as the numbers of the draws, are read on the host and stay there.
    """

    def __init__(
        self,
        *,
        loader: Iterable[dict[str, Any]],
        device: torch.device | str,
        keys: Collection[str] = ("image", "label"),
    ) -> None:
        self.loader = loader
        self.device = torch.device(device)
        self.keys = keys

    def __len__(self) -> int:
        """Number of batches, if the loader has a length."""
        if not isinstance(self.loader, Sized):
            raise TypeError(f"{type(self.loader).__name__} has no length.")
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        batches = iter(self.loader)  # now, not at the first batch: a loader draws a random number when it starts
        return self._copied(batches) if self.device.type == "cuda" else batches

    def _copied(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        stream = torch.cuda.Stream(self.device)
        for batch in batches:
            with torch.cuda.stream(stream):
                copies = {key: batch[key].to(self.device, non_blocking=True) for key in self.keys if key in batch}
            step = torch.cuda.current_stream(self.device)
            step.wait_stream(stream)
            for copy in copies.values():
                copy.record_stream(step)  # otherwise its memory could be reused while the step reads it
            yield {**batch, **copies}
