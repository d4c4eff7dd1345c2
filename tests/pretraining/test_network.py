# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The network has the official checkpoints' names and shapes, and its heads read what they say they read."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from bundles.common.errors import InputError
from bundles.common.networks.swin_unetr import build_swin_unetr
from bundles.common.weights.checkpoint_file import save_atomically
from bundles.common.weights.loading import encoder_state, load_encoder, load_model
from bundles.pretraining.network import SwinPretrainer, read_model, resolve_heads, values_of_training
from bundles.pretraining.proxy_tasks.tasks import PAPER_TASKS as TASKS

CROP = (64, 64, 32)  # bottleneck 2 x 2 x 1


def build(record, tasks=TASKS, head="vae", pooling="token", **options):
    torch.manual_seed(0)
    return SwinPretrainer(
        encoder=record, tasks=tasks, heads={"reconstruction_head": head, "pooling": pooling}, **options
    )


def shapes(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("head", "conv"),
    [
        (
            "vae",
            {
                "conv.0": (96, 192, 3, 3, 3),
                "conv.4": (48, 96, 3, 3, 3),
                "conv.8": (24, 48, 3, 3, 3),
                "conv.12": (12, 24, 3, 3, 3),
                "conv.16": (12, 12, 3, 3, 3),
                "conv.20": (2, 12, 1, 1, 1),
            },
        ),
        (
            "deconv",
            {
                "conv.0": (192, 96, 2, 2, 2),
                "conv.1": (96, 48, 2, 2, 2),
                "conv.2": (48, 24, 2, 2, 2),
                "conv.3": (24, 12, 2, 2, 2),
                "conv.4": (12, 2, 2, 2, 2),
            },
        ),
        ("large_kernel_deconv", {"conv": (192, 2, 32, 32, 32)}),
    ],
)
def test_names_and_shapes_are_those_of_the_official_checkpoints(record, head, conv):
    record = record | {"in_channels": 2}
    state = shapes(build(record, head=head).state_dict())
    heads = {name: shape for name, shape in state.items() if not name.startswith("swinViT.")}
    expected = {
        "rotation_head.weight": (4, 192),
        "rotation_head.bias": (4,),
        "contrastive_head.weight": (512, 192),
        "contrastive_head.bias": (512,),
    }
    for name, weight in conv.items():
        out = weight[0] if head == "vae" else weight[1]
        expected |= {f"{name}.weight": weight, f"{name}.bias": (out,)}
    assert heads == expected
    encoder = {name: shape for name, shape in state.items() if name.startswith("swinViT.")}
    assert encoder == shapes(encoder_state(build_swin_unetr(record, out_channels=3)))


def test_the_published_size_has_the_published_shapes():
    record = {"in_channels": 1, "feature_size": 48, "depths": [2, 2, 2, 2], "num_heads": [3, 6, 12, 24]}
    record |= {"window_size": 7, "patch_size": 2, "merging": "legacy", "use_v2": False}
    state = shapes(build(record).state_dict())
    assert state["swinViT.patch_embed.proj.weight"] == (48, 1, 2, 2, 2)
    assert state["swinViT.layers4.0.downsample.reduction.weight"] == (768, 3072)
    assert state["swinViT.layers1.0.blocks.1.attn.relative_position_bias_table"] == (2197, 3)
    assert state["rotation_head.weight"] == (4, 768) and state["contrastive_head.weight"] == (512, 768)
    assert state["conv.0.weight"] == (384, 768, 3, 3, 3) and state["conv.20.weight"] == (1, 48, 1, 1, 1)


@pytest.mark.parametrize("fast", [True, False])
def test_the_vae_head_computes_what_the_official_one_does(record, fast):
    """Convolution, instance norm, leaky ReLU of slope 0.01, trilinear upsampling by 2, five times; then a projection."""
    network = build(record, fast=fast).double().eval()
    state = {name: tensor.normal_(std=0.3) for name, tensor in network.conv.state_dict().items()}
    network.conv.load_state_dict(state)
    deep = x = torch.randn(2, 192, 2, 3, 2, dtype=torch.float64)
    for place in (0, 4, 8, 12, 16):
        x = F.conv3d(x, state[f"{place}.weight"], state[f"{place}.bias"], padding=1)
        x = (x - x.mean(dim=(2, 3, 4), keepdim=True)) / (x.var(dim=(2, 3, 4), keepdim=True, correction=0) + 1e-5).sqrt()
        x = torch.where(x > 0, x, 0.01 * x)
        x = F.interpolate(x, scale_factor=2, mode="trilinear", align_corners=False)
    expected = F.conv3d(x, state["20.weight"], state["20.bias"])
    with torch.no_grad():
        assert (network.conv(deep) - expected).abs().max() < 1e-9


@pytest.mark.parametrize("head", ["vae", "deconv", "large_kernel_deconv"])
def test_training_gives_a_dict_of_the_heads_in_use_and_eval_one_tensor_of_the_shape_of_the_input(record, head):
    network = build(record, head=head)
    x = torch.rand(2, 1, *CROP)
    outputs = network.train()(x)
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {
        "rotation": (2, 4),
        "contrast": (2, 512),
        "inpainting": (2, 1, *CROP),
    }
    with torch.no_grad():
        reconstruction = network.eval()(x)
        assert type(reconstruction) is torch.Tensor and reconstruction.shape == x.shape
        assert torch.equal(reconstruction, network.proxy_outputs(x)["inpainting"])


def test_the_reconstruction_has_the_channels_of_the_input(record):
    network = build(record | {"in_channels": 3}).eval()
    with torch.no_grad():
        assert network(torch.rand(1, 3, *CROP)).shape == (1, 3, *CROP)


@pytest.mark.parametrize("pooling", ["token", "mean"])
def test_rotation_and_contrast_read_tokens_0_and_1_or_the_mean(record, pooling):
    network = build(record, pooling=pooling).eval()
    x = torch.rand(2, 1, *CROP)
    with torch.no_grad():
        deep = network.bottleneck(x)
        outputs = network.proxy_outputs(x)
        embedding = network.embedding(x)
    assert deep.shape == (2, 192, 2, 2, 1)
    mean = deep.mean(dim=(2, 3, 4))
    # voxels 0 and 1 in C order of a 2 x 2 x 1 bottleneck
    rotation_reads, contrast_reads = (deep[:, :, 0, 0, 0], deep[:, :, 0, 1, 0]) if pooling == "token" else (mean, mean)
    torch.testing.assert_close(outputs["rotation"], network.rotation_head(rotation_reads))
    torch.testing.assert_close(outputs["contrast"], network.contrastive_head(contrast_reads))
    torch.testing.assert_close(embedding, mean)
    assert (deep[:, :, 0, 0, 0] - deep[:, :, 0, 1, 0]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("tasks", "frozen"),
    [
        (TASKS, ()),
        (["inpainting"], ("rotation_head", "contrastive_head")),
        (["rotation", "contrast"], ("conv",)),
        ("contrast", ("conv", "rotation_head")),
    ],
)
def test_heads_of_other_tasks_are_silent_and_frozen(record, tasks, frozen):
    network = build(record, tasks=tasks)
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad != name.split(".")[0].startswith(frozen or ("nothing",)), name
    asked = [tasks] if isinstance(tasks, str) else tasks
    outputs = network.train()(torch.rand(1, 1, *CROP))
    assert set(outputs) == set(asked)
    # every trainable parameter gets a gradient, as DistributedDataParallel demands
    sum(value.sum() for value in outputs.values()).backward()
    without = [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_gradient_checkpointing_changes_memory_and_not_gradients(record):
    plain, checkpointed = build(record), build(record, use_checkpoint=True)
    checkpointed.load_state_dict(plain.state_dict())
    x = torch.rand(1, 1, *CROP)
    for network, forwards in ((plain, 1), (checkpointed, 2)):  # the second one in the backward
        calls = []
        network.swinViT.layers1[0].blocks[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        network.train()(x)["rotation"].square().sum().backward()
        assert len(calls) == forwards
    torch.testing.assert_close(
        checkpointed.swinViT.patch_embed.proj.weight.grad, plain.swinViT.patch_embed.proj.weight.grad
    )
    assert plain.swinViT.patch_embed.proj.weight.grad.any()


@pytest.mark.parametrize("merging", ["monai", "legacy"])
def test_features_in_swin_unetr_equal_those_of_the_pre_training(record, tmp_path, merging):
    record = record | {"merging": merging}
    pretrainer = build(record).eval()
    save_atomically(
        {"state_dict": encoder_state(pretrainer), "encoder": record, "trained": {}}, tmp_path / "encoder.pt"
    )
    segmenter = build_swin_unetr(record, out_channels=2).eval()
    load_encoder(segmenter, str(tmp_path / "encoder.pt"))
    x = torch.rand(1, 1, *CROP)
    with torch.no_grad():
        ours, theirs = pretrainer.swinViT(x), segmenter.swinViT(x, segmenter.normalize)
    assert len(ours) == len(theirs) == 5
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("heads", "words"),
    [
        (
            {"reconstruction_head": "net", "pooling": "token"},
            "--reconstruction_head 'net' is not one of vae, deconv, large_kernel_deconv, unet",
        ),
        ({"reconstruction_head": "vae", "pooling": "max"}, "--pooling 'max' is not one of token, mean"),
    ],
)
def test_unknown_heads_are_refused(record, heads, words):
    with pytest.raises(InputError, match=words):
        SwinPretrainer(encoder=record, tasks=TASKS, heads=heads)


def test_unknown_tasks_are_refused(record):
    with pytest.raises(InputError, match="jigsaw"):
        build(record, tasks=["jigsaw"])


def test_heads_are_what_was_asked_for_else_those_of_the_checkpoint_else_the_official_ones(tmp_path, record):
    path = str(tmp_path / "model.pt")
    heads = {"reconstruction_head": "deconv", "pooling": "mean"}
    model = build(record, head="deconv", pooling="mean").state_dict()
    save_atomically({"model": model, "heads": heads, "tasks": ["contrast"]}, path)
    nothing = {"reconstruction_head": None, "pooling": None}
    assert resolve_heads(asked=nothing, checkpoint=None) == {"reconstruction_head": "vae", "pooling": "token"}
    assert resolve_heads(asked=nothing, checkpoint=path) == {"reconstruction_head": "deconv", "pooling": "mean"}
    assert resolve_heads(asked={"reconstruction_head": "deconv"}, checkpoint=path)["pooling"] == "mean"
    preset = {"reconstruction_head": "deconv", "pooling": "mean", "max_steps": 5}
    assert resolve_heads(asked=nothing, checkpoint=None, preset=preset) == {
        **{"reconstruction_head": "deconv", "pooling": "mean"},
    }
    assert resolve_heads(asked={"pooling": "token"}, checkpoint=None, preset=preset)["pooling"] == "token"
    assert resolve_heads(asked={"pooling": "mean"}, checkpoint=None) == {
        "reconstruction_head": "vae",
        "pooling": "mean",
    }
    with pytest.raises(InputError, match="model.pt was trained with pooling mean, not token. Do not set --pooling"):
        resolve_heads(asked={"pooling": "token"}, checkpoint=path)


def test_the_heads_of_last_pt_are_those_of_its_run(tmp_path, record):
    """They are not visible in the weights: taken for an official file, it would silently get another pooling."""
    model = build(record, head="vae", pooling="normalised_mean").state_dict()
    heads = {"reconstruction_head": "vae", "pooling": "normalised_mean"}
    settings = {"heads": heads, "tasks": "rotation", "seed": 3}
    save_atomically({"model": model, "settings": settings, "step": 4}, tmp_path / "last.pt")
    path = str(tmp_path / "last.pt")
    assert resolve_heads(asked={}, checkpoint=path) == heads
    found = read_model(path)
    assert (found["tasks"], found["trained"]["seed"]) == (["rotation"], 3)


def test_an_absent_checkpoint_is_refused_unless_it_is_optional(tmp_path):
    absent = str(tmp_path / "none.pt")
    with pytest.raises(InputError, match="none.pt"):
        resolve_heads(asked={}, checkpoint=absent)
    assert resolve_heads(asked={}, checkpoint=absent, optional=True)["pooling"] == "token"


@pytest.mark.parametrize("head", ["vae", "deconv", "large_kernel_deconv"])
def test_an_official_checkpoint_with_its_heads_can_be_continued(tmp_path, record, head):
    source = build(record, head=head)
    state = {f"module.{name}": tensor + 1 for name, tensor in source.state_dict().items() if tensor.is_floating_point()}
    save_atomically({"epoch": 3, "state_dict": state, "optimizer": {}}, tmp_path / "official.pt")
    path = str(tmp_path / "official.pt")
    heads = resolve_heads(asked={}, checkpoint=path)
    assert heads == {"reconstruction_head": head, "pooling": "token"}
    target = build(record, head=heads["reconstruction_head"], pooling=heads["pooling"])
    load_model(target, path)
    for name, tensor in target.state_dict().items():
        expected = source.state_dict()[name]
        torch.testing.assert_close(tensor, expected + 1 if expected.is_floating_point() else expected)


def test_an_encoder_alone_is_no_whole_network(tmp_path, record):
    save_atomically({"state_dict": encoder_state(build(record)), "encoder": record}, tmp_path / "encoder.pt")
    with pytest.raises(InputError, match="encoder.pt is not a complete pre-training network.*--pretrained_encoder"):
        resolve_heads(asked={}, checkpoint=str(tmp_path / "encoder.pt"))


@pytest.mark.parametrize("part", ["rotation_head.", "contrastive_head.", "conv."])
def test_an_official_checkpoint_without_one_of_its_heads_is_no_whole_network(tmp_path, record, part):
    state = {f"module.{name}": tensor for name, tensor in build(record).state_dict().items()}
    save_atomically({k: v for k, v in state.items() if not k.startswith(f"module.{part}")}, tmp_path / "part.pt")
    with pytest.raises(InputError, match="part.pt is not a complete pre-training network"):
        resolve_heads(asked={}, checkpoint=str(tmp_path / "part.pt"))


def test_an_evaluation_goes_by_the_training_then_the_preset_then_train_yaml():
    trained = {"trained": {"mask_ratio": [0.1, 0.2], "temperature": 0.1}}
    values = values_of_training(trained=trained, preset={"mask_ratio": [0.3, 0.3], "batch_size": 2})
    assert (values["mask_ratio"], values["batch_size"], values["temperature"]) == ([0.1, 0.2], 2, 0.1)
    assert values["min_body"] == 0.01


WHOLE = (*TASKS, "position")


def test_the_decoder_is_that_of_swin_unetr(record):
    """Every tensor but the last layer has MONAI's name, and the features are those of MONAI's forward."""
    network = build(record, tasks=WHOLE, head="unet").eval()
    segmenter = build_swin_unetr(record, out_channels=3, fast=False).eval()
    state = network.state_dict()
    theirs = {name for name in segmenter.state_dict() if not name.startswith("out.")}
    assert theirs < set(state)
    heads = ("rotation_head.", "contrastive_head.", "conv.", "position_head.")
    assert all(name.startswith(heads) for name in set(state) - theirs)
    segmenter.load_state_dict({name: state[name] for name in theirs}, strict=False)
    segmenter.out = network.position_head
    x = torch.rand(2, 1, *CROP)
    with torch.no_grad():
        torch.testing.assert_close(network.predict_positions(x), 100 * segmenter(x), rtol=1e-4, atol=1e-3)
        segmenter.out = network.conv
        torch.testing.assert_close(network.reconstruct(x), segmenter(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("tasks", "head", "views"),
    [(WHOLE, "unet", 6), (WHOLE, "vae", 6), (["position"], "vae", 2), (["inpainting"], "unet", 4)],
)
def test_each_head_reads_its_views(record, tasks, head, views):
    network = build(record, tasks=tasks, head=head, pooling="mean").eval()
    x = torch.rand(views, 1, *CROP)
    masked, for_position = (x[:4], x[4:]) if len(tasks) == 4 else (x, x)
    with torch.no_grad():
        outputs = network.proxy_outputs(x, embedding=True)
        assert set(outputs) == {*tasks, "embedding"} and outputs["embedding"].shape == (views, 192)
        if "inpainting" in tasks:
            torch.testing.assert_close(outputs["inpainting"], network.reconstruct(masked), rtol=1e-4, atol=1e-5)
        if "position" in tasks:
            expected = network.predict_positions(for_position) / 100
            torch.testing.assert_close(outputs["position"], expected, rtol=1e-4, atol=1e-5)
        if "rotation" in tasks:
            expected = network.rotation_head(network.embedding(masked))
            torch.testing.assert_close(outputs["rotation"], expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(
            network(x), network.predict_positions(x) if tasks == ["position"] else network.reconstruct(x)
        )


def test_some_of_the_tasks_of_a_network_can_be_scored(record):
    learnt = build(record, tasks=[*TASKS, "position"]).train()
    scored = build(record, tasks=[*TASKS, "position"], scored=["position", "contrast"]).train()
    scored.load_state_dict(learnt.state_dict())
    crop = torch.rand(1, 1, 64, 32, 32)
    outputs = scored(torch.cat([crop] * 3))  # two masked views, one for position
    assert {name: len(each) for name, each in outputs.items()} == {"contrast": 2, "position": 1}
    torch.testing.assert_close(outputs["position"], learnt(torch.cat([crop] * 3))["position"])
    with pytest.raises(InputError, match=r"this model did not learn rotation. It learnt inpainting"):
        build(record, tasks=["inpainting"], scored=["inpainting", "rotation"])


@pytest.mark.parametrize(
    ("tasks", "head"), [(WHOLE, "unet"), (["position"], "unet"), (["inpainting"], "unet"), (["contrast"], "unet")]
)
def test_every_trainable_parameter_of_the_whole_network_gets_a_gradient(record, tasks, head):
    network = build(record, tasks=tasks, head=head).train()
    sum(value.sum() for value in network(torch.rand(3, 1, *CROP)).values()).backward()
    without = [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    trained = {name.split(".")[0] for name, p in network.named_parameters() if p.requires_grad}
    assert ("decoder1" in trained) == (tasks != ["contrast"]) and "swinViT" in trained


@pytest.mark.parametrize("head", ["vae", "deconv", "large_kernel_deconv", "unet"])
def test_reconstructions_start_grey(record, head):
    for seed in range(3):
        torch.manual_seed(seed)
        heads = {"reconstruction_head": head, "pooling": "mean"}
        network = SwinPretrainer(encoder=record, tasks=["inpainting"], heads=heads).eval()
        with torch.no_grad():
            grey = network(torch.rand(1, 1, *CROP))
        assert grey.mean() == pytest.approx(0.5, abs=0.12) and 0 < grey.std() < 0.2


def test_without_position_and_unet_there_is_no_decoder(record):
    assert not any(name.startswith(("encoder", "decoder")) for name in build(record).state_dict())


def test_a_decoder_needs_four_stages(record):
    record = record | {"depths": [1, 1, 1], "num_heads": [1, 2, 4]}
    for options in ({"head": "unet"}, {"tasks": ["position"]}):
        with pytest.raises(InputError, match=r"depths \[1, 1, 1\]: the decoder of Swin UNETR needs .* four stages"):
            build(record, **options)
