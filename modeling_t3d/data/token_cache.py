# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Tokens of texts that come again in every epoch: each is tokenised once, and batches are padded here."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

_MAX_TOKENS = 1 << 23  # that are kept: 32 MiB for each of the tokenizer's outputs


class TokenCache:
    """
    Texts to padded tensors, equal to what `tokenizer(texts, padding="longest", return_tensors="pt")` gives.

    The tokenizer is copied: a call changes its settings for a moment, which another thread would notice.

    Args:
        tokenizer (any Hugging Face tokenizer): text to tokens.
        max_length (`int`): longer texts are cut.

    Example:

    ```python
    >>> from modeling_t3d.data.phantom_reports import train_phantom_tokenizer
    >>> from modeling_t3d.data.token_cache import TokenCache

    >>> tokenizer = train_phantom_tokenizer(["No effusion.", "The heart is of normal size."], 100)
    >>> TokenCache(tokenizer, 32)(["No effusion.", "The heart is of normal size."])["attention_mask"].shape[0]
    2

    ```"""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer = copy.deepcopy(tokenizer)
        self.max_length = max_length
        self._kept: dict[str, dict[str, np.ndarray]] = {}
        self._num_kept = 0

    def __call__(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Tensors of shape `(texts, longest)`, int64."""
        new = [text for text in dict.fromkeys(texts) if text not in self._kept]
        made = self._tokenize(new) if new else {}
        for text, tokens in made.items():
            if self._num_kept < _MAX_TOKENS:
                self._kept[text] = tokens
                self._num_kept += len(tokens["input_ids"])
        return self._pad([made.get(text) or self._kept[text] for text in texts])

    def _tokenize(self, texts: list[str]) -> dict[str, dict[str, np.ndarray]]:
        encoded = self.tokenizer(texts, truncation=True, max_length=self.max_length, padding=False)
        return {
            text: {name: np.asarray(encoded[name][row], dtype=np.int32) for name in encoded}
            for row, text in enumerate(texts)
        }

    def _pad(self, rows: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        fill = {"input_ids": self.tokenizer.pad_token_id, "token_type_ids": self.tokenizer.pad_token_type_id}
        longest = max(len(row["input_ids"]) for row in rows)
        is_left = self.tokenizer.padding_side == "left"
        batch = {}
        for name in rows[0]:
            values = np.full((len(rows), longest), fill.get(name, 0), dtype=np.int64)
            for padded, row in zip(values, rows, strict=True):
                first = longest - len(row[name]) if is_left else 0
                padded[first : first + len(row[name])] = row[name]
            batch[name] = torch.from_numpy(values)
        return batch


__all__ = ["TokenCache"]
