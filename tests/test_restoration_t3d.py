# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Restoration: corruption that can be replayed, a decoder for any stride, and a loss that is a mean over voxels."""

import pytest
import torch
from model_inputs import tiny_config
from torch import nn

from modeling_t3d.configuration_t3d import T3DConfig
from modeling_t3d.encoders_t3d import build_encoder
from modeling_t3d.restoration_t3d import (
    T3DRestoration,
    corrupt_views,
    restoration_errors,
    restoration_loss,
    view_seeds,
)

SETTINGS = {"block_size": 4, "ratio": 0.5, "noise": 0.1}


def views_and_seeds(num_views: int = 5, size: tuple[int, int, int] = (8, 12, 16)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(num_views, 2, *size, generator=generator)
    return views, view_seeds(torch.arange(num_views), 1)[:, 0]


# ----------------------------------------------------------------------------------------- corruption


@pytest.mark.parametrize(("ratio", "size"), [(0.5, (8, 12, 16)), (0.25, (8, 8, 8)), (0.75, (16, 4, 8))])
def test_the_asked_share_of_blocks_is_zeroed_and_whole(ratio, size):
    views, seeds = views_and_seeds(size=size)
    corrupted, zeroed = corrupt_views(views, seeds, block_size=4, ratio=ratio, noise=0.0)
    assert zeroed.float().mean(dim=(1, 2, 3, 4)).tolist() == pytest.approx([ratio] * 5)
    assert torch.equal(corrupted, views * ~zeroed)
    blocks = zeroed[:, 0].unflatten(3, (-1, 4)).unflatten(2, (-1, 4)).unflatten(1, (-1, 4)).float().mean(dim=(2, 4, 6))
    assert set(blocks.unique().tolist()) == {0.0, 1.0}
    assert len({tuple(mask.flatten().tolist()) for mask in zeroed}) == 5, "every view loses other blocks"


def test_every_block_is_zeroed_about_as_often():
    views, _ = views_and_seeds(400, (8, 8, 8))
    _, zeroed = corrupt_views(views, view_seeds(torch.arange(400), 1)[:, 0], **SETTINGS)
    frequencies = zeroed[:, 0, ::4, ::4, ::4].double().mean(dim=0)
    assert (frequencies - 0.5).abs().max() < 0.1


def test_blocks_at_the_far_ends_may_be_smaller():
    views, seeds = views_and_seeds(size=(5, 6, 7))
    corrupted, zeroed = corrupt_views(views, seeds, **{**SETTINGS, "noise": 0.0})
    assert corrupted.shape == views.shape
    assert zeroed.shape == (5, 1, 5, 6, 7)
    assert 0 < zeroed.float().mean() < 1


def test_corruption_depends_on_the_seed_alone():
    views, seeds = views_and_seeds()
    together = corrupt_views(views, seeds, **SETTINGS)
    for place in range(5):
        alone = corrupt_views(views[place : place + 1], seeds[place : place + 1], **SETTINGS)
        assert torch.equal(alone[0][0], together[0][place])
        assert torch.equal(alone[1][0], together[1][place])
    other = corrupt_views(views, view_seeds(torch.arange(5) + 5, 1)[:, 0], **SETTINGS)
    assert not torch.equal(other[1], together[1])


def test_seeds_differ_between_views_and_pairs():
    seeds = view_seeds(torch.tensor([0, -1, 2, -5, 1 << 50]), 16)
    assert seeds.shape == (5, 16)
    assert len(set(seeds.flatten().tolist())) == 80
    assert torch.equal(view_seeds(torch.tensor([1 << 50]), 3)[0], seeds[4, :3])


def test_noise_has_the_asked_size_everywhere():
    views, seeds = torch.zeros(3, 1, 32, 32, 32), torch.tensor([1, 2, 3])
    corrupted, _ = corrupt_views(views, seeds, block_size=8, ratio=0.5, noise=0.1)
    assert corrupted.std(dim=(1, 2, 3, 4)).tolist() == pytest.approx([0.1] * 3, rel=0.02)
    half = corrupt_views(views.half(), seeds, block_size=8, ratio=0.5, noise=0.1)[0]
    assert half.dtype == torch.float16


def test_a_view_of_a_single_block_is_refused():
    views, seeds = views_and_seeds(size=(4, 4, 4))
    with pytest.raises(ValueError, match=r"tir_block_size=4 makes a local view of \(4, 4, 4\) voxels.*a single block"):
        corrupt_views(views, seeds, **SETTINGS)


def test_no_views_corrupt_to_none():
    corrupted, zeroed = corrupt_views(torch.zeros(0, 1, 8, 8, 8), torch.zeros(0, dtype=torch.int64), **SETTINGS)
    assert corrupted.shape == (0, 1, 8, 8, 8)
    assert zeroed.shape == (0, 1, 8, 8, 8)


# ----------------------------------------------------------------------------------------- loss


def test_the_loss_is_the_mean_over_voxels_of_valid_views():
    generator = torch.Generator().manual_seed(1)
    views, restored = torch.randn(2, 6, 2, 4, 4, 8, generator=generator, dtype=torch.float64)
    _, zeroed = corrupt_views(views, torch.arange(6), block_size=2, ratio=0.3, noise=0.0)
    restored.requires_grad_()
    mask = torch.tensor([[True, False, True], [True, True, False]])
    errors, counts = restoration_errors(restored, views, zeroed)
    loss, loss_zeroed = restoration_loss(errors.view(2, 3, 2), counts.view(2, 3, 2), mask)
    valid = mask.flatten()
    assert torch.allclose(loss, nn.functional.mse_loss(restored[valid], views[valid]))
    places = zeroed[valid].expand(-1, 2, -1, -1, -1)
    assert torch.allclose(loss_zeroed, nn.functional.mse_loss(restored[valid][places], views[valid][places]))
    assert not loss_zeroed.requires_grad
    (gradient,) = torch.autograd.grad(loss, restored)
    assert gradient[~valid].abs().max() == 0
    expected = 2 * (restored - views) / restored[valid].numel()
    assert torch.allclose(gradient[valid], expected[valid])


def test_without_a_valid_view_the_loss_is_zero():
    errors = torch.ones(2, 3, 2, requires_grad=True)
    loss, loss_zeroed = restoration_loss(errors, torch.ones(2, 3, 2), torch.zeros(2, 3, dtype=torch.bool))
    assert loss.item() == loss_zeroed.item() == 0
    loss.backward()
    assert errors.grad.abs().max() == 0


def test_half_precision_is_summed_in_single():
    views = torch.full((1, 1, 64, 64, 64), 0.5)
    zeroed = torch.ones(1, 1, 64, 64, 64, dtype=torch.bool)
    errors, counts = restoration_errors(torch.zeros_like(views, dtype=torch.bfloat16), views, zeroed)
    assert (errors / counts).tolist() == [[0.25, 0.25]]


# ----------------------------------------------------------------------------------------- decoder


def restoration(**vision) -> tuple[T3DRestoration, nn.Module]:
    config = tiny_config(vision_config=vision, num_tir_heads=2, lambda_tir=1.0)
    encoder = build_encoder(config.vision_config)
    return T3DRestoration(config, encoder.feature_strides[-1]), encoder


@pytest.mark.parametrize(
    ("vision", "size"),
    [
        ({"stem_stride": 2}, (8, 8, 8)),
        ({"stem_stride": [1, 2, 2]}, (8, 16, 16)),
        ({"stem_stride": [4, 1, 2], "stem_pool": True}, (16, 16, 16)),
        ({"stem_stride": 1, "depths": [1], "hidden_sizes": [8]}, (4, 4, 4)),
        ({"stem_stride": 2}, (10, 13, 9)),
        ({"num_channels": 2}, (8, 8, 8)),
    ],
)
def test_views_come_back_in_their_own_size(vision, size):
    module, encoder = restoration(**vision)
    views = torch.randn(2 * 3, vision.get("num_channels", 1), *size)
    maps = encoder(views).last_hidden_state.unflatten(0, (2, 3))
    restored = module(maps, torch.randn(2, 5, 16), None, size)
    assert restored.shape == views.shape
    assert len(module.stages) == max(encoder.feature_strides[-1]).bit_length() - 1


def test_nothing_beyond_a_view_is_decoded():
    torch.manual_seed(0)
    module = restoration(stem_stride=[1, 2, 2])[0].double().requires_grad_(False)
    nn.init.normal_(module.stages[0].norm.weight)
    hidden_states, size = torch.randn(2, 16, 5, 4, 3).double(), (9, 13, 9)
    needed = [(9, 7, 5), (9, 13, 9)]
    expected, scales = hidden_states, [(2, 2, 2), (1, 2, 2)]
    for stage, scale, extents in zip(module.stages, scales, needed, strict=True):
        for axis, (factor, extent) in enumerate(zip(scale, extents, strict=True), start=2):
            expected = expected.repeat_interleave(factor, axis).narrow(axis, 0, extent)
        expected = nn.functional.conv3d(expected, stage.convolution.weight, padding=1)
        groups = expected.flatten(2).unflatten(1, (stage.norm.num_groups, -1)).flatten(2)
        variance, mean = torch.var_mean(groups, dim=2, correction=0, keepdim=True)
        expected = ((groups - mean) / (variance + stage.norm.eps).sqrt()).view_as(expected)
        weight, bias = (value[:, None, None, None] for value in (stage.norm.weight, stage.norm.bias))
        expected = (expected * weight + bias).clamp(min=0)
    expected = nn.functional.conv3d(expected, module.output_convolution.weight, module.output_convolution.bias)
    torch.testing.assert_close(module.decode(hidden_states, size), expected)


def test_a_transformer_of_any_patch_of_powers_of_two():
    vision = {
        "encoder_type": "vit",
        "hidden_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "patch_size": [2, 8, 4],
    }
    settings = {"projection_dim": 16, "num_tma_heads": 2, "num_fusion_heads": 2, "num_tir_heads": 2, "lambda_tir": 1.0}
    config = T3DConfig(vision_config=vision, text_config=tiny_config().text_config, **settings)
    encoder = build_encoder(config.vision_config)
    module = T3DRestoration(config, encoder.feature_strides[-1])
    maps = encoder(torch.randn(2, 1, 4, 16, 8)).last_hidden_state[:, None]
    assert module(maps, torch.randn(2, 5, 16), None, (4, 16, 8)).shape == (2, 1, 4, 16, 8)


def test_strides_that_no_doubling_reaches_are_refused():
    with pytest.raises(ValueError, match=r"the encoder's stride \(z, y, x\) is \(6, 4, 4\); choose stem_stride"):
        restoration(stem_stride=[3, 2, 2])
    config = tiny_config(tir_decoder_channels=[8], lambda_tir=1.0, num_tir_heads=2)
    with pytest.raises(ValueError, match=r"names 1 stages, but the encoder's stride .* takes 2 doublings"):
        T3DRestoration(config, (4, 4, 4))


def test_attention_reads_the_report_and_not_its_padding():
    torch.manual_seed(0)
    module, encoder = restoration()
    maps = encoder(torch.randn(4, 1, 8, 8, 8)).last_hidden_state.unflatten(0, (2, 2))
    report, mask = torch.randn(2, 5, 16), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    restored = module(maps, report, mask, (8, 8, 8))
    padded = report.clone()
    padded[0, 3:] = 100.0
    assert torch.equal(module(maps, padded, mask, (8, 8, 8)), restored)
    changed = module(maps, report.flip(0), mask, (8, 8, 8))
    assert not torch.allclose(changed[:2], restored[:2], atol=1e-4)


def test_informing_is_plain_multi_head_attention_with_a_residual():
    torch.manual_seed(0)
    module = restoration()[0].double()
    tokens, report = torch.randn(2, 6, 16).double(), torch.randn(2, 5, 16).double()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    attention = nn.MultiheadAttention(16, 2, batch_first=True).double()
    projections = (module.query_projection, module.key_projection, module.value_projection)
    attention.in_proj_weight.data = torch.cat([projection.weight for projection in projections])
    attention.in_proj_bias.data = torch.cat([projection.bias for projection in projections])
    attention.out_proj.load_state_dict(module.output_projection.state_dict())
    mixed, _ = attention(tokens, report, report, key_padding_mask=mask == 0)
    assert torch.allclose(module.inform(tokens, report, mask), tokens + mixed)


def test_each_view_is_restored_by_itself():
    torch.manual_seed(0)
    module = restoration()[0].double()
    maps, report = torch.randn(2, 3, 16, 2, 2, 2).double(), torch.randn(2, 5, 16).double()
    together = module(maps, report, None, (8, 8, 8)).unflatten(0, (2, 3))
    alone = module(maps[1:, 2:], report[1:], None, (8, 8, 8))
    assert torch.allclose(together[1, 2], alone[0])


def kept_numbers(module: T3DRestoration, *inputs) -> tuple[torch.Tensor, int]:
    """The loss, and how many numbers wait for the backward pass."""
    sizes = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        return module(*inputs).square().mean(), sum(sizes)


def test_decoding_in_chunks_gives_the_same_gradients_in_less_memory():
    torch.manual_seed(0)
    module = restoration()[0].double()
    maps, report = torch.randn(2, 3, 16, 2, 2, 2).double().requires_grad_(), torch.randn(2, 5, 16).double()
    results = []
    for chunk_size in (None, 4, 1):
        module.chunk_size = chunk_size
        loss, size = kept_numbers(module, maps, report, None, (8, 8, 8))
        results.append((loss, torch.autograd.grad(loss, [maps, *module.parameters()]), size))
    for loss, gradients, size in results[1:]:
        assert torch.allclose(loss, results[0][0])
        for gradient, expected in zip(gradients, results[0][1], strict=True):
            torch.testing.assert_close(gradient, expected)
        assert size < 0.7 * results[0][2]
