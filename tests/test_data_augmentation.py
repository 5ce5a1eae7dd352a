# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""An augmented sample depends on its own seed alone, all its views change alike, and sides agree with the text."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_t3d.counter_noise_t3d import normal_noise
from modeling_t3d.data.augmentation import AugmentingCollator, BatchAugmentation, swap_sides
from modeling_t3d.data.datasets import PretrainingCollator, PretrainingSample, stable_id
from modeling_t3d.data.phantom_reports import train_phantom_tokenizer
from modeling_t3d.image_processing_t3d import T3DImageProcessor
from modeling_t3d.processing_t3d import T3DProcessor

REPORTS = [
    "Effusion in the left lung.",
    "The RIGHT kidney is normal. Left adrenal nodule.",
    "The lingula on the left.",
]
PROCESSOR = T3DImageProcessor(spacing=(6, 6, 6), global_size=(10, 12, 14), local_size=(6, 6, 6), num_local_views=2)


def sample(number: int, epoch: int = 0, text: str | None = None) -> PretrainingSample:
    scan = np.full((20, 30, 30), -1000, dtype=np.int16)
    scan[:, 5:25, 4:26] = 40 + np.random.default_rng(number).integers(-100, 100, (20, 20, 22))
    text = text or REPORTS[number % 3]
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
    reports = [*REPORTS, *(swap_sides(report) or report for report in REPORTS)]
    return PretrainingCollator(T3DProcessor(PROCESSOR, train_phantom_tokenizer(reports, 120)))


def augmented(collator, augmentation: BatchAugmentation, samples) -> dict[str, torch.Tensor]:
    return augmentation(AugmentingCollator(collator, augmentation)(samples))


EVERYTHING = BatchAugmentation(probability=1.0, flip=0.5)


def test_a_sample_does_not_depend_on_its_batch(collator):
    samples = [sample(number, text="The heart is normal.") for number in range(5)]
    together = augmented(collator, EVERYTHING, samples)
    for order in ([3], [4, 0], [2, 1, 3]):
        batch = augmented(collator, EVERYTHING, [samples[number] for number in order])
        for name in ("pixel_values", "local_pixel_values", "local_positions"):
            assert torch.equal(batch[name], together[name][order]), name
    later = augmented(collator, EVERYTHING, [sample(3, epoch=1, text="The heart is normal.")])
    assert not torch.equal(later["pixel_values"], together["pixel_values"][[3]])


def test_views_are_what_the_plain_formula_gives(collator):
    samples = [sample(number, text="The heart is normal.") for number in range(6)]
    plain, batch = collator(samples), augmented(collator, EVERYTHING, samples)
    flips = 0
    for number, one in enumerate(samples):
        (gamma, scale, shift, noise, flip), seed = EVERYTHING.draw(one.view_seed)
        flips += flip
        for stream, name in enumerate(("pixel_values", "local_pixel_values")):
            values = plain[name][number].double().numpy()
            drawn = normal_noise(torch.tensor(seed + (stream << 31)), values.size, torch.device("cpu")).numpy()
            values = (2 * ((values + 1) / 2) ** gamma - 1) * scale + shift + noise * drawn.reshape(values.shape)
            values = np.clip(values[..., ::-1] if flip else values, -1, 1)
            assert np.allclose(batch[name][number].numpy(), values, atol=1e-5)
        side = torch.tensor([1, 1, 1 - 2 * flip, 1, 1, 1])
        assert torch.equal(batch["local_positions"][number], plain["local_positions"][number] * side)
    assert 0 < flips < 6
    assert set(batch) == set(plain), "nothing is left for the model to stumble over"


def test_without_changes_nothing_changes(collator):
    samples = [sample(number) for number in range(3)]
    plain = collator(samples)
    batch = augmented(collator, BatchAugmentation(probability=0.0), samples)
    for name, value in plain.items():
        assert torch.allclose(batch[name].float(), value.float(), atol=1e-6), name
    assert BatchAugmentation()(plain) is plain, "validation batches carry no draws"


def test_views_that_only_fill_up_stay_zero():
    augmentation = BatchAugmentation(probability=1.0)
    batch = {
        "pixel_values": torch.zeros(1, 1, 2, 2, 2),
        "local_pixel_values": torch.zeros(1, 2, 1, 2, 2, 2),
        "local_mask": torch.tensor([[True, False]]),
        "local_positions": torch.zeros(1, 2, 6),
        "augmentation_parameters": torch.tensor([[1.1, 1.0, 0.1, 0.05, 0.0]]),
        "augmentation_seeds": torch.tensor([5]),
    }
    local = augmentation(batch)["local_pixel_values"]
    assert local[0, 0].abs().min() > 0
    assert local[0, 1].abs().max() == 0


# ---------------------------------------------------------------------------------------------- sides


def test_text_and_views_change_sides_together(collator):
    flipping = BatchAugmentation(probability=0.0, flip=1.0)
    samples = [sample(number) for number in range(3)]
    plain, batch = collator(samples), augmented(collator, flipping, samples)
    mirrored = collator([sample(0, text=swap_sides(REPORTS[0])), sample(1, text=swap_sides(REPORTS[1])), samples[2]])
    assert torch.equal(batch["input_ids"], mirrored["input_ids"])
    assert torch.equal(batch["report_ids"], mirrored["report_ids"])
    for number, side in enumerate((-1, -1, 1)):
        expected = plain["pixel_values"][number].flip(-1) if side < 0 else plain["pixel_values"][number]
        assert torch.allclose(batch["pixel_values"][number], expected, atol=1e-6), number
        assert torch.equal(batch["local_positions"][number, :, 2], side * plain["local_positions"][number, :, 2])


@pytest.mark.parametrize(
    ("text", "swapped"),
    [
        ("Nodule of the left_kidney, leftsided effusion.", "Nodule of the right_kidney, rightsided effusion."),
        ("RUL nodule. LLL consolidation.", None),
        ("Lt pleural effusion, right lung clear.", None),
        ("Effusion L>R.", None),
        *(
            (text, None)
            for text in (
                "Free fluid in the RLQ.",
                "Filling defect in the RPA.",
                "LICA stenosis.",
                "Left lower lobe nodule; LV dilated.",
                "Derrame pleural izquierdo.",
                "Pleuraerguss links.",
                "Infiltrat im rechten Oberlappen.",
                "Épanchement pleural gauche.",
                "Derrame pleural à esquerda.",
                "Versamento pleurico sinistro.",
                "Sol akciğerde nodül.",
                "左側胸水",
                "Плевральный выпот слева.",
                "Правое легкое чистое.",
            )
        ),
        ("LEFT LUNG: LOW VOLUME. RIBS NORMAL.", "RIGHT LUNG: LOW VOLUME. RIBS NORMAL."),
        ("Плевральный выпот.", "Плевральный выпот."),
        ("Soluble contrast; the link is rectified.", "Soluble contrast; the link is rectified."),
        ("right middle\nlobe nodule", None),
        ("Right-middle-lobe nodule", None),
        ("Fracture of L1, cleft vertebra.", "Fracture of L1, cleft vertebra."),
        ("Left-sided effusion, RIGHT lung clear.", "Right-sided effusion, LEFT lung clear."),
        ("Nodule in the right upper lobe; leftward shift.", "Nodule in the left upper lobe; rightward shift."),
        ("The drain was left in place.", "The drain was left in place."),
        ("Bright spot, no cleft.", "Bright spot, no cleft."),
        ("Consolidation of the lingula on the left.", None),
        ("Right middle lobe nodule.", None),
        ("Bilateral effusions, left more than right.", "Bilateral effusions, right more than left."),
        ("Bilateral effusions.", "Bilateral effusions."),
    ],
)
def test_sides_are_exchanged(text, swapped):
    assert swap_sides(text) == swapped


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from(["left", "Right", "LEFT", "right-sided", "rightmost", "lung", "no", "."]), max_size=12)
)
def test_exchanging_sides_twice_changes_nothing(words):
    text = " ".join(words)
    assert swap_sides(swap_sides(text)) == text


@pytest.mark.parametrize("setting", [{"probability": 1.5}, {"flip": -0.1}, {"noise": -1}, {"scale": 2}])
def test_wrong_settings_are_refused(setting):
    with pytest.raises(ValueError, match=f"augmentation.{next(iter(setting))} must"):
        BatchAugmentation(**setting)
