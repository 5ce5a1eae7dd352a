# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Global alignment against values worked out by hand and against plain loops, in value and gradient."""

import math

import pytest
import torch
from loss_inputs import TOLERANCE, dense_mask, dense_targets, identities, relations, unit
from process_memory import allocated_peak
from torch import nn

from modeling_t3d.contrastive_loss_t3d import contrastive_sigmoid, contrastive_softmax
from modeling_t3d.pair_relations_t3d import PairIdentities, SoftTargets


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


# --- against plain loops ---------------------------------------------------------------------------------------------


MASKS = ["nothing", "study", "study and report", "everything"]


def kinds(masked: str, batch: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Studies and reports of a batch."""
    study_ids = {"nothing": None, "everything": torch.zeros(batch, dtype=torch.int64)}.get(masked, identities(batch))
    return study_ids, identities(batch).flip(0) if masked == "study and report" else None


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("masked", MASKS)
def test_softmax_equals_its_loop(soft, masked):
    batch = 6
    both = kinds(masked, batch)
    parts = [unit(batch, 8, seed=seed).requires_grad_() for seed in (1, 2)]
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    soft_targets = SoftTargets(parts[1], parts[1], 0.5, 2.0) if soft else None
    targets = dense_targets(parts[1].detach(), 0.5, 2.0) if soft else None

    total, count = contrastive_softmax(*parts, *parts, scale, identities=relations(*both), soft_targets=soft_targets)
    expected, expected_count = loop_softmax(*parts, scale, dense_mask(batch, *both), targets)
    assert count == expected_count
    if masked == "everything":
        assert total == expected == 0
        return
    torch.testing.assert_close(total, expected, **TOLERANCE)
    gradients = torch.autograd.grad(total, [*parts, scale])
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, [*parts, scale]), **TOLERANCE)


def test_sigmoid_equals_its_loop():
    batch = 5
    excluded = dense_mask(batch, identities(batch))
    image, text = (unit(batch, 8, seed=seed).requires_grad_() for seed in (1, 2))
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (4.0, -2.0))
    total, count = contrastive_sigmoid(image, text, scale, bias, identities=relations(identities(batch)))
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


# --- against the whole matrix ----------------------------------------------------------------------------------------


def dense_softmax(image, text, scale, excluded, targets) -> torch.Tensor:
    """The loss from all logits at once, by torch's own functions."""
    logits = (scale * image @ text.T).masked_fill(excluded, -torch.inf)
    targets = torch.eye(len(image), dtype=image.dtype) if targets is None else targets.masked_fill(excluded, 0.0)
    targets = targets / targets.sum(dim=1, keepdim=True)
    rows = nn.functional.cross_entropy(logits.nan_to_num(neginf=-1e300), targets, reduction="none")
    columns = nn.functional.cross_entropy(logits.T.nan_to_num(neginf=-1e300), targets, reduction="none")
    return ((rows + columns) / 2)[(~excluded).sum(dim=1) > 1].sum()


def dense_sigmoid(image, text, scale, bias, excluded) -> torch.Tensor:
    """The loss from all logits at once, by torch's own functions."""
    logits, targets = scale * image @ text.T + bias, torch.eye(len(image), dtype=image.dtype)
    losses = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return losses.masked_fill(excluded, 0.0).sum()


def assert_scaled(actual: list[torch.Tensor], expected: list[torch.Tensor], limit: float = 1e-12) -> None:
    """Each tensor's largest error over its largest value."""
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).abs().max() <= limit * other.abs().max().clamp(min=1e-300)


@pytest.mark.parametrize("chunk_size", [1, 5, 16, 64, None])
@pytest.mark.parametrize("masked", MASKS[:3])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("scale", [1 / 0.07, 100.0])
def test_tiles_of_the_softmax_equal_the_whole(chunk_size, masked, soft, scale):
    batch = 37
    both = kinds(masked, batch)
    inputs = [unit(batch, 12, seed=seed).requires_grad_() for seed in (1, 2)]
    inputs.append(torch.tensor(scale, dtype=torch.float64, requires_grad=True))
    texts = unit(batch, 12, seed=3)
    total, count = contrastive_softmax(
        *inputs[:2],
        *inputs,
        identities=relations(*both),
        soft_targets=SoftTargets(texts, texts, 0.5, 2.0) if soft else None,
        chunk_size=chunk_size,
    )
    expected = dense_softmax(*inputs, dense_mask(batch, *both), dense_targets(texts, 0.5, 2.0) if soft else None)
    assert count == batch
    assert_scaled([total], [expected])
    # Not a weight of 1: what comes down must be handed on.
    assert_scaled(torch.autograd.grad(total * 3, inputs), torch.autograd.grad(expected * 3, inputs))


@pytest.mark.parametrize("chunk_size", [1, 5, 64, None])
@pytest.mark.parametrize("masked", MASKS[:3])
def test_tiles_of_the_sigmoid_equal_the_whole(chunk_size, masked):
    batch = 37
    both = kinds(masked, batch)
    inputs = [unit(batch, 12, seed=seed).requires_grad_() for seed in (1, 2)]
    inputs += [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (10.0, -10.0)]
    total, _ = contrastive_sigmoid(*inputs, identities=relations(*both), chunk_size=chunk_size)
    expected = dense_sigmoid(*inputs, dense_mask(batch, *both))
    assert_scaled([total], [expected])
    assert_scaled(torch.autograd.grad(total * 3, inputs), torch.autograd.grad(expected * 3, inputs))


@pytest.mark.parametrize("loss", ["softmax", "soft targets", "sigmoid"])
def test_shares_of_several_ranks_sum_to_the_whole(loss):
    """Each rank's own anchors against all candidates, with the gradients that the gather would bring home."""
    batch, bounds = 13, [(0, 4), (4, 4), (4, 5), (5, 13)]  # one of them has no pair
    study_ids, texts = identities(batch), unit(batch, 12, seed=3)
    image, text = (unit(batch, 12, seed=seed).requires_grad_() for seed in (1, 2))
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (20.0, -5.0))
    inputs = [image, text, scale] + ([bias] if loss == "sigmoid" else [])
    total, count = torch.zeros((), dtype=torch.float64), 0
    for start, stop in bounds:
        own = slice(start, stop)
        settings = {
            "offset": start,
            "identities": PairIdentities((study_ids[own],), (study_ids,), start),
            "chunk_size": 3,
        }
        if loss == "sigmoid":
            share = contrastive_sigmoid(image[own], text, scale, bias, **settings)
        else:
            soft = SoftTargets(texts[own], texts, 0.5, 2.0) if loss == "soft targets" else None
            share = contrastive_softmax(image[own], text[own], image, text, scale, soft_targets=soft, **settings)
        total, count = total + share[0], count + share[1]
    excluded = dense_mask(batch, study_ids)
    if loss == "sigmoid":
        expected = dense_sigmoid(*inputs, excluded)
    else:
        targets = dense_targets(texts, 0.5, 2.0) if loss == "soft targets" else None
        expected = dense_softmax(*inputs, excluded, targets)
    assert count == batch
    assert_scaled([total], [expected])
    assert_scaled(torch.autograd.grad(total, inputs), torch.autograd.grad(expected, inputs))


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_side_costs_no_gradient(frozen):
    sides = [unit(6, 8, seed=seed).requires_grad_(seed != frozen) for seed in (0, 1)]
    scale = torch.tensor(10.0, dtype=torch.float64)
    total, _ = contrastive_softmax(*sides, *sides, scale)
    expected = dense_softmax(*sides, scale, dense_mask(6), None)
    learns = sides[1 - frozen]
    assert_scaled(torch.autograd.grad(total, learns), torch.autograd.grad(expected, learns))


def test_half_precision_becomes_float32():
    image, text = (unit(6, 8, seed=seed).to(torch.bfloat16).requires_grad_() for seed in (1, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = contrastive_softmax(image, text, image, text, torch.tensor(10.0))
    total.backward()
    assert (total.dtype, image.grad.dtype) == (torch.float32, torch.bfloat16)
    inputs = [side.detach().double().requires_grad_() for side in (image, text)]
    expected = dense_softmax(*inputs, 10.0, dense_mask(6), None)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_scaled([image.grad.double()], torch.autograd.grad(expected, inputs[:1]), limit=1e-2)


@pytest.mark.parametrize("loss", ["softmax", "soft targets", "sigmoid"])
def test_memory_grows_with_the_batch_and_not_with_its_square(loss):
    def run(batch: int) -> None:
        image, text = (torch.randn(batch, 8).requires_grad_() for _ in range(2))
        settings = {"identities": relations(torch.arange(batch) // 2, torch.arange(batch)), "chunk_size": 32}
        if loss == "sigmoid":
            total, _ = contrastive_sigmoid(image, text, torch.tensor(10.0), torch.tensor(-10.0), **settings)
        else:
            soft = SoftTargets(text, text, 0.1, 1.0) if loss == "soft targets" else None
            total, _ = contrastive_softmax(image, text, image, text, torch.tensor(10.0), soft_targets=soft, **settings)
        total.backward()

    small, large = (allocated_peak(lambda batch=batch: run(batch)) for batch in (512, 2048))
    assert large <= 4.2 * small
    assert large < 2048**2 * 4 / 4, "a quarter of the matrix of logits"
