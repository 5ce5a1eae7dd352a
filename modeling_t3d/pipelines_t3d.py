# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The zero-shot pipeline: scans and label names in, sorted scores out. Reading and cutting is the processor's work."""

# Pipelines state flags and narrower signatures for their steps by overriding `Pipeline`'s, whose types forbid both.
# mypy: disable-error-code="override,assignment"

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pipelines.base import Pipeline
from transformers.utils import logging

from .image_settings_t3d import checked_views, has_axes, per_image, refuse_unknown

logger = logging.get_logger(__name__)

_RECORD_KEYS = ("volume", "affine", "series", "time_index", "name")
_PHANTOMS_ALONE = (
    "this model was trained on phantoms alone; its scores on real scans mean nothing; it is not a medical device"
)


def _parse_labels(candidate_labels: str | Sequence[str] | None) -> list[str]:
    """Label names from a list, or from one string that separates them by commas; none at all is an error."""
    remedy = "pass the names to score, such as candidate_labels=['pleural effusion', 'lung nodule']"
    if candidate_labels is None:
        raise ValueError(f"candidate_labels is missing: {remedy}")
    if not isinstance(candidate_labels, Iterable):
        raise ValueError(f"candidate_labels is {candidate_labels!r}, which is no list: {remedy}")
    names = candidate_labels.split(",") if isinstance(candidate_labels, str) else list(candidate_labels)
    if not names or names == [""]:
        raise ValueError(f"candidate_labels is empty: {remedy}")
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"candidate_labels holds {name!r}, which is no name: {remedy}")
    return [name.strip() for name in names]


def _parse_templates(hypothesis_template: str | Sequence[str], absent_template: str) -> tuple[str, str]:
    """The (present, absent) templates of a pair, or of a single template and the `absent_template` beside it."""
    single = isinstance(hypothesis_template, str)
    templates = [hypothesis_template, absent_template] if single else list(hypothesis_template)
    if len(templates) != 2:
        raise ValueError(f"hypothesis_template must be one template or a (present, absent) pair, got {templates!r}")
    present, absent = map(str, templates)
    for template in (present, absent):
        if template.count("{}") != 1:
            raise ValueError(f"hypothesis_template {template!r} must hold {{}} exactly once, where the label goes")
    return present, absent


def _trained_on_phantoms_alone(provenance: dict | None) -> bool:
    """Whether a configuration's provenance names phantoms, and nothing else, as training data."""
    sources = (provenance or {}).get("training_data") or []
    sources = [sources] if isinstance(sources, str) else sources
    return bool(sources) and all("phantom" in str(source).lower() for source in sources)


def _as_record(volume: Any) -> dict[str, Any]:
    """A volume with what belongs to it, if it does not come so. TorchIO's images are dictionaries, too."""
    if type(volume) is dict and "volume" in volume:
        refuse_unknown(volume, _RECORD_KEYS, "key", "a volume's dictionary")
        return volume
    if type(volume) is dict:
        raise ValueError(
            f"a dictionary needs the key 'volume', beside 'affine', 'series' or 'time_index'; it has "
            f"{', '.join(map(repr, volume)) or 'none'}"
        )
    return {"volume": volume}


@dataclass
class _PlannedViews:
    """A volume and where its local views lie: they are cut when the vision tower is ready for them."""

    prepared: Any
    boxes: Sequence[Any]


class ZeroShotVolumeClassificationPipeline(Pipeline):
    r"""
    Scores free-text labels on CT volumes with a [`T3DModel`], under the task `"zero-shot-volume-classification"`.

    With `multi_label=True` each label is scored by itself: `sigmoid((v . t_present - v . t_absent) / tau)`, where `v`
    is the volume's unit-norm embedding and `t` those of the two prompts. With `multi_label=False` the labels compete:
    a softmax over `v . t_present / tau`. Scores rank findings; they are not calibrated probabilities.

    Example:

    ```python
    >>> import modeling_t3d
    >>> from transformers import pipeline

    >>> classifier = pipeline("zero-shot-volume-classification", model="path/to/checkpoint")  # doctest: +SKIP
    >>> classifier("chest.nii.gz", candidate_labels=["pleural effusion", "lung nodule"])  # doctest: +SKIP
    [{'label': 'pleural effusion', 'score': 0.93}, {'label': 'lung nodule', 'score': 0.21}]

    ```"""

    model: Any
    processor: Any
    tokenizer: Any

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args: Any, hypothesis_template: str | Sequence[str] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.hypothesis_template = hypothesis_template
        self.model.eval()

    def __call__(
        self,
        inputs: Any,
        candidate_labels: str | Sequence[str] | None = None,
        *,
        affine: Any = None,
        series: Any = None,
        time_index: Any = None,
        hypothesis_template: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Score labels on one volume, or on each of a batch.

        Args:
            inputs: a volume, or a list, generator or data set of volumes. A volume is a path (`.nii`, `.nii.gz`,
                `.nrrd`, `.mha`, a folder with one DICOM series), a [`Volume`], a nibabel image, or an array or tensor
                in HU with its `affine`. In a batch, `{"volume": ..., "affine": ...}` is a volume too, with `"series"`
                and `"time_index"` where they are needed.
            candidate_labels (`list[str]` or `str`): names to score; a string is split on commas.
            affine (`np.ndarray` of shape `(4, 4)`, *optional*):
                Maps the indices of an array, in its own axis order, to RAS+ world (x, y, z) in mm. For a list of
                arrays a list of affines, or one for all; `None` in it for a file.
            series, time_index (`int`, *optional*): which series of a DICOM folder, by its place in
                `list_series(path)`; which volume of a 4-D file. For a list of volumes one each, or one for all.
            hypothesis_template (`str` or a pair of them, *optional*):
                How a label becomes a prompt; by default the processor's pair, `"{} is present."` and
                `"{} is not present."`. A single template keeps the default second one, which only `multi_label=True`
                reads: give a pair where the wording matters.
            multi_label (`bool`, defaults to `True`): score each label by itself, or all against each other.
            views (`"grid"`, `int` or points, *optional*):
                Full-resolution local views: tiles over the uncropped volume, that many random ones, or views around
                world coordinates (x, y, z) in RAS mm. By default what the model's `view_fusion` reads: the grid, or
                none for `"global"`.
            seed (`int`, defaults to 0): places random views.
            view_batch_size (`int`, defaults to 8):
                Local views that are cut and pass through the vision tower at once: bounds memory, changes scores by
                rounding only.
            batch_size, num_workers (`int`, *optional*): as in every pipeline.

        Returns:
            `list[dict]`: `{"label", "score"}`, highest score first; for a batch a list (generators and data sets: an
            iterator) of these.
        """
        if isinstance(inputs, list | tuple):
            inputs = self._name_volumes(inputs, affine=affine, series=series, time_index=time_index)
            if not inputs:
                return []
        elif any(option is not None for option in (affine, series, time_index)):
            inputs = {"volume": inputs, "affine": affine, "series": series, "time_index": time_index}
        if candidate_labels is not None:
            kwargs["candidate_labels"] = candidate_labels
        settings = {**self._postprocess_params, **self._sanitize_parameters(**kwargs)[2]}
        template = self.hypothesis_template if hypothesis_template is None else hypothesis_template
        template = self.processor.present_template if template is None else template
        present, absent = _parse_templates(template, self.processor.absent_template)
        labels = _parse_labels(settings.get("candidate_labels"))
        names = self.processor.described_labels(labels)
        prompts = [present.replace("{}", name) for name in names]
        if settings.get("multi_label", True):
            prompts += [absent.replace("{}", name) for name in names]
        text_embeds = self._embed_prompts(prompts)
        if _trained_on_phantoms_alone(self.model.config.provenance):
            logger.warning_once(_PHANTOMS_ALONE)
        return super().__call__(inputs, text_embeds=text_embeds, **kwargs)

    @staticmethod
    def _name_volumes(volumes: Sequence[Any], **options: Any) -> list[dict[str, Any]]:
        """The volumes of a list with what was given for each, and with their places in it for messages."""
        named: list[dict[str, Any]] = [{"name": f"volume {index}"} for index in range(len(volumes))]
        for option, value in options.items():
            is_single = has_axes(2 if option == "affine" else 0)
            values = per_image(value, len(volumes), option, is_single, "volumes")
            for item, its_own in zip(named, values, strict=True):
                item[option] = its_own
        for item, volume in zip(named, volumes, strict=True):
            item.update(_as_record(volume))
        return named

    def _sanitize_parameters(
        self,
        *,
        candidate_labels: str | Sequence[str] | None = None,
        multi_label: bool | None = None,
        views: Any = None,
        seed: int | None = None,
        view_batch_size: int | None = None,
        text_embeds: Tensor | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """The options that were given, by the step that reads them; an unknown option is a `TypeError`."""
        if view_batch_size is not None and view_batch_size < 1:
            raise ValueError(f"view_batch_size must be at least 1, got {view_batch_size}")
        steps = (
            {"views": views, "seed": seed},
            {"view_batch_size": view_batch_size, "text_embeds": text_embeds},
            {
                "candidate_labels": None if candidate_labels is None else _parse_labels(candidate_labels),
                "multi_label": multi_label,
            },
        )
        preprocess, forward, postprocess = (
            {name: value for name, value in step.items() if value is not None} for step in steps
        )
        return preprocess, forward, postprocess

    def _embed_prompts(self, prompts: list[str]) -> Tensor:
        """Unit-norm embeddings (prompts, projection_dim), in float32."""
        tokens = self.tokenizer(prompts, padding=True, return_tensors="pt")
        # Towers with relative positions have no such limit.
        positions = getattr(self.model.config.text_config, "max_position_embeddings", self.tokenizer.model_max_length)
        limit = min(self.tokenizer.model_max_length, positions)
        lengths = tokens["attention_mask"].sum(dim=1)
        if lengths.max() > limit:
            longest = prompts[int(lengths.argmax())]
            raise ValueError(f"the prompt {longest!r} has {lengths.max()} tokens, at most {limit} fit: shorten it")
        with self.device_placement(), torch.no_grad():
            embeds = self.model.base_model.get_text_features(**tokens.to(self.device)).pooler_output
        return nn.functional.normalize(embeds.float(), dim=-1)

    def preprocess(self, inputs: Any, views: Any = None, seed: int = 0) -> dict[str, Any]:
        """One volume to its global view and, where the model's fusion reads them, the plan of its local views."""
        item = _as_record(inputs)
        processor = self.processor.image_processor
        prepared = processor.prepare(
            *(item["volume"], item.get("affine")),
            name=item.get("name", "the volume"),
            series=item.get("series"),
            time_index=item.get("time_index"),
        )
        model_inputs = {"pixel_values": processor(prepared, return_tensors="pt")["pixel_values"]}
        if self.model.config.view_fusion != "global":
            views = "grid" if views is None else views
            positions = processor.shared_positions(views, seed)
            boxes = processor.plan_views(prepared, views, np.random.default_rng((seed, 0)), positions)
            model_inputs["local_views"] = _PlannedViews(prepared, boxes)
        elif views is not None:
            checked_views(views)
            logger.warning_once(f"views={views!r} is not used: view_fusion='global' embeds the global view alone")
        return model_inputs

    def _forward(
        self, model_inputs: dict[str, Any], text_embeds: Tensor, view_batch_size: int = 8
    ) -> dict[str, Tensor]:
        """Scaled similarities (batch, prompts), in float32; the bias of a sigmoid loss cancels in every score."""
        model = self.model.base_model
        features = model.vision_model(model_inputs["pixel_values"]).pooler_output
        if "local_views" in model_inputs:
            planned = model_inputs["local_views"]
            planned = planned if isinstance(planned, list) else [planned]
            features = model.fuse_views(features, *self._encode_local_views(planned, view_batch_size, features))
        image_embeds = nn.functional.normalize(model.visual_projection(features).float(), dim=-1)
        scale = model.logit_scale.exp().to(image_embeds.device)
        return {"logits": image_embeds @ text_embeds.to(image_embeds.device).T * scale}

    def _encode_local_views(
        self, planned: Sequence["_PlannedViews"], view_batch_size: int, like: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pooled local views (batch, views, hidden_size), mask and positions; `view_batch_size` are cut at once."""
        most = max(len(volume.boxes) for volume in planned)
        features = like.new_zeros(len(planned), most, like.shape[-1])
        mask = torch.zeros(len(planned), most, dtype=torch.bool, device=like.device)
        positions = torch.zeros(len(planned), most, 6, device=like.device)
        for index, volume in enumerate(planned):
            mask[index, : len(volume.boxes)] = True
            first = 0
            for views in self.processor.image_processor.iterate_views(
                volume.prepared, volume.boxes, batch_size=view_batch_size
            ):
                place = slice(first, first + len(views.boxes))
                pooled = self.model.base_model.vision_model(views.pixel_values.to(self.device)).pooler_output
                features[index, place] = pooled.to(features)
                positions[index, place] = views.positions.to(like.device)
                first = place.stop
        return features, mask, positions

    def postprocess(
        self,
        model_outputs: dict[str, Tensor],
        candidate_labels: Sequence[str],
        multi_label: bool = True,
    ) -> list[dict[str, Any]]:
        """Scores of one volume from its logits (1, prompts), highest first; equal scores keep the labels' order."""
        logits = model_outputs["logits"][0].float()
        if multi_label:
            present, absent = logits.chunk(2)
            scores = (present - absent).sigmoid()
        else:
            scores = logits.softmax(dim=-1)
        ranked = sorted(zip(candidate_labels, scores.tolist(), strict=True), key=lambda entry: -entry[1])
        return [{"label": label, "score": score} for label, score in ranked]

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save model, processor and this pipeline's code: the folder then runs where the package is not installed."""
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)


__all__ = ["ZeroShotVolumeClassificationPipeline"]
