# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What a run measures on its held-out pairs while it trains: losses, controls, zero-shot classification, retrieval."""

import logging
from itertools import islice
from typing import Any, cast

import numpy as np
import torch

from .encoding import Embeddings, embed_samples, evaluation_samples
from .findings import to_units
from .leak import measure_leak
from .restoration import measure_restoration
from .retrieval import report_volume_retrieval
from .statistics import area_under_roc_per_finding, macro_mean
from .zero_shot import DEFAULT_TEMPLATES, encode_prompt_pairs, logit_scale_of, make_prompts, zero_shot_logits

logger = logging.getLogger(__name__)

# Validation batches whose views are shuffled: the control costs two passes over each.
NUM_CONTROL_BATCHES = 4


class HeldOutEvaluation:
    """
    A callable for `T3DTrainer`: model -> metrics. Losses on held-out pairs, leak and restoration control, retrieval
    and, where the rows have labels, zero-shot AUROC.

    Args:
        dataset: the held-out pairs, as `PretrainingDataset`: `rows`, `prepared(index)`, `image_processor`.
        losses: model -> mean losses, with `batches()`, `sampler()` and `batch_size`, as `ValidationLosses`.
        processor: the `T3DProcessor` that is trained with.
        seed: of the places of local views and of the controls' shuffles.
    """

    def __init__(self, dataset: Any, losses: Any, processor: Any, *, seed: int = 0) -> None:
        self.dataset = dataset
        self.losses = losses
        self.processor = processor
        self.seed = seed
        self.findings = list(dict.fromkeys(name for row in dataset.rows for name in row.labels))
        self.prompts = make_prompts(self.findings, descriptions=processor.finding_descriptions)

    def __call__(self, model: Any) -> dict[str, float]:
        """Metrics of a model in evaluation mode; every process calls it."""
        metrics = self.losses(model)
        # Views are shuffled within a process's batch; how many processes there are is known when they run.
        shuffles = self.losses.sampler().batch_size > 1
        if model.config.lambda_tma and shuffles:
            report = measure_leak(model, islice(self.losses.batches(), NUM_CONTROL_BATCHES), seed=self.seed)
            logger.info("leak control: %s", report.describe())
            metrics["loss_tma_shuffled"] = report.loss_shuffled
            if report.leak is not None:
                metrics["tma_leak"] = report.leak
        if model.config.lambda_tir and shuffles:
            restored = measure_restoration(model, islice(self.losses.batches(), NUM_CONTROL_BATCHES), seed=self.seed)
            logger.info("restoration control: %s", restored.describe())
            metrics["loss_tir_shuffled"] = restored.loss_shuffled
        views = None
        if model.config.view_fusion != "global":
            views = self.processor.image_processor.num_local_views or None
        samples = evaluation_samples(self.dataset, views=views, seed=self.seed)
        embeddings = embed_samples(model, self.processor, samples, self.findings)
        if self.prompts:
            metrics["macro_auroc"] = self._macro_auroc(model, embeddings)
        retrieval = report_volume_retrieval(
            embeddings.image_embeds,
            cast(np.ndarray, embeddings.text_embeds),
            study_ids=embeddings.study_ids,
            reports=embeddings.reports,
            patient_ids=embeddings.patient_ids,
            num_resamples=0,
        )
        return metrics | {f"{name}_median_rank": result.median_rank for name, result in retrieval.items()}

    def describe(self) -> str:
        """How the metrics come about, in sentences for a model card."""
        rows = self.dataset.rows
        splits = ", ".join(sorted({repr(row.split) for row in rows}))
        sentences = [
            f"Metrics of split {splits}: {len(rows)} volumes of {len({row.study_id for row in rows})} studies and "
            f"{len({row.patient_id for row in rows})} patients, as single values without intervals.",
            f"Losses are means over whole batches of at most {self.losses.batch_size} pairs per process.",
            "Median ranks are those of a report's volume, and of a volume's report, among all studies.",
            f"Seed of the local views' places and of the controls: {self.seed}.",
        ]
        if self.prompts:
            templates = "; ".join(f'"{present}" against "{absent}"' for present, absent in DEFAULT_TEMPLATES)
            descriptions = ", with the processor's descriptions" if self.processor.finding_descriptions else ""
            sentences.insert(
                1,
                "`macro_auroc` is the mean area under the ROC curve of the zero-shot scores of studies, over those of "
                f"{len(self.prompts)} findings that some have and some have not; labels are the manifest's. "
                f"{sum(map(len, self.prompts.values()))} pairs of prompts: {templates}, {{}} being the label's "
                f"name{descriptions}.",
            )
        return " ".join(sentences)

    def _macro_auroc(self, model: Any, embeddings: Embeddings) -> float:
        """Mean over the findings, of studies' zero-shot scores."""
        pairs = encode_prompt_pairs(model, self.processor.tokenizer, self.prompts)
        logits = zero_shot_logits(torch.from_numpy(embeddings.image_embeds), *pairs, logit_scale_of(model)).numpy()
        scores, labels, _ = to_units(
            logits, embeddings.labels, embeddings.study_ids, embeddings.patient_ids, unit="study"
        )
        return macro_mean(area_under_roc_per_finding(labels, scores)).mean


__all__ = ["HeldOutEvaluation"]
