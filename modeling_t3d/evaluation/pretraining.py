# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The complete evaluation of a pre-trained model: zero-shot, retrieval, leak control, baselines, probes, localisation.

Data sets and readers arrive as arguments; each measurement is a function of its own module.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..geometry_t3d import Volume
from .classification import LabelledFeatures, evaluate_probe, labelled_shortcuts
from .encoding import Embeddings, embed_samples, evaluation_samples
from .figures import plot_attention
from .leak import measure_leak
from .localisation import attention_volume, evaluate_localisation, localisation_case, mask_on_grid, text_attention
from .probes import study_identity
from .results import Results
from .retrieval import DEFAULT_KS
from .segmentation_probe import halves_of_patients, labelled_cells, probe_segmentation
from .zero_shot import PromptPairs, encode_prompt_pairs, evaluate_embeddings, logit_scale_of, validation_thresholds


def leak_batches(dataset: Any, collator: Callable, batch_size: int, max_batches: int) -> Iterator[dict[str, Any]]:
    """Full batches of a data set in its order, collated as in training; a shorter last one is left out."""
    for number in range(min(max_batches, len(dataset) // batch_size)):
        yield collator([dataset[number * batch_size + place] for place in range(batch_size)])


def localisation_cases(
    dataset: Any,
    read_label_map: Callable[[Any], Volume],
    lesion_values: Mapping[str, int],
    mask_name: str = "lesions",
) -> Iterator[dict[str, Any]]:
    """Cases for [`evaluate_localisation`]: every volume with a label map, tiled by its grid, one at a time.

    Args:
        dataset: has `rows` with `masks`, `prepared(index)` and `image_processor`.
        read_label_map: path -> `Volume` of integers, such as [`~modeling_t3d.volume_io_t3d.read_label_map`].
        lesion_values: finding -> its value in the label map; findings that a volume lacks are left out.
        mask_name: key of the label map in a row's masks.
    """
    for index, row in enumerate(dataset.rows):
        if mask_name not in row.masks:
            continue
        label_map = read_label_map(row.masks[mask_name])
        masks = {finding: label_map.array == value for finding, value in lesion_values.items()}
        lesions = {finding: Volume(mask, label_map.affine) for finding, mask in masks.items() if mask.any()}
        if lesions:
            prepared = dataset.prepared(index)
            views = dataset.image_processor.make_views(prepared, "grid")
            yield localisation_case(prepared, views, lesions, row.patient_id)


def _as_features(embeddings: Embeddings) -> LabelledFeatures:
    """Frozen volume embeddings as features of a probe."""
    return LabelledFeatures(embeddings.image_embeds, embeddings.labels, embeddings.patient_ids, embeddings.study_ids)


def evaluate_pretrained(
    model: Any,
    processor: Any,
    test: Any,
    prompts: PromptPairs,
    *,
    train: Any | None = None,
    validation: Any | None = None,
    collator: Callable | None = None,
    read_row: Callable[[Any], Volume] | None = None,
    read_label_map: Callable[[Any], Volume] | None = None,
    lesion_values: Mapping[str, int] | None = None,
    organ_values: Mapping[str, int] | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    views: int | str | None = None,
    unit: str = "study",
    ks: Sequence[int] = DEFAULT_KS,
    batch_size: int = 4,
    leak_batch_size: int = 16,
    max_leak_batches: int = 8,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Results:
    """Everything that can be measured with what is given, on the test rows once.

    Always: zero-shot table, retrieval (where every row has a report), study identity of the local views (where the
    processor cuts any).

    Args:
        model: a `T3DForPreTraining`.
        processor: its `T3DProcessor`.
        test: a data set as `PretrainingDataset`: `rows`, `prepared(index)`, `image_processor`, items to collate.
        prompts: finding -> (positive, negative) pairs.
        train: the training set: adds the linear probe and, with `read_row`, the shortcut baseline.
        validation: a data set on which thresholds are chosen.
        collator: makes training batches of `test`: adds the leak control of a model with multi-view alignment.
        read_row: row -> `Volume` as stored; see [`labelled_shortcuts`].
        read_label_map: path -> `Volume` of integers; see [`localisation_cases`].
        lesion_values: finding -> value in the label maps of the test rows: with `read_label_map`, adds localisation.
        organ_values: organ -> value in the label maps of the test rows: with `read_label_map`, adds the segmentation
            probe, fitted on every other patient and scored on the others.
        groups: group name -> findings, for instance diffuse and focal.
        views: local views per volume (a number or "grid") that a fusing model embeds; the processor's number by
            default, none where that is 0.
        unit, ks, batch_size, num_resamples, confidence, seed: as in [`evaluate_zero_shot`].
        leak_batch_size, max_leak_batches: pairs per batch, and batches, of the leak control.
    """
    findings = list(prompts)
    bootstrap: dict[str, Any] = {"num_resamples": num_resamples, "confidence": confidence, "seed": seed}
    if views is None:
        views = processor.image_processor.num_local_views or None

    def embed(dataset: Any, **settings: bool) -> Embeddings:
        samples = evaluation_samples(dataset, views=views, seed=seed)
        return embed_samples(model, processor, samples, findings, batch_size=batch_size, **settings)

    positive, negative = encode_prompt_pairs(model, processor.tokenizer, prompts)
    logit_scale, thresholds = logit_scale_of(model), None
    if validation is not None:
        thresholds = validation_thresholds(
            embed(validation, with_reports=False), positive, negative, logit_scale, unit
        )
    has_reports = all(row.report for row in test.rows)
    embeddings = embed(test, with_reports=has_reports, with_view_features=views is not None)
    results = evaluate_embeddings(
        embeddings,
        positive,
        negative,
        logit_scale,
        prompts=prompts,
        groups=groups,
        unit=unit,
        thresholds=thresholds,
        ks=ks,
        **bootstrap,
    )
    if embeddings.view_features is not None:
        results.study_identity = study_identity(embeddings.view_features, embeddings.study_ids, embeddings.view_mask)
    settings: dict[str, Any] = {"groups": groups, "unit": unit, **bootstrap}
    if train is not None and read_row is not None:
        known, unseen = (labelled_shortcuts(part.rows, findings, read_row) for part in (train, test))
        results.comparisons["shortcut baseline"] = evaluate_probe(known, unseen, findings, **settings)
    if train is not None:
        known, unseen = _as_features(embed(train, with_reports=False)), _as_features(embeddings)
        results.comparisons["linear probe"] = evaluate_probe(known, unseen, findings, **settings)
    if collator is not None and model.config.lambda_tma > 0:
        batches = leak_batches(test, collator, min(leak_batch_size, len(test)), max_leak_batches)
        results.leak = measure_leak(model, batches, seed=seed)
    if lesion_values is not None and read_label_map is not None:
        cases = localisation_cases(test, read_label_map, lesion_values)
        results.localisation = evaluate_localisation(model, processor, cases, prompts, **bootstrap)
    if organ_values is not None and read_label_map is not None:
        fitted, scored = (
            labelled_cells(model, test, read_label_map, patient_ids=half, seed=seed)
            for half in halves_of_patients(test.rows)
        )
        results.segmentation = probe_segmentation(fitted, scored, organ_values, **bootstrap)
    return results


def plot_case(
    model: Any,
    processor: Any,
    prepared: Any,
    text: str,
    path: str | os.PathLike,
    *,
    lesion: Volume | None = None,
) -> Path:
    """PNG of one volume with the attention that a text draws on its grid of local views.

    Args:
        model: a `T3DForPreTraining`.
        processor: its `T3DProcessor`.
        prepared: a `PreparedVolume`; the slices show its model grid.
        text: a prompt or a report; the title of the figure.
        path: of the PNG.
        lesion: mask in any orientation, drawn as a contour; the slices then cross its middle.
    """
    views = processor.image_processor.make_views(prepared, "grid")
    attention = text_attention(model, processor.tokenizer, [text], views.pixel_values)
    # Sums to one in each view; relative to a view's even share, views can stand in one picture.
    attention = attention * attention[0].size
    boxes = np.array([[*box.start, *box.stop] for box in views.boxes])
    shape, outline, center = prepared.array.shape, None, None
    if lesion is not None:
        outline = mask_on_grid(lesion, prepared.affine, shape)
        center = np.median(np.argwhere(outline), axis=0).astype(int) if outline.any() else None
    return plot_attention(
        np.asarray(prepared.array),
        attention_volume(attention, boxes, shape),
        path,
        spacing=prepared.spacing,
        title=text,
        lesion=outline,
        center=center,
    )


__all__ = ["evaluate_pretrained", "leak_batches", "localisation_cases", "plot_case"]
