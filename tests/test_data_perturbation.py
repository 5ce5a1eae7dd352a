# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Each crop is changed in one way that its own seed chooses; where it flips, so do the other crop and the caption."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from modeling_t3d.data.augmentation import swap_sides
from modeling_t3d.data.datasets import PretrainingCollator, PretrainingSample, stable_id
from modeling_t3d.data.perturbation import KINDS, CropPerturbation, PerturbingCollator, gaussian_blur, magnify
from modeling_t3d.data.phantom_reports import train_phantom_tokenizer
from modeling_t3d.image_processing_t3d import T3DImageProcessor
from modeling_t3d.processing_t3d import T3DProcessor

CAPTION = "Nodule in the left lung, the right kidney is large."
ONE_SIDED = "Consolidation of the lingula, on the left."
PROCESSOR = T3DImageProcessor(spacing=(6, 6, 6), global_size=(8, 8, 8), local_size=(8, 10, 12), num_local_views=2)


def sample(number: int, text: str = CAPTION, epoch: int = 0) -> PretrainingSample:
    scan = np.full((20, 30, 30), -1000, dtype=np.int16)
    scan[:, 5:25, 4:26] = 40 + np.random.default_rng(number).integers(-100, 100, (20, 20, 22))
    return PretrainingSample(
        prepared=PROCESSOR.prepare(scan, volume_spacing=(6, 6, 6), volume_axes="SAR"),
        text=text,
        study_id=number,
        report_id=stable_id(text),
        view_seed=(0, 0, epoch, number),
        batch_seed=(0, 1, epoch, 0),
    )


@pytest.fixture(scope="module")
def collator() -> PretrainingCollator:
    return PretrainingCollator(
        T3DProcessor(PROCESSOR, train_phantom_tokenizer([CAPTION, swap_sides(CAPTION), ONE_SIDED], 120))
    )


@pytest.fixture(scope="module")
def samples() -> list[PretrainingSample]:
    return [sample(number) for number in range(16)]


def test_a_sample_flips_as_a_whole_with_its_caption_or_each_crop_changes_by_itself(collator, samples):
    perturbation = CropPerturbation(kinds=("flip", "intensity"))
    plain, batch = collator(samples), PerturbingCollator(collator, perturbation)(samples)
    flips = [perturbation.flips(one) for one in samples]
    assert 3 < sum(flips) < 13
    swapped = collator([sample(number, swap_sides(CAPTION)) for number in range(16)])
    for number, flipped in enumerate(flips):
        expected = swapped if flipped else plain
        for name in ("input_ids", "report_ids"):
            assert torch.equal(batch[name][number], expected[name][number])
        if flipped:
            for name in ("pixel_values", "local_pixel_values"):
                assert torch.equal(batch[name][number], plain[name][number].flip(-1))
            side = torch.tensor([1, 1, -1, 1, 1, 1])
            assert torch.equal(batch["local_positions"][number], plain["local_positions"][number] * side)
        else:
            assert torch.equal(batch["pixel_values"][number], plain["pixel_values"][number])
            for view in range(2):
                assert not torch.equal(
                    batch["local_pixel_values"][number, view], plain["local_pixel_values"][number, view]
                )


def test_a_caption_that_cannot_change_sides_keeps_its_views_upright(collator):
    perturbation = CropPerturbation(kinds=("flip", "blur"))
    one = next(one for number in range(50) if perturbation.flips(one := sample(number, ONE_SIDED)))
    plain, batch = collator([one]), PerturbingCollator(collator, perturbation)([one])
    assert torch.equal(batch["input_ids"], plain["input_ids"])
    assert torch.equal(batch["pixel_values"], plain["pixel_values"])
    assert not torch.equal(batch["local_pixel_values"], plain["local_pixel_values"])


def test_a_sample_does_not_depend_on_its_batch(collator, samples):
    perturbing = PerturbingCollator(collator, CropPerturbation())
    together = perturbing(samples)
    for order in ([5], [9, 0, 3]):
        batch = perturbing([samples[number] for number in order])
        for name in ("pixel_values", "local_pixel_values", "local_positions", "input_ids"):
            assert torch.equal(batch[name], together[name][order]), name
    later = perturbing([sample(5, epoch=1)])
    assert not torch.equal(later["local_pixel_values"], together["local_pixel_values"][[5]])


def test_every_kind_is_drawn_about_as_often():
    counts = dict.fromkeys(KINDS, 0)

    class Counting(CropPerturbation):
        def perturb(self, view, kind, generator):
            counts[kind] += 1
            return view

    perturbation = Counting()
    one = sample(0)
    for number in range(500):
        one.view_seed = (0, 0, 0, number)
        if perturbation.flips(one):
            counts["flip"] += 2
        else:
            perturbation(one, torch.zeros(2, 1, 4, 4, 4), torch.ones(2, 6))
    assert sum(counts.values()) == 1000
    assert all(150 < count < 250 for count in counts.values()), counts


def test_magnification_shows_the_middle_larger(collator, samples):
    batch = PerturbingCollator(collator, CropPerturbation(kinds=("rescale",)))(samples[:1])
    plain = collator(samples[:1])
    assert torch.allclose(batch["local_positions"][..., 3:] * 1.5, plain["local_positions"][..., 3:])
    assert torch.equal(batch["local_positions"][..., :3], plain["local_positions"][..., :3])
    places = [torch.arange(size) - (size - 1) / 2 for size in (9, 11, 13)]
    for axis in range(3):
        shape = [1, 1, 1]
        shape[axis] = -1
        ramp = places[axis].view(shape).expand(9, 11, 13)[None]
        assert torch.allclose(magnify(ramp, 1.5), ramp / 1.5, atol=1e-5)


def test_blur_is_a_gaussian_filter():
    view = torch.randn(2, 9, 10, 11, generator=torch.Generator().manual_seed(0))
    for sigma in (0.5, 1.2):
        expected = [
            ndimage.gaussian_filter(channel.numpy(), sigma, mode="nearest", radius=max(1, round(3 * sigma)))
            for channel in view
        ]
        assert np.allclose(gaussian_blur(view, sigma).numpy(), np.stack(expected), atol=1e-5)
    assert gaussian_blur(view, 0) is view


def test_values_stay_in_the_range_of_their_view():
    generator = np.random.default_rng(0)
    perturbation = CropPerturbation(intensity_scale=0.9, intensity_shift=1.0, noise=(0.2, 0.2))
    for limit in (1.0, 4.0):  # HU windows, and standardised values
        view = limit * torch.rand(1, 8, 8, 8) * 2 - limit
        for kind in ("rescale", "intensity", "noise", "blur"):
            changed = perturbation.perturb(view, kind, generator)
            assert changed.abs().max() <= max(1.0, view.abs().max()), kind
            assert not torch.equal(changed, view), kind


def test_noise_has_the_published_size():
    perturbation, generator = CropPerturbation(), np.random.default_rng(0)
    sizes = [perturbation.perturb(torch.zeros(1, 16, 16, 16), "noise", generator).std().item() for _ in range(60)]
    assert 0.009 < min(sizes) < 0.04
    assert 0.17 < max(sizes) < 0.21


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kinds": ["blurr"]}, "kinds must be some of rescale, flip"),
        ({"kinds": []}, "kinds must be some of"),
        ({"kinds": ["flip"]}, "holds flip alone"),
        ({"rescale": 0.5}, "rescale >= 1"),
        ({"noise": [0.2, 0.1]}, r"crop_perturbation\.noise must be two numbers"),
        ({"blur": [1.0]}, r"crop_perturbation\.blur must be two numbers"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CropPerturbation(**settings)


def test_a_batch_without_local_views_is_refused(samples):
    processor = T3DProcessor(PROCESSOR, train_phantom_tokenizer([CAPTION], 120))
    with pytest.raises(ValueError, match="crop_perturbation changes local views, and this batch has none"):
        PerturbingCollator(PretrainingCollator(processor, num_local_views=0), CropPerturbation())(samples[:1])
