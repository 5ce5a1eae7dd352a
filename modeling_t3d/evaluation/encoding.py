# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Runs a model over volumes, reports and prompts and keeps embeddings only, so that memory is bounded by one batch.

What is computed from the embeddings is left to the protocols.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
LOCAL_INPUTS = ("local_pixel_values", "local_mask", "local_positions")


@dataclass(frozen=True)
class Embeddings:
    """What a model makes of a set of volumes; N volumes (reconstructions), in the order of the samples.

    Attributes:
        image_embeds (`np.ndarray` of shape `(N, D)`): float32, unit norm.
        text_embeds (`np.ndarray` of shape `(N, D)`, *optional*): of the volumes' reports.
        view_features (`np.ndarray` of shape `(N, S, C)`, *optional*): mean over the tokens of each local view, pooled
            without any text.
        view_mask (`np.ndarray` of shape `(N, S)`, *optional*): valid views.
        labels (`np.ndarray` of shape `(N, K)`): 0, 1 or nan (unknown), columns as `findings`.
        findings: K names.
        patient_ids, study_ids, reconstructions, reports: per volume.
        num_truncated_reports: distinct reports that were longer than the text tower takes.
    """

    image_embeds: np.ndarray
    labels: np.ndarray
    findings: tuple[str, ...]
    patient_ids: tuple[str, ...]
    study_ids: tuple[str, ...]
    reconstructions: tuple[str, ...]
    reports: tuple[str, ...]
    text_embeds: np.ndarray | None = None
    view_features: np.ndarray | None = None
    view_mask: np.ndarray | None = None
    num_truncated_reports: int = 0

    def __len__(self) -> int:
        return len(self.image_embeds)


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """No gradients, no dropout; the training mode is restored, also after an error."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _unit(embeds: torch.Tensor) -> torch.Tensor:
    """Unit-norm float32 rows on the CPU."""
    return torch.nn.functional.normalize(embeds.float(), dim=-1).cpu()


def token_limit(model: Any, tokenizer: Any, max_report_tokens: int = 512) -> int:
    """Longest text in tokens that the tokenizer and the text tower both take, at most `max_report_tokens`."""
    positions = model.config.text_config.max_position_embeddings
    return min(tokenizer.model_max_length, positions, max_report_tokens)


def _encode_texts(model: Any, tokenizer: Any, texts: Sequence[str], batch_size: int, limit: int) -> torch.Tensor:
    """Unit-norm embeddings (num_texts, D) of texts, cut at `limit` tokens."""
    base = model.base_model
    embeds = []
    with evaluation_mode(model):
        for start in range(0, len(texts), batch_size):
            tokens = tokenizer(
                list(texts[start : start + batch_size]),
                padding=True,
                truncation=True,
                max_length=limit,
                return_tensors="pt",
            )
            inputs = {name: tokens[name].to(model.device) for name in TEXT_INPUTS if name in tokens}
            embeds.append(_unit(base.get_text_features(**inputs).pooler_output))
    return torch.cat(embeds)


def _num_too_long(tokenizer: Any, texts: Sequence[str], limit: int) -> int:
    """How many texts have more than `limit` tokens."""
    return sum(len(ids) > limit for ids in tokenizer(list(texts), truncation=False, verbose=False)["input_ids"])


def encode_prompts(model: Any, tokenizer: Any, prompts: Sequence[str], batch_size: int = 64) -> torch.Tensor:
    """Unit-norm embeddings of prompts, each computed once; a prompt that would be cut is an error.

    Args:
        model: a `T3DModel` or `T3DForPreTraining`.
        tokenizer: the processor's.
        prompts: texts, for instance "Pleural effusion is present."
        batch_size: prompts per pass.

    Returns:
        `torch.Tensor` of shape `(num_prompts, D)`, float32, on the CPU.
    """
    if not prompts:
        raise ValueError("no prompts were given; pass at least one")
    limit = token_limit(model, tokenizer)
    for prompt in prompts:
        if not prompt.strip():
            raise ValueError("a prompt is empty; remove it")
        if _num_too_long(tokenizer, [prompt], limit):
            raise ValueError(f"the prompt {prompt!r} is longer than the {limit} tokens that the text tower takes")
    return _encode_texts(model, tokenizer, prompts, batch_size, limit)


def encode_reports(
    model: Any,
    tokenizer: Any,
    reports: Sequence[str],
    *,
    batch_size: int = 32,
    max_report_tokens: int = 512,
) -> tuple[torch.Tensor, int]:
    """Unit-norm embeddings (num_reports, D) of reports, identical texts computed once, and how many texts were cut.

    Reports longer than the text tower takes are cut at `max_report_tokens`, as in training.
    """
    distinct = list(dict.fromkeys(reports))
    if not distinct or any(not report.strip() for report in distinct):
        raise ValueError("a volume has no report: retrieval needs one for each; pass retrieval=False to score without")
    limit = token_limit(model, tokenizer, max_report_tokens)
    embeds = _encode_texts(model, tokenizer, distinct, batch_size, limit)
    row = {report: number for number, report in enumerate(distinct)}
    return embeds[[row[report] for report in reports]], _num_too_long(tokenizer, distinct, limit)


def evaluation_samples(
    dataset: Any, *, views: int | str | None = None, seed: int = 0, indices: Sequence[int] | None = None
) -> Iterator[dict[str, Any]]:
    """Evaluation samples of a data set of prepared volumes, one at a time.

    Args:
        dataset: has `rows` (labels, ids, report), `prepared(index)` and `image_processor`, as `PretrainingDataset`.
        views: local views per volume: a number of random ones, "grid" for tiles over the whole volume, or None.
        seed: with the row's index, seeds the places of random views.
        indices: rows to use; all by default.
    """
    processor = dataset.image_processor
    for index in range(len(dataset.rows)) if indices is None else indices:
        row, prepared = dataset.rows[index], dataset.prepared(index)
        sample = {
            "pixel_values": processor.global_view(prepared),
            "labels": row.labels,
            "patient_id": row.patient_id,
            "study_id": row.study_id,
            "reconstruction": row.reconstruction,
            "report": row.report,
        }
        if views is not None:
            local = processor.make_views(prepared, views, np.random.default_rng((seed, index)))
            sample["local_pixel_values"], sample["local_positions"] = local.pixel_values, local.positions
        yield sample


def batches_of(samples: Iterable[Mapping[str, Any]], batch_size: int) -> Iterator[list[Mapping[str, Any]]]:
    """Lists of at most `batch_size` samples, in order, drawn lazily."""
    batch: list[Mapping[str, Any]] = []
    for sample in samples:
        batch.append(sample)
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def stack_samples(batch: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Model inputs of a batch of samples; volumes with fewer local views get empty, masked ones.

    Args:
        batch: samples with `pixel_values` `(C, D, H, W)` and optionally `local_pixel_values` `(S, C, d, h, w)`,
            `local_mask` `(S,)` and `local_positions` `(S, 6)`.

    Returns:
        `dict` with `pixel_values` `(B, C, D, H, W)` and, where every sample has local views, `local_pixel_values`
        `(B, S, C, d, h, w)`, `local_mask` `(B, S)` and `local_positions` `(B, S, 6)`.
    """
    inputs = {"pixel_values": torch.stack([torch.as_tensor(sample["pixel_values"]) for sample in batch])}
    present = [sample.get("local_pixel_values") is not None for sample in batch]
    if not any(present):
        return inputs
    if not all(present):
        raise ValueError("some samples have local_pixel_values and some have none; give them to all or to none")
    most = max(len(sample["local_pixel_values"]) for sample in batch)
    columns: dict[str, list[torch.Tensor]] = {name: [] for name in LOCAL_INPUTS}
    for sample in batch:
        views = torch.as_tensor(sample["local_pixel_values"])
        mask = sample.get("local_mask")
        mask = torch.ones(len(views), dtype=torch.bool) if mask is None else torch.as_tensor(mask, dtype=torch.bool)
        entries = {"local_pixel_values": views, "local_mask": mask}
        if sample.get("local_positions") is not None:
            entries["local_positions"] = torch.as_tensor(sample["local_positions"])
        for name, entry in entries.items():
            padding = entry.new_zeros((most - len(entry), *entry.shape[1:]))
            columns[name].append(torch.cat([entry, padding]))
    return {**inputs, **{name: torch.stack(column) for name, column in columns.items() if len(column) == len(batch)}}


def _pad_views(parts: Sequence[torch.Tensor]) -> np.ndarray:
    """(B_i, S_i, ...) batches with different numbers of views -> one (N, S, ...) array padded with zeros."""
    most = max(part.shape[1] for part in parts)
    padded = [torch.cat([part, part.new_zeros(len(part), most - part.shape[1], *part.shape[2:])], 1) for part in parts]
    return torch.cat(padded).numpy()


def label_row(labels: Mapping[str, Any], findings: Sequence[str]) -> list[float]:
    """Labels in the order of the findings; absent or None is unknown (nan)."""
    values = (labels.get(finding) for finding in findings)
    return [float("nan") if value is None else float(value) for value in values]


def embed_samples(
    model: Any,
    processor: Any,
    samples: Iterable[Mapping[str, Any]],
    findings: Sequence[str] = (),
    *,
    batch_size: int = 4,
    with_reports: bool = True,
    with_view_features: bool = False,
    max_report_tokens: int = 512,
) -> Embeddings:
    """Embed volumes and, if wanted, their reports and local views, one batch at a time.

    Args:
        model: a `T3DModel` or `T3DForPreTraining`; its training mode is restored.
        processor: a `T3DProcessor` (its tokenizer is used for reports).
        samples: mappings with `pixel_values` `(C, D, H, W)`, optionally local views, `labels` (finding -> 0, 1 or
            None), `patient_id`, `study_id` and, where known, `reconstruction` and `report`. Any iterable will do: a
            generator keeps one batch in memory, see [`evaluation_samples`].
        findings: names that become the columns of the labels.
        batch_size: volumes per pass.
        with_reports: embed the reports too.
        with_view_features: keep the pooled features of the local views, for the study-identity probe.
        max_report_tokens: longer reports are cut and counted.
    """
    base = model.base_model
    embeds, features, masks, rows = [], [], [], []
    with evaluation_mode(model):
        for batch in batches_of(samples, batch_size):
            inputs = {name: value.to(model.device) for name, value in stack_samples(batch).items()}
            output = base.get_image_features(**inputs, output_local_hidden_state=with_view_features)
            embeds.append(_unit(output.pooler_output))
            if with_view_features:
                features.append(output.local_hidden_state.float().mean(dim=(3, 4, 5)).cpu())
                masks.append(inputs["local_mask"].cpu())
            # Everything but the voxels is kept.
            names = ("labels", "patient_id", "study_id", "reconstruction", "report")
            rows += [{name: sample.get(name) for name in names} for sample in batch]
    if not rows:
        raise ValueError("there is nothing to evaluate: the samples are empty")
    for name in ("patient_id", "study_id"):
        if nameless := [number for number, row in enumerate(rows) if row[name] is None]:
            raise ValueError(
                f"sample {nameless[0]} has no {name!r}, by which volumes are one unit and intervals are drawn; give "
                "every sample one"
            )
    reports = tuple(row["report"] or "" for row in rows)
    embeddings = Embeddings(
        image_embeds=torch.cat(embeds).numpy(),
        labels=np.array([label_row(row["labels"] or {}, findings) for row in rows]).reshape(len(rows), len(findings)),
        findings=tuple(findings),
        patient_ids=tuple(str(row["patient_id"]) for row in rows),
        study_ids=tuple(str(row["study_id"]) for row in rows),
        reconstructions=tuple(str(row["reconstruction"] or "") for row in rows),
        reports=reports,
        view_features=_pad_views(features) if features else None,
        view_mask=_pad_views(masks) if masks else None,
    )
    if not with_reports:
        return embeddings
    text_embeds, num_truncated = encode_reports(
        model, processor.tokenizer, reports, max_report_tokens=max_report_tokens
    )
    return replace(embeddings, text_embeds=text_embeds.numpy(), num_truncated_reports=num_truncated)


__all__ = [
    "Embeddings",
    "batches_of",
    "embed_samples",
    "encode_prompts",
    "encode_reports",
    "evaluation_mode",
    "evaluation_samples",
    "label_row",
    "stack_samples",
    "token_limit",
]
