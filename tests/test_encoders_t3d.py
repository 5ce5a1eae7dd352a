# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The encoders against MONAI's network and PyTorch's layers, and what Transformers and torch ask of them."""

import math
from functools import partial

import pytest
import torch
from monai.networks.layers.utils import get_pool_layer
from monai.networks.nets.resnet import ResNet, resnet10
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from modeling_t3d.configuration_t3d import T3DVisionConfig
from modeling_t3d.encoders_t3d import (
    ENCODERS,
    T3DEncoder,
    T3DEncoderBlock,
    T3DEncoderOutput,
    build_encoder,
    checkpoint_counting_once,
    frozen_batch_norm_statistics,
    initialize_encoder_module,
    sincos_positions,
)

WIDTHS = [8, 16, 24, 32]
# MONAI's and MedicalNet's networks by name: block, depths, shortcut, bias of the shortcut convolution.
NETWORKS = {
    "resnet10": ("basic", [1, 1, 1, 1], "B", False),
    "resnet18": ("basic", [2, 2, 2, 2], "A", True),
    "resnet34": ("basic", [3, 4, 6, 3], "A", True),
    "resnet50": ("bottleneck", [3, 4, 6, 3], "B", True),
    "resnet50-A": ("bottleneck", [1, 2, 1, 1], "A", True),
}


class ResNetWithGradient(ResNet):
    """MONAI's network with a shortcut A that stays in the graph (MONAI's own detaches it)."""

    def _downsample_basic_block(self, x, planes, stride, spatial_dims=3):
        out = get_pool_layer(("avg", {"kernel_size": 1, "stride": stride}), spatial_dims=spatial_dims)(x)
        return torch.cat([out, out.new_zeros(out.size(0), planes - out.size(1), *out.shape[2:])], dim=1)


def resnet_config(layer_type="basic", depths=(1, 1), shortcut_type="B", downsample_bias=True, widths=None, **kwargs):
    widths = WIDTHS[: len(depths)] if widths is None else widths
    expansion = 4 if layer_type == "bottleneck" else 1
    settings = {
        "embedding_size": widths[0],
        "hidden_sizes": [width * expansion for width in widths],
        "depths": list(depths),
        "layer_type": layer_type,
        "shortcut_type": shortcut_type,
        "downsample_bias": downsample_bias,
        "norm": "batch",
        "num_norm_groups": 4,
    }
    return T3DVisionConfig(**{**settings, **kwargs})


def vit_config(attn_implementation="sdpa", **kwargs):
    settings = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "patch_size": [2, 4, 4]}
    config = T3DVisionConfig(encoder_type="vit", **{**settings, **kwargs})
    config._attn_implementation = attn_implementation
    return config


def initialized(encoder):
    return encoder.apply(initialize_encoder_module)


CONFIGS = {
    "resnet-group": partial(resnet_config, norm="group"),
    "resnet-batch": resnet_config,
    "resnet-instance": partial(resnet_config, norm="instance"),
    "resnet-bottleneck-A": partial(resnet_config, "bottleneck", shortcut_type="A"),
    "vit": vit_config,
    "local-contrast": partial(
        T3DVisionConfig, encoder_type="local_contrast", hidden_size=16, cell_size=2, grid_size=[4, 8, 8]
    ),
}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]()


# --- the ResNet against MONAI's


def assert_same_network(reference, encoder, pixel_values, gradients):
    """The reference pools its last map; compare outputs, running statistics and gradients in both modes."""
    encoder.load_state_dict(reference.state_dict())
    for training in (True, False):
        reference.train(training)
        encoder.train(training)
        expected = reference(pixel_values)
        result = encoder(pixel_values).last_hidden_state.mean((2, 3, 4))
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-10)
        for (name, value), (other_name, other) in zip(
            encoder.state_dict().items(), reference.state_dict().items(), strict=True
        ):
            assert name == other_name
            torch.testing.assert_close(value, other, rtol=0, atol=1e-10)
        if gradients:
            weights = torch.randn_like(expected)
            expected.mul(weights).sum().backward()
            result.mul(weights).sum().backward()
            for parameter, other in zip(encoder.parameters(), reference.parameters(), strict=True):
                torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-8, atol=1e-10)
                parameter.grad = other.grad = None


@pytest.mark.parametrize("name", NETWORKS)
def test_resnet_equals_monai(name):
    block, depths, shortcut, bias = NETWORKS[name]
    reference = ResNetWithGradient(
        block, depths, WIDTHS, n_input_channels=2, feed_forward=False, shortcut_type=shortcut, bias_downsample=bias
    ).double()
    encoder = build_encoder(resnet_config(block, depths, shortcut, bias, num_channels=2)).double()
    assert_same_network(reference, encoder, torch.randn(2, 2, 17, 20, 35).double(), gradients=True)


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_resnet_equals_unchanged_monai_with_another_stem(shortcut):
    reference = ResNet(
        "basic",
        [1, 2, 1, 1],
        WIDTHS,
        n_input_channels=1,
        feed_forward=False,
        shortcut_type=shortcut,
        conv1_t_size=(3, 5, 7),
        conv1_t_stride=(1, 2, 2),
        no_max_pool=True,
    ).double()
    config = resnet_config(
        depths=[1, 2, 1, 1],
        shortcut_type=shortcut,
        stem_kernel_size=[3, 5, 7],
        stem_stride=[1, 2, 2],
        stem_pool=False,
    )
    pixel_values = torch.randn(2, 1, 9, 24, 33).double()
    assert_same_network(reference, build_encoder(config).double(), pixel_values, gradients=False)


def test_real_resnet10_equals_monai():
    reference = resnet10(spatial_dims=3, n_input_channels=1, feed_forward=False).double()
    encoder = build_encoder(resnet_config(depths=[1, 1, 1, 1], widths=[64, 128, 256, 512])).double()
    assert_same_network(reference, encoder, torch.randn(2, 1, 20, 17, 24).double(), gradients=False)


def test_default_is_monai_resnet50_in_size():
    with torch.device("meta"):
        encoder = build_encoder(T3DVisionConfig(norm="batch"))
        medicalnet = build_encoder(T3DVisionConfig(norm="batch", downsample_bias=False))
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 46_158_912
    assert sum(parameter.numel() for parameter in medicalnet.parameters()) == 46_155_072
    assert len(medicalnet.state_dict()) == 318
    assert encoder.feature_channels == [64, 256, 512, 1024, 2048]
    assert encoder.feature_strides == [(stride,) * 3 for stride in (1, 2, 4, 8, 16)]


def replace_batch_norms(module, make):
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm3d):
            setattr(module, name, make(child.num_features))
        else:
            replace_batch_norms(child, make)


@pytest.mark.parametrize(
    ("norm", "make"),
    [
        ("group", lambda channels: nn.GroupNorm(4, channels)),
        ("instance", lambda channels: nn.InstanceNorm3d(channels, affine=True)),
    ],
)
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_norm_reaches_every_block(norm, make, block):
    reference = ResNet(block, [1, 2, 1, 1], WIDTHS, n_input_channels=1, feed_forward=False)
    replace_batch_norms(reference, make)
    encoder = build_encoder(resnet_config(block, [1, 2, 1, 1], norm=norm)).double()
    assert not any(isinstance(module, nn.BatchNorm3d) for module in encoder.modules())
    assert_same_network(reference.double(), encoder, torch.randn(2, 1, 24, 24, 35).double(), gradients=True)


def test_without_batch_norm_a_sample_does_not_see_its_batch():
    encoder = build_encoder(resnet_config(norm="group")).double().train()
    views = torch.randn(3, 1, 8, 8, 8).double()
    alone = encoder(views[:1]).last_hidden_state
    torch.testing.assert_close(encoder(views).last_hidden_state[:1], alone, rtol=0, atol=1e-12)


def test_shortcut_without_parameters_cannot_narrow():
    with pytest.raises(ValueError, match="cannot reduce 16 channels to 8"):
        build_encoder(resnet_config(widths=[16, 8], shortcut_type="A"))


# --- the ViT against PyTorch's parts


def plain_vit(encoder, pixel_values):
    """The same network from PyTorch's convolution and transformer layers."""
    config = encoder.config
    patch = tuple(config.patch_size)
    kernel = encoder.patch_embedding.weight.view(config.hidden_size, config.num_channels, *patch)
    tokens = nn.functional.conv3d(pixel_values, kernel, encoder.patch_embedding.bias, stride=patch)
    grid = tokens.shape[2:]
    hidden_states = tokens.flatten(2).transpose(1, 2) + sincos_positions(tuple(grid), config.hidden_size)
    maps = []
    for number, layer in enumerate(encoder.layers, start=1):
        plain = nn.TransformerEncoderLayer(
            config.hidden_size,
            config.num_attention_heads,
            config.intermediate_size,
            dropout=0.0,
            activation="gelu",
            layer_norm_eps=config.layer_norm_eps,
            batch_first=True,
            norm_first=True,
            dtype=pixel_values.dtype,
        )
        projections = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
        plain.self_attn.in_proj_weight.data = torch.cat([projection.weight.data for projection in projections])
        plain.self_attn.in_proj_bias.data = torch.cat([projection.bias.data for projection in projections])
        plain.self_attn.out_proj.load_state_dict(layer.self_attn.out_proj.state_dict())
        plain.linear1.load_state_dict(layer.mlp.fc1.state_dict())
        plain.linear2.load_state_dict(layer.mlp.fc2.state_dict())
        plain.norm1.load_state_dict(layer.layer_norm1.state_dict())
        plain.norm2.load_state_dict(layer.layer_norm2.state_dict())
        hidden_states = plain(hidden_states)
        if number in config.feature_layers:
            maps.append(encoder.post_layernorm(hidden_states).transpose(1, 2).unflatten(2, grid))
    return maps


def randomized(module):
    """Random values everywhere, so that no bias or norm hides behind its initial zero or one."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return module


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_vit_equals_pytorch_layers(attn_implementation):
    config = vit_config(attn_implementation, num_channels=2, feature_layers=[1, 3, 4])
    encoder = randomized(build_encoder(config)).double().eval()
    pixel_values = torch.randn(2, 2, 4, 12, 8).double()
    output = encoder(pixel_values)
    for result, expected in zip(output.feature_maps, plain_vit(encoder, pixel_values), strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)  # the eager softmax runs in float32
    assert output.last_hidden_state is output.feature_maps[-1]


def test_vit_eager_and_sdpa_agree_in_value_and_gradient():
    results = []
    for attn_implementation in ("eager", "sdpa"):
        torch.manual_seed(0)
        encoder = randomized(build_encoder(vit_config(attn_implementation))).train()
        loss = encoder(torch.randn(2, 1, 4, 8, 8)).last_hidden_state.square().sum()
        loss.backward()
        results.append((loss, [parameter.grad for parameter in encoder.parameters()]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=0)
    for eager, sdpa in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(eager, sdpa, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("grid", "hidden_size"), [((2, 3, 4), 12), ((1, 1, 5), 20)])
def test_sincos_positions_equal_loops(grid, hidden_size):
    table = sincos_positions(grid, hidden_size)
    assert table.shape == (1, math.prod(grid), hidden_size)
    num_frequencies = hidden_size // 6
    cells = [(z, y, x) for z in range(grid[0]) for y in range(grid[1]) for x in range(grid[2])]
    for token, cell in enumerate(cells):
        expected = []
        for index in cell:
            angles = [index / 10000 ** (k / num_frequencies) for k in range(num_frequencies)]
            expected += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        expected += [0.0] * (hidden_size - len(expected))
        torch.testing.assert_close(table[0, token], torch.tensor(expected), rtol=0, atol=1e-5)


def test_vit_refuses_views_that_are_no_whole_number_of_patches():
    with pytest.raises(ValueError, match=r"\(4, 10, 8\) voxels .* multiples of patch_size"):
        build_encoder(vit_config())(torch.zeros(1, 1, 4, 10, 8))


# --- the contract, for every encoder


@pytest.mark.parametrize("shape", [(8, 16, 16), (12, 16, 24)])
def test_pyramid_is_as_declared(config, shape):
    encoder = build_encoder(config).eval()
    output = encoder(torch.randn(2, config.num_channels, *shape))
    assert isinstance(output, T3DEncoderOutput)
    assert len(output.feature_maps) == len(encoder.feature_channels) == len(encoder.feature_strides)
    for feature_map, channels, strides in zip(
        output.feature_maps, encoder.feature_channels, encoder.feature_strides, strict=True
    ):
        grid = tuple(math.ceil(side / stride) for side, stride in zip(shape, strides, strict=True))
        assert feature_map.shape == (2, channels, *grid)
    assert output.last_hidden_state is output.feature_maps[-1]
    assert encoder.hidden_size == config.hidden_size == encoder.feature_channels[-1]


def test_input_is_checked_and_left_alone(config):
    encoder = build_encoder(config)
    for shape in [(1, 8, 16, 16), (1, config.num_channels + 1, 8, 16, 16), (1, 2, 1, 8, 16, 16)]:
        with pytest.raises(ValueError, match="the encoder takes"):
            encoder(torch.zeros(shape))
    pixel_values = torch.randn(2, config.num_channels, 8, 16, 16)
    before = pixel_values.clone()
    encoder(pixel_values).last_hidden_state.sum().backward()
    assert torch.equal(pixel_values, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_outputs_follow_the_dtype_of_the_weights(config, dtype):
    encoder = build_encoder(config).to(dtype).eval()
    output = encoder(torch.randn(1, config.num_channels, 8, 16, 16))
    assert {feature_map.dtype for feature_map in output.feature_maps} == {dtype}


@pytest.mark.parametrize("training", [True, False])
def test_compiles_as_one_graph_and_recompiles_once(config, training):
    encoder = initialized(build_encoder(config)).train(training)
    num_graphs = 0

    def count_graphs(graph, example_inputs):
        nonlocal num_graphs
        num_graphs += 1
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(encoder, fullgraph=True, backend=count_graphs)
    for batch_size in (1, 3, 1, 3):
        pixel_values = torch.randn(batch_size, config.num_channels, 8, 16, 16)
        result = compiled(pixel_values)
        expected = encoder(pixel_values)
        for feature_map, other in zip(result.feature_maps, expected.feature_maps, strict=True):
            torch.testing.assert_close(feature_map, other, rtol=1e-4, atol=1e-5)
    assert num_graphs <= 2


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_compiles_with_inductor(config, training):
    encoder = initialized(build_encoder(config)).train(training)
    torch._dynamo.reset()
    compiled = torch.compile(encoder, fullgraph=True)
    for batch_size in (1, 3):
        pixel_values = torch.randn(batch_size, config.num_channels, 8, 16, 16)
        results = []
        for network in (compiled, encoder):
            encoder.zero_grad()
            output = network(pixel_values).last_hidden_state
            output.square().sum().backward()
            results.append([output.detach(), *(parameter.grad.clone() for parameter in encoder.parameters())])
        for value, other in zip(*results, strict=True):
            torch.testing.assert_close(value, other, rtol=1e-3, atol=1e-3)


def test_builds_on_meta_and_initialises_every_tensor(config):
    with torch.device("meta"):
        encoder = build_encoder(config)
    tensors = {**dict(encoder.named_parameters()), **dict(encoder.named_buffers())}
    assert all(tensor.is_meta for tensor in tensors.values())
    encoder = encoder.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*encoder.parameters(), *encoder.buffers()]:
            tensor.fill_(77)  # what was never initialised stays recognisable
        initialized(encoder)
    for name, tensor in [*encoder.named_parameters(), *encoder.named_buffers()]:
        assert (tensor != 77).all(), name
    assert torch.isfinite(encoder.eval()(torch.randn(1, 1, 8, 16, 16)).last_hidden_state).all()


def test_convolutions_start_from_the_law_of_monai():
    encoder = initialized(build_encoder(resnet_config(widths=[32, 64])))
    weight = encoder.layer2[0].conv1.weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 27)), rel=0.02)
    assert weight.mean().item() == pytest.approx(0, abs=1e-3)


def test_initialisation_spares_what_was_loaded(config):
    encoder = build_encoder(config)
    names = [name for name, _ in encoder.named_parameters()]
    for name, parameter in encoder.named_parameters():
        nn.init.constant_(parameter, 77)
        parameter._is_hf_initialized = name != names[0]
    initialized(encoder)
    for name, parameter in encoder.named_parameters():
        assert (parameter == 77).all() == (name != names[0]), name


# --- activation checkpointing


def enable_checkpointing(encoder, counting_once=True, use_reentrant=False):
    function = partial(checkpoint, use_reentrant=use_reentrant)
    for module in encoder.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module._gradient_checkpointing_func = (
                partial(checkpoint_counting_once, encoder, function) if counting_once else function
            )
            module.gradient_checkpointing = True


def one_step(encoder, pixel_values):
    encoder.zero_grad()
    encoder(pixel_values).last_hidden_state.square().sum().backward()
    return [parameter.grad.clone() for parameter in encoder.parameters()], [b.clone() for b in encoder.buffers()]


@pytest.mark.parametrize("mode", ["default", "reentrant", "compiled"])
def test_checkpointing_keeps_gradients_and_running_statistics(config, mode):
    plain = initialized(build_encoder(config)).double().train()
    encoder = build_encoder(config).double().train()
    encoder.load_state_dict(plain.state_dict())
    enable_checkpointing(encoder, use_reentrant=mode == "reentrant")
    num_runs = 0

    def count_runs(module, args, output):
        nonlocal num_runs
        num_runs += 1

    if mode == "compiled":
        torch._dynamo.reset()
        encoder.compile(fullgraph=True, backend="aot_eager")
    else:  # a part of the first block sees the recomputation
        block = next(module for module in encoder.modules() if isinstance(module, T3DEncoderBlock))
        next(block.children()).register_forward_hook(count_runs)
    for _ in range(2):
        pixel_values = torch.randn(2, config.num_channels, 8, 16, 16).double()
        for values, others in zip(one_step(encoder, pixel_values), one_step(plain, pixel_values), strict=True):
            for value, other in zip(values, others, strict=True):
                torch.testing.assert_close(value, other, rtol=1e-10, atol=1e-12)
    assert num_runs == (0 if mode == "compiled" else 4)


def test_checkpointing_without_the_cure_counts_batches_twice():
    encoder = build_encoder(resnet_config()).train()
    enable_checkpointing(encoder, counting_once=False)
    one_step(encoder, torch.randn(2, 1, 8, 16, 16))
    assert encoder.bn1.num_batches_tracked == 1
    assert encoder.layer1[0].bn1.num_batches_tracked == 2


def test_frozen_statistics_are_restored_after_an_error():
    norm = nn.BatchNorm3d(4)
    before = [buffer.clone() for buffer in norm.buffers()]
    with pytest.raises(ValueError, match="expected 5D"), frozen_batch_norm_statistics(norm):
        norm(torch.randn(2, 4))
    with frozen_batch_norm_statistics(norm):
        norm(torch.randn(2, 4, 3, 3, 3))
    assert norm.momentum == 0.1
    for buffer, other in zip(norm.buffers(), before, strict=True):
        assert torch.equal(buffer, other)


# --- the registry


def test_unknown_encoder_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown encoder_type 'resnett'; .* did you mean 'resnet'"):
        build_encoder(T3DVisionConfig(encoder_type="resnett"))


def test_a_new_encoder_is_one_class_and_one_entry(monkeypatch):
    class Pooling(T3DEncoder):
        def __init__(self, config):
            super().__init__(config)
            self.projection = nn.Linear(config.num_channels, config.hidden_size)
            self.offset = nn.Parameter(torch.empty(config.hidden_size))
            self.feature_channels, self.feature_strides = [config.hidden_size], [(4, 4, 4)]

        def get_input_embeddings(self):
            return self.projection

        def initialize_parameters(self):
            from transformers import initialization as init

            init.constant_(self.offset, 3.0)

        def forward(self, pixel_values, **kwargs):
            tokens = nn.functional.avg_pool3d(self.prepare_input(pixel_values), 4).movedim(1, -1)
            tokens = (self.projection(tokens) + self.offset).movedim(-1, 1)
            return T3DEncoderOutput(last_hidden_state=tokens, feature_maps=(tokens,))

    monkeypatch.setitem(ENCODERS, "pooling", Pooling)
    encoder = initialized(build_encoder(T3DVisionConfig(encoder_type="pooling", hidden_size=8)))
    assert (encoder.offset == 3).all()
    assert encoder(torch.zeros(1, 1, 8, 8, 8)).last_hidden_state.shape == (1, 8, 2, 2, 2)
