# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Leak control: the ratio by hand, what a shuffle moves, and the measurement on a real model."""

import math

import pytest
import torch

from modeling_t3d.configuration_t3d import T3DConfig
from modeling_t3d.evaluation.leak import leak_ratio, measure_leak, shuffle_views
from modeling_t3d.modeling_pretraining_t3d import T3DForPreTraining


def test_ratio_by_hand():
    chance = math.log(127)
    assert leak_ratio(1.6, 1.6, chance) == pytest.approx(1.0)
    assert leak_ratio(1.6, chance, chance) == pytest.approx(0.0)
    assert leak_ratio(chance - 2, chance - 0.5, chance) == pytest.approx(0.25)
    # Informative views get worse than chance when shuffled: negative, no leak.
    assert leak_ratio(1.62, 5.85, chance) < 0


def test_ratio_is_undefined_near_chance():
    chance = math.log(127)
    assert leak_ratio(chance - 0.049, chance, chance) is None
    assert leak_ratio(chance - 0.051, chance, chance) == pytest.approx(0.0)
    assert leak_ratio(chance + 0.3, chance, chance) is None


def batch_of(num_pairs: int = 4, num_views: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    views = torch.randn(num_pairs, num_views, 1, 16, 16, 16, generator=generator)
    return {
        "input_ids": torch.randint(5, 100, (num_pairs, 6), generator=generator),
        "attention_mask": torch.ones(num_pairs, 6, dtype=torch.long),
        "pixel_values": torch.randn(num_pairs, 1, 16, 16, 16, generator=generator),
        "local_pixel_values": views,
        "local_mask": torch.ones(num_pairs, num_views, dtype=torch.bool),
        "local_positions": views.mean(dim=(2, 3, 4, 5))[..., None].expand(-1, -1, 6).clone(),
    }


def test_shuffle_moves_each_slot_by_its_own_permutation():
    batch = batch_of(num_pairs=16)
    batch["local_mask"] = torch.rand(16, 3) < 0.7
    shuffled = shuffle_views(batch, torch.Generator().manual_seed(0))
    places = []
    for slot in range(3):
        moved = shuffled["local_pixel_values"][:, slot].flatten(1)
        matches = (moved[:, None] == batch["local_pixel_values"][:, slot].flatten(1)).all(dim=-1)
        # A permutation: every view of the slot is there once, and its mask and position came with it.
        assert (matches.sum(dim=0) == 1).all()
        assert (matches.sum(dim=1) == 1).all()
        source = matches.int().argmax(dim=1)
        places.append(source)
        assert torch.equal(shuffled["local_mask"][:, slot], batch["local_mask"][source, slot])
        assert torch.equal(shuffled["local_positions"][:, slot], batch["local_positions"][source, slot])
    assert not torch.equal(places[0], places[1])
    assert not torch.equal(places[1], places[2])
    for name in ("input_ids", "attention_mask", "pixel_values"):
        assert shuffled[name] is batch[name]


@pytest.fixture(scope="module")
def model() -> T3DForPreTraining:
    torch.manual_seed(0)
    return T3DForPreTraining(T3DConfig.from_preset("tiny"))


def test_measurement_on_an_untrained_model_is_undefined_and_changes_nothing(model):
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = measure_leak(model, [batch_of()], num_shuffles=2)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert report.chance == pytest.approx(math.log(4 * 3 - 1))
    assert report.loss == pytest.approx(math.log(11), abs=0.5)
    assert report.num_shuffles == 2
    assert report == measure_leak(model, [batch_of()], num_shuffles=2)


def test_views_of_one_volume_that_agree_are_no_leak(model, monkeypatch):
    """Views that carry a pair's mark find each other; shuffled, they find the wrong ones: far above chance."""
    batch = batch_of(num_pairs=6)
    marks = torch.randn(6, 1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(2)) * 3
    batch["local_pixel_values"] = marks.expand(-1, 3, -1, -1, -1, -1).clone()
    # A low temperature stands in for training: the untrained vectors differ by little.
    monkeypatch.setattr(model.config, "tma_temperature", 0.001)
    report = measure_leak(model, [batch], num_shuffles=3)
    assert report.loss < math.log(17) - 0.05 < report.loss_shuffled
    assert report.leak == pytest.approx((math.log(17) - report.loss_shuffled) / (math.log(17) - report.loss), abs=1e-4)
    assert f"leak {report.leak:.3f}" in report.describe()


def test_refusal_of_a_batch_without_two_pairs(model):
    with pytest.raises(ValueError, match="at least two pairs"):
        measure_leak(model, [{name: value[:1] for name, value in batch_of().items()}])
    with pytest.raises(ValueError, match="local_pixel_values"):
        measure_leak(model, [{"input_ids": torch.ones(2, 3)}])
    with pytest.raises(ValueError, match="at least one batch"):
        measure_leak(model, [])


def test_losses_are_averaged_over_batches(model):
    small, large = batch_of(num_pairs=2), batch_of(num_pairs=4)
    alone = [measure_leak(model, batch) for batch in (small, large)]
    both = measure_leak(model, iter([small, large]))
    assert both.loss == pytest.approx((alone[0].loss + alone[1].loss) / 2)
    assert both.chance == pytest.approx((math.log(5) + math.log(11)) / 2)


def test_description_says_undefined(model):
    report = measure_leak(model, [batch_of()])
    described = report.describe()
    assert ("undefined" in described) == (report.leak is None)
    assert "chance 2.398" in described
