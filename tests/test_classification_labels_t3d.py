# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What a classifier takes for labels."""

import doctest
import math

import pytest
import torch
from model_inputs import tiny_batch, tiny_config
from torch import nn

from modeling_t3d import T3DForImageClassification, classification_labels_t3d
from modeling_t3d.classification_labels_t3d import infer_problem_type, prepare_labels

NAN = float("nan")


def classifier(problem_type: str | None, num_labels: int = 3) -> T3DForImageClassification:
    config = tiny_config().vision_config
    config.num_labels, config.problem_type = num_labels, problem_type
    return T3DForImageClassification(config).eval()


def test_doctest():
    results = doctest.testmod(classification_labels_t3d)
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.parametrize(
    ("labels", "num_labels", "expected"),
    [
        (torch.zeros(4), 1, "regression"),
        (torch.zeros(4, dtype=torch.long), 3, "single_label_classification"),
        (torch.zeros(4, dtype=torch.uint8), 3, "single_label_classification"),
        (torch.zeros(4, 3), 3, "multi_label_classification"),
        (torch.zeros(4, 3, dtype=torch.long), 3, "multi_label_classification"),
        (torch.zeros(4, 3, dtype=torch.bool), 3, "multi_label_classification"),
    ],
)
def test_labels_say_which_problem_they_are_of(labels, num_labels, expected):
    assert infer_problem_type(labels, num_labels) == expected
    model = classifier(None, num_labels)
    assert model(tiny_batch(4)["pixel_values"], labels=labels).loss.isfinite()
    assert model.config.problem_type == expected


@pytest.mark.parametrize(
    ("problem_type", "labels"),
    [
        ("single_label_classification", torch.tensor([0, -100, 2])),
        ("multi_label_classification", torch.tensor([[0, 1, -100], [-100, -100, -100], [1, 1, 0]])),
        ("multi_label_classification", torch.tensor([[0, 1, NAN], [NAN, NAN, NAN], [1, 1, 0]])),
        ("regression", torch.tensor([[0.5, -100.0, NAN], [NAN, NAN, NAN], [1.0, 1.0, 2.0]])),
    ],
)
def test_unknown_labels_are_left_out_of_the_mean(problem_type, labels):
    model, views = classifier(problem_type).double(), tiny_batch()["pixel_values"].double()
    output = model(views, labels=labels)
    output.loss.backward()
    terms = []
    for logits, row in zip(output.logits, labels.tolist(), strict=True):
        if problem_type == "single_label_classification":
            terms += [] if row == -100 else [-logits.log_softmax(dim=0)[row]]
            continue
        for logit, label in zip(logits, row, strict=True):
            if math.isnan(label) or (label == -100 and problem_type != "regression"):
                continue
            binary = nn.functional.binary_cross_entropy_with_logits(logit, torch.tensor(label).double())
            terms.append((logit - label) ** 2 if problem_type == "regression" else binary)
    torch.testing.assert_close(output.loss, sum(terms) / len(terms))
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification"])
def test_a_batch_of_which_nothing_is_known_teaches_nothing(problem_type):
    model = classifier(problem_type)
    labels = torch.full((3,) if problem_type.startswith("single") else (3, 3), -100)
    loss = model(tiny_batch()["pixel_values"], labels=labels).loss
    loss.backward()
    assert loss == 0
    assert not any(parameter.grad.any() for parameter in model.parameters())


def test_a_single_number_per_volume_needs_no_second_axis():
    for labels in (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[1.0], [2.0], [3.0]])):
        output = classifier("regression", 1)(tiny_batch()["pixel_values"], labels=labels)
        torch.testing.assert_close(output.loss, (output.logits.flatten() - labels.flatten()).square().mean())


@pytest.mark.parametrize(
    ("problem_type", "labels", "message"),
    [
        ("single_label_classification", torch.tensor([0, 1, 3]), "classes from 0 to 2, .* got 3"),
        ("single_label_classification", torch.tensor([0.0, 1.0, 2.0]), r"takes integers of shape \(3,\)"),
        ("single_label_classification", torch.zeros(3, 3, dtype=torch.long), r"set config.problem_type"),
        ("multi_label_classification", torch.tensor([[0, 1, 2]] * 3), "numbers from 0 to 1, .* got 2"),
        ("multi_label_classification", torch.zeros(3), r"takes shape \(3, 3\)"),
        ("regression", torch.zeros(3), r"takes shape \(3, 3\)"),
        ("regression", torch.full((3, 3), float("inf")), "finite numbers"),
    ],
)
def test_labels_that_cannot_be_right_are_refused(problem_type, labels, message):
    with pytest.raises(ValueError, match=message):
        prepare_labels(labels, torch.zeros(3, 3), problem_type)
