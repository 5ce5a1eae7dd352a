# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The sentences of a report, a random few of them, and the identity by which equal texts are known."""

import hashlib
import re
from functools import lru_cache

import numpy as np

MAX_SENTENCES = 3  # of a sampled text [choice]


def split_sentences(text: str) -> list[str]:
    """Sentences of a report; a full stop inside a number or after an item number ends none."""
    return list(_sentences(text))


@lru_cache(maxsize=1 << 14)
def _sentences(text: str) -> tuple[str, ...]:
    parts = re.split(r"(?<=[.!?])(?<!\b\d\.)\s+(?=\S)|\n+", text.strip())
    return tuple(part.strip() for part in parts if part and part.strip())


@lru_cache(maxsize=1 << 16)
def stable_id(text: str) -> int:
    """Non-negative 63-bit hash of a text, case and white space aside; equal in every process and run."""
    normalised = " ".join(text.casefold().split())
    return int.from_bytes(hashlib.blake2b(normalised.encode(), digest_size=8).digest(), "big") >> 1


def sample_sentences(text: str, seed: tuple[int, ...]) -> str:
    """One to `MAX_SENTENCES` random sentences of a report, in their order; every number is equally likely.

    The same text and seed give the same sentences, so that identical reports stay identical.
    """
    sentences = _sentences(text)
    generator = np.random.default_rng(seed)
    count = int(generator.integers(1, min(MAX_SENTENCES, len(sentences)) + 1))
    chosen = np.sort(generator.choice(len(sentences), size=count, replace=False))
    return " ".join(sentences[position] for position in chosen)


__all__ = ["MAX_SENTENCES", "sample_sentences", "split_sentences", "stable_id"]
