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
