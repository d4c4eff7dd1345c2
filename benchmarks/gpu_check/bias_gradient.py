# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Part 2: the Triton kernel of the attention bias's gradient: built, equal to float64, to the bit in two runs, memory.

In a dry run there is no Triton kernel: the same checks of the path in PyTorch that replaces it.
"""

from __future__ import annotations

import time
from functools import partial

import torch

from bundles.common.networks.fast.bias_gradient import bias_gradient, why_no_kernel
from bundles.common.networks.fast.fused_attention import fold, fused_attention, has_efficient_kernel
from bundles.common.networks.fast.windows import WindowPlan, window_plan

from .parts import Settings, attempt, tell

# name: grid, window, heads, width of a head, samples
CASES = {
    "343 tokens, width 16": ((24, 24, 24), (7, 7, 7), 3, 16, 2),
    "216 tokens, width 16": ((6, 6, 6), (6, 6, 6), 24, 16, 2),
    "64 tokens, width 12": ((16, 16, 8), (4, 4, 4), 1, 12, 4),
    "64 tokens, width 32": ((8, 8, 8), (4, 4, 4), 4, 32, 2),
    "32 tokens, width 4": ((4, 4, 2), (4, 4, 2), 2, 4, 2),
}
TINY = ("64 tokens, width 12", "32 tokens, width 4")
FIRST_STAGE = ((48, 48, 48), (7, 7, 7), 3, 16, 4)  # base size, four crops of 96^3
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}  # relative 2-norm
RUNS = 10


def run(settings: Settings) -> None:
    """Check the kernel, then the attention around it."""
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device(settings.device)
    for kind in TOLERANCE:
        attempt(f"kernel, {name_of(kind)}", partial(built, device, kind, dry_run=settings.dry_run))
    if not settings.dry_run:  # the figure that matters most comes before the cases, each of which builds kernels
        attempt("first stage", partial(cost, device))
    for name, case in ((name, CASES[name]) for name in (TINY if settings.dry_run else CASES)):
        for kind in TOLERANCE:
            for shifted in (False, True):
                label = f"{name}, {'shifted' if shifted else 'plain'}, {name_of(kind)}"
                attempt(label, partial(compare, label, case, kind, device, shifted=shifted))


def name_of(kind: torch.dtype) -> str:
    """Return the name of a type without ``torch.``."""
    return str(kind).removeprefix("torch.")


def built(device: torch.device, kind: torch.dtype, *, dry_run: bool) -> None:
    """Report whether both kernels are used on this card, or why not."""
    reason = why_no_kernel(device, kind, 16)
    efficient = has_efficient_kernel(device, kind)
    text = f"Triton's kernel in {name_of(kind)}: {reason or 'built'}; PyTorch's efficient kernel: {'yes' if efficient else 'no'}"
    tell(f"kernel, {name_of(kind)}", ok=dry_run or (reason is None and efficient), text=text, reason=reason)


def drawn(
    case: tuple, kind: torch.dtype, device: torch.device, *, shifted: bool
) -> tuple[WindowPlan, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return plan, qkv, bias and the gradient of the output."""
    grid, window, heads, width, samples = case
    shift = tuple(w // 2 if shifted and g > w else 0 for g, w in zip(grid, window, strict=True))
    plan = window_plan(grid, window, shift, device, samples)
    tokens = len(plan.take) // plan.windows
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(plan.windows, tokens, 3, heads, width, generator=generator).to(device, kind)
    bias = torch.randn(heads, tokens, tokens + -tokens % 8, generator=generator).to(device)
    grad = torch.randn(plan.windows, tokens, heads * width, generator=generator).to(device, kind)
    return plan, qkv, bias, grad


def exact(
    plan: WindowPlan, qkv: torch.Tensor, bias: torch.Tensor, grad: torch.Tensor, scale: float
) -> dict[str, torch.Tensor]:
    """Return output, gradients and logsumexp of the plain formula in float64."""
    leaves = qkv.double().requires_grad_(), bias.double().requires_grad_()
    q, k, v = leaves[0].permute(2, 0, 3, 1, 4)
    tokens = bias.shape[1]
    scores = scale * q @ k.transpose(-1, -2) + leaves[1][None, ..., :tokens]
    if plan.masks is not None:
        scores = scores + plan.masks.double()[plan.kind][:, None]
    out = (torch.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(-2)
    out.backward(grad.double())
    found = {"output": out.detach(), "qkv gradient": leaves[0].grad, "bias gradient": leaves[1].grad}
    return found | {"logsumexp": scores.detach().logsumexp(dim=-1)}


def compare(label: str, case: tuple, kind: torch.dtype, device: torch.device, *, shifted: bool) -> None:
    """Report the errors of the attention, and of the kernel alone, against float64, and whether two runs are equal."""
    plan, qkv, bias, grad = drawn(case, kind, device, shifted=shifted)
    scale = qkv.shape[-1] ** -0.5
    true = exact(plan, qkv, bias, grad, scale)
    runs = []
    for _ in range(2):
        leaves = qkv.clone().requires_grad_(), bias.clone().requires_grad_()
        out = fused_attention(*leaves, plan, scale)
        out.backward(grad)
        runs.append({"output": out.detach(), "qkv gradient": leaves[0].grad, "bias gradient": leaves[1].grad})
    heads, tokens = bias.shape[:2]
    folded = fold(bias, plan.masks, kind)
    shape = (*qkv.shape[:2], heads, qkv.shape[-1])
    saved = true["output"].view(shape).float(), true["logsumexp"].float()
    alone = bias_gradient(qkv, grad.view(shape), *saved, folded, plan.bounds, plan.runs, scale)
    errors = {name: relative(found, true[name]) for name, found in runs[0].items()}
    errors["kernel alone"] = relative(alone, true["bias gradient"][..., :tokens])
    equal = all(torch.equal(one, other) for one, other in zip(*(each.values() for each in runs), strict=True))
    ok = equal and all(error < TOLERANCE[kind] for error in errors.values())
    shown = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    tell(label, ok=ok, text=f"{label}: {shown}; two runs {'equal' if equal else 'differ'}", errors=errors, equal=equal)


def relative(found: torch.Tensor, true: torch.Tensor) -> float:
    """Return the 2-norm of the difference over that of the exact value."""
    return float((found.double() - true).norm() / true.norm())


def cost(device: torch.device) -> None:
    """Report time and peak memory of the backward of one block of the first stage in bf16, ours and PyTorch's."""
    aten = torch.ops.aten
    kind = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    plan, qkv, bias, grad = drawn(FIRST_STAGE, kind, device, shifted=False)
    leaves = qkv.requires_grad_(), bias.requires_grad_()
    out = fused_attention(*leaves, plan, 0.25)
    q, k, v = qkv.detach().permute(2, 0, 3, 1, 4)
    table = fold(bias.detach(), None, kind).expand(len(q), -1, -1, -1)
    saved = aten._scaled_dot_product_efficient_attention(q, k, v, table, True, scale=0.25)
    heads = grad.view(*qkv.shape[:2], *qkv.shape[3:]).transpose(1, 2)

    def ours() -> None:
        torch.autograd.grad(out, leaves, grad, retain_graph=True)

    def theirs() -> None:
        gradients = aten._scaled_dot_product_efficient_attention_backward(
            heads, q, k, v, table, *saved, 0.0, [True] * 4, scale=0.25
        )
        gradients[3].sum(dim=0)

    figures = {}
    for name, backward in (("ours", ours), ("PyTorch", theirs)):
        backward()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        for _ in range(RUNS):
            backward()
        torch.cuda.synchronize()
        ms = (time.perf_counter() - begin) / RUNS * 1000
        figures[name] = {"ms": ms, "mib": (torch.cuda.max_memory_allocated() - before) / 2**20}
    shown = "; ".join(f"{name} {found['ms']:.2f} ms, {found['mib']:.0f} MiB" for name, found in figures.items())
    tell("first stage", ok=None, text=f"backward of a block of the first stage, {name_of(kind)}: {shown}", **figures)
