# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Tokens from the cache are those of the tokenizer itself."""

import pytest
import torch

from modeling_t3d.data import token_cache
from modeling_t3d.data.phantom_reports import train_phantom_tokenizer
from modeling_t3d.data.token_cache import TokenCache

TEXTS = [
    "No effusion.",
    "The heart is of normal size. A nodule of 8 mm in the left lung.",
    "",
    "No effusion.",
    "The spleen is normal. The liver is normal. The aorta is calcified. No free air.",
]


@pytest.fixture
def tokenizer():
    return train_phantom_tokenizer(TEXTS, 120)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("max_length", [8, 64])
@pytest.mark.parametrize("limit", [0, 10, 1 << 20])
def test_equals_the_tokenizer(tokenizer, side, max_length, limit, monkeypatch):
    monkeypatch.setattr(token_cache, "_MAX_TOKENS", limit)
    tokenizer.padding_side = side
    cache = TokenCache(tokenizer, max_length)
    for texts in (TEXTS, TEXTS[1:2], TEXTS[::-1], TEXTS):
        expected = tokenizer(texts, padding="longest", truncation=True, max_length=max_length, return_tensors="pt")
        batch = cache(texts)
        assert batch.keys() == dict(expected).keys()
        for name, values in expected.items():
            assert torch.equal(batch[name], values), name
            assert batch[name].dtype == values.dtype


def test_a_text_is_tokenised_once_and_by_a_tokenizer_of_its_own(tokenizer):
    cache = TokenCache(tokenizer, 32)
    assert cache.tokenizer is not tokenizer
    tokenised, tokenise = [], cache._tokenize
    cache._tokenize = lambda texts: tokenised.extend(texts) or tokenise(texts)
    first, again = cache(TEXTS), cache(TEXTS)
    assert tokenised == list(dict.fromkeys(TEXTS))
    assert all(torch.equal(first[name], values) for name, values in again.items())
