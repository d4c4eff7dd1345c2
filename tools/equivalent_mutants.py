# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Mutants that no test can notice: the change makes no difference, or none that the CPU of a test machine can show."""

from __future__ import annotations

#: Module, line and changed line of mutants that make no difference, with the reason.
EQUIVALENTS: dict[tuple[str, str, str], str] = {
    (
        "bundles/pretraining/proxy_tasks/rotation.py",
        "return draw(generators, lambda g: torch.randint(4, (each,), generator=g, device=g.device))",
        "return draw(generators, lambda g: torch.randint(4, (each,), generator=g))",
    ): "equal on a CPU; benchmarks/gpu_check trains on a GPU",
}
