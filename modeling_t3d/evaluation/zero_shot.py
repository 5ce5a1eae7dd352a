# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Zero-shot classification with pairs of prompts, and the evaluation of a pre-trained model on labelled volumes.

Scores are `sigmoid((v . t_positive - v . t_negative) / tau)`, ranked by what stands inside the sigmoid; several prompt
pairs of a finding are averaged.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ..processing_t3d import ABSENT_TEMPLATE, PRESENT_TEMPLATE, described
from .encoding import Embeddings, embed_samples, encode_prompts
from .findings import choose_thresholds, score_findings, sigmoid, to_units
from .protocol import ProtocolCard, split_hash
from .results import Results
from .retrieval import DEFAULT_KS, report_volume_retrieval

# The field's wording for CT-RATE.
DEFAULT_TEMPLATES = ((PRESENT_TEMPLATE, ABSENT_TEMPLATE),)
PROTOCOLS = ("clean", "ct-clip")

PromptPairs = Mapping[str, Sequence[tuple[str, str]]]


def make_prompts(
    findings: Sequence[str],
    templates: Sequence[tuple[str, str]] = DEFAULT_TEMPLATES,
    descriptions: Mapping[str, str] | None = None,
) -> dict[str, list[tuple[str, str]]]:
    """Prompt pairs of findings from (positive, negative) templates with one `{}` each; a finding that has a
    description carries it in both, as in `T3DProcessor.make_prompts`.

    Example:

    ```python
    >>> from modeling_t3d.evaluation.zero_shot import make_prompts
    >>> make_prompts(["pleural effusion"])
    {'pleural effusion': [('pleural effusion is present.', 'pleural effusion is not present.')]}

    ```
    """
    return {
        finding: [(positive.replace("{}", name), negative.replace("{}", name)) for positive, negative in templates]
        for finding, name in ((finding, described(finding, descriptions)) for finding in findings)
    }


def mean_prompt_embeds(embeds: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Mean of each run of unit-norm prompt embeddings, renormalised.

    Args:
        embeds (`torch.Tensor` of shape `(num_prompts, D)`): the prompts of all findings, one finding after the other.
        counts: prompts per finding.

    Returns:
        `torch.Tensor` of shape `(num_findings, D)`, unit norm.
    """
    means = torch.stack([run.mean(dim=0) for run in torch.split(embeds, list(counts))])
    return torch.nn.functional.normalize(means, dim=-1)


def encode_prompt_pairs(model: Any, tokenizer: Any, prompts: PromptPairs) -> tuple[torch.Tensor, torch.Tensor]:
    """Positive and negative embeddings of each finding, two tensors (num_findings, D) of unit norm."""
    counts = [len(pairs) for pairs in prompts.values()]
    if not counts:
        raise ValueError("no findings were given: prompts must map at least one finding to its prompt pairs")
    if min(counts) == 0:
        empty = next(finding for finding, pairs in prompts.items() if not pairs)
        raise ValueError(f"the finding {empty!r} has no prompts; give it at least one (positive, negative) pair")
    sides = []
    for side in (0, 1):
        texts = [pair[side] for pairs in prompts.values() for pair in pairs]
        sides.append(mean_prompt_embeds(encode_prompts(model, tokenizer, texts), counts))
    return sides[0], sides[1]


def zero_shot_logits(
    image_embeds: torch.Tensor, positive_embeds: torch.Tensor, negative_embeds: torch.Tensor, logit_scale: float
) -> torch.Tensor:
    """`(v . t_positive - v . t_negative) / tau` of every volume and finding: the log-odds of its score.

    Rank by these: the sigmoid rounds confident scores to exactly 1 (in float64 above a logit of 36.7), and ties would
    enter the ranking.

    Args:
        image_embeds (`torch.Tensor` of shape `(N, D)`): unit norm.
        positive_embeds, negative_embeds (`torch.Tensor` of shape `(K, D)`): unit norm, per finding.
        logit_scale: 1 / tau (not its logarithm).

    Returns:
        `torch.Tensor` of shape `(N, K)`, float64.

    Example:

    ```python
    >>> import torch
    >>> from modeling_t3d.evaluation.zero_shot import zero_shot_logits
    >>> volume, present, absent = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> zero_shot_logits(volume, present, absent, logit_scale=100.0).item()
    100.0

    ```
    """
    direction = positive_embeds.double() - negative_embeds.double()
    return logit_scale * (image_embeds.double() @ direction.T)


def softmax_scores(image_embeds: torch.Tensor, label_embeds: torch.Tensor, logit_scale: float) -> torch.Tensor:
    """Softmax over mutually exclusive labels: (N, D) and (num_labels, D) of unit norm -> (N, num_labels), float64."""
    return torch.softmax(logit_scale * (image_embeds.double() @ label_embeds.double().T), dim=-1)


def logit_scale_of(model: Any) -> float:
    """1 / tau of a model, which stores its logarithm."""
    return math.exp(float(model.base_model.logit_scale))


def validation_thresholds(
    embeddings: Embeddings,
    positive_embeds: torch.Tensor,
    negative_embeds: torch.Tensor,
    logit_scale: float,
    unit: str = "study",
) -> dict[str, float]:
    """Thresholds per finding from the embeddings of a *validation* split."""
    logits = zero_shot_logits(
        torch.from_numpy(embeddings.image_embeds), positive_embeds, negative_embeds, logit_scale
    ).numpy()
    logits, labels, _ = to_units(logits, embeddings.labels, embeddings.study_ids, embeddings.patient_ids, unit)
    return choose_thresholds(labels, sigmoid(logits), embeddings.findings)


def evaluate_embeddings(
    embeddings: Embeddings,
    positive_embeds: torch.Tensor,
    negative_embeds: torch.Tensor,
    logit_scale: float,
    *,
    prompts: PromptPairs,
    groups: Mapping[str, Sequence[str]] | None = None,
    unit: str = "study",
    protocol: str = "clean",
    thresholds: Mapping[str, float] | None = None,
    ks: Sequence[int] = DEFAULT_KS,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Results:
    """Score embeddings: the per-finding table, retrieval where reports were embedded, and the protocol card.

    Arguments as in [`evaluate_zero_shot`]; `positive_embeds` and `negative_embeds` `(K, D)` come from
    [`encode_prompt_pairs`], in the order of the embeddings' findings.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {PROTOCOLS}, got {protocol!r}")
    images = torch.from_numpy(embeddings.image_embeds)
    logits = zero_shot_logits(images, positive_embeds, negative_embeds, logit_scale).numpy()
    logits, labels, patient_ids = to_units(
        logits, embeddings.labels, embeddings.study_ids, embeddings.patient_ids, unit
    )
    probabilities = sigmoid(logits)
    source = "none (ranking metrics alone)" if thresholds is None else "chosen on a validation split"
    if protocol == "ct-clip":
        thresholds = choose_thresholds(labels, probabilities, embeddings.findings, protocol="ct-clip")
        source = "100 steps, nearest the ROC corner, chosen on the evaluation set itself (optimistic)"
    bootstrap: dict[str, Any] = {"num_resamples": num_resamples, "confidence": confidence, "seed": seed}
    table = score_findings(
        labels,
        logits,
        embeddings.findings,
        patient_ids,
        groups=groups,
        probabilities=probabilities,
        thresholds=thresholds,
        protocol=protocol,
        **bootstrap,
    )
    retrieval = {}
    if embeddings.text_embeds is not None:
        retrieval = report_volume_retrieval(
            embeddings.image_embeds,
            embeddings.text_embeds,
            study_ids=embeddings.study_ids,
            reports=embeddings.reports,
            patient_ids=embeddings.patient_ids,
            unit=unit,
            ks=ks,
            **bootstrap,
        )
    notes = []
    if embeddings.num_truncated_reports:
        notes.append(f"{embeddings.num_truncated_reports} distinct reports were cut at the text tower's length.")
    per_unit = "one score per volume, any reconstruction of the right study counts in retrieval"
    if unit == "study":
        per_unit = "mean score over a study's reconstructions, first reconstruction in retrieval"
    card = ProtocolCard(
        protocol=protocol,
        unit=unit,
        num_units=len(logits),
        num_volumes=len(embeddings),
        num_studies=len(set(embeddings.study_ids)),
        num_patients=len(set(embeddings.patient_ids)),
        split_hash=split_hash(embeddings.patient_ids, embeddings.study_ids, embeddings.reconstructions),
        prompts={finding: tuple(pairs) for finding, pairs in prompts.items()},
        score="sigmoid((v.t_positive - v.t_negative) / tau), prompt embeddings averaged per finding and renormalised",
        temperature=1.0 / logit_scale,
        de_duplication=f"{per_unit}; an identical report counts as right",
        thresholds=dict(thresholds or {}),
        threshold_source=source,
        optimistic=protocol == "ct-clip",
        bootstrap={"level": "patient", **bootstrap},
        seed=seed,
        notes=tuple(notes),
    )
    return Results(protocol=card, zero_shot=table, retrieval=retrieval)


def evaluate_zero_shot(
    model: Any,
    processor: Any,
    samples: Iterable[Mapping[str, Any]],
    prompts: PromptPairs,
    *,
    groups: Mapping[str, Sequence[str]] | None = None,
    unit: str = "study",
    protocol: str = "clean",
    validation_samples: Iterable[Mapping[str, Any]] | None = None,
    thresholds: Mapping[str, float] | None = None,
    retrieval: bool = True,
    ks: Sequence[int] = DEFAULT_KS,
    batch_size: int = 4,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Results:
    """Zero-shot classification and report-volume retrieval of a pre-trained model on labelled volumes.

    Serves the trainer's periodic validation (`num_resamples=0` leaves the intervals out) and the final evaluation.

    Args:
        model: a `T3DModel` or `T3DForPreTraining`; its training mode is restored.
        processor: a `T3DProcessor`.
        samples: see [`embed_samples`]; a generator keeps one batch of voxels in memory.
        prompts: finding -> (positive, negative) prompt pairs, see [`make_prompts`].
        groups: group name -> findings; "macro" over all findings is always added.
        unit: "study" (mean score over a study's reconstructions) or "reconstruction".
        protocol: "clean" takes thresholds from validation data and reports no F1 without; "ct-clip" follows the
            published protocol, whose thresholds are chosen on the evaluation set itself: comparable, and optimistic.
        validation_samples, thresholds: for "clean": labelled samples to choose thresholds on, or the thresholds.
        retrieval: embed the reports too; every sample then needs one.
        ks: ranks at which recall is read.
        batch_size: volumes per pass.
        num_resamples, confidence, seed: of the patient-level bootstrap.
    """
    if protocol == "ct-clip" and (validation_samples is not None or thresholds is not None):
        raise ValueError(
            'protocol="ct-clip" chooses thresholds on the evaluation set; drop the given ones or use "clean"'
        )
    if validation_samples is not None and thresholds is not None:
        raise ValueError("give either validation_samples or thresholds, not both")
    positive, negative = encode_prompt_pairs(model, processor.tokenizer, prompts)
    logit_scale, findings = logit_scale_of(model), list(prompts)
    if validation_samples is not None:
        validation = embed_samples(
            model, processor, validation_samples, findings, batch_size=batch_size, with_reports=False
        )
        thresholds = validation_thresholds(validation, positive, negative, logit_scale, unit)
    embeddings = embed_samples(model, processor, samples, findings, batch_size=batch_size, with_reports=retrieval)
    return evaluate_embeddings(
        embeddings,
        positive,
        negative,
        logit_scale,
        prompts=prompts,
        groups=groups,
        unit=unit,
        protocol=protocol,
        thresholds=thresholds,
        ks=ks,
        num_resamples=num_resamples,
        confidence=confidence,
        seed=seed,
    )


__all__ = [
    "DEFAULT_TEMPLATES",
    "encode_prompt_pairs",
    "encode_prompts",
    "evaluate_embeddings",
    "evaluate_zero_shot",
    "logit_scale_of",
    "make_prompts",
    "mean_prompt_embeds",
    "softmax_scores",
    "validation_thresholds",
    "zero_shot_logits",
]
