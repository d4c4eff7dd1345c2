# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The forward pass of Swin UNETR as in MONAI 0.9 to 1.4, written out from a state dict alone: a reference for tests.

No module of MONAI and no layer of torch.nn takes part, only indexing and matrix products, window by window and head by
head: clear, not fast. Sizes, depths and whether the network is a V2 are read off the names and shapes of the weights;
the numbers of heads and the window's size have to be said. Tensors are (batch, channel, depth, height, width), inside a
Swin stage (batch, depth, height, width, channel). Arithmetic is done in the dtype of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product

import torch
from torch import Tensor

State = Mapping[str, Tensor]

#: Start of the sub-lattices along (depth, height, width), in the order in which patch merging concatenates them.
#: "legacy" is what MONAI 0.9 to 1.4 wrote, where 010 and 001 stand twice and 110 and 011 not at all.
OFFSETS = {
    "legacy": ("000", "100", "010", "001", "101", "010", "001", "111"),
    "monai": ("000", "100", "010", "001", "110", "101", "011", "111"),
}
EPS = 1e-5  # of every layer norm and instance norm
NO_ATTENTION = -100.0  # added to the score of two tokens that a shift brought together (MONAI adds no infinity)


def encoder_features(
    state: State, x: Tensor, *, num_heads: Sequence[int], window_size: int, merging: str = "legacy"
) -> list[Tensor]:
    """What MONAI's ``SwinUNETR.swinViT(x, normalize=True)`` returns.

    Args:
        state: weights under the names of ``SwinUNETR.state_dict()``; only those under ``swinViT.`` are read.
        x: image, (B, in_channels, D, H, W), of any size.
        num_heads: attention heads of each of the four stages.
        window_size: side of the attention window, in tokens.
        merging: ``"legacy"`` (MONAI 0.9 to 1.4) or ``"monai"`` (1.5 and later).

    Returns:
        The embedded patches and the outputs of the four stages, each normalised over its channels: five tensors
        (B, C * 2**i, D / 2**(i+1), H / 2**(i+1), W / 2**(i+1)) for a patch size of 2.
    """
    x = patch_embedding(state, x.to(state["swinViT.patch_embed.proj.weight"].dtype))
    features = [normalised(x, dims=(1,))]
    for stage, heads in enumerate(num_heads, start=1):
        if f"swinViT.layers{stage}c.0.layer.conv1.conv.weight" in state:
            x = residual_block(state, f"swinViT.layers{stage}c.0.layer", x)
        x = swin_stage(state, f"swinViT.layers{stage}.0", x, heads=heads, window_size=window_size, merging=merging)
        features.append(normalised(x, dims=(1,)))
    return features


def segmentation_logits(
    state: State, x: Tensor, *, num_heads: Sequence[int], window_size: int, merging: str = "legacy"
) -> Tensor:
    """What MONAI's ``SwinUNETR(x)`` returns: logits (B, classes, D, H, W), for sides that are multiples of 32.

    Arguments as of `encoder_features`, with the decoder's weights in ``state``.
    """
    x = x.to(state["out.conv.conv.weight"].dtype)
    hidden = encoder_features(state, x, num_heads=num_heads, window_size=window_size, merging=merging)
    # hidden[3] goes into the decoder as it is: there is no encoder5.
    skips = [
        hidden[3],
        residual_block(state, "encoder4.layer", hidden[2]),
        residual_block(state, "encoder3.layer", hidden[1]),
        residual_block(state, "encoder2.layer", hidden[0]),
        residual_block(state, "encoder1.layer", x),
    ]
    y = residual_block(state, "encoder10.layer", hidden[4])
    for name, skip in zip(("decoder5", "decoder4", "decoder3", "decoder2", "decoder1"), skips, strict=True):
        upsampled = upsampling(y, state[f"{name}.transp_conv.conv.weight"])
        y = residual_block(state, f"{name}.conv_block", torch.cat([upsampled, skip], dim=1))
    return convolution(y, state["out.conv.conv.weight"]) + state["out.conv.conv.bias"].view(1, -1, 1, 1, 1)


# The Swin encoder.


def patch_embedding(state: State, x: Tensor) -> Tensor:
    """Each patch of patch_size^3 voxels, zeros beyond the end of the image, times one matrix."""
    weight, bias = state["swinViT.patch_embed.proj.weight"], state["swinViT.patch_embed.proj.bias"]
    side = weight.shape[-1]
    x = zero_padded(x, dims=(2, 3, 4), multiples=(side, side, side))
    out = bias.view(1, -1, 1, 1, 1)
    for i, j, k in product(range(side), repeat=3):
        out = out + torch.einsum("oc,bcdhw->bodhw", weight[:, :, i, j, k], x[:, :, i::side, j::side, k::side])
    return out


def swin_stage(state: State, name: str, x: Tensor, *, heads: int, window_size: int, merging: str) -> Tensor:
    """The blocks of one stage, every second one with shifted windows, and then patch merging."""
    x = x.movedim(1, -1)
    depth = 0
    while f"{name}.blocks.{depth}.norm1.weight" in state:
        block, shifted = f"{name}.blocks.{depth}", depth % 2 == 1
        y = layer_norm(state, f"{block}.norm1", x)
        x = x + window_attention(state, f"{block}.attn", y, heads=heads, window_size=window_size, shifted=shifted)
        y = linear(state, f"{block}.mlp.linear1", layer_norm(state, f"{block}.norm2", x))
        x = x + linear(state, f"{block}.mlp.linear2", gelu(y))
        depth += 1
    return patch_merging(state, f"{name}.downsample", x, merging).movedim(-1, 1)


def window_attention(state: State, name: str, x: Tensor, *, heads: int, window_size: int, shifted: bool) -> Tensor:
    """Attention inside each window of (B, D, H, W, C), without the residual connection."""
    sides = x.shape[1:4]
    window = [min(window_size, side) for side in sides]
    # A window that covers an axis has nothing to be shifted to.
    shift = [window_size // 2 if shifted and side > window_size else 0 for side in sides]
    # Tokens of the padding are zero, yet queries, keys and values are not: they have a bias, and nothing masks them.
    x = zero_padded(x, dims=(1, 2, 3), multiples=window)
    padded = x.shape[1:4]
    bias = relative_position_bias(state, name, window_size, tokens=math.prod(window))

    out = torch.zeros_like(x)
    for start in product(*(range(0, length, step) for length, step in zip(padded, window, strict=True))):
        # Shifted windows run over the end of the volume and go on at its beginning, as a cyclic roll has it.
        unwrapped = [torch.arange(s, s + w) + move for s, w, move in zip(start, window, shift, strict=True)]
        d, h, w = (position % length for position, length in zip(unwrapped, padded, strict=True))
        place = (slice(None), d[:, None, None], h[None, :, None], w[None, None, :])
        # Tokens see each other if, along each axis, both or neither went over the end. Inside one window this is
        # what Swin's 27 numbered regions come to.
        over = torch.cartesian_prod(*(p >= length for p, length in zip(unwrapped, padded, strict=True)))
        apart = (over[:, None, :] != over[None, :, :]).any(dim=-1)

        tokens = x[place].flatten(1, 3)
        q, k, v = linear(state, f"{name}.qkv", tokens).chunk(3, dim=-1)
        size = q.shape[-1] // heads
        attended = []
        for head in range(heads):
            mine = slice(head * size, (head + 1) * size)
            scores = q[..., mine] @ k[..., mine].transpose(1, 2) / math.sqrt(size)
            scores = scores + bias[:, :, head] + NO_ATTENTION * apart
            attended.append(softmax(scores) @ v[..., mine])
        out[place] = linear(state, f"{name}.proj", torch.cat(attended, dim=-1)).unflatten(1, window)
    return out[:, : sides[0], : sides[1], : sides[2]]


def relative_position_bias(state: State, name: str, window_size: int, tokens: int) -> Tensor:
    """What is added to the score of query a and key b for each head: (tokens, tokens, heads).

    A window that was cut to fewer tokens is given the rows and columns of the full window's first tokens, although its
    own tokens lie elsewhere. This is wrong, and every published checkpoint was trained with it.
    """
    span = 2 * window_size - 1
    place = torch.cartesian_prod(*[torch.arange(window_size)] * 3)[:tokens]
    d, h, w = (place[:, None, :] - place[None, :, :] + window_size - 1).unbind(dim=-1)
    return state[f"{name}.relative_position_bias_table"][(d * span + h) * span + w]


def patch_merging(state: State, name: str, x: Tensor, merging: str) -> Tensor:
    """Half the resolution of (B, D, H, W, C), twice the channels."""
    x = zero_padded(x, dims=(1, 2, 3), multiples=(2, 2, 2))
    lattices = [x[:, int(i) :: 2, int(j) :: 2, int(k) :: 2] for i, j, k in OFFSETS[merging]]
    return linear(state, f"{name}.reduction", layer_norm(state, f"{name}.norm", torch.cat(lattices, dim=-1)))


# The convolutional part.


def residual_block(state: State, name: str, x: Tensor) -> Tensor:
    """Two 3x3x3 convolutions with instance norm, plus the input, which goes through a 1x1x1 one where there is one."""
    y = convolution(x, state[f"{name}.conv1.conv.weight"])
    y = leaky_relu(normalised(y, dims=(2, 3, 4)))
    y = convolution(y, state[f"{name}.conv2.conv.weight"])
    y = normalised(y, dims=(2, 3, 4))
    if f"{name}.conv3.conv.weight" in state:
        x = normalised(convolution(x, state[f"{name}.conv3.conv.weight"]), dims=(2, 3, 4))
    return leaky_relu(y + x)


def convolution(x: Tensor, weight: Tensor) -> Tensor:
    """One matrix product for each element of a kernel of odd side; zeros beyond the border, the size is kept."""
    side, (depth, height, width) = weight.shape[-1], x.shape[2:]
    border = side // 2
    around = x.new_zeros(*x.shape[:2], depth + 2 * border, height + 2 * border, width + 2 * border)
    around[:, :, border : border + depth, border : border + height, border : border + width] = x
    out = x.new_zeros(x.shape[0], weight.shape[0], depth * height * width)
    for i, j, k in product(range(side), repeat=3):
        moved = around[:, :, i : i + depth, j : j + height, k : k + width]
        out += weight[:, :, i, j, k] @ moved.flatten(2)
    return out.unflatten(2, (depth, height, width))


def upsampling(x: Tensor, weight: Tensor) -> Tensor:
    """Transposed convolution with the kernel's side as its stride: voxels become blocks that do not overlap."""
    side, (depth, height, width) = weight.shape[-1], x.shape[2:]
    out = x.new_empty(x.shape[0], weight.shape[1], side * depth, side * height, side * width)
    for i, j, k in product(range(side), repeat=3):
        out[:, :, i::side, j::side, k::side] = torch.einsum("co,bcdhw->bodhw", weight[:, :, i, j, k], x)
    return out


# What both are made of.


def linear(state: State, name: str, x: Tensor) -> Tensor:
    y = x @ state[f"{name}.weight"].T
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def layer_norm(state: State, name: str, x: Tensor) -> Tensor:
    return normalised(x, dims=(-1,)) * state[f"{name}.weight"] + state[f"{name}.bias"]


def normalised(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Mean 0 and variance 1 over these dimensions: a layer norm or an instance norm without weights."""
    centred = x - x.mean(dim=dims, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(dim=dims, keepdim=True) + EPS)


def softmax(scores: Tensor) -> Tensor:
    exp = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    return exp / exp.sum(dim=-1, keepdim=True)


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def leaky_relu(x: Tensor) -> Tensor:
    return torch.where(x < 0, 0.01 * x, x)


def zero_padded(x: Tensor, *, dims: Sequence[int], multiples: Sequence[int]) -> Tensor:
    """Zeros at the end of each of ``dims``, up to the next multiple."""
    shape = list(x.shape)
    for dim, multiple in zip(dims, multiples, strict=True):
        shape[dim] = -(-shape[dim] // multiple) * multiple
    out = x.new_zeros(shape)
    out[tuple(slice(side) for side in x.shape)] = x
    return out
