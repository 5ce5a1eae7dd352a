# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The encoder of local contrast against SciPy's filters and plain loops, and what it sees and does not see."""

import itertools

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate, gaussian_filter
from torch import nn

from modeling_t3d.configuration_t3d import T3DVisionConfig
from modeling_t3d.encoder_contrast_t3d import T3DContrastFilters, T3DPlaceProjection, binned, contrast_filters
from modeling_t3d.encoders_t3d import build_encoder
from modeling_t3d.modeling_t3d import T3DVisionModel

SCALES = [(0.0, 1.0), (0.6, 1.3)]


def small_config(**overrides):
    settings = {"encoder_type": "local_contrast", "num_channels": 2, "hidden_size": 8, "grid_size": [2, 3, 4]}
    return T3DVisionConfig(**{**settings, **overrides})


# --- the filters


def test_filters_are_differences_of_gaussians_of_both_signs():
    filters = contrast_filters(SCALES)[:, 0].double()
    impulse = np.zeros((5, 5, 5))
    impulse[2, 2, 2] = 1.0
    for index, (inner, outer) in enumerate(SCALES):
        # SciPy's Gaussians of so many voxels either way, which sum to 1 like ours.
        inside = gaussian_filter(impulse, inner, radius=2, mode="constant") if inner else impulse
        expected = inside - gaussian_filter(impulse, outer, radius=2, mode="constant")
        expected /= np.abs(expected).sum()
        np.testing.assert_allclose(filters[2 * index], expected, atol=1e-7)
        torch.testing.assert_close(filters[2 * index + 1], -filters[2 * index])
    torch.testing.assert_close(filters.abs().sum(dim=(1, 2, 3)), torch.ones(5).double(), rtol=0, atol=1e-6)


def test_a_constant_volume_has_no_contrast():
    filters = contrast_filters(SCALES)
    responses = nn.functional.conv3d(torch.full((1, 1, 5, 5, 5), 7.0), filters)
    assert responses[0, :-1].abs().max() < 1e-5
    torch.testing.assert_close(responses[0, -1], torch.full((1, 1, 1), 7.0))


@pytest.mark.parametrize("shape", [(8, 10, 12), (9, 10, 13)])
def test_responses_equal_those_of_scipy_on_halved_volumes(shape):
    pixel_values = torch.randn(2, 2, *shape, dtype=torch.float64)
    bank = T3DContrastFilters(2, SCALES).double()
    responses = bank(pixel_values)
    halved = [
        reduce(pixel_values[:, channel])
        for reduce in (
            lambda x: nn.functional.max_pool3d(x, 2, ceil_mode=True),
            lambda x: nn.functional.avg_pool3d(x, 2, ceil_mode=True, count_include_pad=False),
        )
        for channel in (0, 1)
    ]
    filters = contrast_filters(SCALES)[:, 0].double().numpy()
    assert responses.shape[1] == bank.num_outputs == len(halved) * len(filters)
    for (channel, volume), (index, kernel) in itertools.product(enumerate(halved), enumerate(filters)):
        for sample in range(2):
            expected = correlate(volume[sample].numpy(), kernel, mode="constant")
            result = responses[sample, channel * len(filters) + index]
            np.testing.assert_allclose(result.numpy(), expected, atol=1e-12)


# --- the bins


def test_a_bin_is_empty_below_its_edges_and_full_above():
    responses = torch.tensor([[-5.0, 0.0, 0.5, 1.0, 2.0, 3.0, 50.0]]).view(1, 1, -1)
    full = binned(responses, [0.0, 1.0, 3.0])
    torch.testing.assert_close(full[0, 0], torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0, 1.0, 1.0]))
    torch.testing.assert_close(full[0, 1], torch.tensor([0.0, 0.0, 0.0, 0.0, 0.5, 1.0, 1.0]))


# --- places


def test_each_cell_has_its_own_weights_and_all_share_one_layer():
    projection = T3DPlaceProjection(3, 5, (2, 3, 4)).double()
    nn.init.normal_(projection.place_weight)
    hidden_states = torch.randn(2, 3, 2, 3, 4, dtype=torch.float64)
    tokens = projection(hidden_states)
    for number, (z, y, x) in enumerate(itertools.product(range(2), range(3), range(4))):
        cell = hidden_states[:, :, z, y, x]
        expected = projection.shared(cell) + 24**0.5 * cell @ projection.place_weight[number]
        torch.testing.assert_close(tokens[:, :, z, y, x], expected)


def test_places_are_unknown_on_another_grid():
    projection = T3DPlaceProjection(3, 5, (2, 3, 4))
    nn.init.normal_(projection.place_weight)
    hidden_states = torch.randn(2, 3, 2, 2, 2)
    expected = projection.shared(hidden_states.movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(projection(hidden_states), expected)


def test_gradients_of_places_are_those_of_finite_differences():
    projection = T3DPlaceProjection(2, 3, (1, 2, 2)).double()
    hidden_states = torch.rand(2, 2, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, w: torch.func.functional_call(projection, {"place_weight": w}, (x,)),
        (hidden_states, torch.randn_like(projection.place_weight, requires_grad=True)),
    )


# --- the encoder


@pytest.mark.parametrize("shape", [(12, 18, 24), (7, 13, 24)])
def test_cells_cover_the_whole_view(shape):
    model = T3DVisionModel(small_config()).eval()
    output = model(torch.randn(1, 2, *shape))
    assert output.last_hidden_state.shape[2:] == tuple(-(-side // 6) for side in shape)
    assert [feature_map.shape[1] for feature_map in output.feature_maps] == model.encoder.feature_channels


def test_a_spot_answers_in_its_own_cell_alone():
    encoder = build_encoder(small_config()).eval()
    plain = torch.zeros(1, 2, 12, 18, 24)
    spotted = plain.clone()
    spotted[0, 0, 8:10, 8:10, 14:16] = 1.0  # in the middle of cell (1, 1, 2)
    change = (encoder(spotted).feature_maps[0] - encoder(plain).feature_maps[0]).abs().amax(dim=(0, 1))
    assert change.argmax() == np.ravel_multi_index((1, 1, 2), (2, 3, 4))
    assert change[1, 1, 2] > 3 * change.flatten().topk(2).values[1]


def test_a_bright_voxel_is_not_averaged_away():
    bank = T3DContrastFilters(1, [(0.0, 1.0)])
    stone = torch.zeros(1, 1, 12, 12, 12)
    stone[0, 0, 5, 5, 5] = 1.0
    responses = bank(stone).amax(dim=(0, 2, 3, 4)).view(2, 3)
    torch.testing.assert_close(responses[0, 0], 8 * responses[1, 0])


def test_what_is_fixed_is_saved_and_never_trained(tmp_path):
    model = T3DVisionModel(small_config()).train()
    model(torch.randn(2, 2, 12, 18, 24)).pooler_output.sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert "encoder.filters.weight" not in dict(model.named_parameters())
    model.save_pretrained(tmp_path)
    loaded = T3DVisionModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    with torch.device("meta"):
        empty = T3DVisionModel(small_config())
    empty.to_empty(device="cpu").init_weights()
    torch.testing.assert_close(empty.encoder.filters.weight, model.encoder.filters.weight, rtol=0, atol=0)


def test_shapes_are_told_without_memory():
    with torch.device("meta"):
        output = T3DVisionModel(small_config())(torch.empty(3, 2, 12, 18, 24))
    assert output.last_hidden_state.shape == (3, 8, 2, 3, 4)


def test_views_smaller_than_a_cell_are_refused():
    with pytest.raises(ValueError, match=r"views of \(4, 18, 24\) voxels .* smaller than one cell of 6"):
        build_encoder(small_config())(torch.zeros(1, 2, 4, 18, 24))
