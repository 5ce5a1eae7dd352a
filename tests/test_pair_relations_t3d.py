# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Which pairs are not negatives of each other, and soft targets, for any rows that are asked for."""

import pytest
import torch
from loss_inputs import TOLERANCE, dense_mask, dense_targets, identities, relations, unit

from modeling_t3d.pair_relations_t3d import PairIdentities, SoftTargets, gather_identities


def test_identities_exclude_symmetrically_and_never_the_own_pair():
    study_ids = torch.tensor([3, -1, 3, -1, 4])
    report_ids = torch.tensor([0, 1, 2, 3, 1])
    mask = gather_identities(study_ids, report_ids, [5], torch.device("cpu")).mask(0, 5)
    assert mask.nonzero().tolist() == [[0, 2], [1, 4], [2, 0], [4, 1]]


def test_without_identities_there_is_no_mask():
    assert gather_identities(None, None, [5], torch.device("cpu")).mask(0, 5) is None


@pytest.mark.parametrize(("start", "stop"), [(0, 9), (2, 5), (8, 9)])
def test_rows_and_candidates_are_those_of_the_whole(start, stop):
    batch = 9
    ids = (identities(batch), torch.arange(batch) // 3)
    whole = dense_mask(batch, *ids)
    assert torch.equal(relations(*ids).mask(start, stop), whole[start:stop])
    candidates = torch.randint(batch, (stop - start, 4))
    assert torch.equal(relations(*ids).mask(start, stop, candidates), whole[start:stop].gather(1, candidates))
    # The same rows as a later rank's.
    of_rank = PairIdentities(tuple(kind[start:] for kind in ids), ids, start)
    assert torch.equal(of_rank.mask(0, stop - start), whole[start:stop])


def test_soft_targets_follow_the_formula():
    texts = unit(7, 12)
    targets = SoftTargets(texts, texts, 0.07, 0.2).standardised()
    expected = dense_targets(texts, 0.07, 0.2)
    torch.testing.assert_close(targets.tile(0, 7, 0), expected, **TOLERANCE)
    torch.testing.assert_close(targets.tile(2, 5, 0), expected[2:5], **TOLERANCE)
    of_rank = SoftTargets(texts[3:], texts, 0.07, 0.2).standardised()
    torch.testing.assert_close(of_rank.tile(1, 4, 3), expected[4:], **TOLERANCE)


def test_reports_that_correlate_negatively_share_nothing():
    texts = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0], [3.0, 2.0, 1.0]], dtype=torch.float64)
    targets = SoftTargets(texts, texts, 0.07, 0.2).standardised().tile(0, 3, 0)
    close = 0.07 * (1 - torch.tensor(-0.2, dtype=torch.float64).exp())
    assert targets[0, 1] == pytest.approx(close.item(), rel=1e-10)
    assert targets[0, 2] == targets[2, 1] == 0
