# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Views clustered by prototypes and by decorrelation, as the pre-training model does it, and what is refused."""

import math

import pytest
import torch
from model_inputs import tiny_batch, tiny_config

from modeling_t3d.evaluation.leak import measure_leak
from modeling_t3d.modeling_pretraining_t3d import T3DForPreTraining
from modeling_t3d.modeling_t3d import T3DModel

SWAV = {"tma_loss": "swav", "num_prototypes": 8, "num_frozen_prototype_batches": 0}
BARLOW = {"tma_loss": "barlow"}
both_losses = pytest.mark.parametrize("loss", [SWAV, BARLOW], ids=["swav", "barlow"])


@both_losses
@pytest.mark.parametrize("query", ["text", "none", "vision", "mean"])
def test_every_parameter_is_reached(loss, query):
    model = T3DForPreTraining(tiny_config(tma_query=query, lambda_tma=0.5, **loss))
    output = model(**tiny_batch(4))
    torch.testing.assert_close(output.loss, output.loss_gca + 0.5 * output.loss_tma)
    assert (output.num_valid_anchors, output.num_skipped_pairs) == (12, 0)
    assert output.local_embeds.shape == (4, 3, 16)
    output.loss.backward()
    learnt = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    without = [name for name, p in learnt.items() if p.grad is None or (not p.grad.any() and "key" not in name)]
    assert all("embeddings" in name for name in without), without
    assert any("prototypes" in name for name in learnt) == (loss is SWAV)


@both_losses
def test_views_that_do_not_exist_change_nothing(loss):
    model, batch = T3DForPreTraining(tiny_config(**loss)).eval(), tiny_batch(5)
    batch["local_mask"][1, 2] = batch["local_mask"][3, 0] = batch["local_mask"][3, 1] = False
    expected = model(**batch)
    batch["local_pixel_values"][~batch["local_mask"]] = torch.nan
    output = model(**batch)
    assert (output.num_valid_anchors, output.num_skipped_pairs) == (11, 1)
    assert torch.equal(output.loss_tma, expected.loss_tma)
    output.loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_prototypes_hold_still_at_first():
    model = T3DForPreTraining(tiny_config(**{**SWAV, "num_frozen_prototype_batches": 2}))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before, moved = model.prototypes.directions.weight.detach().clone(), []
    for _ in range(4):
        model.eval()(**tiny_batch(4))  # evaluation is no training batch
        optimizer.zero_grad()
        model.train()(**tiny_batch(4)).loss_tma.backward()
        optimizer.step()
        moved.append(not torch.equal(model.prototypes.directions.weight, before))
    assert moved == [False, False, True, True]
    assert model.prototypes.num_batches == 4


def test_a_loaded_model_goes_on_with_its_prototypes(tmp_path):
    model = T3DForPreTraining(tiny_config(**SWAV))
    for _ in range(3):
        model.train()(**tiny_batch(4))
    model.save_pretrained(tmp_path)
    loaded = T3DForPreTraining.from_pretrained(tmp_path)
    assert loaded.prototypes.num_batches == 3
    assert torch.equal(loaded.prototypes.directions.weight, model.prototypes.directions.weight)
    torch.testing.assert_close(loaded.prototypes(torch.device("cpu")).norm(dim=-1), torch.ones(8))
    _, report = T3DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["unexpected_keys"]


@both_losses
def test_the_leak_control_of_losses_without_negatives(loss):
    """Chance is the log of the number of prototypes, and half the number of dimensions."""
    model = T3DForPreTraining(tiny_config(**loss)).eval()
    output = model(**tiny_batch(4))
    assert output.log_num_candidates.item() == pytest.approx(math.log(8) if loss is SWAV else 16 / 2)
    report = measure_leak(model, tiny_batch(4))
    assert report.loss == pytest.approx(output.loss_tma.item())
    assert report.chance == pytest.approx(output.log_num_candidates.item())


# --- what is refused -------------------------------------------------------------------------------------------------


def test_more_prototypes_than_views_are_refused():
    model = T3DForPreTraining(tiny_config(tma_loss="swav", num_prototypes=13))
    with pytest.raises(ValueError, match="13 prototypes cannot share the 12 views of a global batch of 4 pairs: use "):
        model(**tiny_batch(4))
    assert model(**tiny_batch(5)).loss_tma.isfinite()


def test_one_pair_has_nothing_to_correlate_over():
    with pytest.raises(ValueError, match="needs other pairs to correlate over: the global batch holds 1 pair"):
        T3DForPreTraining(tiny_config(lambda_gca=0.0, **BARLOW))(**tiny_batch(1))


@pytest.mark.parametrize("missing", ["input_ids", "pixel_values"])
def test_a_batch_without_reports_or_volumes_is_refused(missing):
    batch = {**tiny_batch(4), missing: None}
    with pytest.raises(ValueError, match=f"pass {missing}"):
        T3DForPreTraining(tiny_config())(**batch)


def test_a_model_without_a_term_is_refused_where_it_would_train():
    model = T3DForPreTraining(tiny_config(lambda_gca=0.0, lambda_tma=0.0))
    with pytest.raises(ValueError, match="no term has a weight"):
        model(**tiny_batch(4))
    assert model(**tiny_batch(4), return_loss=False).loss is None


def test_logits_are_not_kept_while_training():
    model, batch = T3DForPreTraining(tiny_config()), tiny_batch(4)
    assert model.train()(**batch).logits_per_image is None
    assert model(**batch, return_loss=False).logits_per_image.shape == (4, 4)
    assert model.eval()(**batch).logits_per_image.shape == (4, 4)
