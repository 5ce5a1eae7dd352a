# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The sentences of a report, a random few of them, and the identity by which equal texts are known."""

import hashlib
import re
from functools import lru_cache

import numpy as np

MAX_SENTENCES = 3  # of a sampled text [choice]
_MIN_WIDTH = 40  # of lines that are broken for their length, in letters [choice]
_ITEM = re.compile(r"[-*\u2022]|\d{1,2}[.)]\s")  # what begins an item of a list
_ITEM_NUMBER = re.compile(r"(.*[:;]\s*)?\d{1,2}\.")  # all that stands before an item's own words
# Words that a full stop shortens before a number, and before anything; before a small letter every word may be one.
_SHORT_BEFORE_NUMBER = re.compile(r"(?:.*[\s(])?(?:approx|ca|figs?|im|img|ser|no|nr|seg)\.", re.IGNORECASE)
_SHORT = re.compile(r"(?:.*[\s(])?(?:dr|prof|mr|mrs|ms|st|vs|e\.\s?g|i\.\s?e|cf|incl|bzw|z\.\s?[bn])\.", re.IGNORECASE)


def split_sentences(text: str) -> list[str]:
    """
    Sentences of a report. A full stop inside a number, after the number of an item or after an abbreviation ends none;
    the end of a line does, unless the line was broken for its length alone: half a sentence may affirm what the whole
    one denies.
    """
    return list(_sentences(text))


@lru_cache(maxsize=1 << 14)
def _sentences(text: str) -> tuple[str, ...]:
    sentences = []
    has_capitals = text != text.lower()
    for line in _unwrapped_lines(text):
        start = 0
        for gap in re.finditer(r"(?<=[.!?])\s+", line):
            following = line[gap.end() :]
            goes_on = (
                (has_capitals and following[:1].islower())
                or _ITEM_NUMBER.fullmatch(line, start, gap.start())
                or _SHORT.fullmatch(line, start, gap.start())
                or (following[:1].isdigit() and _SHORT_BEFORE_NUMBER.fullmatch(line, start, gap.start()))
            )
            if not goes_on:
                sentences.append(line[start : gap.start()])
                start = gap.end()
        sentences.append(line[start:])
    return tuple(sentences)


def _unwrapped_lines(text: str) -> list[str]:
    """The lines of a text, without empty ones; those that were broken for their length alone are joined again."""
    lines = [line.strip() for line in text.splitlines()]
    width = max(map(len, lines), default=0)
    joined: list[str] = []
    former = ""
    for line in lines:
        goes_on = former and line and former[-1] not in ".!?:" and not _ITEM.match(line)
        # A sentence begins with no small letter, nor with a word that had no room in the line before.
        if goes_on and (
            line[0].islower()
            or line[0] in "(,;"
            or _MIN_WIDTH <= width < len(former) + 1 + len(line.split(maxsplit=1)[0])
        ):
            joined[-1] += f" {line}"
        elif line:
            joined.append(line)
        former = line
    return joined


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
