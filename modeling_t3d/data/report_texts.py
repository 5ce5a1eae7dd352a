# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What becomes of a report before it is tokenised for training: a few of its sentences, findings that explain
themselves. Which sections a report consists of is left to the manifest."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from .datasets import PretrainingSample
from .texts import sample_sentences, stable_id

_TEXTS = 5  # stream of random numbers; those of views, sentences, augmentation and perturbation come first


def explain_findings(text: str, descriptions: Mapping[str, str]) -> str:
    """
    A text whose findings carry their description in brackets where each is named first, denied or not: the form that
    prompts with descriptions have.

    Args:
        descriptions (`Mapping[str, str]`): finding -> description; longer names win over those that they contain.

    Example:

    ```python
    >>> from modeling_t3d.data.report_texts import explain_findings

    >>> explain_findings("No ascites. Ascites was there before.", {"ascites": "free fluid in the abdomen"})
    'No ascites (free fluid in the abdomen). Ascites was there before.'

    ```"""
    names = sorted(descriptions, key=len, reverse=True)
    if not names:
        return text
    # A group for each: what matches without regard to case need not be equal to the name in lower case (Turkish I).
    words = (r"\s+".join(map(re.escape, name.split())) for name in names)
    pattern = re.compile(rf"\b(?:{'|'.join(f'({name})' for name in words)})\b", re.IGNORECASE)
    explained: set[int] = set()

    def explain(match: re.Match[str]) -> str:
        position = next(number for number, found in enumerate(match.groups()) if found)
        if position in explained:
            return match[0]
        explained.add(position)
        return f"{match[0]} ({descriptions[names[position]]})"

    return pattern.sub(explain, text)


@dataclass(frozen=True)
class ReportTexts:
    """
    Changes of a sample's report in training. Equal reports become equal texts in the same epoch, and stay no negatives
    of each other.

    Args:
        sample_sentences (`bool`, defaults to `False`):
            One to three random sentences of the report in place of the whole, others in every epoch [choice].
        descriptions (`Mapping[str, str]`):
            Finding -> what it is, for knowledge-enhanced text; none by default. The processor's prompts should carry
            the same ones.
        description_probability (`float`, defaults to 0): share of the texts whose findings are explained [choice].

    Example:

    ```python
    >>> from modeling_t3d.data.datasets import PretrainingSample
    >>> from modeling_t3d.data.report_texts import ReportTexts

    >>> texts = ReportTexts(descriptions={"ascites": "free fluid in the abdomen"}, description_probability=1.0)
    >>> texts(PretrainingSample(None, "No ascites.", 1, 2, view_seed=(0, 0, 0, 0), batch_seed=(0, 1, 0, 0))).text
    'No ascites (free fluid in the abdomen).'

    ```"""

    sample_sentences: bool = False
    descriptions: Mapping[str, str] = field(default_factory=dict)
    description_probability: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.description_probability <= 1:
            raise ValueError(f"texts.description_probability must lie in [0, 1], got {self.description_probability}")

    def __call__(self, sample: PretrainingSample) -> PretrainingSample:
        """The sample with its text of this epoch; its further sentences stay as they are."""
        # A view's seed is (run, stream, epoch, index); the text takes the index's place, so that equal texts stay so.
        run, _, epoch, _ = sample.view_seed
        seed = (run, _TEXTS, epoch, stable_id(sample.text))
        text = sample_sentences(sample.text, seed) if self.sample_sentences else sample.text
        if self.descriptions and np.random.default_rng((*seed, 1)).random() < self.description_probability:
            text = explain_findings(text, self.descriptions)
        return replace(sample, text=text, report_id=stable_id(text))


class TextCollator:
    """
    A collator that is given samples with other texts.

    Args:
        collator (callable): samples -> batch; see [`PretrainingCollator`].
        texts ([`ReportTexts`]): sample -> sample.
    """

    def __init__(
        self,
        collator: Callable[[list[PretrainingSample]], dict[str, torch.Tensor]],
        texts: ReportTexts,
    ) -> None:
        self.collator = collator
        self.texts = texts

    @property
    def identity(self) -> dict[str, Any]:
        """As that of [`PretrainingCollator`]."""
        return {**getattr(self.collator, "identity", {}), "texts": asdict(self.texts)}

    def __call__(self, samples: Sequence[PretrainingSample]) -> dict[str, torch.Tensor]:
        """One batch."""
        return self.collator([self.texts(sample) for sample in samples])


__all__ = ["ReportTexts", "TextCollator", "explain_findings"]
