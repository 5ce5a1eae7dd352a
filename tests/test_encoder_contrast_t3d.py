# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The encoder of local contrast against SciPy's morphology and plain loops, and what it sees and does not see."""

import itertools

import numpy as np
import pytest
import torch
from scipy.ndimage import convolve1d, grey_opening
from torch import nn

from modeling_t3d.configuration_t3d import T3DVisionConfig
from modeling_t3d.encoder_contrast_t3d import (
    T3DPlaceProjection,
    binned,
    contrast_responses,
    num_responses,
    spots,
)
from modeling_t3d.encoders_t3d import build_encoder
from modeling_t3d.modeling_t3d import T3DVisionModel

DIRECTIONS = [step for step in itertools.product((-1, 0, 1), repeat=3) if step > (0, 0, 0)]


def small_config(**overrides):
    settings = {"encoder_type": "local_contrast", "num_channels": 2, "hidden_size": 8, "grid_size": [2, 3, 4]}
    return T3DVisionConfig(**{**settings, **overrides})


def whole_numbers(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def spots_of_scipy(volume, length):
    """The white top-hat: a volume less the largest of its openings by 13 lines."""
    padded = np.pad(volume, length, mode="edge")
    openings = []
    for step in DIRECTIONS:
        line = np.zeros((length,) * 3, bool)
        for number in range(length):
            line[tuple(length // 2 + (number - length // 2) * np.array(step))] = True
        openings.append(grey_opening(padded, footprint=line))
    inside = (slice(length, -length),) * 3
    return volume - np.max(openings, axis=0)[inside]


# --- spots


@pytest.mark.parametrize("length", [3, 5, 7])
def test_spots_equal_the_top_hat_of_scipy_by_lines(length):
    volume = whole_numbers(8, 9, 11)
    np.testing.assert_array_equal(spots(torch.from_numpy(volume), length), spots_of_scipy(volume, length))


def test_spots_of_floating_point_volumes_and_batches_are_the_same():
    volumes = whole_numbers(2, 3, 6, 7, 8)
    found = spots(torch.from_numpy(volumes), 5)
    np.testing.assert_array_equal(spots(torch.from_numpy(volumes).double(), 5), found.double())
    np.testing.assert_array_equal(spots(torch.from_numpy(volumes[1, 2]), 5), found[1, 2])


def test_edges_plates_and_tubes_are_no_spots():
    volume = torch.zeros(20, 20, 20, dtype=torch.uint8)
    volume[:4] = 200  # an organ's edge
    volume[8] = 200  # a plate of one voxel
    along = torch.arange(20)
    volume[12:14, 4] = 200  # a vessel along an axis
    volume[along[11:], along[11:], 15] = 200  # and one at an angle
    assert spots(volume, 5).max() == 0
    volume[18, 3:5, 3:6] = 90
    assert spots(volume, 5).nonzero().tolist() == [[18, y, x] for y in (3, 4) for x in (3, 4, 5)]


# --- responses


@pytest.mark.parametrize("shape", [(12, 12, 12), (7, 9, 14)])
def test_responses_equal_those_of_scipy_cell_by_cell(shape):
    levels = whole_numbers(1, 3, *shape, seed=1)
    levels[:, :, :3] = 0
    cells = tuple(-(-side // 4) for side in shape)
    padded = [(0, 4 * count - side) for count, side in zip(cells, shape, strict=True)]
    whole = np.pad(levels[0], [(0, 0), *padded], mode="edge")

    def smoothed(volume):
        sums = volume.astype(np.int64)
        for axis in range(3):
            sums = convolve1d(sums, [1, 2, 1], axis=axis, mode="nearest")
        return (sums // 64).astype(np.uint8)

    def blocks(volume, size):
        sides = [number for side in volume.shape for number in (side // size, size)]
        return volume.reshape(sides).transpose(0, 2, 4, 1, 3, 5).reshape(*(side // size for side in volume.shape), -1)

    bright, shaded = whole[:2], 255 - np.where(whole[2] == 0, 128, whole[2])
    mean = blocks(whole.reshape(-1, *whole.shape[2:]).astype(np.int64), 2).sum(-1) // 8
    mean = mean.reshape(3, *(side // 2 for side in whole.shape[1:])).astype(np.uint8)
    maps = [
        *((spots_of_scipy(volume, 5), 4) for volume in bright),
        *((spots_of_scipy(smoothed(volume), 5), 4) for volume in bright),
        (spots_of_scipy(smoothed(shaded.astype(np.uint8)), 7), 4),
        *((spots_of_scipy(blocks(volume, 2).max(-1), 3), 2) for volume in bright),
        *((volume, 2) for volume in mean),
        *((255 - volume, 2) for volume in mean),
    ]
    expected = np.stack([blocks(volume, size).max(-1) for volume, size in maps])
    pixel_values = torch.from_numpy(levels).double() / 127.5 - 1
    responses = contrast_responses(pixel_values, [0, 1], [2], 4)
    assert responses.shape[1] == num_responses(3, [0, 1], [2])
    np.testing.assert_array_equal(responses[0], expected)


def test_responses_of_a_volume_do_not_depend_on_its_batch_or_precision():
    pixel_values = torch.from_numpy(whole_numbers(3, 2, 8, 9, 10)).float() / 127.5 - 1
    together = contrast_responses(pixel_values, [0, 1], [1], 2)
    assert torch.equal(contrast_responses(pixel_values[1:2].double(), [0, 1], [1], 2), together[1:2])


def test_values_beyond_the_window_count_as_its_ends():
    pixel_values = 3 * torch.rand(1, 1, 8, 8, 8) - 1.5
    expected = contrast_responses(pixel_values.clamp(-1, 1), [0], [0], 4)
    assert torch.equal(contrast_responses(pixel_values, [0], [0], 4), expected)


def test_what_lies_below_the_window_is_no_dark_spot():
    liver = torch.full((1, 1, 12, 12, 12), 0.1)
    cyst, fat = liver.clone(), liver.clone()
    cyst[..., 5:7, 5:7, 5:7], fat[..., 5:7, 5:7, 5:7] = -0.7, -1.0
    dark = [contrast_responses(volume, [], [0], 12)[0, 0].item() for volume in (liver, cyst, fat)]
    assert dark[0] == 0
    assert dark[1] > 20 > 10 > dark[2]


def test_the_operator_is_what_it_tells_the_compiler():
    torch.library.opcheck(contrast_responses, (torch.rand(2, 2, 7, 8, 9), [0, 1], [1], 4))


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


def test_every_parameter_learns_and_the_statistics_are_saved(tmp_path):
    model = T3DVisionModel(small_config()).train()
    model(torch.rand(2, 2, 12, 18, 24)).pooler_output.sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    model.save_pretrained(tmp_path)
    loaded = T3DVisionModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert model.encoder.norm.running_mean.abs().min() > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_volume_that_is_not_finite_does_not_pass_for_one_that_is(value):
    model = T3DVisionModel(small_config()).eval()
    pixel_values = torch.rand(2, 2, 12, 18, 24)
    expected = model(pixel_values).pooler_output
    pixel_values[1, 0, 3, 4, 5] = value
    pooled = model(pixel_values).pooler_output
    torch.testing.assert_close(pooled[0], expected[0])
    assert pooled[1].isnan().all()


def test_shapes_are_told_without_memory():
    with torch.device("meta"):
        output = T3DVisionModel(small_config())(torch.empty(3, 2, 12, 18, 24))
    assert output.last_hidden_state.shape == (3, 8, 2, 3, 4)


def test_views_smaller_than_a_cell_are_refused():
    with pytest.raises(ValueError, match=r"views of \(4, 18, 24\) voxels .* smaller than one cell of 6"):
        build_encoder(small_config())(torch.zeros(1, 2, 4, 18, 24))
