# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The labels of a classifier: which kind they are, whether they can be right, and which of them are known."""

import torch

UNKNOWN_LABEL = -100  # what Transformers' losses leave out


def infer_problem_type(labels: torch.Tensor, num_labels: int) -> str:
    """What Transformers takes labels for where `config.problem_type` says nothing, and integers one per label too."""
    if num_labels == 1:
        return "regression"
    one_per_label = labels.ndim == 2 and labels.shape[1] == num_labels
    if labels.is_floating_point() or one_per_label:
        return "multi_label_classification"
    return "single_label_classification"


def prepare_labels(
    labels: torch.Tensor, logits: torch.Tensor, problem_type: str
) -> tuple[torch.Tensor, torch.BoolTensor]:
    """
    Labels as a loss takes them, and which of them are known.

    Args:
        labels (`torch.Tensor`): for `"single_label_classification"` integers of shape `(batch,)` or `(batch, 1)`, else
            numbers or truth values of shape `(batch, num_labels)`, or `(batch,)` where there is one label. Unknown
            are -100 in classification, and NaN.
        logits (`torch.Tensor` of shape `(batch, num_labels)`): from the classifier.
        problem_type (`str`): as in the configurations of Transformers.

    Returns:
        Labels on the device of the logits, `(batch,)` int64 or `(batch, num_labels)` in float32 or finer, and a mask
        of the same shape.

    Raises:
        ValueError: for a shape, type or value that the problem type does not have.

    Example:

    ```python
    >>> import torch
    >>> from modeling_t3d.classification_labels_t3d import prepare_labels

    >>> labels, known = prepare_labels(torch.tensor([[1, -100]]), torch.zeros(1, 2), "multi_label_classification")
    >>> known.tolist()
    [[True, False]]

    ```"""
    batch, num_labels = logits.shape
    labels = labels.to(logits.device)
    if problem_type == "single_label_classification":
        if labels.is_floating_point() or labels.shape not in ((batch,), (batch, 1)):
            raise _misfit(labels, problem_type, f"integers of shape {(batch,)}")
        labels = labels.reshape(batch).long()
        known = labels != UNKNOWN_LABEL
        right = (labels >= 0) & (labels < num_labels)
        values = f"classes from 0 to {num_labels - 1}"
    else:
        if num_labels == 1 and labels.shape == (batch,):
            labels = labels[:, None]
        if labels.shape != logits.shape:
            raise _misfit(labels, problem_type, f"shape {(batch, num_labels)}")
        labels = labels.to(torch.promote_types(logits.dtype, torch.float32))
        known = ~labels.isnan()
        right, values = labels.isfinite(), "finite numbers"
        if problem_type == "multi_label_classification":
            known &= labels != UNKNOWN_LABEL
            right, values = (labels >= 0) & (labels <= 1), "numbers from 0 to 1"
    wrong = known & ~right
    if wrong.any():
        raise ValueError(
            f"labels of problem_type={problem_type!r} must be {values}, or {UNKNOWN_LABEL} or NaN where unknown, got "
            f"{labels[wrong][0].item()}"
        )
    return labels, known


def _misfit(labels: torch.Tensor, problem_type: str, expected: str) -> ValueError:
    return ValueError(
        f"labels of shape {tuple(labels.shape)} and type {labels.dtype} do not fit problem_type={problem_type!r}, "
        f"which takes {expected}; set config.problem_type or config.num_labels"
    )


__all__ = ["UNKNOWN_LABEL", "infer_problem_type", "prepare_labels"]
