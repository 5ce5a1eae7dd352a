# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What could only fail later, or would be ignored, is refused before the first step."""

import pytest
from training_footprint import Pairs
from training_footprint import build as build_pretraining
from training_stub import build_trainer, validate

from modeling_t3d.data.streaming import StreamingDataset
from modeling_t3d.training.arguments import ConfigurationError
from modeling_t3d.training.preflight import refuse_lonely_reports, refuse_scarce_views, smallest_training_batch
from modeling_t3d.training.sampling import ShardedBatchSampler
from modeling_t3d.training.validation import ValidationLosses


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "training.metric_for_best_model=score needs a validation, and there is none; set data.validation_split"),
        ({"early_stopping_patience": 2, "eval_steps": 2}, "=score and training.early_stopping_patience need a valid"),
    ],
)
def test_a_metric_that_no_validation_measures(tmp_path, settings, message):
    settings = {"metric_for_best_model": "score", **settings}
    with pytest.raises(ConfigurationError, match=message):
        build_trainer(tmp_path, **settings)
    build_trainer(tmp_path, evaluate=validate, **settings)


def prototypes_of_ten(tmp_path, num_pairs, max_steps=4, **settings):
    """A trainer of batches of four pairs, of three views each, and ten prototypes."""
    overrides = {"tma_loss": "swav", "num_prototypes": 10}
    trainer = build_pretraining(tmp_path, num_pairs=4, num_views=3, overrides=overrides, **settings)
    trainer.args.max_steps = max_steps
    trainer.sampler = ShardedBatchSampler(num_pairs, 4, drop_last=trainer.args.drop_last)
    return trainer


@pytest.mark.parametrize(
    ("num_pairs", "settings", "smallest"),
    [
        (6, {"drop_last": False}, 2),
        (6, {"drop_last": False, "max_steps": 1}, 4),
        (7, {"drop_last": False}, 3),
        (9, {"drop_last": False}, 4),
        (6, {}, 4),
        (14, {"drop_last": False, "gradient_accumulation_steps": 3, "max_steps": 2}, 2),
        (14, {"drop_last": False, "gradient_accumulation_steps": 3, "max_steps": 2, "gradient_caching": True}, 2),
        (14, {"drop_last": False, "gradient_accumulation_steps": 2, "max_steps": 2, "gradient_caching": True}, 6),
    ],
)
def test_the_smallest_batch_is_known_and_must_have_views_for_all_prototypes(tmp_path, num_pairs, settings, smallest):
    trainer = prototypes_of_ten(tmp_path, num_pairs, **settings)
    assert smallest_training_batch(trainer) == smallest
    if smallest < 4:
        with pytest.raises(
            ConfigurationError,
            match=rf"smallest training batch has {smallest} pairs of 3 views, .*: set training.drop_last=true, raise "
            "training.per_device_train_batch_size, or lower model.overrides.num_prototypes=10",
        ):
            refuse_scarce_views(trainer, 3)
    else:
        refuse_scarce_views(trainer, 3)


def test_a_run_without_views_for_all_prototypes_takes_no_step(tmp_path):
    """The first batch has enough of them; the second one is smaller."""
    trainer = prototypes_of_ten(tmp_path, 6, drop_last=False)
    with pytest.raises(ConfigurationError, match="smallest training batch has 2 pairs of 3 views"):
        trainer.train()
    assert trainer.state.step == 0


def test_validation_batches_must_have_views_for_all_prototypes(tmp_path):
    trainer = prototypes_of_ten(tmp_path, 8)
    for num_pairs in (5, 4):
        refuse_scarce_views(trainer, 3, ValidationLosses(Pairs(num_pairs, 3), trainer.collator, 4))
    with pytest.raises(
        ConfigurationError, match=r"a validation batch has 3 pairs of 3 views, .*: give 4 pairs to data.v"
    ):
        refuse_scarce_views(trainer, 3, ValidationLosses(Pairs(3, 3), trainer.collator, 4))


def test_other_objectives_need_no_more_views(tmp_path):
    trainer = build_pretraining(tmp_path, num_pairs=4, num_views=2, drop_last=False)
    trainer.sampler = ShardedBatchSampler(6, 4, drop_last=False)
    refuse_scarce_views(trainer, 2)


RESTORES_WITH_OTHERS = {"lambda_tir": 1.0, "tir_report": "other", "tir_block_size": 8}


def test_reports_of_others_are_not_taken_from_parts_of_a_batch(tmp_path):
    """The loss would depend on how large the parts are."""
    caching = {"gradient_caching": True, "caching_micro_batch_size": 2}
    with pytest.raises(ConfigurationError, match=r"tir_report=other .* in parts, .*: leave out training.gradient_cac"):
        build_pretraining(tmp_path, num_pairs=4, overrides=RESTORES_WITH_OTHERS, **caching)
    build_pretraining(tmp_path, num_pairs=4, overrides={**RESTORES_WITH_OTHERS, "tir_report": "own"}, **caching)
    build_pretraining(tmp_path, num_pairs=4, overrides={**RESTORES_WITH_OTHERS, "lambda_tir": 0.0}, **caching)


def test_reports_of_others_need_two_pairs_for_each_process(tmp_path):
    trainer = build_pretraining(tmp_path, num_pairs=4, overrides=RESTORES_WITH_OTHERS, drop_last=False)
    for num_pairs in (8, 6):
        trainer.sampler = StreamingDataset(Pairs(num_pairs, 2), 4, drop_last=False)
        refuse_lonely_reports(trainer)
    trainer.sampler = StreamingDataset(Pairs(5, 2), 4, drop_last=False)
    with pytest.raises(ConfigurationError, match=r"single pair for a process: set training.drop_last=true, raise tr"):
        refuse_lonely_reports(trainer)


def test_reports_of_others_need_two_pairs_in_validation(tmp_path):
    trainer = build_pretraining(tmp_path, num_pairs=4, overrides=RESTORES_WITH_OTHERS)
    refuse_lonely_reports(trainer, ValidationLosses(Pairs(3, 2), trainer.collator, 4))
    with pytest.raises(
        ConfigurationError, match=r"a validation batch has a single pair .*: give 2 pairs for each pro"
    ):
        refuse_lonely_reports(trainer, ValidationLosses(Pairs(3, 2), trainer.collator, 1))
