# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Clustering of views against values worked out by hand and plain loops, in value and gradient, and its pooling."""

import math

import pytest
import torch
from loss_inputs import TOLERANCE, dense_mask, identities, relations, unit
from torch import nn

from modeling_t3d.clustering_loss_t3d import (
    chunked_multi_view_contrastive,
    draw_candidate_pairs,
    multi_view_contrastive,
    redundancy_reduction,
    sinkhorn_codes,
    swapped_prediction,
)
from modeling_t3d.configuration_t3d import T3DConfig
from modeling_t3d.layers_t3d import T3DMultiViewAlignment, T3DReports


def loop_multi_view(views, own_pair, view_mask, excluded, temperature):
    """The clustering loss, anchor by anchor and candidate by candidate."""
    total, count, log_candidates = 0.0, 0, 0.0
    for q in range(len(views)):
        own = int(own_pair[q])
        everyone = [
            (j, u)
            for j in range(views.shape[1])
            for u in range(views.shape[2])
            if view_mask[q, j, u] and not excluded[q, j]
        ]
        for s in range(views.shape[2]):
            others = [c for c in everyone if c != (own, s)]
            positives = [c for c in others if c[0] == own]
            if not view_mask[q, own, s] or not positives:
                continue
            logits = {c: torch.dot(views[q, own, s], views[q, c[0], c[1]]) / temperature for c in others}
            log_sum = torch.log(sum(torch.exp(logit) for logit in logits.values()))
            total = total - sum(logits[p] - log_sum for p in positives) / len(positives)
            log_candidates += math.log(len(others))
            count += 1
    return total, count, log_candidates


# --- values worked out by hand ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "slots"), [(2, 2), (3, 4), (32, 4)])
def test_multi_view_of_equal_views_is_log_of_the_candidates(batch, slots):
    views = unit(1, 1, 1, 8).expand(batch, batch, slots, -1)
    mask = torch.ones(batch, batch, slots, dtype=torch.bool)
    total, count, log_candidates = multi_view_contrastive(views, torch.arange(batch), mask, temperature=0.2)
    assert count == batch * slots
    assert (total / count).item() == pytest.approx(math.log(batch * slots - 1), abs=1e-12)
    assert log_candidates.item() == pytest.approx(total.item(), rel=1e-12)


def test_multi_view_of_two_perfect_clusters():
    # Two pairs of two equal views, orthogonal to each other: one positive at 1, two negatives at 0.
    views = torch.eye(2, dtype=torch.float64)[:, None].expand(2, 2, -1).expand(2, -1, -1, -1)
    total, count, _ = multi_view_contrastive(
        views, torch.arange(2), torch.ones(2, 2, 2, dtype=torch.bool), temperature=0.5
    )
    assert (total / count).item() == pytest.approx(math.log(1 + 2 * math.exp(-2.0)), abs=1e-12)


# --- against plain loops ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("study", [False, True])
def test_multi_view_equals_its_loop(study):
    batch, slots = 4, 3
    raw = torch.randn(batch, batch, slots, 8, dtype=torch.float64, requires_grad=True)
    views = nn.functional.normalize(raw, dim=-1)
    # Full, two views, one view (skipped, yet a candidate), none.
    mask = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 1, 0], [0, 0, 0]]).bool().expand(batch, -1, -1)
    excluded = dense_mask(batch, identities(batch) if study else None)
    own = torch.arange(batch)
    terms = multi_view_contrastive(views, own, mask, excluded, temperature=0.2)
    expected, count, log_candidates = loop_multi_view(views, own, mask, excluded, 0.2)
    assert terms[1] == count == 5
    torch.testing.assert_close(terms[0], expected, **TOLERANCE)
    assert terms[2].item() == pytest.approx(log_candidates, rel=1e-12)
    gradients = [torch.autograd.grad(loss, raw, retain_graph=True)[0] for loss in (terms[0], expected)]
    torch.testing.assert_close(*gradients, **TOLERANCE)
    assert gradients[0][:, 3].abs().max() == 0  # a masked view has no gradient


def test_masked_views_may_hold_anything():
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]]).bool().expand(2, -1, -1)
    views = unit(2, 2, 3, 8)
    other = views.clone()
    other[:, :, 2] = 100.0
    own = torch.arange(2)
    first, second = (multi_view_contrastive(v, own, mask, temperature=0.2)[0] for v in (views, other))
    assert torch.equal(first, second)


def test_views_shared_by_all_queries_equal_a_copy_for_each():
    views = unit(4, 3, 8).requires_grad_()
    mask = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 1, 0], [1, 1, 1]]).bool().expand(4, -1, -1)
    own = torch.arange(4)
    shared = multi_view_contrastive(views[None], own, mask, temperature=0.2)
    copied = multi_view_contrastive(views.expand(4, -1, -1, -1), own, mask, temperature=0.2)
    for one, other in zip(shared, copied, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)
    gradients = [torch.autograd.grad(terms[0], views)[0] for terms in (shared, copied)]
    torch.testing.assert_close(*gradients, **TOLERANCE)


# --- prototypes ------------------------------------------------------------------------------------------------------


def loop_sinkhorn(scores, mask, epsilon, num_iterations):
    """Rows and columns divided in turn."""
    codes = torch.exp(scores[mask] / epsilon)
    for _ in range(num_iterations):
        codes = codes / codes.sum(dim=0, keepdim=True) / codes.shape[1]
        codes = codes / codes.sum(dim=1, keepdim=True) / codes.shape[0]
    whole = torch.zeros_like(scores)
    whole[mask] = codes / codes.sum(dim=1, keepdim=True)
    return whole


@pytest.mark.parametrize("num_iterations", [1, 3, 50])
def test_sinkhorn_equals_division_of_rows_and_columns(num_iterations):
    scores = unit(20, 6) @ unit(5, 6, seed=1).T
    mask = torch.arange(20) % 4 > 0
    codes = sinkhorn_codes(scores, mask, epsilon=0.05, num_iterations=num_iterations)
    torch.testing.assert_close(codes, loop_sinkhorn(scores, mask, 0.05, num_iterations), **TOLERANCE)
    torch.testing.assert_close(codes.sum(dim=1), mask.double())
    if num_iterations == 50:
        torch.testing.assert_close(codes.sum(dim=0), torch.full((5,), 3.0, dtype=torch.float64), rtol=1e-3, atol=0)


def test_sinkhorn_neither_overflows_nor_forgets_views_in_float32():
    """Exponents far beyond float32's: views whose scores are all low count like others."""
    scores = unit(20, 6) @ unit(5, 6, seed=1).T
    scores[3] -= 1.0
    mask = torch.ones(20, dtype=torch.bool)
    codes = sinkhorn_codes(scores.float(), mask, epsilon=0.008, num_iterations=3)
    expected = loop_sinkhorn(scores, mask, 0.008, 3)
    assert torch.exp(scores.float() / 0.008).isinf().any(), "the plain form would overflow"
    torch.testing.assert_close(codes.double(), expected, rtol=1e-2, atol=1e-4)


def loop_swapped(views, mask, prototypes, temperature, codes):
    """View by view."""
    total, count = 0.0, 0
    for i in range(len(views)):
        slots = [s for s in range(views.shape[1]) if mask[i, s]]
        for s in slots if len(slots) > 1 else []:
            predicted = (prototypes @ views[i, s] / temperature).log_softmax(dim=0)
            others = [t for t in slots if t != s]
            total = total - sum(torch.dot(codes[i, t], predicted) for t in others) / len(others)
            count += 1
    return total, count


def test_swapped_prediction_equals_its_loop():
    inputs = [unit(5, 3, 8).requires_grad_(), unit(4, 8, seed=1).requires_grad_()]
    views, prototypes = inputs
    mask = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 1]]).bool()
    total, count, log_prototypes = swapped_prediction(
        views, mask, prototypes, temperature=0.1, epsilon=0.05, num_iterations=3
    )
    scores = (views @ prototypes.T).detach().flatten(0, 1)
    codes = loop_sinkhorn(scores, mask.flatten(), 0.05, 3).view(5, 3, 4)
    expected, expected_count = loop_swapped(views, mask, prototypes, 0.1, codes)
    assert count == expected_count == 8
    assert log_prototypes.item() == pytest.approx(8 * math.log(4))
    torch.testing.assert_close(total, expected, **TOLERANCE)
    # Of the prediction alone: assignments have no gradient.
    torch.testing.assert_close(torch.autograd.grad(total, inputs), torch.autograd.grad(expected, inputs), **TOLERANCE)


def test_views_without_information_cannot_fall_below_log_of_the_prototypes():
    views, prototypes = unit(1, 1, 8).expand(6, 3, -1), unit(4, 8, seed=1)
    mask = torch.ones(6, 3, dtype=torch.bool)
    for scale in (0.0, 1.0):
        total, count, _ = swapped_prediction(
            views * scale, mask, prototypes, temperature=0.1, epsilon=0.05, num_iterations=3
        )
        assert total / count >= math.log(4) - 1e-12
        assert scale or (total / count).item() == pytest.approx(math.log(4))


# --- decorrelation ---------------------------------------------------------------------------------------------------


def loop_redundancy(views, mask, weight):
    """Pair of slots by pair of slots, entry by entry."""
    losses = []
    for s in range(views.shape[1]):
        for t in range(s + 1, views.shape[1]):
            both = mask[:, s] & mask[:, t]
            if both.sum() < 2:
                continue
            first, second = (
                (z - z.mean(dim=0)) / (z.var(dim=0, unbiased=False) + 1e-8).sqrt()
                for z in (views[both, s], views[both, t])
            )
            correlation = first.T @ second / both.sum()
            loss = 0.0
            for k in range(len(correlation)):
                for m in range(len(correlation)):
                    loss = loss + ((correlation[k, m] - 1) ** 2 if k == m else weight * correlation[k, m] ** 2)
            losses.append(loss / 2)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("slots", [2, 4])
def test_redundancy_reduction_equals_its_loop(slots):
    views = unit(7, slots, 6).requires_grad_()
    mask = torch.rand(7, slots, generator=torch.Generator().manual_seed(2)) < 0.8
    loss, count = redundancy_reduction(views, mask, off_diagonal_weight=0.3)
    expected = loop_redundancy(views, mask, 0.3)
    assert count == sum(int(row.sum()) for row in mask if row.sum() > 1)
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    gradients = [torch.autograd.grad(one, views)[0] for one in (loss, expected)]
    torch.testing.assert_close(*gradients, **TOLERANCE)
    assert gradients[0][~mask].abs().max() == 0


def test_redundancy_reduction_by_hand():
    # Two dimensions that vary independently over four pairs, the same in both views.
    design = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    mask = torch.ones(4, 2, dtype=torch.bool)
    settings = {"off_diagonal_weight": 0.5}
    assert redundancy_reduction(torch.stack([design, design], dim=1), mask, **settings)[0].item() < 1e-12
    # The second view has the dimensions swapped: C = [[0, 1], [1, 0]].
    swapped = redundancy_reduction(torch.stack([design, design.flip(1)], dim=1), mask, **settings)[0]
    assert swapped.item() == pytest.approx((1 + 1 + 0.5 * (1 + 1)) / 2)
    # Views that are all alike correlate with nothing.
    constant = torch.ones(4, 2, 6, dtype=torch.float64).requires_grad_()
    loss, _ = redundancy_reduction(constant, mask, **settings)
    assert loss.item() == pytest.approx(6 / 2)
    assert torch.autograd.grad(loss, constant)[0].isfinite().all()


def test_a_batch_without_two_views_of_two_pairs_has_no_redundancy():
    views = unit(3, 2, 6).requires_grad_()
    mask = torch.tensor([[1, 1], [1, 0], [0, 1]]).bool()
    loss, _ = redundancy_reduction(views, mask, off_diagonal_weight=0.1)
    assert loss == 0
    assert torch.autograd.grad(loss, views)[0].abs().max() == 0
    assert redundancy_reduction(views[:, :1], mask[:, :1], off_diagonal_weight=0.1)[0] == 0


# --- the text-informed pooling behind it -----------------------------------------------------------------------------


def alignment(query: str, seed: int = 0, **overrides) -> T3DMultiViewAlignment:
    torch.manual_seed(seed)
    config = T3DConfig.from_preset(
        "tiny", projection_dim=16, projection_hidden_size=16, num_tma_heads=2, tma_query=query, **overrides
    )
    return T3DMultiViewAlignment(config).double()


def random_reports(num_reports: int) -> T3DReports:
    mask = torch.ones(num_reports, 5, dtype=torch.bool)
    mask[0, 3:] = False
    tokens = torch.randn(num_reports, 5, 16, dtype=torch.float64)
    return T3DReports(torch.randn(num_reports, 16, dtype=torch.float64), tokens, mask)


def loop_pool(module: T3DMultiViewAlignment, tokens: torch.Tensor, reports: T3DReports, i: int) -> torch.Tensor:
    """One view, `(tokens, size)`, as report i asks, head by head."""
    d = module.head_dim
    residual = 0.0
    if module.config.tma_query == "vision":
        asked = reports.tokens[i][reports.mask[i]].detach()
        queries, residual = module.query_projection(tokens), tokens.mean(dim=0)
    else:
        asked, queries = tokens, module.query_projection(reports.embeds[i])[None]
    keys, values = module.key_projection(asked), module.value_projection(asked)
    heads = []
    for h in range(0, 16, d):
        weights = (queries[:, h : h + d] @ keys[:, h : h + d].T / math.sqrt(d)).softmax(dim=-1)
        heads.append(weights @ values[:, h : h + d])
    mixed = module.output_projection(torch.cat(heads, dim=-1)).mean(dim=0)
    return nn.functional.normalize(module.head(residual + mixed), dim=-1)


@pytest.mark.parametrize("query", ["text", "vision"])
@pytest.mark.parametrize("subset", [False, True])
def test_pooling_equals_its_loop(query, subset):
    module, reports = alignment(query), random_reports(4)
    tokens = torch.randn(4, 3, 6, 16, dtype=torch.float64)
    candidates = torch.tensor([[0, 2], [1, 3], [2, 0], [3, 1]]) if subset else None
    pool, _ = module.pooler(tokens, reports, candidates)
    chosen = candidates if subset else torch.arange(4).expand(4, -1)
    expected = torch.stack(
        [
            torch.stack([torch.stack([loop_pool(module, view, reports, i) for view in tokens[j]]) for j in chosen[i]])
            for i in range(4)
        ]
    )
    torch.testing.assert_close(pool(0, 4), expected, **TOLERANCE)
    torch.testing.assert_close(pool(1, 3), expected[1:3], **TOLERANCE)
    own = torch.stack([expected[i, (chosen[i] == i).nonzero().item()] for i in range(4)])
    torch.testing.assert_close(module.pool_own_views(tokens, reports), own, **TOLERANCE)


@pytest.mark.parametrize("query", ["text", "vision"])
@pytest.mark.parametrize("chunk_size", [1, 3])
def test_chunks_of_queries_equal_one_piece(query, chunk_size):
    module, reports = alignment(query), random_reports(5)
    tokens = torch.randn(5, 2, 4, 16, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1], [1, 0], [1, 1], [0, 0], [1, 1]]).bool().expand(5, -1, -1)
    results = []
    for size in (5, chunk_size):
        pool, _ = module.pooler(tokens, reports)
        terms = chunked_multi_view_contrastive(
            pool, torch.arange(5), mask, relations(identities(5)).mask, temperature=0.2, chunk_size=size
        )
        inputs = [tokens, *module.parameters()]
        results.append((*terms, *torch.autograd.grad(terms[0], inputs, allow_unused=True)))
    for one_piece, in_chunks in zip(*results, strict=True):
        assert (one_piece is None) == (in_chunks is None)
        if one_piece is not None:
            torch.testing.assert_close(in_chunks, one_piece, rtol=1e-10, atol=1e-12)


def test_drawn_pairs_are_distinct_balanced_and_contain_the_own():
    candidates = draw_candidate_pairs(7, 7, 0, 3, device=torch.device("cpu"))
    assert candidates[:, 0].tolist() == list(range(7))
    assert all(len(set(row)) == 4 for row in candidates.tolist())
    assert torch.bincount(candidates.flatten()).tolist() == [4] * 7
    # The rows of a later rank are those of one process.
    torch.manual_seed(3)
    whole = draw_candidate_pairs(7, 7, 0, 3, device=torch.device("cpu"))
    torch.manual_seed(3)
    assert torch.equal(draw_candidate_pairs(2, 7, 5, 3, device=torch.device("cpu")), whole[5:])


@pytest.mark.parametrize(("negatives", "leaks"), [("same_query", False), ("own_query", True)])
def test_only_own_query_leaks(negatives, leaks):
    """
    Views that are the same for every input, but differ from token to token, say nothing about the pair. With its own
    query for each pair the pattern of pooling alone tells pairs apart; with the anchor's query for all it cannot.
    """
    batch, slots, num_tokens = 8, 3, 12
    module = alignment("text").float()
    texts = nn.Parameter(torch.randn(batch, 16))
    tokens = nn.Parameter(torch.randn(num_tokens, 16))
    optimizer = torch.optim.Adam([*module.parameters(), texts, tokens], lr=1e-2)
    mask = torch.ones(batch, batch, slots, dtype=torch.bool)
    chance, lowest = math.log(batch * slots - 1), math.inf
    for _ in range(400):
        views = tokens.expand(batch, slots, -1, -1)
        if negatives == "same_query":
            candidates = module.pooler(views, T3DReports(texts))[0](0, batch)
        else:
            candidates = module.pool_own_views(views, T3DReports(texts)).expand(batch, -1, -1, -1)
        total, count, _ = multi_view_contrastive(candidates, torch.arange(batch), mask, temperature=0.2)
        loss = total / count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lowest = min(lowest, loss.item())
    if leaks:
        assert lowest < chance - 0.3
    else:
        assert lowest >= chance - 0.02
