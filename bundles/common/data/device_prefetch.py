# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The next batch is copied to the GPU while the step before it is computed there."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sized
from typing import Any

import torch


class DevicePrefetch:
    """A data loader whose images and labels lie on the GPU; on a CPU it is the loader as it is.

    A training that never waits for its GPU asks for a batch as soon as the step before is queued: the copy then runs beside that step, on a
    stream of its own. It wants a loader with ``pin_memory``; from other memory a copy waits.

    Args:
        loader: gives dicts of tensors.
        device: of the training.
        keys: what is copied; the rest, such as the numbers of the draws, is read by the host and stays there.
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
        """Number of batches, where the loader has one."""
        if not isinstance(self.loader, Sized):
            raise TypeError(f"{type(self.loader).__name__} has no length.")
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        batches = iter(self.loader)  # here and not at the first batch: a loader takes a random number when it begins
        return self._copied(batches) if self.device.type == "cuda" else batches

    def _copied(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        stream = torch.cuda.Stream(self.device)
        for batch in batches:
            with torch.cuda.stream(stream):
                copies = {key: batch[key].to(self.device, non_blocking=True) for key in self.keys if key in batch}
            step = torch.cuda.current_stream(self.device)
            step.wait_stream(stream)
            for copy in copies.values():
                copy.record_stream(step)  # or its memory could be given away while the step reads it
            yield {**batch, **copies}
