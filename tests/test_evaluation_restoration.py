# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The control of restoration: other volumes' reports, the same corruption, and means over all voxels."""

import pytest
import torch
from model_inputs import tiny_batch, tiny_config

from modeling_t3d import T3DForPreTraining
from modeling_t3d.evaluation.restoration import RestorationReport, measure_restoration, shuffle_reports

NO_DROPOUT = {"text_config": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}}


def restoring_model(**overrides) -> T3DForPreTraining:
    torch.manual_seed(0)
    settings = {"lambda_gca": 0.0, "lambda_tma": 0.0, "lambda_tir": 1.0, "tir_block_size": 4, "num_tir_heads": 2}
    return T3DForPreTraining(tiny_config(**{**settings, **NO_DROPOUT, **overrides}))


def test_reports_move_and_all_else_stays():
    batch = {**tiny_batch(5), "study_ids": torch.arange(5)}
    for seed in range(5):
        shuffled = shuffle_reports(batch, torch.Generator().manual_seed(seed))
        assert not (shuffled["input_ids"] == batch["input_ids"]).all(dim=1).any()
        for name in ("pixel_values", "local_pixel_values", "study_ids"):
            assert shuffled[name] is batch[name]
        places = [int((batch["input_ids"] == row).all(dim=1).nonzero()) for row in shuffled["input_ids"]]
        assert torch.equal(shuffled["attention_mask"], batch["attention_mask"][places])


def test_errors_are_those_of_the_model_over_all_batches():
    model = restoring_model()
    batches = [tiny_batch(2, seed=1), tiny_batch(4, seed=2)]
    batches[1]["local_mask"][3, 1:] = False
    report = measure_restoration(model, batches, num_shuffles=2)
    assert model.training
    model.eval()
    losses = [model(**batch) for batch in batches]
    weights = torch.tensor([6.0, 10.0]) / 16
    for name in ("loss_tir", "loss_tir_corrupted"):
        expected = sum(weight * getattr(loss, name) for weight, loss in zip(weights, losses, strict=True))
        assert getattr(report, name.replace("_tir", "")) == pytest.approx(expected.item(), rel=1e-5)
    assert report == measure_restoration(model, batches, num_shuffles=2)
    assert report.num_shuffles == 2


def test_a_model_that_reads_its_report_restores_worse_with_another():
    """Views that the report alone determines: every voxel is the sign that a word names."""
    model = restoring_model(tir_mask_ratio=0.9)
    batch = tiny_batch(8, 1)
    signs = torch.tensor([1.0, -1.0] * 4)
    batch["input_ids"] = torch.where(signs > 0, 7, 9)[:, None].repeat(1, 8)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    # Neither zeroed blocks nor the noise around them show the sign.
    batch["local_pixel_values"] = signs.view(8, 1, 1, 1, 1, 1).expand(8, 1, 1, 8, 8, 8).contiguous()
    model.config.tir_noise = 3.0
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(60):
        optimizer.zero_grad()
        model(**batch, corruption_seeds=torch.arange(8) + 8 * step).loss.backward()
        optimizer.step()
    odd = shuffle_reports(batch, torch.Generator().manual_seed(1))
    assert not torch.equal(odd["input_ids"], batch["input_ids"])
    report = measure_restoration(model, batch, num_shuffles=8)
    assert report.help_of_text > 0.3, report.describe()


def test_a_report_in_words():
    report = RestorationReport(0.1, 0.2, 0.12, 0.25, 1)
    assert report.help_of_text == pytest.approx(0.2)
    assert report.describe().endswith("the report saves 20.00%")


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="needs a model that restores"):
        measure_restoration(T3DForPreTraining(tiny_config()), tiny_batch())
    with pytest.raises(ValueError, match="at least two pairs"):
        measure_restoration(restoring_model(), tiny_batch(1))
    with pytest.raises(ValueError, match="at least one batch"):
        measure_restoration(restoring_model(), [])
