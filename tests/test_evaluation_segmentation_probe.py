# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The segmentation probe: cells and their labels meet in space, its fit is ridge regression, its Dice is Dice."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from modeling_t3d.configuration_t3d import T3DConfig
from modeling_t3d.data.datasets import PretrainingDataset
from modeling_t3d.data.manifest import read_manifest
from modeling_t3d.data.phantoms import ORGANS, phantom_seeds, write_phantoms
from modeling_t3d.evaluation.segmentation_probe import (
    LabelledCells,
    cell_features,
    fit_cells,
    halves_of_patients,
    labelled_cells,
    labels_at_cells,
    probe_segmentation,
)
from modeling_t3d.geometry_t3d import Volume
from modeling_t3d.image_processing_t3d import T3DImageProcessor
from modeling_t3d.modeling_t3d import T3DModel
from modeling_t3d.volume_io_t3d import read_label_map


def box(start, stop):
    return SimpleNamespace(start=start, stop=stop)


def cells_of(patient: str, labels: np.ndarray, noise: float = 0.0, seed: int = 0) -> LabelledCells:
    """Features that tell the labels apart, blurred by noise."""
    features = np.eye(4)[labels] + noise * np.random.default_rng(seed).normal(size=(len(labels), 4))
    return LabelledCells(torch.from_numpy(features), labels, patient)


def test_coarse_levels_are_interpolated_to_the_finest():
    fine, coarse = torch.randn(2, 3, 4, 4, 4), torch.arange(2.0).view(1, 1, 2, 1, 1).expand(2, 1, 2, 2, 2)
    cells = cell_features([fine, coarse])
    assert cells.shape == (2, 4, 4, 4, 4)
    assert torch.equal(cells[..., :3], fine.movedim(1, -1))
    assert cells[0, :, 0, 0, 3].tolist() == [0.0, 0.25, 0.75, 1.0]


def test_labels_are_read_at_the_centres_of_cells_in_any_orientation():
    labels = np.random.default_rng(0).integers(0, 5, (8, 6, 4))
    # Index order (z, y, x), 2 mm apart.
    affine = np.array([[0, 0, 2.0, 5], [0, 2, 0, -3], [2, 0, 0, 7], [0, 0, 0, 1]])
    found = labels_at_cells(
        Volume(labels, affine), affine, [box((0, 0, 0), (8, 6, 4)), box((2, 2, 2), (4, 4, 4))], (8, 6, 4)
    )
    assert np.array_equal(found[0], labels)
    # Two voxels in eight, six and four cells: each voxel many times.
    assert np.array_equal(found[1], labels[2:4, 2:4, 2:4].repeat(4, 0).repeat(3, 1).repeat(2, 2))
    flipped = affine.copy()
    flipped[:3, 3] += flipped[:3, 0] * 7
    flipped[:3, 0] *= -1
    turned = Volume(labels[::-1].transpose(2, 0, 1), flipped[:, [2, 0, 1, 3]])
    assert np.array_equal(labels_at_cells(turned, affine, [box((0, 0, 0), (8, 6, 4))], (8, 6, 4))[0], labels)


def test_labels_outside_the_map_are_background():
    affine = np.eye(4)[[2, 1, 0, 3]]
    found = labels_at_cells(
        Volume(np.ones((2, 2, 2), dtype=np.uint8), affine), affine, [box((-2, 0, 0), (2, 2, 2))], (4, 2, 2)
    )
    assert found[0].sum(axis=(1, 2)).tolist() == [0, 0, 4, 4]


def test_fit_is_ridge_regression_with_a_free_constant():
    generator = np.random.default_rng(0)
    parts = [
        LabelledCells(torch.from_numpy(generator.normal(size=(30, 3)) + 2), generator.integers(0, 3, 30), str(number))
        for number in range(2)
    ]
    features = np.concatenate([part.features.numpy() for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    targets = np.stack([(labels == 0) | (labels == 1), labels == 2], axis=1).astype(float)
    ridge = 0.1 * (features**2).sum(axis=0).mean()
    # The same by least squares on rows that pull every weight but the constant to zero.
    stacked = np.concatenate([np.c_[features, np.ones(60)], np.c_[np.sqrt(ridge) * np.eye(3), np.zeros(3)]])
    expected = np.linalg.lstsq(stacked, np.concatenate([targets, np.zeros((3, 2))]), rcond=None)[0]
    np.testing.assert_allclose(fit_cells(parts, [2], 0.1).numpy(), expected, atol=1e-12)


def test_dice_is_one_where_features_tell_and_falls_with_noise():
    generator = np.random.default_rng(1)
    organs = {"liver": 1, "spleen": 2, "heart": 3}
    fitted = [cells_of("a", generator.integers(0, 4, 400), noise=0.5, seed=1)]
    right = probe_segmentation(fitted, [cells_of("b", generator.integers(0, 4, 400))], organs, num_resamples=10)
    assert right.mean.value == 1.0
    assert (right.num_volumes, right.num_fitted_volumes, right.num_cells) == (1, 1, 400)
    noisy = [cells_of(str(number), generator.integers(0, 4, 400), noise=0.5, seed=number) for number in range(2, 8)]
    result = probe_segmentation(fitted, noisy, organs, num_resamples=50)
    assert 0.5 < result.mean.low < result.mean.value < result.mean.high < 0.95
    assert result.mean.value == pytest.approx(np.mean([value.value for value in result.dice.values()]))
    assert np.isnan(probe_segmentation(fitted, noisy, organs | {"none": 9}, num_resamples=5).dice["none"].value)


def test_patients_do_not_score_what_they_fitted():
    part = cells_of("a", np.array([0, 1, 2, 3]))
    with pytest.raises(ValueError, match="a patient is among those that the probe was fitted on"):
        probe_segmentation([part], [part], {"liver": 1})


@pytest.mark.parametrize("missing", ["fit on", "score"])
def test_volumes_without_label_maps_are_refused(missing):
    part = [cells_of("a", np.array([0, 1, 2, 3]))]
    with pytest.raises(ValueError, match=f"needs volumes with label maps to {missing}"):
        probe_segmentation([] if missing == "fit on" else part, [], {"liver": 1})


def test_organs_of_phantoms_are_found_in_random_features(tmp_path):
    manifest = read_manifest(write_phantoms(tmp_path, phantom_seeds("test", 8), masks=True, resolution=8.0))
    processor = T3DImageProcessor(spacing=(8, 8, 8), global_size=(16, 16, 16), local_size=(24, 24, 24))
    dataset = PretrainingDataset(manifest.rows, processor)
    torch.manual_seed(0)
    model = T3DModel(T3DConfig.from_preset("tiny"))
    halves = halves_of_patients(dataset.rows)
    fitted, scored = (
        list(labelled_cells(model, dataset, read_label_map, patient_ids=half, num_views=2)) for half in halves
    )
    assert {part.patient_id for part in fitted} == set(halves[0])
    assert len(fitted) + len(scored) == 8
    assert fitted[0].features.shape[1] == sum(model.vision_model.encoder.feature_channels)
    result = probe_segmentation(fitted, scored, {"right lung": ORGANS["right lung"]}, num_resamples=20)
    assert result.mean.value > 0.4  # lungs are dark, but so are both
    shuffled = [
        LabelledCells(part.features, np.random.default_rng(0).permutation(part.labels), part.patient_id)
        for part in fitted
    ]
    assert probe_segmentation(shuffled, scored, {"right lung": ORGANS["right lung"]}, num_resamples=5).mean.value < 0.2
