# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Convolutions of small maps: right in 16 bits, and nn.Conv3d otherwise."""

import itertools

import pytest
import torch
from torch import nn

from modeling_t3d.configuration_t3d import T3DVisionConfig
from modeling_t3d.encoder_blocks_t3d import T3DConv3d
from modeling_t3d.modeling_t3d import T3DVisionModel

SMALL_SHAPES = [*itertools.product((1, 2, 3, 4), (1, 2, 3), (1, 2, 3)), (4, 4, 1), (1, 6, 8), (8, 6, 4)]


def weight_gradient(convolution: nn.Conv3d, inputs: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    convolution.weight.grad = None
    convolution(inputs).backward(gradient.to(inputs.dtype))
    return convolution.weight.grad.double()


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((value - expected).abs().max() / expected.abs().max()).detach())


@pytest.mark.parametrize("channels", [(16, 16), (20, 24), (64, 128)])
@pytest.mark.parametrize("stride", [1, 2])
def test_weight_gradients_of_small_maps_in_16_bits(stride, channels):
    torch.manual_seed(0)
    convolution = T3DConv3d(*channels, 3, stride=stride, padding=1, bias=False)
    rounded = convolution.weight.data.bfloat16()
    for shape in SMALL_SHAPES:
        inputs = torch.randn(3, channels[0], *shape).bfloat16()
        convolution.weight.data = rounded.double()
        outputs = convolution(inputs.double())
        gradient = torch.randn_like(outputs).bfloat16()
        expected = weight_gradient(convolution, inputs.double(), gradient)
        convolution.weight.data = rounded
        assert relative_error(convolution(inputs).double(), outputs) < 0.02
        assert relative_error(weight_gradient(convolution, inputs, gradient), expected) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_are_those_of_a_plain_convolution(dtype):
    torch.manual_seed(0)
    convolution = T3DConv3d(4, 6, 3, stride=2, padding=1, dtype=dtype)
    plain = nn.Conv3d(4, 6, 3, stride=2, padding=1, dtype=dtype)
    plain.load_state_dict(convolution.state_dict())
    for shape in ((2, 2, 2), (9, 8, 7)):
        inputs = torch.randn(2, 4, *shape, dtype=dtype)
        assert torch.equal(convolution(inputs), plain(inputs))


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_an_encoder_of_small_views_has_right_gradients_under_autocast(layer_type):
    """The views of the quickstart end in maps of 2^3."""
    torch.manual_seed(0)
    config = T3DVisionConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 64, 128],
        depths=[1, 1, 1, 1],
        layer_type=layer_type,
        stem_stride=2,
        norm="batch",
    )
    model = T3DVisionModel(config)
    views = torch.randn(8, 1, 32, 24, 32)
    gradients = {}
    for is_16_bit in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_16_bit):
            pooled = model(pixel_values=views).pooler_output
        pooled.float().square().sum().backward()
        gradients[is_16_bit] = {
            name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.ndim == 5
        }
    for name, expected in gradients[False].items():
        similarity = nn.functional.cosine_similarity(gradients[True][name].flatten(), expected.flatten(), dim=0)
        assert similarity > 0.9, name
