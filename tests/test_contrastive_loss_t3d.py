# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Global alignment against values worked out by hand and against plain loops, in value and gradient."""

import math

import pytest
import torch
from loss_inputs import TOLERANCE, exclude, identities, unit

from modeling_t3d.contrastive_loss_t3d import contrastive_sigmoid, contrastive_softmax, soft_targets


def loop_softmax(image, text, scale, excluded, targets=None):
    """Cross entropy of every row and column, candidate by candidate."""
    total, count = 0.0, 0
    for i in range(len(image)):
        allowed = [j for j in range(len(image)) if not excluded[i][j]]
        if len(allowed) < 2:
            continue
        count += 1
        weights = {j: (targets[i][j] if targets is not None else float(j == i)) for j in allowed}
        norm = sum(weights.values())
        for anchor, others in ((image[i], text), (text[i], image)):
            logits = {j: scale * torch.dot(anchor, others[j]) for j in allowed}
            log_sum = torch.log(sum(torch.exp(logit) for logit in logits.values()))
            total = total - sum(weights[j] / norm * (logits[j] - log_sum) for j in allowed) / 2
    return total, count


# --- values worked out by hand ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [2, 5, 32])
def test_softmax_is_log_b_for_equal_embeddings(batch):
    image, text = unit(1, 16).expand(batch, -1), unit(1, 16, seed=1).expand(batch, -1)
    total, count = contrastive_softmax(image, text, image, text, torch.tensor(1 / 0.07))
    assert count == batch
    assert (total / count).item() == pytest.approx(math.log(batch), abs=1e-12)


@pytest.mark.parametrize("constant", ["image", "text"])
def test_softmax_from_one_constant_side_cannot_fall_below_log_b(constant):
    batch = 8
    sides = {"image": unit(batch, 16), "text": unit(batch, 16, seed=1)}
    sides[constant] = unit(1, 16, seed=2).expand(batch, -1)
    similarities = ((sides["image"] * sides["text"]).sum(dim=-1) * 10.0).tolist()
    total, count = contrastive_softmax(sides["image"], sides["text"], *sides.values(), torch.tensor(10.0))
    # From the varied side all candidates are equal: ln B. From the constant side every row is the same softmax.
    constant_side = math.log(sum(map(math.exp, similarities))) - sum(similarities) / batch
    assert (total / count).item() == pytest.approx((math.log(batch) + constant_side) / 2, abs=1e-12)
    assert total / count >= math.log(batch)


def test_softmax_of_two_orthogonal_pairs():
    eye = torch.eye(2, dtype=torch.float64)
    total, count = contrastive_softmax(eye, eye, eye, eye, torch.tensor(3.0))
    assert (total / count).item() == pytest.approx(math.log(1 + math.exp(-3.0)), abs=1e-12)


def test_random_embeddings_lie_within_one_above_log_b():
    batch = 32
    losses = []
    for seed in range(10):
        image, text = unit(batch, 512, seed=seed), unit(batch, 512, seed=100 + seed)
        total, count = contrastive_softmax(image, text, image, text, torch.tensor(1 / 0.07))
        losses.append((total / count).item())
    assert math.log(batch) < sum(losses) / len(losses) < math.log(batch) + 1


def test_sigmoid_of_two_orthogonal_pairs():
    eye = torch.eye(2, dtype=torch.float64)
    total, count = contrastive_sigmoid(eye, eye, torch.tensor(10.0), torch.tensor(-10.0))
    expected = math.log(1 + math.exp(0.0)) + math.log(1 + math.exp(-10.0))  # the pair, and the other report
    assert (total / count).item() == pytest.approx(expected, abs=1e-12)


def test_soft_targets_follow_the_formula():
    texts = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0], [3.0, 2.0, 1.0]], dtype=torch.float64)
    targets = soft_targets(texts, texts, 0, temperature=0.07, rate=0.2)
    close = 0.07 * (1 - math.exp(-0.2))  # correlation 1; the third report correlates at -1, which counts as 0
    expected = torch.tensor([[1.0, close, 0.0], [close, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(targets, expected, **TOLERANCE)


# --- against plain loops ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("masked", ["nothing", "study", "study and report", "everything"])
def test_softmax_equals_its_loop(soft, masked):
    batch = 6
    study_ids = {"nothing": None, "everything": torch.zeros(batch, dtype=torch.int64)}.get(masked, identities(batch))
    report_ids = identities(batch).flip(0) if masked == "study and report" else None
    excluded = exclude(study_ids, report_ids, batch)
    parts = [unit(batch, 8, seed=seed).requires_grad_() for seed in (1, 2)]
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    targets = soft_targets(parts[1], parts[1], 0, temperature=0.5, rate=2.0) if soft else None

    total, count = contrastive_softmax(*parts, *parts, scale, excluded=excluded, targets=targets)
    expected, expected_count = loop_softmax(*parts, scale, excluded, targets)
    assert count == expected_count
    if masked == "everything":
        assert total == expected == 0
        return
    torch.testing.assert_close(total, expected, **TOLERANCE)
    gradients = torch.autograd.grad(total, [*parts, scale])
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, [*parts, scale]), **TOLERANCE)


def test_sigmoid_equals_its_loop():
    batch = 5
    excluded = exclude(identities(batch), None, batch)
    image, text = (unit(batch, 8, seed=seed).requires_grad_() for seed in (1, 2))
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (4.0, -2.0))
    total, count = contrastive_sigmoid(image, text, scale, bias, excluded=excluded)
    expected = 0.0
    for i in range(batch):
        for j in range(batch):
            if not excluded[i, j]:
                logit = scale * torch.dot(image[i], text[j]) + bias
                expected = expected + torch.log(1 + torch.exp(-logit if i == j else logit))
    assert count == batch
    torch.testing.assert_close(total, expected, **TOLERANCE)
    inputs = [image, text, scale, bias]
    torch.testing.assert_close(torch.autograd.grad(total, inputs), torch.autograd.grad(expected, inputs), **TOLERANCE)


def test_identities_exclude_symmetrically_and_never_the_own_pair():
    study_ids = torch.tensor([3, -1, 3, -1, 4])
    report_ids = torch.tensor([0, 1, 2, 3, 1])
    excluded = exclude(study_ids, report_ids, 5)
    assert excluded.nonzero().tolist() == [[0, 2], [1, 4], [2, 0], [4, 1]]
